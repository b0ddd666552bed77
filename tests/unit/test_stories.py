"""The story of a request: what happened to it, event by event, in words."""

from __future__ import annotations

import pytest

from extproc.admission.controller import Controller
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.observe import stories
from extproc.observe.log import CAME_LATE
from extproc.observe.stories import Stories

WALL_S = 1_700_000_000.0  # 22:13:20 UTC, at 100 s of the core's time


class Office:
    """A core, who remembers its requests, and a clock that stands."""

    def __init__(self, limit: int = 1, **policy: object) -> None:
        self.now = 100.0
        self.core = Controller(Policy(classes=(RequestClass("std", 0, 5.0),), shed=False, **policy))  # type: ignore[arg-type]
        self.stories = Stories(self.core, lambda: self.now)
        for name in ("a", "b"):
            self.core.put_endpoint(EndpointSpec(name, max_running_requests=limit), self.now)
            self.core.set_up(name, self.now, is_up=True)

    def offer(self, request_id: str, **facts: object) -> Ticket:
        ticket = Ticket(Request(request_id, self.now, **facts))  # type: ignore[arg-type]
        self.note(self.core.offer(ticket, self.now))
        return ticket

    def note(self, decisions: list) -> None:  # type: ignore[type-arg]
        for decision in decisions:
            self.stories.decided(decision)

    def tell(self, request_id: str) -> list[str]:
        lines = self.stories.tell(request_id, WALL_S + self.now - 100.0)
        assert lines is not None
        return lines


def test_a_request_that_waited_tells_why_where_it_went_and_how_it_ended() -> None:
    office = Office()
    first, _ = office.offer("first", session="s"), office.offer("other")
    late = office.offer("late", session="s", tenant="acme", prompt_tokens=10)
    office.now = 100.5
    assert (
        "waits still, at place 1 of its line, because as many requests as its limit allows" in office.tell("late")[-1]
    )
    office.now = 102.25
    office.note(office.core.tick(office.now))
    office.note(office.core.release(first, office.now, Answer.OK))
    office.core.first_token(late, 102.75)
    assert office.tell("late")[-1].endswith("holds its slot: its answer has begun well")
    office.core.release(late, 104.0, Answer.OK)
    office.now = 110.0
    assert office.tell("late")[0].startswith("22:13:20.000     +0.000 s  arrived: class std")
    arrived, *rest = [line.partition("+")[2] for line in office.tell("late")]
    assert "tenant 'acme', of a session, it may wait 5.0 s" in arrived
    assert arrived.endswith("taken for 10 tokens of prompt and 200 of answer")
    assert rest[0].endswith("limit allows are in flight; 0 of its class or above were there before it")
    assert rest[1:] == [
        "0.000 s  a is its home: nobody else gets it until +1.000 s",
        "2.250 s  dispatched to a, which held 1 with it, after 2.250 s",
        "2.750 s  its first token was seen",
        "4.000 s  gave its slot back after 1.750 s: its answer came whole",
    ]


def test_of_a_home_that_was_down_no_time_is_told_for_which_it_is_kept() -> None:
    """`vllm-b is its home: nobody else gets it until -47714.689 s` was said of one whose only server was down."""
    office = Office(enable_queue=True)
    office.core.set_up("b", office.now, is_up=False)
    office.offer("first")
    office.offer("waits", home="b")
    assert [line for line in office.tell("waits") if "home" in line] == ["22:13:20.000     +0.000 s  b is its home"]


def test_one_that_runs_where_nobody_is_sent_any_more_tells_so() -> None:
    """Found on call: of a request at an engine that hung, and was down by its checks, it said only `no answer yet`."""
    office = Office()
    runs = office.offer("runs")
    assert runs.endpoint is not None
    name = runs.endpoint.name
    assert office.tell("runs")[-1].endswith("holds its slot: no answer was seen yet")
    office.core.set_up(name, office.now, is_up=False)
    assert office.tell("runs")[-1].endswith(stories._HANGS)
    assert f"holds its slot: no answer was seen yet; {name} is down now. What" in office.tell("runs")[-1]


def test_a_refusal_tells_its_outcome_and_when_to_try_again() -> None:
    office = Office(enable_queue=True)
    for name in ("x", "y", "z"):
        office.offer(name)
    office.now = 105.0
    office.note(office.core.tick(office.now))
    told = office.tell("z")[-1]
    assert told.startswith("22:13:25.000     +5.000 s  refused, budget_expired (429): No inference server had room")
    assert told.endswith("; Retry-After 5 s"), "as long as it waited: nothing else tells before the first answers"


def test_one_that_came_back_too_late_tells_so_and_not_that_it_waited() -> None:
    office = Office(enable_queue=True)
    for name in ("x", "y"):
        office.offer(name)
    ticket = Ticket(Request("late", office.now - 13.0))
    office.note(office.core.offer(ticket, office.now))
    told = office.tell("late")
    assert len(told) == 2
    assert f"(its time was {CAME_LATE}); Retry-After 1 s" in told[1]


@pytest.mark.parametrize(
    ("wait_s", "hint"),
    [
        (0.201, ", at 200 ms, Envoy's message_timeout where none is set (`extproc check FILE --envoy BOOTSTRAP`)"),
        (
            5.01,
            ", at 5 s: a timeout, perhaps, of Envoy (message_timeout, stream_idle_timeout, a route's) or the client",
        ),
        (0.02, ""),
        (0.199, ""),
        (1.5, ""),
    ],
)
def test_one_that_was_given_up_while_it_waited_names_both_who_may_have_and_a_timeout_that_fits(wait_s, hint) -> None:
    office = Office()
    *_, ticket = (office.offer(name) for name in ("x", "y", "z"))
    office.now = 100.0 + wait_s
    office.core.cancel(ticket, office.now)
    office.stories.cancelled(ticket, wait_s)
    assert office.tell("z")[-1].endswith(f"its client, or Envoy, gave it up while it waited{hint}")


def test_who_was_never_here_has_no_story_and_only_so_many_are_remembered() -> None:
    office = Office(limit=10_000)
    for number in range(stories.MOST + 10):
        office.offer(f"r{number}")
    assert office.stories.tell("nobody", WALL_S) is None
    assert office.stories.tell("r9", WALL_S) is None
    assert office.stories.tell("r10", WALL_S) is not None
    assert len(office.stories._kept) == stories.MOST


def test_one_that_needs_more_than_there_is_tells_how_many_were_let_past_it() -> None:
    office = Office(limit=2)
    for name in ("x", "y"):
        office.offer(name)
    office.offer("big", sequences=2)
    office.offer("small", sequences=1)
    assert office.tell("big")[-1].endswith("; 1 that fit were let past it")


def test_one_over_its_tenants_cap_tells_what_that_had_in_flight_and_the_last_refusals_are_counted_by_tenant() -> None:
    office = Office(tenants=TenantRules(default=TenantRule(max_in_flight=3)))
    for number in range(5):
        office.offer(f"evil-{number}", tenant="evil")
    office.offer("nice", tenant="nice")
    assert "(it has 3 of 3 in flight); Retry-After 1 s" in office.tell("evil-4")[-1]
    assert office.stories.refused_by_tenant() == {"evil": 2}
    *_, left = (office.offer(name, tenant="nice") for name in ("holds", "leaves"))
    office.core.cancel(left, office.now)
    office.stories.cancelled(left, 0.0)
    assert office.stories.refused_by_tenant() == {"evil": 2}, "who leaves is refused nothing"


def test_of_two_requests_of_one_id_the_last_is_told() -> None:
    office = Office(limit=10)
    office.offer("same", tenant="before")
    office.now = 101.0
    office.offer("same", tenant="after")
    assert "tenant 'after'" in office.tell("same")[0]
