"""A random machine drives every event of the core; after each event every invariant is recomputed (`audit.py`).

Hypothesis finds and shrinks; the storm (`storm.py`) goes long. Both share the books and the checks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extproc.admission.load import Load
from extproc.admission.values import Answer, Binding, EndpointSpec, Policy, Request, RequestClass

from .audited import Audited

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

NAMES = st.sampled_from(("a", "b", "c"))
CLASSES = (RequestClass("std", 0, 8.0), RequestClass("int", 10, 1.5), RequestClass("batch", -5, 60.0))
TOKENS = st.sampled_from((0, 1, 100, 700, 2000, 50_000))


def perhaps(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


SPECS = st.builds(
    EndpointSpec,
    name=NAMES,
    models=st.sampled_from((frozenset(), frozenset(), frozenset({"m"}), frozenset({"m", "n"}))),
    max_running_requests=perhaps(st.integers(1, 4)),
    kv_capacity_tokens=perhaps(st.sampled_from((1000, 4000))),
)
POLICIES = st.builds(
    Policy,
    enable_queue=st.sampled_from((True, True, True, False)),
    classes=st.permutations(CLASSES).map(tuple),
    patience_s=st.sampled_from((0.0, 1.0, 5.0)),
    binding=st.sampled_from(Binding),
    max_queued_requests=st.sampled_from((0, 3, 1000, 1000)),
    shed=st.booleans(),
    fair=st.booleans(),
    short_first=st.sampled_from((False, False, True)),
    max_prompt_tokens=st.sampled_from((500, 4096, None)),
    max_gpu_usage=perhaps(st.just(0.9)),
    stale_after_s=st.sampled_from((0.1, 2.0, 10.0)),
    first_byte_probe=st.booleans(),
    session_memory=st.sampled_from((0, 2, 100)),
)
SHARES = perhaps(st.sampled_from((0.0, 0.5, 0.93, 0.95, 1.0)))
COUNTS = perhaps(st.sampled_from((0, 1, 700, 5000)))
LOADS = st.builds(
    Load,
    running=perhaps(st.sampled_from((0.0, 1.0, 50.0))),
    waiting=perhaps(st.sampled_from((0.0, 3.0))),
    kv_usage=SHARES,
    gpu_usage=SHARES,
    tokens_per_s=perhaps(st.sampled_from((0.0, 100.0, 3000.0))),
    kv_capacity_tokens=perhaps(st.sampled_from((0, 2000))),
    preemptions=perhaps(st.integers(0, 1)),
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    cached_tokens=COUNTS,
    first_tokens=perhaps(st.sampled_from((0, 1, 5))),
    asleep=st.sampled_from((None, None, False, True)),
    max_running=perhaps(st.sampled_from((0, 2))),
)


class Machine(RuleBasedStateMachine):
    """All events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.audited = Audited(Policy(classes=CLASSES))
        self.number = 0

    @initialize(policy=POLICIES, specs=st.lists(SPECS, max_size=3))
    def begin(self, policy: Policy, specs: list[EndpointSpec]) -> None:
        self.audited.set_policy(policy)
        for spec in specs:
            self.audited.put(spec)

    @rule(
        count=st.sampled_from((1, 1, 2, 5, 70)),
        model=st.sampled_from((None, "m", "m", "n", "stranger")),
        request_class=st.sampled_from(("std", "int", "batch", "made up")),
        tenant=st.sampled_from(("", "t", "u")),
        session=perhaps(st.sampled_from(("s1", "s2", "s3"))),
        home=perhaps(st.sampled_from(("a", "b", "nowhere"))),
        budget_s=perhaps(st.sampled_from((0.0, 0.1, 3.0, 1e9))),
        age_s=st.sampled_from((0.0, 0.0, 2.0, 100.0)),
        prompt_tokens=TOKENS,
        max_output_tokens=perhaps(TOKENS),
        sequences=st.sampled_from((1, 1, 1, 3, 20)),
        kind=st.sampled_from(("", "image")),
    )
    def offer(self, count: int, age_s: float, **request: object) -> None:
        for _ in range(count):
            self.number += 1
            self.audited.offer(Request(str(self.number), self.audited.now - age_s, **request))

    def _pick(self, tickets: dict[Ticket, object], data: st.DataObject) -> Ticket:
        return list(tickets)[data.draw(st.integers(0, len(tickets) - 1))]

    @precondition(lambda self: self.audited.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.audited.cancel(self._pick(self.audited.waiting, data))

    @precondition(lambda self: self.audited.leased)
    @rule(data=st.data(), answer=st.sampled_from(Answer), count=st.sampled_from((1, 1, 1, 6, 70)))
    def release(self, data: st.DataObject, answer: Answer, count: int) -> None:
        self.audited.release(self._pick(self.audited.leased, data), answer)
        for _ in range(min(count - 1, len(self.audited.leased))):
            self.audited.release(next(iter(self.audited.leased)), answer)

    @precondition(lambda self: self.audited.leased)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.audited.first_token(self._pick(self.audited.leased, data))

    @precondition(lambda self: self.audited.leased)
    @rule(data=st.data())
    def answered(self, data: st.DataObject) -> None:
        self.audited.answered(self._pick(self.audited.leased, data))

    @rule(spec=SPECS)
    def put(self, spec: EndpointSpec) -> None:
        self.audited.put(spec)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.audited.remove(name)

    @rule(name=NAMES, is_up=st.sampled_from((True, False, None)))
    def set_up(self, name: str, is_up: bool | None) -> None:
        self.audited.set_up(name, is_up=is_up)

    @rule(name=NAMES, load=LOADS)
    def observe(self, name: str, load: Load) -> None:
        self.audited.observe(name, load)

    @rule(name=NAMES, load=LOADS)
    def report(self, name: str, load: Load) -> None:
        self.audited.report(name, load)

    @rule(seconds=st.sampled_from((0.0, 0.001, 0.1, 0.3, 1.0, 2.0, 10.0, 3600.0)), late=st.booleans())
    def pass_time(self, seconds: float, late: bool) -> None:
        self.audited.advance(seconds, late=late)

    @rule(policy=POLICIES)
    def set_policy(self, policy: Policy) -> None:
        self.audited.set_policy(policy)

    @invariant()
    def shows_itself(self) -> None:
        assert f"waiting={len(self.audited.waiting)}" in repr(self.audited.core)

    def teardown(self) -> None:
        audited = self.audited
        if not audited.offered:
            return
        audited.drain()
        for ticket in list(audited.leased):
            audited.release(ticket)
        assert audited.outcomes.total() == audited.offered
        for endpoint in audited.core.endpoints.values():
            assert (endpoint.leases, endpoint.sequences) == ({}, 0)
            assert (endpoint.kv.prompts, endpoint.kv.outputs, endpoint.prefill.tokens) == (0, 0, 0)
        audited.advance(100.0)
        assert audited.core.next_deadline() is None
        assert len(audited.core._lines.alarms) == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=500 if os.environ.get("EXTPROC_LONG") else 120,  # `make storm`
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
