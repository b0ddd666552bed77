"""Fronts that are not ours, and what every front is: Envoy's balancers, HAProxy's queue, one front per pool of models.

A front hears what a proxy hears and says who goes where; it sees no engine. Balancers choose at arrival and hold
nothing; HAProxy holds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.admission.load import Load
    from extproc.admission.values import Answer
    from extproc.engine.params import EngineParams
    from extproc.simulate.workload import Demand


@dataclass(frozen=True, slots=True)
class Group:
    """Engines of one kind, and the models that they serve; none: any.

    Attributes:
        says_batch: whether their page tells how many they run at once, as SGLang's, TGI's and llama.cpp's do.
    """

    params: EngineParams
    engines: int
    models: tuple[str, ...] = ()
    says_batch: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One demand on its way. The world fills it in; `engine` is where it went."""

    number: int
    demand: Demand
    arrived: float
    engine: int | None = None
    dispatched: float | None = None
    first_token: float | None = None
    ended: float | None = None
    outcome: str = ""
    unfinished: int = 0  # of its sequences


@dataclass(frozen=True, slots=True)
class Verdict:
    """Send the job to `engine`, or refuse it: then `engine` is None."""

    job: Job
    engine: int | None
    outcome: str


class Front(Protocol):
    """What decides. Events in, verdicts out, the clock passed in; the same shape as the core's."""

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Take a new request."""

    def leave(self, job: Job, now: float) -> list[Verdict]:
        """Note that the client of a job that got no verdict yet has left."""

    def first_token(self, job: Job, now: float) -> list[Verdict]:
        """Note the first byte of an answer: the first token where it is streamed, else the last."""

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:
        """Note that a job that was sent somewhere is over."""

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        """Follow a scrape."""

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:
        """Note what an active health check found."""

    def tick(self, now: float) -> list[Verdict]:
        """Let time pass."""

    def next_deadline(self) -> float | None:
        """Return when `tick` is due."""


class Proxy:
    """What counts its own requests in flight, and sees neither first tokens nor telemetry."""

    def __init__(self, engines: int, own: Sequence[int] | None = None) -> None:
        """Stand before `engines` in all, of which only the numbers in `own` are its; None: all."""
        self._in_flight = [0] * engines
        self._healthy = list(range(engines) if own is None else own)

    def first_token(self, job: Job, now: float) -> list[Verdict]:  # noqa: ARG002
        """Not looked at."""
        return []

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:  # noqa: ARG002
        """Not looked at."""
        return []


class Balancer(Proxy):
    """A load balancer without a queue. `pick` chooses among the healthy engines by requests in flight."""

    def __init__(
        self,
        engines: int,
        pick: Callable[[list[int], list[int]], int],
        breaker: int | None,
        own: Sequence[int] | None = None,
    ) -> None:
        """Balance over `engines`; more than `breaker` in flight at the chosen one is refused with 503."""
        super().__init__(engines, own)
        self._pick = pick
        self._breaker = breaker

    def arrive(self, job: Job, now: float) -> list[Verdict]:  # noqa: ARG002
        """Choose at once."""
        if not self._healthy:
            return [Verdict(job, None, "no_endpoint")]
        engine = self._pick(self._healthy, self._in_flight)
        if self._breaker is not None and self._in_flight[engine] >= self._breaker:
            return [Verdict(job, None, "circuit_breaker")]
        self._in_flight[engine] += 1
        return [Verdict(job, engine, "dispatched")]

    def leave(self, job: Job, now: float) -> list[Verdict]:  # noqa: ARG002
        """Nothing waits here."""
        return []

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:  # noqa: ARG002
        """Count one less."""
        if job.engine is not None:
            self._in_flight[job.engine] -= 1
        return []

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:  # noqa: ARG002
        """Take an engine out of the rotation, or back in."""
        self._healthy = sorted({*self._healthy, engine} if is_up else {*self._healthy} - {engine})
        return []

    def tick(self, now: float) -> list[Verdict]:  # noqa: ARG002
        """No timers here."""
        return []

    def next_deadline(self) -> float | None:
        """No timers here."""
        return None


def round_robin() -> Callable[[list[int], list[int]], int]:
    """Return a rule that takes one after the other."""

    turn = -1

    def pick(healthy: list[int], in_flight: list[int]) -> int:  # noqa: ARG001
        nonlocal turn
        turn += 1
        return healthy[turn % len(healthy)]

    return pick


def two_choices(seed: int) -> Callable[[list[int], list[int]], int]:
    """Envoy's LEAST_REQUEST with equal weights: two random hosts, with replacement, the less active of the two."""
    draw = random.Random(f"{seed} choices")  # noqa: S311 - Envoy's dice

    def pick(healthy: list[int], in_flight: list[int]) -> int:
        one, other = draw.choice(healthy), draw.choice(healthy)
        return one if in_flight[one] <= in_flight[other] else other

    return pick


def shortest(healthy: list[int], in_flight: list[int]) -> int:
    """Take the least busy."""
    return min(healthy, key=in_flight.__getitem__)


class Haproxy(Proxy):
    """One backend: a queue by class and arrival, `maxconn` per server, the least busy of those with room."""

    def __init__(self, engines: int, limit: int, wait_s: float, own: Sequence[int] | None = None) -> None:
        """Queue before `engines`, `limit` requests each; who waited `wait_s` gets 503."""
        super().__init__(engines, own)
        self._limit = limit
        self._wait_s = wait_s
        self._queue = SortedDict()
        self._waiting: dict[int, tuple[int, float, int]] = {}
        self._due: list[tuple[float, int, Job]] = []  # a heap; some have left

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Queue it, and place who can be placed."""
        key = (-job.demand.klass.priority, now, job.number)
        self._queue[key] = job
        self._waiting[job.number] = key
        placed = self._place()
        if job.number in self._waiting:
            heappush(self._due, (job.arrived + self._wait_of(job), job.number, job))
        return placed

    def leave(self, job: Job, now: float) -> list[Verdict]:  # noqa: ARG002
        """`option abortonclose`."""
        self._drop(job)
        return []

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:  # noqa: ARG002
        """A connection less."""
        if job.engine is not None:
            self._in_flight[job.engine] -= 1
        return self._place()

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:  # noqa: ARG002
        """Follow the health check."""
        self._healthy = sorted({*self._healthy, engine} if is_up else {*self._healthy} - {engine})
        return self._place()

    def tick(self, now: float) -> list[Verdict]:
        """Turn away who waited too long."""
        late = []
        while self._due and self._due[0][0] <= now:
            job = heappop(self._due)[2]
            if job.number in self._waiting:
                self._drop(job)
                late.append(Verdict(job, None, "timeout"))
        return late

    def next_deadline(self) -> float | None:
        """Return when the first has waited too long."""
        while self._due and self._due[0][1] not in self._waiting:
            heappop(self._due)
        return self._due[0][0] if self._due else None

    def _wait_of(self, job: Job) -> float:  # noqa: ARG002
        """Return how long a request may wait: one `timeout queue` for all."""
        return self._wait_s

    def _drop(self, job: Job) -> None:
        del self._queue[self._waiting.pop(job.number)]

    def _place(self) -> list[Verdict]:
        placed = []
        while self._queue:
            room = [engine for engine in self._healthy if self._in_flight[engine] < self._limit]
            if not room:
                break
            engine = min(room, key=self._in_flight.__getitem__)
            _, job = self._queue.peekitem(0)
            self._drop(job)
            self._in_flight[engine] += 1
            placed.append(Verdict(job, engine, "dispatched"))
        return placed


class Split:
    """A front for each pool of models, as a proxy has a backend for each."""

    def __init__(self, parts: Sequence[tuple[Front, Sequence[int], tuple[str, ...]]]) -> None:
        """Route to `parts`: each a front, the numbers of its engines, and its models."""
        self._parts = [front for front, _, _ in parts]
        self._by_model = {model: front for front, _, models in parts for model in models}
        self._by_engine = {engine: front for front, engines, _ in parts for engine in engines}

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Ask the front of its model."""
        return self._of(job).arrive(job, now)

    def leave(self, job: Job, now: float) -> list[Verdict]:
        """Tell the front of its model."""
        return self._of(job).leave(job, now)

    def first_token(self, job: Job, now: float) -> list[Verdict]:
        """Tell the front of its model."""
        return self._of(job).first_token(job, now)

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:
        """Tell the front of its model."""
        return self._of(job).end(job, now, answer)

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        """Tell the front of the engine."""
        return self._by_engine[engine].observe(engine, load, now)

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:
        """Tell the front of the engine."""
        return self._by_engine[engine].set_up(engine, now, is_up=is_up)

    def tick(self, now: float) -> list[Verdict]:
        """Tell all."""
        return [verdict for front in self._parts for verdict in front.tick(now)]

    def next_deadline(self) -> float | None:
        """Ask all."""
        return min((due for front in self._parts if (due := front.next_deadline()) is not None), default=None)

    def _of(self, job: Job) -> Front:
        return self._by_model[job.demand.model or ""]
