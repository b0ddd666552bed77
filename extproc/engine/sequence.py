"""A sequence in the engine: one answer being made, where it stands, and what is told of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

SeqId = int | str


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first output token of a sequence left the engine at `t` (seconds, the caller's clock)."""

    seq_id: SeqId
    t: float


@dataclass(frozen=True, slots=True)
class Preempted:
    """A running sequence lost its blocks at `t` and waits again, before all that are less urgent."""

    seq_id: SeqId
    t: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last token of a sequence left the engine at `t`; the engine has forgotten the sequence."""

    seq_id: SeqId
    t: float
    output_tokens: int
    preemptions: int


Event = FirstToken | Preempted | Finished


class Refusal(enum.StrEnum):
    """Why `submit` did not take a sequence."""

    TOO_LONG = "too_long"  # could never fit; vLLM answers 400
    QUEUE_FULL = "queue_full"  # max_num_queued reached; vLLM answers 503


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence. It owns blocks while it prefills or decodes."""

    seq_id: SeqId
    prompt: int
    output: int
    order: tuple[int, int]  # (priority, arrival number): the smallest is admitted first, the largest preempted first
    session: str | None
    prefix: str | None = None
    prefix_blocks: int = 0  # whole blocks of its prompt's beginning that others have too
    adapter: str | None = None  # LoRA adapter
    shared: int = 0  # of these, the ones that it uses of the shared entry, while it runs
    state: State = State.WAITING
    produced: int = 0  # output tokens at the end of step `joined`; later ones follow from the step number
    length: int = 0  # tokens to have in the KV cache when prefill ends: prompt + produced
    left: int = 0  # of these, not computed at the end of the last step
    chunk: int = 0  # of these, being computed in the step in progress
    joined: int = 0  # the step that ended its prefill; it decodes from the next one
    offset: int = 0  # context tokens in step t = offset + t, while decoding
    finish_step: int = 0
    computed: int = 0  # prefill tokens computed for it in all, recomputation included
    preemptions: int = 0

    @property
    def cache_key(self) -> str | int:
        """Where its blocks are found again: under its session, or under itself after a preemption."""
        return self.order[1] if self.session is None else self.session
