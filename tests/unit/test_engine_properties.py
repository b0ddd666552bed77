"""The simulated engine under random requests: nothing is lost, and how it is watched changes nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.engine.model import Engine
from extproc.engine.sequence import Event, Finished, FirstToken, Preempted
from tests.unit.engines import drain, first_tokens, small

if TYPE_CHECKING:
    from extproc.engine.params import EngineParams

Op = tuple[str, int, int, int, float]  # what, a, b, c, seconds since the last one
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 14), st.integers(-2, 2), st.floats(0, 0.1)),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0), st.just(0), st.floats(0, 0.05)),
        st.tuples(st.just("advance"), st.just(0), st.just(0), st.just(0), st.floats(0, 0.2)),
    ),
    max_size=40,
)
PARAMS = st.builds(
    small,
    num_gpu_blocks=st.integers(3, 14),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 24),
    max_num_queued=st.none() | st.integers(1, 8),
    scheduling_policy=st.sampled_from(["fcfs", "priority"]),
    prefix_caching=st.booleans(),
    context_token_s=st.sampled_from([0.0, 1e-4]),
)


class Run:
    """Plays a script on an engine and checks after every call what must hold at any time."""

    def __init__(self, params: EngineParams, *, stride_s: float | None = None) -> None:
        self.engine = Engine(params)
        self.stride_s = stride_s
        self.now = 0.0
        self.events: list[Event] = []
        self.submitted: dict[int, tuple[int, int]] = {}
        self.refused: set[int] = set()
        self.aborted: dict[int, int] = {}  # -> tokens it had got

    def play(self, ops: list[Op]) -> None:
        for number, (what, a, b, c, pause_s) in enumerate(ops):
            self.advance(self.now + pause_s)
            if what == "submit":
                self.submitted[number] = (a, b)
                shared = {"session": f"s{c}" if c else None, "prefix": f"p{a % 2}" if b % 3 else None}
                if self.engine.submit(number, a, b, self.now, priority=c, prefix_tokens=10, **shared) is not None:
                    self.refused.add(number)
            elif what == "abort" and a in self.engine:
                tokens = self.engine.tokens_of(a)
                assert self.engine.abort(a, self.now)
                self.aborted[a] = tokens
            self.check()
        while (end := self.engine.next_event()) is not None:
            self.advance(end)
            self.check()

    def advance(self, until: float) -> None:
        while self.stride_s is not None and self.now + self.stride_s < until:
            self.now += self.stride_s
            self.events += self.engine.advance(self.now)
        self.now = until
        self.events += self.engine.advance(until)

    def check(self) -> None:
        engine, params = self.engine, self.engine.params
        owned = sum(engine.blocks_of(number) for number in self.submitted if number in engine)
        owned += sum(prefix.blocks for prefix in engine._blocks.prefixes.values())
        assert engine.kv_usage == pytest.approx(owned / params.num_gpu_blocks)
        assert 0 <= owned <= params.num_gpu_blocks
        assert owned + engine._blocks.cached <= params.num_gpu_blocks
        assert engine._blocks.cached == sum(engine._blocks.entries.values()) >= 0
        assert all(blocks > 0 for blocks in engine._blocks.entries.values())
        assert engine.running <= params.max_num_seqs
        assert (engine.next_step() is None) == (engine.running == engine.waiting == 0) or self.aborted


@settings(max_examples=150, deadline=None)
@given(PARAMS, OPS)
def test_every_request_ends_exactly_once_and_no_block_or_token_is_lost(params: EngineParams, ops: list[Op]) -> None:
    run = Run(params)
    run.play(ops)
    engine = run.engine
    finished = Counter(event.seq_id for event in run.events if isinstance(event, Finished))
    assert set(finished.values()) <= {1}
    assert sorted([*finished, *run.aborted, *run.refused]) == sorted(run.submitted)
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)
    assert (engine._decoding, engine._offsets, set(engine._growth)) == (0, 0, {0})
    assert not engine._live
    assert not engine._finish_at
    assert not engine._blocks.prefixes
    kept = engine._blocks.entries
    assert not any(isinstance(key, int) for key in kept), "only sessions and prefixes outlive their requests"
    began = first_tokens(run.events)
    assert len(began) == len(set(began)) >= finished.total()
    assert engine.prompt_tokens_total == sum(run.submitted[number][0] for number in began)
    made = sum(run.submitted[number][1] for number in finished) + sum(run.aborted.values())
    assert engine.generation_tokens_total == made
    preempted = Counter(event.seq_id for event in run.events if isinstance(event, Preempted))
    assert engine.preemptions_total == preempted.total()
    assert all(event.preemptions == preempted[event.seq_id] for event in run.events if isinstance(event, Finished))
    assert [event.t for event in run.events] == sorted(event.t for event in run.events)
    if not run.aborted and not engine.preemptions_total:
        prompts = sum(run.submitted[number][0] for number in finished)
        assert engine.prefill_tokens_total == prompts - engine.prefix_hits_total


@settings(max_examples=60, deadline=None)
@given(PARAMS, OPS, st.floats(0.001, 0.03))
def test_how_often_somebody_looks_changes_nothing(params: EngineParams, ops: list[Op], stride_s: float) -> None:
    seldom, often = Run(params), Run(params, stride_s=stride_s)
    seldom.play(ops)
    often.play(ops)
    assert seldom.events == often.events


@settings(max_examples=100, deadline=None)
@given(PARAMS.map(lambda params: dataclasses.replace(params, context_token_s=0.0)), OPS)
def test_planning_ahead_changes_nothing(params: EngineParams, ops: list[Op]) -> None:
    planned, stepwise = Run(params), Run(params)
    planned.play(ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extproc.engine.model.HORIZON_STEPS", 1)
        stepwise.play(ops)
    assert planned.events == stepwise.events
    assert planned.engine.generation_tokens_total == stepwise.engine.generation_tokens_total


@settings(max_examples=60, deadline=None)
@given(PARAMS.map(lambda params: dataclasses.replace(params, scheduling_policy="fcfs")), OPS)
def test_fcfs_gives_first_tokens_in_arrival_order(params: EngineParams, ops: list[Op]) -> None:
    run = Run(params)
    run.play(ops)
    order = [event.seq_id for event in run.events if isinstance(event, FirstToken)]
    assert order == sorted(order, key=int)


@settings(max_examples=60, deadline=None)
@given(PARAMS, st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_priority_order_holds_among_all_that_wait_together(params: EngineParams, priorities: list[int]) -> None:
    roomy = dataclasses.replace(params, scheduling_policy="priority", max_num_queued=None, max_num_seqs=1)
    engine = Engine(roomy)
    engine.submit("head", 1, 2, now=0.0)
    for number, priority in enumerate(priorities):
        engine.submit(number, 3, 2, now=0.0, priority=priority)
    expected = sorted(range(len(priorities)), key=lambda number: (priorities[number], number))
    assert first_tokens(drain(engine)) == ["head", *expected]
