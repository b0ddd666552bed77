"""The one table of what can keep a request waiting: label of metrics, field of logs and bodies, words for people."""

from __future__ import annotations

from enum import Enum


class HeldBy(Enum):
    """Which limit has no room. `value` is the label everywhere.

    Attributes:
        words: what a person reads: "it waits because ...".
    """

    __hash__ = object.__hash__  # a member equals nothing but itself; Enum's own hash is a call of Python's

    words: str

    def __new__(cls, label: str, words: str) -> HeldBy:
        """Make a member whose value is its label alone."""
        member = object.__new__(cls)
        member._value_ = label
        member.words = words
        return member

    DOWN = ("down", "health checks say that it is down, or neither requests nor its page get a connection")
    EJECTED = ("ejected", "it refused what its peers serve, and is left out for a while")
    ASLEEP = ("asleep", "the engine says that it sleeps or is paused")
    REFUSED = ("refused", "the engine, or a circuit breaker of Envoy before it, has just refused a request as full")
    TRIAL = ("trial", "a few requests at a time show whether it works")
    HOT = ("hot", "its telemetry is over max_gpu_perc or gpu_utilization_perc")
    PART = ("part", "the rest of its limit is for sidecars that can't be reached")
    LIMIT = ("limit", "as many requests as its limit allows are in flight")
    KV = ("kv", "the KV cache has no room for the prompt and answer")
    PROMPTS = ("prompts", "prompts that were sent are still being computed (max_prompt_tokens)")
    GUARD = ("guard", "its room is kept for a request that goes first")
