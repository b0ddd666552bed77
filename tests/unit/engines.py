"""Simulated engines whose figures can be worked out by hand, and how to run them to their end."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from extproc.engine.params import EngineParams
from extproc.engine.sequence import Event, FirstToken

if TYPE_CHECKING:
    from extproc.engine.model import Engine


def small(**changes: Any) -> EngineParams:
    """An engine whose figures can be worked out by hand: 10 ms a step, 1 ms a prefill token, nothing else."""
    base = EngineParams(
        step_base_s=0.010,
        prefill_token_s=0.001,
        decode_seq_s=0.0,
        num_gpu_blocks=8,
        block_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=8,
    )
    return dataclasses.replace(base, **changes)


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while (end := engine.next_event()) is not None:
        events += engine.advance(end)
    return events


def first_tokens(events: list[Event]) -> list[Any]:
    return [event.seq_id for event in events if isinstance(event, FirstToken)]
