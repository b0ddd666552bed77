"""The world on a virtual clock: clients, engines, scrapes and faults around one front. A heap of events, no I/O.

Every demand ends exactly once: finished, refused, abandoned by a client out of patience, or failed with its engine.
Simpler than life: no network, no router cost, no retries after a refusal; health checks see a dead engine in
`CHECK_S`; engines don't think (a scrape is exact for its moment).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Literal

from extproc.admission.load import Load
from extproc.admission.values import Answer
from extproc.engine.model import Engine
from extproc.engine.sequence import Finished, FirstToken, Refusal
from extproc.simulate.fronts import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.engine.params import EngineParams
    from extproc.engine.sequence import SeqId
    from extproc.simulate.contenders import Contender
    from extproc.simulate.fronts import Group, Verdict
    from extproc.simulate.workload import Demand

CHECK_S = 3.0
"""How long an active health check needs to see that an engine died or came back."""
REFUSED_S = 0.001
"""How long a refused connection takes."""
REPORT_EVERY = 500
"""Ended requests between two calls of `progress`."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong.

    Attributes:
        speeds: the speed of the first engines; the rest run at 1.0.
        dies: (engine, from, until), seconds: it loses all it has and refuses connections. From 0: it comes late, cold.
        blink: (at, for), seconds: the network to all engines is gone: what runs is cut, connections are refused. Too
            short for a health check to notice. The engines keep their caches.
        cold_requests: whoever died is slow again until it has computed so many prompts (`EngineParams.cold_times`).
    """

    speeds: tuple[float, ...] = ()
    dies: tuple[int, float, float] | None = None
    blink: tuple[float, float] | None = None
    cold_requests: int = 0


Page = Literal["vllm", "gauges", "none"]
"""What engines tell of themselves: vLLM's gauges and counters; running, waiting and KV use only; or nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """How one demand ended. Times in seconds since its arrival; None where it did not come so far."""

    klass: str
    tenant: str
    outcome: str
    ttft_s: float | None
    tpot_s: float | None
    met: bool
    queued_s: float | None
    ended_s: float
    output: int


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's run: every demand's record, and what the engines counted.

    Attributes:
        classes: names of those that came, the most urgent first.
        generated: output tokens of all engines while demands arrived, `duration_s` seconds.
        wasted: tokens computed for requests whose client then left.
        hits: share of the prompt tokens found in prefix caches.
        peak_waiting: the longest queue inside any engine.
    """

    contender: str
    classes: tuple[str, ...]
    load: float
    seed: int
    duration_s: float
    records: list[Record]
    generated: int
    wasted: int
    preemptions: int
    hits: float
    peak_waiting: int


class World:
    """One run of one contender."""

    def __init__(
        self,
        groups: Sequence[Group],
        contender: Contender,
        seed: int = 0,
        faults: Faults | None = None,
        page: Page = "vllm",
    ) -> None:
        """Start the engines of `groups` and the contender's front before them."""
        self.faults = faults or Faults()
        self.contender = contender
        self.page = page
        tuned = [contender.engine(group.params) for group in groups for _ in range(group.engines)]
        self._says_batch = [group.says_batch for group in groups for _ in range(group.engines)]
        engines = len(tuned)
        speeds = (*self.faults.speeds, *([1.0] * engines))[:engines]
        self._params = [replace(own, speed=own.speed * speed) for own, speed in zip(tuned, speeds, strict=True)]
        self.engines = [Engine(own) for own in self._params]
        self.front = contender.front(groups, seed)
        self.jobs: list[Job] = []
        self.now = 0.0
        self.open = 0  # demands that have not ended, later turns of sessions included
        self._running: list[dict[SeqId, Job]] = [{} for _ in range(engines)]  # by sequence
        self._cut = False  # while the network is gone
        self._dead = [False] * engines
        self._past: list[Engine] = []  # engines that died
        self._versions = [0] * engines
        self._tick_at: float | None = None
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._scraped: list[_Counters] = [_Counters(engine, 0.0, 0) for engine in self.engines]
        self._generated = 0
        self._first_tokens = [0] * engines

    def run(
        self, demands: Sequence[Demand], duration_s: float, progress: Callable[[int], None] | None = None
    ) -> list[Job]:
        """Play `demands` and return all jobs, each ended. `progress` hears how many ended since it was called last."""
        self.open = sum(1 for demand in demands for _ in demand.chain())
        interval_s = self.contender.scrape_interval_s
        if interval_s is not None and self.page != "none":
            for engine in range(len(self.engines)):
                self._at(interval_s * (engine + 1) / len(self.engines), partial(self._scrape, engine))
        if self.faults.dies is not None:
            engine, begin_s, end_s = self.faults.dies
            self._at(begin_s, partial(self._die, engine))
            self._at(end_s, partial(self._revive, engine))
        if self.faults.blink is not None:
            at, span_s = self.faults.blink
            self._at(at, self._blink)
            self._at(at + span_s, self._see_again)
        self._at(duration_s, self._close_books)
        arrivals = iter(demands)
        coming = next(arrivals, None)
        heap, reported = self._heap, self.open
        while self.open:
            if coming is not None and (not heap or coming.at <= heap[0][0]):
                self.now = coming.at
                self._arrive(coming)
                coming = next(arrivals, None)
            else:
                self.now, _, event = heappop(heap)
                event()
            if progress is not None and reported - self.open >= REPORT_EVERY:
                progress(reported - self.open)
                reported = self.open
        if progress is not None:
            progress(reported)
        if not self._generated:
            self._close_books()
        return self.jobs

    def result(self, load: float, seed: int, duration_s: float) -> Run:
        """Return what a report needs, after `run`."""
        engines = [*self.engines, *self._past]
        classes = {job.demand.klass for job in self.jobs}
        queries = sum(engine.prefix_queries_total for engine in engines)
        return Run(
            contender=self.contender.name,
            classes=tuple(klass.name for klass in sorted(classes, key=lambda klass: (-klass.priority, klass.name))),
            load=load,
            seed=seed,
            duration_s=duration_s,
            records=[_record(job) for job in self.jobs],
            generated=self._generated,
            wasted=sum(engine.wasted_tokens_total for engine in engines),
            preemptions=sum(engine.preemptions_total for engine in engines),
            hits=sum(engine.prefix_hits_total for engine in engines) / max(queries, 1),
            peak_waiting=max(engine.peak_waiting for engine in engines),
        )

    # ---- clients

    def _arrive(self, demand: Demand) -> None:
        job = Job(len(self.jobs), demand, self.now)
        self.jobs.append(job)
        self._at(self.now + demand.klass.patience_s, partial(self._lose_patience, job))
        self._carry_out(self.front.arrive(job, self.now))

    def _lose_patience(self, job: Job) -> None:
        if job.ended is not None or job.first_token is not None:
            return
        if job.engine is None:
            self._end(job, "abandoned")
            self._carry_out(self.front.leave(job, self.now))
            return
        self._settle(job.engine)  # its first token may have come at this very moment
        if job.ended is None and job.first_token is None:
            engine = job.engine
            self._abort(job, engine)
            self._end(job, "abandoned")
            self._carry_out(self.front.end(job, self.now, Answer.UNKNOWN))
            self._watch(engine)

    def _end(self, job: Job, outcome: str) -> None:
        assert job.ended is None  # noqa: S101 - conservation: a job ends once
        job.ended = self.now
        job.outcome = outcome
        self.open -= 1
        if job.demand.then is not None:
            self._at(self.now + job.demand.then.at, partial(self._arrive, job.demand.then))

    # ---- the front

    def _carry_out(self, verdicts: list[Verdict]) -> None:
        """Do what the front says, and set its timer."""
        for verdict in verdicts:
            job = verdict.job
            if verdict.engine is None:
                self._end(job, verdict.outcome)
            else:
                self._send(job, verdict.engine)
        due = self.front.next_deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self._at(due, partial(self._tick, due))

    def _tick(self, due: float) -> None:
        if due == self._tick_at:
            self._tick_at = None
            self._carry_out(self.front.tick(self.now))

    # ---- engines

    def _send(self, job: Job, engine: int) -> None:
        job.engine = engine
        job.dispatched = self.now
        if self._dead[engine] or self._cut:
            self._at(self.now + REFUSED_S, partial(self._refuse, job))
            return
        demand = job.demand
        prefix, prefix_tokens = demand.prefix, demand.prefix_tokens
        if demand.sequences > 1:  # they share the whole prompt
            prefix, prefix_tokens = f"job-{job.number}", demand.prompt
        for seq_id in _sequences(job):
            refusal = self.engines[engine].submit(
                seq_id,
                demand.prompt,
                demand.output,
                self.now,
                -demand.klass.priority,
                demand.session,
                prefix,
                prefix_tokens,
                demand.model,
            )
            if refusal is not None:
                self._abort(job, engine)
                self._end(job, refusal.value)
                full = refusal is Refusal.QUEUE_FULL
                self._carry_out(self.front.end(job, self.now, Answer.SATURATED if full else Answer.OK))
                return
            self._running[engine][seq_id] = job
            job.unfinished += 1
        self._watch(engine)

    def _refuse(self, job: Job) -> None:
        """Let a connection fail."""
        if job.ended is None:
            self._end(job, "failed")
            self._carry_out(self.front.end(job, self.now, Answer.FAILED))

    def _abort(self, job: Job, engine: int) -> None:
        """Let its engine drop all that is left of a job."""
        for seq_id in _sequences(job):
            if self._running[engine].pop(seq_id, None) is not None:
                self.engines[engine].abort(seq_id, self.now)

    def _watch(self, engine: int) -> None:
        """Look at the engine again when it next has something to report."""
        self._versions[engine] += 1
        due = self.engines[engine].next_event()
        if due is not None:
            self._at(due, partial(self._look, engine, self._versions[engine]))

    def _look(self, engine: int, version: int) -> None:
        if version == self._versions[engine]:
            self._settle(engine)
            self._watch(engine)

    def _settle(self, engine: int) -> None:
        """Deliver all that the engine reported until now."""
        running = self._running[engine]
        for event in self.engines[engine].advance(self.now):
            job = running.get(event.seq_id)
            if job is None:
                continue
            if isinstance(event, FirstToken):
                self._first_tokens[engine] += 1
                if job.first_token is None:
                    job.first_token = event.t
                    if job.demand.streamed:
                        self._carry_out(self.front.first_token(job, self.now))
            elif isinstance(event, Finished):
                del running[event.seq_id]
                job.unfinished -= 1
                if job.unfinished:
                    continue
                if not job.demand.streamed:
                    self._carry_out(self.front.first_token(job, self.now))
                self._end(job, "finished")
                self._carry_out(self.front.end(job, self.now, Answer.OK))

    def _die(self, engine: int) -> None:
        self._settle(engine)
        self._dead[engine] = True
        self._past.append(self.engines[engine])
        self.engines[engine] = Engine(replace(self._params[engine], cold_requests=self.faults.cold_requests))
        self._versions[engine] += 1
        lost, self._running[engine] = self._running[engine], {}
        for job in dict.fromkeys(lost.values()):
            self._end(job, "failed")
            self._carry_out(self.front.end(job, self.now, Answer.FAILED))
        self._at(self.now + CHECK_S, partial(self._check, engine))

    def _revive(self, engine: int) -> None:
        self._dead[engine] = False
        self._scraped[engine] = _Counters(self.engines[engine], self.now, self._first_tokens[engine])
        self._at(self.now + CHECK_S, partial(self._check, engine))

    def _check(self, engine: int) -> None:
        self._carry_out(self.front.set_up(engine, self.now, is_up=not self._dead[engine]))

    def _blink(self) -> None:
        """Cut all connections; an engine that sees its client leave stops."""
        self._cut = True
        for engine in range(len(self.engines)):
            self._settle(engine)
            for job in dict.fromkeys(self._running[engine].values()):
                self._abort(job, engine)
                self._end(job, "failed")
                self._carry_out(self.front.end(job, self.now, Answer.FAILED))
            self._watch(engine)

    def _see_again(self) -> None:
        self._cut = False

    # ---- telemetry

    def _scrape(self, index: int) -> None:
        interval_s = self.contender.scrape_interval_s
        assert interval_s is not None  # noqa: S101 - nobody scrapes otherwise
        self._at(self.now + interval_s, partial(self._scrape, index))
        if self._dead[index] or self._cut:
            return
        self._settle(index)
        engine, params = self.engines[index], self._params[index]
        if self.page == "gauges":
            load = Load(float(engine.running), float(engine.waiting), engine.kv_usage)
            if self._says_batch[index]:
                load = replace(load, max_running=params.max_num_seqs)
            self._carry_out(self.front.observe(index, load, self.now))
            self._watch(index)
            return
        before = self._scraped[index]
        after = self._scraped[index] = _Counters(engine, self.now, self._first_tokens[index])
        made = after.generated - before.generated
        elapsed_s = after.at - before.at
        load = Load(
            running=float(engine.running),
            waiting=float(engine.waiting),
            kv_usage=engine.kv_usage,
            tokens_per_s=made / elapsed_s if elapsed_s > 0 else None,
            kv_capacity_tokens=params.kv_tokens,
            preemptions=after.preemptions - before.preemptions,
            prompt_tokens=after.prompts - before.prompts,
            output_tokens=made,
            first_tokens=after.first - before.first,
            max_running=params.max_num_seqs if self._says_batch[index] else None,
            cached_tokens=after.cached - before.cached,
            context_tokens=params.max_model_len,
            adapters=engine.adapters[0] if params.max_loras else None,
            waiting_adapters=engine.adapters[1] if params.max_loras else None,
            adapter_slots=params.max_loras or None,
        )
        self._carry_out(self.front.observe(index, load, self.now))
        self._watch(index)

    def _close_books(self) -> None:
        for index in range(len(self.engines)):
            self._settle(index)
            self._watch(index)
        self._generated = sum(engine.generation_tokens_total for engine in (*self.engines, *self._past))

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._sequence += 1
        heappush(self._heap, (when, self._sequence, event))


class _Counters:
    """What a scraper remembers of the last page."""

    __slots__ = ("at", "cached", "first", "generated", "preemptions", "prompts")

    def __init__(self, engine: Engine, at: float, first: int) -> None:
        self.at = at
        self.cached = engine.prefix_hits_total
        self.generated = engine.generation_tokens_total
        self.first = first
        self.preemptions = engine.preemptions_total
        self.prompts = engine.prompt_tokens_total


def _sequences(job: Job) -> list[SeqId]:
    """Return the names of its sequences in its engine."""
    return [job.number, *(f"{job.number}.{more}" for more in range(1, job.demand.sequences))]


def _record(job: Job) -> Record:
    demand, klass = job.demand, job.demand.klass
    ttft_s = None if job.first_token is None else job.first_token - job.arrived
    tpot_s = None
    if job.outcome == "finished" and job.first_token is not None and job.ended is not None:
        tpot_s = (job.ended - job.first_token) / max(demand.output - 1, 1)
    met = ttft_s is not None and tpot_s is not None and ttft_s <= klass.ttft_s and tpot_s <= klass.tpot_s
    queued_s = None if job.dispatched is None else job.dispatched - job.arrived
    assert job.ended is not None  # noqa: S101 - all jobs of a run have ended
    ended_s = job.ended - job.arrived
    return Record(klass.name, demand.tenant, job.outcome, ttft_s, tpot_s, met, queued_s, ended_s, demand.output)


def saturation(params: EngineParams, engines: int, demands: Sequence[Demand]) -> float:
    """Return the requests per second that `engines` engines finish of this mix when there is always another one.

    Measured on one engine as its operator sets it, from the first quarter of what finishes to the last. A session's
    turns count as strangers: no prefix is found.
    """
    engine = Engine(params)
    turns = (turn for demand in demands for turn in demand.chain())
    wanted = [turn for turn in turns if turn.prompt + turn.output <= params.longest]
    for number, turn in enumerate(wanted):
        engine.submit(number, turn.prompt, turn.output, 0.0, prefix=turn.prefix, prefix_tokens=turn.prefix_tokens)
    ends: list[float] = []
    while (due := engine.next_event()) is not None:
        ends += [event.t for event in engine.advance(due) if isinstance(event, Finished)]
    low, high = len(ends) // 4, len(ends) * 3 // 4
    return engines * (high - low) / max(ends[high] - ends[low], 1e-9)
