"""Dry run: nothing is held, and what would have been is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Policy, Request, RequestClass
from extproc.engine.params import EngineParams
from extproc.simulate.contenders import Core, Setting
from extproc.simulate.fronts import Group
from extproc.simulate.workload import STANDARD, Lengths, Workload
from extproc.simulate.world import World
from extproc.stream.dry_run import DryRun
from tests.unit.admission.methods import events_of_the_core

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.admission.values import Decision
    from extproc.simulate.fronts import Front, Verdict

EJECT_AFTER = LAWS.health.eject_after

NAME = "default"
NEEDED = events_of_the_core()
SAMPLES = {
    "name": "a",
    "names": ("a",),
    "spec": EndpointSpec("a", max_running_requests=3),
    "specs": (EndpointSpec("a", max_running_requests=3),),
    "is_up": True,
    "load": Load(running=1.0),
    "policy": Policy(enable_queue=False),
    "quota": 1,
    "models": frozenset({"m"}),
}


class Run:
    """The real core, with the queue off, and who watches it."""

    def __init__(self, policy: Policy) -> None:
        self.core = Controller(replace(policy, enable_queue=False))
        self.dry = DryRun(policy, self.core.endpoints)
        self.counts = self.dry.counts
        self.core.watch(self.dry.happened)

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)


def started(**policy) -> Run:
    run = Run(Policy(classes=(RequestClass(NAME, 0, 5.0),), shed=False, **policy))
    run.put_endpoint(EndpointSpec("a", max_running_requests=2), 0.0)
    return run


def offer(run: Run, now: float) -> Ticket:
    ticket = Ticket(Request("r", now))
    (decision,) = run.offer(ticket, now)
    assert isinstance(decision, Dispatch)
    return ticket


def test_everything_is_dispatched_at_once_and_what_would_wait_is_counted_when_its_end_is_known():
    run = started()
    tickets = [offer(run, 0.0) for _ in range(5)]
    assert run.counts == {("dispatched", NAME): 2}
    run.release(tickets[0], 1.0, Answer.OK)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 1}
    for ticket in tickets[1:]:
        run.release(ticket, 2.0, Answer.OK)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 2}
    run.observe("a", Load(), 3.0)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 3}
    assert all(ticket.state is State.DONE for ticket in tickets)


def test_who_is_answered_while_the_queue_would_hold_it_stays_there_until_it_is_dispatched_or_refused():
    run = started()
    tickets = [offer(run, 0.0) for _ in range(6)]
    for ticket in tickets:
        run.release(ticket, 3.0, Answer.OK)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 2}, "they hold the slots as long as they take"
    run.observe("a", Load(), 5.5)
    assert run.counts[("budget_expired", NAME)] == 2
    assert len(run.dry._other.endpoints["a"].leases) == 2
    run.observe("a", Load(), 6.0)
    assert not run.dry._other.endpoints["a"].leases
    assert not run.dry._of
    assert not run.dry._ends


def test_an_engine_whose_answers_take_longer_the_more_it_has_is_taken_to_end_as_many_with_fewer():
    run, at, running = started(), 0.0, []
    for _ in range(400):  # two slots, a second each: with many waiting inside it still ends two a second
        at += 0.25
        running.append(offer(run, at))
        if len(running) > 2 and at % 0.5 == 0:
            run.release(running.pop(0), at, Answer.OK)
    refused = sum(n for (what, _), n in run.counts.items() if what not in ("dispatched", "held"))
    assert 150 <= refused <= 240, run.counts


def test_a_page_of_an_engine_that_has_more_than_the_queue_would_send_it_says_what_it_would_say_with_these():
    run = started()
    for _ in range(8):
        offer(run, 0.0)
    load = Load(
        running=6.0, waiting=2.0, kv_usage=0.9, tokens_per_s=60.0, output_tokens=60, preemptions=3, first_tokens=4
    )
    run.observe("a", load, 1.0)
    seen = run.dry._other.endpoints["a"].reading.page
    assert (seen.running, seen.waiting, seen.preemptions, seen.first_tokens) == (2.0, 0.0, 0, None)
    assert seen.kv_usage == pytest.approx(0.3)
    assert 20.0 < seen.tokens_per_s < 60.0
    assert run.dry._other.endpoints["a"].foreign == 0, "what the queue would not have sent is nobody else's"


def test_what_is_learned_of_engines_that_are_gone_is_forgotten():
    run = started()
    run.put_endpoint(EndpointSpec("b", max_running_requests=2), 0.0)
    for ticket in [offer(run, 0.0) for _ in range(4)]:
        run.release(ticket, 1.0, Answer.OK)
    run.remove_endpoints(["b"], 9.0)
    assert run.dry._engines.keys() == {"a"}


# ---- beside a run with the queue on

CHAT = replace(STANDARD, share=1.0, prompt=Lengths(40, 0.5), output=Lengths(25, 0.7), patience_s=120.0)
SLOTS = 4
ENDS_PER_S = 6.3
"""What four slots of the demo's engine end of this traffic, whether it has four or, each as fast, sixty-four."""


class Counting(Core):
    """The real core before simulated engines, and what it made of all requests."""

    def __init__(self, groups: Sequence[Group], setting: Setting) -> None:
        super().__init__(groups, setting)
        self.counts: Counter[str] = Counter()

    def _verdicts(self, decisions: Iterable[Decision]) -> list[Verdict]:
        verdicts = super()._verdicts(decisions)
        self.counts.update("sent" if verdict.engine is not None else "refused" for verdict in verdicts)
        return verdicts


class Rehearsing(Core):
    """The same with the queue off, and a dry run beside it."""

    def __init__(self, groups: Sequence[Group], setting: Setting) -> None:
        super().__init__([], replace(setting, policy=replace(setting.policy, enable_queue=False)))
        self.dry = DryRun(setting.policy, self.controller.endpoints)
        self.controller.watch(self.dry.happened)
        self._names = [f"engine-{number}" for number in range(sum(group.engines for group in groups))]
        self._index = {name: number for number, name in enumerate(self._names)}
        for name in self._names:
            self.controller.put_endpoint(EndpointSpec(name, max_running_requests=setting.max_running_requests), 0.0)

    @property
    def refused(self) -> int:
        return sum(count for (what, _), count in self.dry.counts.items() if what not in ("dispatched", "held"))


@dataclass(frozen=True)
class Before:
    """A contender whose front is given."""

    made: Front
    scrape_interval_s: float = 1.0
    name: str = "ours"

    def front(self, groups: Sequence[Group], seed: int) -> Front:
        del groups, seed
        return self.made

    def engine(self, params: EngineParams) -> EngineParams:
        return params


@pytest.mark.parametrize("load", [0.7, 1.0, 1.5])
@pytest.mark.parametrize(
    ("slots", "decode_s", "limit", "page"),
    [
        (SLOTS, 500e-6, SLOTS, "vllm"),
        (SLOTS, 500e-6, None, "vllm"),
        (SLOTS, 500e-6, None, "none"),
        (64, 0.0, SLOTS, "vllm"),
    ],
    ids=["full", "adaptive", "adaptive, no page", "room"],
)
def test_as_many_are_counted_as_refused_as_the_queue_refuses_within_a_quarter(load, slots, decode_s, limit, page):
    params = EngineParams(max_num_seqs=slots, decode_seq_s=decode_s)
    workload, groups = Workload(classes=(CHAT,)), [Group(params, 1)]
    demands = partial(workload.demands, load * ENDS_PER_S, 200.0, 5)
    setting = Setting(
        Policy(classes=(RequestClass(CHAT.name, CHAT.priority, CHAT.budget_s),)), max_running_requests=limit
    )
    real, dry = Counting(groups, setting), Rehearsing(groups, setting)
    for front in (real, dry):
        World(groups, Before(front), page=page).run(demands(), 200.0)
    asked = real.counts.total()
    assert abs(dry.refused - real.counts["refused"]) <= real.counts["refused"] / 4 + asked / 50


def test_what_would_have_been_refused_is_counted_under_its_outcome():
    run = started(max_queued_requests=1)
    tickets = [offer(run, 0.0) for _ in range(5)]
    assert run.counts == {("dispatched", NAME): 2, ("queue_full", NAME): 2}
    run.release(tickets[4], 6.0)
    assert run.counts[("budget_expired", NAME)] == 1


def test_the_run_remembers_nothing_of_requests_that_are_over():
    run = started()
    for ticket in [offer(run, 0.0) for _ in range(10)]:
        run.release(ticket, 1.0)
    assert run.dry._twins == {}
    assert run.dry._other.waiting == 0
    assert not run.dry._other.endpoints["a"].leases


def test_a_request_that_a_gateway_took_elsewhere_is_over_in_both():
    run = started()
    run.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    tickets = [offer(run, 0.0) for _ in range(5)]
    run.remove_endpoints(["b"], 0.0)
    for ticket in tickets:
        run.move(ticket, "nobody's", 1.0)
    assert run.dry._twins == {}
    assert run.dry._other.waiting == 0
    assert not run.dry._other.endpoints["a"].leases
    assert run.counts == {("dispatched", NAME): 3, ("held", NAME): 2}


def test_endpoints_policy_and_health_reach_both():
    run = started()
    run.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    run.set_up("a", 0.0, is_up=False)
    first, second = offer(run, 0.0), offer(run, 0.0)
    assert (first.endpoint.name, second.endpoint.name) == ("b", "b")
    assert run.counts == {("dispatched", NAME): 1}
    run.set_policy(Policy(classes=(RequestClass("other"),), enable_queue=False), 0.0)
    assert run.dry._other.policy.enable_queue
    run.remove_endpoints(["b"], 0.0)
    assert set(run.dry._other.endpoints) == {"a", "b"}
    run.release(first, 0.0)
    run.release(second, 0.0)
    assert set(run.dry._other.endpoints) == set(run.endpoints) == {"a"}


# With the queue off nobody waits, so nobody leaves or is taken back; and "send" takes no slot.
@pytest.mark.parametrize("event", sorted(NEEDED.keys() - {"cancel", "send", "withdraw"}))
def test_whatever_happens_to_the_real_core_happens_to_the_other_one(event):
    run = started()
    ticket = Ticket(Request("r", 0.0)) if event in ("offer", "adopt") else offer(run, 0.0)
    other, twin = Controller(Policy(enable_queue=True)), Ticket(Request("r", 0.0))
    other.put_endpoint(SAMPLES["spec"], 0.0)
    other.offer(twin, 0.0)
    run.dry._other, run.dry._twins[ticket] = other, twin
    happened, heard = [], []
    run.watch(lambda event, _: happened.append(type(event)))
    other.watch(lambda event, _: heard.append(type(event)))
    known = {"ticket": ticket, "now": 1.0, **SAMPLES}
    assert set(NEEDED[event]) <= known.keys(), "a new kind of argument: give a sample of it"
    getattr(run, event)(**{name: known[name] for name in NEEDED[event]})
    assert happened[0] in heard


def test_an_answer_that_begins_well_ends_the_trial_in_both():
    run = started()
    for _ in range(EJECT_AFTER):
        run.release(offer(run, 0.0), 0.0, Answer.FAILED)
    run.put_endpoint(EndpointSpec("a", max_running_requests=64), 0.0)
    run.tick(run.next_deadline())
    before = dict(run.counts)
    long = offer(run, 20.0)
    run.answered(long, 20.1)
    for _ in range(20):
        run.release(offer(run, 21.0), 22.0, Answer.OK)
    assert run.counts == {**before, ("dispatched", NAME): before["dispatched", NAME] + 21}


def test_what_an_answer_reports_closes_the_gate_in_both():
    run = started()
    first = offer(run, 0.0)
    run.report("a", Load(kv_usage=0.99), 1.0)
    run.release(offer(run, 1.0), 2.0)
    assert run.counts["held", NAME] == 1
    run.release(first, 2.0)


def test_budgets_end_in_the_other_core_as_time_passes_whatever_the_event():
    run = started()
    for _ in range(3):
        offer(run, 0.0)
    run.observe("a", Load(), 6.0)
    assert run.counts[("budget_expired", NAME)] == 1
