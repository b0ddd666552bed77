"""Turns what counters say now into what happened since the reading before. No I/O, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.load import Load
from extproc.endpoints.telemetry.bounds import MOST_TOKENS, within
from extproc.endpoints.telemetry.facts import Facts

if TYPE_CHECKING:
    from extproc.endpoints.telemetry.readings import Counter, Readings

_NO_FACTS = Facts()
FELL_KEPT, FELL_MOST = 0.95, 2.0
"""What a reading keeps of the number of pages whose tokens fell; and the most of these that restarts explain."""


class Rates:
    """One endpoint's counters: remembers the reading before."""

    __slots__ = ("_at", "_before", "_fell", "_longest_s")

    def __init__(self, longest_s: float) -> None:
        """Give no rate over a gap longer than `longest_s`: an average over an outage says nothing of now."""
        self._longest_s = longest_s
        self._before: Readings | None = None
        self._at = 0.0
        self._fell = 0.0  # how many pages did lately

    def load(self, readings: Readings, now: float, gpu_usage: float | None = None, facts: Facts = _NO_FACTS) -> Load:
        """Return the load that `readings`, taken at `now` (seconds, monotonic), tell together with those before.

        `gpu_usage`: of its own page. `facts`: what the engine says of itself beside its page.
        The first reading gives no differences, nor does a counter that was reset or whose series changed. Nor does any
        where they fall again and again: a balancer has each page come from another server.
        """
        before, gap_s = self._before, now - self._at
        self._before, self._at = readings, now
        preemptions = prompt_tokens = cached_tokens = first_tokens = output_tokens = decoded = None
        if before is not None:
            written = _difference(readings.output_tokens, before.output_tokens)
            has_fallen = written is None and None not in (readings.output_tokens, before.output_tokens)
            self._fell = FELL_KEPT * self._fell + has_fallen
            if self._fell <= FELL_MOST:
                preemptions = _difference(readings.preemptions, before.preemptions)
                prompt_tokens = _difference(readings.prompt_tokens, before.prompt_tokens)
                cached_tokens = _difference(readings.cached_tokens, before.cached_tokens)
                first_tokens = _difference(readings.first_tokens, before.first_tokens)
                output_tokens = written
                decoded = _difference(readings.decoded_tokens, before.decoded_tokens)
        tokens_per_s = readings.tokens_per_s if readings.decoded_tokens is None else None
        if decoded is not None and 0.0 < gap_s <= self._longest_s:
            tokens_per_s = within(decoded / gap_s, MOST_TOKENS)
        return Load(
            running=readings.running,
            waiting=readings.waiting,
            kv_usage=readings.kv_usage,
            gpu_usage=gpu_usage,
            tokens_per_s=tokens_per_s,
            kv_capacity_tokens=readings.kv_capacity_tokens,
            preemptions=preemptions,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            first_tokens=first_tokens,
            max_running=readings.max_running or facts.max_running,
            cached_tokens=cached_tokens,
            context_tokens=readings.context_tokens or facts.context_tokens,
            asleep=readings.asleep,
            adapters=readings.adapters,
            waiting_adapters=readings.waiting_adapters,
            adapter_slots=readings.adapter_slots,
        )


def _difference(now: Counter | None, before: Counter | None) -> int | None:
    """Return how much a counter rose over all its series; None if one was reset, came or went."""
    if now is None or before is None:
        return None
    earlier = before.values
    if now.series is not before.series:  # lines of another page: in another order, or of others
        then = dict(zip(*before, strict=True))
        if then.keys() != set(now.series):
            return None
        earlier = [then[series] for series in now.series]
    rise = 0.0
    for value, least in zip(now.values, earlier, strict=True):
        if value < least:
            return None
        rise += value - least
    return round(rise)
