"""Drives an engine model in real time: one timer for the step in progress, one wake-up per stream that got tokens.

Here: the clock, who waits for which sequence, and what was measured on the way. Not here: HTTP, scheduling.
Step ends are the model's, so a late timer delays the tokens of its step and nothing accumulates; how late it
was at worst is `lag_max_s`, and a test that claims figures should fail when that is large.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from typing import TYPE_CHECKING, Final

from extproc.engine.model import Engine
from extproc.engine.sequence import Finished, FirstToken, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.engine.openai import Ask, FinishReason
    from extproc.engine.params import EngineParams

# vLLM's bucket bounds for these three metrics, in seconds (recalled, not compared with its page).
TTFT_BOUNDS_S: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
TOKEN_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BOUNDS_S: Final = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Histogram:
    """A Prometheus histogram whose observations may have a weight: a step gives many streams the same gap."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Count `value`, `weight` times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += weight
        self.sum += value * weight

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulated count), the last one +Inf."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class Waits:
    """Whoever waits for the sequences of one request."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def more(self) -> None:
        """Wait until any of them got tokens, or ended."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def wake(self) -> None:
        """End that wait, if there is one."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Generation:
    """One sequence of a request: `tokens` it has so far, all at once if it does not stream."""

    __slots__ = ("arrived_s", "ask", "first_token_s", "seq_id", "tokens", "waits")

    def __init__(self, seq_id: int, ask: Ask, arrived_s: float, waits: Waits) -> None:
        self.seq_id = seq_id
        self.ask = ask
        self.arrived_s = arrived_s
        self.waits = waits
        self.first_token_s: float | None = None
        self.tokens = 0

    def reached(self, tokens: int) -> None:
        """`tokens` have left the engine by now; wake whoever waits for them."""
        self.tokens = tokens
        self.waits.wake()


class Drive:
    """An engine on the wall clock. Belongs to the event loop that it is used on."""

    def __init__(self, params: EngineParams) -> None:
        self.engine = Engine(params)
        self.lag_max_s = 0.0
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0}
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.inter_token = Histogram(TOKEN_BOUNDS_S)
        self.per_output_token = Histogram(TOKEN_BOUNDS_S)
        self.end_to_end = Histogram(REQUEST_BOUNDS_S)
        self._generations: dict[int, Generation] = {}
        self._streams: dict[int, Generation] = {}  # those of them that stream and have their first token
        self._numbers = 0
        self._clock_s = time.monotonic()
        self._looked_s = self._clock_s
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, ask: Ask) -> list[Generation] | Refusal:
        """Hand a request to the engine now, a sequence for each of its choices, or return why it takes not all."""
        now = self._now()
        if self.engine.next_step() is None:
            self._looked_s = now
        generations: list[Generation] = []
        waits = Waits()
        for prompt_tokens in ask.sequences:
            self._numbers += 1
            refusal = self.engine.submit(
                self._numbers,
                prompt_tokens,
                ask.output_tokens,
                now,
                ask.priority,
                ask.session,
                prefix="shared" if ask.shared_tokens else None,
                prefix_tokens=ask.shared_tokens,
                adapter=ask.adapter,
            )
            if refusal is not None:
                for generation in generations:
                    self.abort(generation)
                self._arm()
                return refusal
            generation = self._generations[self._numbers] = Generation(self._numbers, ask, now, waits)
            generations.append(generation)
        self._arm()
        return generations

    def abort(self, generation: Generation) -> None:
        """Nobody waits for it any more: free what it holds. Does nothing after its end."""
        if self._generations.pop(generation.seq_id, None) is not None:
            self._streams.pop(generation.seq_id, None)
            self.engine.abort(generation.seq_id, self._now())
            self._arm()

    def stop(self) -> None:
        """Stop the timer; nothing moves afterwards."""
        if self._timer is not None:
            self._timer.cancel()

    def _now(self) -> float:
        # A timer may fire a hair early (uvloop counts milliseconds); the model's time never goes back.
        self._clock_s = max(self._clock_s, time.monotonic())
        return self._clock_s

    def _arm(self) -> None:
        due_s = self.engine.next_step()
        if due_s == self._due_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_s, self._timer = due_s, None
        if due_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due_s - time.monotonic()), self._step)

    def _step(self) -> None:
        assert self._due_s is not None  # noqa: S101  # for mypy: only a timer that is armed calls this
        self._clock_s = max(self._clock_s, self._due_s)
        now = self._now()
        self.lag_max_s = max(self.lag_max_s, now - self._due_s)
        steps, tokens = self.engine.steps_total, self.engine.generation_tokens_total
        events = self.engine.advance(now)
        first = 0
        for event in events:
            generation = self._generations.get(event.seq_id) if isinstance(event.seq_id, int) else None
            match event:
                case FirstToken(t=t):
                    first += 1
                    if generation is not None:
                        self._began(generation, t)
                case Finished(t=t) if generation is not None:
                    self._ended(generation, t)
                case _:
                    pass
        for generation in self._streams.values():
            produced = self.engine.tokens_of(generation.seq_id)
            if produced > generation.tokens:
                generation.reached(produced)
        later_tokens = self.engine.generation_tokens_total - tokens - first
        if later_tokens > 0 and (passed := self.engine.steps_total - steps) > 0:
            self.inter_token.observe((now - self._looked_s) / passed, later_tokens)
        self._looked_s = now
        self._due_s = None
        self._arm()

    def _began(self, generation: Generation, t: float) -> None:
        generation.first_token_s = t
        self.ttft.observe(t - generation.arrived_s)
        if generation.ask.stream:
            self._streams[generation.seq_id] = generation

    def _ended(self, generation: Generation, t: float) -> None:
        del self._generations[generation.seq_id]
        self._streams.pop(generation.seq_id, None)
        self.finished[generation.ask.finish_reason] += 1
        self.end_to_end.observe(t - generation.arrived_s)
        later_tokens = generation.ask.output_tokens - 1
        if generation.first_token_s is not None and later_tokens:
            self.per_output_token.observe((t - generation.first_token_s) / later_tokens)
        generation.reached(generation.ask.output_tokens)
