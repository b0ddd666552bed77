"""What an endpoint's telemetry said last."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Load:
    """One reading of an endpoint's telemetry. None is unknown, and unknown is never 0.

    Attributes:
        running: requests that the engine computes.
        waiting: requests in the engine's own queue.
        kv_usage: share of the KV cache in use, 0..1.
        gpu_usage: share of time the GPU was busy, 0..1.
        tokens_per_s: output tokens per second since the reading before.
        kv_capacity_tokens: size of the KV cache.
        preemptions: preempted requests since the reading before.
        prompt_tokens: prompt tokens computed since the reading before.
        output_tokens: output tokens made since the reading before.
        first_tokens: answers that began since the reading before.
        max_running: the most requests that the engine runs at once, as it says itself.
        cached_tokens: of `prompt_tokens`' prompts, tokens found in the prefix cache since the reading before.
        context_tokens: the longest prompt and answer together that the model takes.
        adapters: LoRA adapters of which requests run.
        waiting_adapters: LoRA adapters of which requests wait in the engine.
        adapter_slots: how many of them are loaded at once, at most.
        asleep: whether the engine sleeps or is paused: it answers its health check and serves nobody.
    """

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    gpu_usage: float | None = None
    tokens_per_s: float | None = None
    kv_capacity_tokens: int | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    first_tokens: int | None = None
    max_running: int | None = None
    cached_tokens: int | None = None
    context_tokens: int | None = None
    asleep: bool | None = None
    adapters: tuple[str, ...] | None = None
    waiting_adapters: tuple[str, ...] | None = None
    adapter_slots: int | None = None

    @property
    def has_all_adapters(self) -> bool:
        """Whether requests run with as many LoRA adapters as fit: one with another has to wait."""
        return self.adapters is not None and self.adapter_slots is not None and len(self.adapters) >= self.adapter_slots

    def without_counters(self) -> Load:
        """Return what its gauges say alone."""
        return replace(
            self,
            tokens_per_s=None,
            preemptions=None,
            prompt_tokens=None,
            output_tokens=None,
            first_tokens=None,
            cached_tokens=None,
        )

    def times(self, servers: int) -> Load:
        """Return what so many servers would say together of whom each says this."""
        told = {name: value for name in _COUNTED if (value := getattr(self, name)) is not None}
        return replace(self, **{name: servers * value for name, value in told.items()})

    def over(self, older: Load | None) -> Load:
        """Return what this reading tells, and where it tells nothing, what the `older` one did."""
        if older is None:
            return self
        return replace(older, **{name: value for name in _NAMES if (value := getattr(self, name)) is not None})

    def without(self, other: Load) -> Load | None:
        """Return what this reading tells and `other` doesn't; None: nothing."""
        left = replace(self, **{name: None for name in _NAMES if getattr(other, name) is not None})
        return None if left == _NOTHING else left


_NAMES = tuple(field.name for field in fields(Load))
_COUNTED = (
    *("running", "waiting", "tokens_per_s", "kv_capacity_tokens", "preemptions", "prompt_tokens", "output_tokens"),
    *("first_tokens", "max_running", "cached_tokens"),
)
_NOTHING = Load()
