"""The engine itself: continuous batching as vLLM V1 schedules it, on whatever clock the caller has.

Here: the scheduler and the step-time model; blocks.py has the KV cache, sequence.py what is told. Not here: I/O,
asyncio, wall clocks, randomness, text.

An engine runs in steps. A step gives every decoding sequence one token, and prefills prompts with what is
left of its token budget. So the step in which a sequence will finish is known when it starts to decode, and
so are the steps in which it will need another KV block: the number of decoding sequences, their context
tokens and their block growth (by step number modulo block size) are kept as sums. A step of nothing but
decodes costs O(1), whatever the batch, and a run of such steps is planned ahead (`_plan`) until something
would happen or somebody interferes. Measured by `python -m bench.engine model`: 100,000 requests
of 154 output tokens on four engines take 1.9 s of CPU (a100-8b) or 2.5 s (h100-32b).

What is simpler than vLLM, on purpose:
- Admission takes the blocks of the whole prompt at once; vLLM can take them chunk by chunk.
- The prefix cache knows sessions and named prefixes, not block hashes: one entry each, whole blocks, LRU, evicted
  from its end. While a request of a session runs it owns the entry, so an overlapping one of that session misses.
- Blocks of a named prefix (a system prompt) are there once, however many running sequences use them. Others find what
  its first user had computed when they were admitted; what it computes later they compute for themselves too.
- A preempted sequence leaves its full blocks in that cache; back again, it recomputes the evicted ones.
- Under a prefill chunk, attention costs `prefill_context_s` per computed token and token before it, or nothing.

As in vLLM, nobody is preempted to let somebody in, and a head of the queue that does not fit blocks the rest. One
whose LoRA adapter is more than the batch may have (`max_loras`) is passed over (vllm/v1/core/sched/scheduler.py); an
adapter that is not loaded takes the place of the one that was used least lately, and the whole step waits for it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from sortedcontainers import SortedDict

from extproc.engine.blocks import Blocks
from extproc.engine.sequence import Event, Finished, FirstToken, Preempted, Refusal, SeqId, Sequence, State

if TYPE_CHECKING:
    from extproc.engine.params import EngineParams

HORIZON_STEPS: Final = 64  # how far a run of quiet steps is planned, and how much planning an arrival can spoil


class Engine:
    """One engine. Calls carry the time, which must not go back; they first settle the steps ended by then.

    `running` and `waiting` count sequences, `kv_usage` is 0..1; attributes that end in `_total` only grow.
    """

    def __init__(self, params: EngineParams) -> None:
        self.params = params
        self.prompt_tokens_total = 0  # of sequences that got their first token, as vLLM counts
        self.prefill_tokens_total = 0  # computed: without prefix hits, with recomputation after preemption
        self.generation_tokens_total = 0
        self.prefix_queries_total = 0  # prompt tokens looked up
        self.prefix_hits_total = 0  # prompt tokens found
        self.preemptions_total = 0
        self.finished_total = 0
        self.aborted_total = 0
        self.refused_total = 0
        self.wasted_tokens_total = 0  # prefilled and generated for sequences that were then aborted
        self.adapters_loaded_total = 0
        self.peak_running = 0
        self.peak_waiting = 0  # that a step's scheduling left behind, as vLLM's gauge counts it
        self._now = float("-inf")
        self._numbers = 0
        self._live: dict[SeqId, Sequence] = {}
        self._waiting = SortedDict()  # order -> Sequence
        self._running: dict[SeqId, Sequence] = {}
        self._prefilling: list[Sequence] = []
        self._finish_at: dict[int, list[Sequence]] = {}  # by step; may name some that have left, so check
        self._adapters: dict[str, int] = {}  # sequences of each loaded one; the one admitted last stands last
        self._loads = 0  # adapters that the step in progress loads
        self._decoding = 0
        self._offsets = 0  # their sum over decoding sequences
        self._growth = [0] * params.block_size  # decoding sequences that take a block, by step % block_size
        self._blocks = Blocks(params.num_gpu_blocks, params.block_size)
        self._attention = 0.0  # computed tokens x tokens before them, in the prefill of the step in progress
        self._cold = params.cold_requests  # prompts to compute until it is warm
        self._steps = 0  # steps that have ended
        self._ends: list[float] = []  # ends of the planned steps; all but the last are quiet. Empty: idle
        self._at = 0  # index of the step in progress in _ends
        self._events: list[Event] = []

    def __repr__(self) -> str:
        return (
            f"<Engine running={self.running}/{self.params.max_num_seqs} waiting={self.waiting} "
            f"kv={self._blocks.used}/{self.params.num_gpu_blocks} cached={self._blocks.cached} steps={self._steps}>"
        )

    @property
    def running(self) -> int:
        """Sequences in the batch, prefilling or decoding."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the engine's own queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running sequences own, 0..1; cached prefixes count as free."""
        return self._blocks.used / self.params.num_gpu_blocks

    @property
    def _speed(self) -> float:
        """Its speed now: a plan of quiet steps holds, because only the end of a prefill warms it."""
        return self.params.speed / self.params.cold_times if self._cold else self.params.speed

    @property
    def steps_total(self) -> int:
        """Steps that have ended."""
        return self._steps

    def __contains__(self, seq_id: SeqId) -> bool:
        return seq_id in self._live

    def tokens_of(self, seq_id: SeqId) -> int:
        """Output tokens of a live sequence so far; raises KeyError when it has left."""
        return self._produced(self._live[seq_id])

    def blocks_of(self, seq_id: SeqId) -> int:
        """KV blocks that a live sequence owns now, without shared ones; raises KeyError when it has left."""
        seq = self._live[seq_id]
        return self._blocks_for(self._held_tokens(seq, self._steps + 1)) - seq.shared

    def reset_peaks(self) -> None:
        """Forget the peaks: they start again from what runs and waits now."""
        self.peak_running, self.peak_waiting = self.running, self.waiting

    def submit(
        self,
        seq_id: SeqId,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        priority: int = 0,
        session: str | None = None,
        prefix: str | None = None,
        prefix_tokens: int = 0,
        adapter: str | None = None,
    ) -> Refusal | None:
        """Queue a sequence, or say why not. A lower `priority` is earlier, under `priority` scheduling only.

        `adapter`: its LoRA adapter; an engine that knows none (`max_loras` 0) takes it for a name of its model.
        The first `prefix_tokens` of its prompt are the same in all sequences that name the same `prefix`.

        Raises ValueError for token counts below 1, an id that is still live, or a time before the last one.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(f"prompt and output need a token each, got {prompt_tokens} and {output_tokens}")
        if seq_id in self._live:
            raise ValueError(f"sequence {seq_id!r} is still live")
        self._run_until(now)
        if prompt_tokens + output_tokens > self.params.longest:
            self.refused_total += 1
            return Refusal.TOO_LONG
        if self.params.max_num_queued is not None and len(self._live) >= self.params.max_num_queued:
            self.refused_total += 1
            return Refusal.QUEUE_FULL
        self._numbers += 1
        rank = priority if self.params.scheduling_policy == "priority" else 0
        seq = Sequence(seq_id, prompt_tokens, output_tokens, (rank, self._numbers), session)
        seq.adapter = adapter if self.params.max_loras else None
        if prefix is not None and self.params.prefix_caching:
            seq.prefix_blocks = min(prefix_tokens, prompt_tokens - 1) // self.params.block_size
            seq.prefix = prefix if seq.prefix_blocks else None  # too short to have a block of it: nothing in common
        self._live[seq_id] = seq
        self._waiting[seq.order] = seq
        if not self._ends:
            self._begin_step(now)
        elif len(self._running) < self.params.max_num_seqs:
            self._cut_plan()
        return None

    def abort(self, seq_id: SeqId, now: float) -> bool:
        """Drop a sequence, waiting or running, and free all it holds at once; False if it has left before."""
        self._run_until(now)
        seq = self._live.pop(seq_id, None)
        if seq is None:
            return False
        self.aborted_total += 1
        self.wasted_tokens_total += seq.computed + self._produced(seq)
        if seq.state is State.WAITING:
            del self._waiting[seq.order]
            if seq.session is None:
                self._blocks.forget(seq.cache_key)
        else:
            self._leave_batch(seq, self._steps + 1)
        self._cut_plan()
        return True

    def next_step(self) -> float | None:
        """When the step in progress ends; None when idle."""
        return self._ends[self._at] if self._ends else None

    def next_event(self) -> float | None:
        """Until when `advance` has nothing to report, unless somebody submits or aborts; None when idle.

        The time of the next event, or earlier: plans end at HORIZON_STEPS, at KV pressure, at any arrival.
        The last time that a call carried, when that call left something to report.
        """
        if self._events:
            return self._now
        return self._ends[-1] if self._ends else None

    def advance(self, now: float) -> list[Event]:
        """Run all steps that end at `now` or before; report in order what happened since the last call."""
        self._run_until(now)
        events, self._events = self._events, []
        return events

    def _run_until(self, now: float) -> None:
        if now < self._now:
            raise ValueError(f"time went back from {self._now} to {now}")
        self._now = now
        while self._ends and self._ends[self._at] <= now:
            ended = bisect_right(self._ends, now, self._at) - self._at
            quiet = min(ended, len(self._ends) - 1 - self._at)
            self._pass_quiet_steps(quiet)
            if ended > quiet:
                end = self._ends[-1]
                self._end_step(end)
                self._begin_step(end)

    def _pass_quiet_steps(self, count: int) -> None:
        """End `count` steps of nothing but decodes, and take the blocks of the steps that begin thereby."""
        growth, size = self._growth, self.params.block_size
        for step in range(self._steps + 2, self._steps + 2 + count):
            if growth[step % size]:
                self._blocks.take(growth[step % size])
        self._steps += count
        self._at += count
        self.generation_tokens_total += count * self._decoding

    def _end_step(self, now: float) -> None:
        self._steps += 1
        step = self._steps
        self.generation_tokens_total += self._decoding
        for seq in self._finish_at.pop(step, ()):
            if seq.finish_step == step and self._running.get(seq.seq_id) is seq:
                self._finish(seq, step, now)
        if self._prefilling:
            prefilling, self._prefilling = self._prefilling, []
            for seq in prefilling:
                seq.left -= seq.chunk
                seq.chunk = 0
                if seq.prefix is not None:
                    self._blocks.fill(seq, seq.prefix)
                if seq.left:
                    self._prefilling.append(seq)
                else:
                    self._start_decoding(seq, step, now)

    def _start_decoding(self, seq: Sequence, step: int, now: float) -> None:
        """The end of a prefill is also the next token: the first one, or the one after a preemption."""
        if seq.produced == 0:
            self.prompt_tokens_total += seq.prompt
            self._cold = max(self._cold - 1, 0)
            self._events.append(FirstToken(seq.seq_id, now))
        self.generation_tokens_total += 1
        seq.produced += 1
        seq.state = State.DECODING
        seq.joined = step
        seq.offset = seq.length - step
        seq.finish_step = step + seq.output - seq.produced
        self._decoding += 1
        self._offsets += seq.offset
        self._growth[(1 - seq.offset) % self.params.block_size] += 1
        if seq.finish_step == step:
            self._finish(seq, step, now)
        else:
            self._finish_at.setdefault(seq.finish_step, []).append(seq)

    def _finish(self, seq: Sequence, step: int, now: float) -> None:
        self._leave_batch(seq, step)
        del self._live[seq.seq_id]
        self.finished_total += 1
        self._events.append(Finished(seq.seq_id, now, seq.output, seq.preemptions))

    def _begin_step(self, now: float) -> None:
        """Schedule a step as vLLM V1 does: decodes, then prefills in progress, then the head of the queue."""
        params, step = self.params, self._steps + 1
        pressed = False
        while self._growth[step % params.block_size] > params.num_gpu_blocks - self._blocks.used:
            self._preempt(max(self._running.values(), key=lambda seq: seq.order), step, now)
            pressed = True
        self._blocks.take(self._growth[step % params.block_size])
        budget = params.max_num_batched_tokens - self._decoding
        prefill = 0
        self._attention = 0.0
        for seq in self._prefilling:
            prefill += self._schedule_chunk(seq, budget - prefill)
        self._loads = 0
        while not pressed and prefill < budget and len(self._running) < params.max_num_seqs:
            first = self._next()
            if first is None or (
                self._blocks_for(first.prompt + first.produced) - self._blocks.sharable(first)
                > params.num_gpu_blocks - self._blocks.used
            ):
                break
            del self._waiting[first.order]
            self._admit(first)
            prefill += self._schedule_chunk(first, budget - prefill)
        self.prefill_tokens_total += prefill
        self.peak_running = max(self.peak_running, len(self._running))
        self.peak_waiting = max(self.peak_waiting, len(self._waiting))
        self._at = 0
        if not self._running:
            self._ends = []
            self._finish_at.clear()
            return
        tokens = self._decoding * step + self._offsets
        step_s = params.step_base_s + params.prefill_token_s * prefill + params.decode_seq_s * self._decoding
        step_s += params.context_token_s * tokens + params.prefill_context_s * self._attention
        step_s = step_s / self._speed + params.lora_load_s * self._loads
        # After a step that preempted, the head of the queue gets its chance in the next one.
        alone = bool(self._prefilling) or pressed
        self._ends = [now + step_s] if alone else self._plan(now, step_s, step)

    def _plan(self, now: float, step_s: float, step: int) -> list[float]:
        """Ends of the steps from `step` on, up to the first after which something can change."""
        room = self.params.num_gpu_blocks - self._blocks.used
        longer_s = self.params.context_token_s * self._decoding / self._speed
        growth, size, finish_at = self._growth, self.params.block_size, self._finish_at
        ends = [now + step_s]
        while step not in finish_at and len(ends) < HORIZON_STEPS:
            step += 1
            room -= growth[step % size]
            if room < 0:
                break
            step_s += longer_s
            ends.append(ends[-1] + step_s)
        return ends

    def _cut_plan(self) -> None:
        del self._ends[self._at + 1 :]

    def _schedule_chunk(self, seq: Sequence, budget: int) -> int:
        seq.chunk = min(seq.left, budget)
        self._attention += seq.chunk * (seq.length - seq.left + seq.chunk / 2)
        seq.computed += seq.chunk
        return seq.chunk

    @property
    def adapters(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """LoRA adapters of which sequences run, and of which some wait, by name."""
        waiting = {seq.adapter for seq in self._waiting.values() if seq.adapter is not None}
        return tuple(sorted(name for name, count in self._adapters.items() if count)), tuple(sorted(waiting))

    def _next(self) -> Sequence | None:
        """The first that waits and whose adapter the batch may have."""
        if not self.params.max_loras:
            return self._waiting.peekitem(0)[1] if self._waiting else None
        counts = self._adapters
        is_full = sum(1 for count in counts.values() if count) >= self.params.max_loras
        fits = (seq for seq in self._waiting.values() if not is_full or seq.adapter is None or counts.get(seq.adapter))
        return next(fits, None)

    def _load(self, adapter: str) -> None:
        """Count one more sequence of `adapter`, which is loaded, in the idle one's place that was used least lately."""
        counts = self._adapters
        if adapter not in counts:
            self._loads += 1
            self.adapters_loaded_total += 1
            if len(counts) >= self.params.max_loras:
                del counts[next(name for name, count in counts.items() if not count)]
        counts[adapter] = counts.pop(adapter, 0) + 1

    def _admit(self, seq: Sequence) -> None:
        if seq.adapter is not None:
            self._load(seq.adapter)
        seq.length = seq.prompt + seq.produced
        entry = self._blocks.forget(seq.cache_key)
        # The last token is always computed: its logits are the next token (vLLM caps a hit the same way).
        if seq.prefix is not None:
            found = self._blocks.join(seq, seq.prefix)
            entry = found + (entry if found == seq.prefix_blocks else 0)  # of the rest, what follows without a gap
        hit = min(entry, (seq.length - 1) // self.params.block_size) * self.params.block_size
        if self.params.prefix_caching and not seq.preemptions:
            self.prefix_queries_total += seq.prompt
            self.prefix_hits_total += hit
        seq.left = seq.length - hit
        seq.state = State.PREFILLING
        self._running[seq.seq_id] = seq
        self._prefilling.append(seq)
        self._blocks.take(self._blocks_for(seq.length) - seq.shared)

    def _preempt(self, seq: Sequence, step: int, now: float) -> None:
        seq.produced = self._produced(seq)
        self._leave_batch(seq, step - 1, resumes=True)
        seq.state = State.WAITING
        seq.finish_step = 0  # _finish_at may still name it
        seq.preemptions += 1
        self.preemptions_total += 1
        self._waiting[seq.order] = seq
        self._events.append(Preempted(seq.seq_id, now))

    def _leave_batch(self, seq: Sequence, step: int, *, resumes: bool = False) -> None:
        """Give back what a running sequence owns; `step` is the last one whose blocks were taken."""
        del self._running[seq.seq_id]
        if seq.adapter is not None:
            self._adapters[seq.adapter] -= 1
        self._blocks.give(self._blocks_for(self._held_tokens(seq, step)) - seq.shared)
        if seq.state is State.DECODING:
            complete = seq.offset + self._steps
            self._decoding -= 1
            self._offsets -= seq.offset
            self._growth[(1 - seq.offset) % self.params.block_size] -= 1
        else:
            complete = seq.length - seq.left
            self._prefilling.remove(seq)
        if self.params.prefix_caching and (resumes or seq.session is not None):
            self._blocks.remember(seq.cache_key, complete // self.params.block_size - seq.prefix_blocks)
        if seq.prefix is not None:
            self._blocks.leave(seq, seq.prefix)

    def _produced(self, seq: Sequence) -> int:
        return seq.produced + (self._steps - seq.joined if seq.state is State.DECODING else 0)

    def _held_tokens(self, seq: Sequence, step: int) -> int:
        """Tokens that its blocks have room for when the blocks of `step` have been taken."""
        match seq.state:
            case State.WAITING:
                return 0
            case State.PREFILLING:
                return seq.length
            case State.DECODING:
                return seq.offset + step

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.params.block_size)
