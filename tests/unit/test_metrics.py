"""Metrics on a real core: what is counted, what the gauges say, and a page that is one moment however it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.observe.metrics import PIECE_LINES, Metrics

CLASSES = (RequestClass("low", 0, 30.0), RequestClass("high", 1, 5.0))


class Telemetry:
    """Who says how the scraping goes, in a test's words."""

    def __init__(self) -> None:
        self.ages: dict[str, float | None] = {}

    def age_s(self, name: str) -> float | None:
        return self.ages.get(name)

    def follows(self, name: str) -> bool:
        return name in self.ages

    def errors(self) -> list[tuple[str, str, int]]:
        return []


class Metered:
    """A core with endpoints a and b of one slot each, its metrics, and a clock that the test moves."""

    def __init__(self, endpoints: int = 2) -> None:
        self.now = 100.0
        self.streams = 0
        self.telemetry = Telemetry()
        self.controller = Controller(Policy(classes=CLASSES))
        self.metrics = Metrics(
            self.controller, lambda: self.streams, self.telemetry, clock=lambda: self.now, ignored=lambda: {"budget": 3}
        )
        for number in range(endpoints):
            name = "ab"[number] if endpoints <= 2 else f"e{number}"
            self.controller.put_endpoint(EndpointSpec(name, max_running_requests=1), self.now)
            self.controller.set_up(name, self.now, is_up=True)

    def offer(self, name: str = "r", request_class: str = "low", sequences: int = 1) -> Ticket:
        ticket = Ticket(Request(name, self.now, request_class=request_class, sequences=sequences))
        for decision in self.controller.offer(ticket, self.now):
            self.metrics.decided(decision)
        return ticket

    def page(self) -> dict[str, float]:
        text = b"".join(self.metrics.pieces()).decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}


@pytest.fixture
def desk() -> Metered:
    return Metered()


def test_the_oldest_waiting_request_of_each_class_has_an_age_and_a_class_that_waits_not_has_0(desk):
    desk.offer("runs-1")
    desk.offer("runs-2")
    desk.offer("first")
    desk.now += 2
    desk.offer("second")
    desk.now += 3
    page = desk.page()
    assert page['extproc_oldest_waiting_seconds{class="low"}'] == 5
    assert page['extproc_oldest_waiting_seconds{class="high"}'] == 0
    assert page['extproc_class_budget_seconds{class="high"}'] == 5


def test_the_oldest_lease_is_counted_from_its_dispatch(desk):
    first = desk.offer()
    desk.now += 4
    desk.offer()
    desk.now += 3
    ages = {desk.page()[f'extproc_oldest_lease_seconds{{endpoint="{name}"}}'] for name in "ab"}
    assert ages == {7, 3}
    desk.controller.release(first, desk.now)
    assert desk.page()[f'extproc_oldest_lease_seconds{{endpoint="{first.endpoint.name}"}}'] == 0


def test_a_lease_that_comes_from_another_sidecar_is_as_old_as_it_was_there(desk):
    first = desk.offer()
    desk.now += 3
    adopted = Ticket(Request("adopted", desk.now))
    desk.controller.adopt(adopted, first.endpoint.name, desk.now, held_s=4000.0)
    assert desk.page()[f'extproc_oldest_lease_seconds{{endpoint="{first.endpoint.name}"}}'] == 4000


def test_what_an_endpoint_holds_is_counted_as_requests_and_as_the_sequences_that_its_limit_counts(desk):
    asked = desk.offer(sequences=3)
    at = f'{{endpoint="{asked.endpoint.name}"}}'
    page = desk.page()
    assert (page[f"extproc_inflight_requests{at}"], page[f"extproc_inflight_sequences{at}"]) == (1, 3)


def test_a_closed_endpoint_says_by_what(desk):
    def closed(name: str) -> set[str]:
        page = desk.page()
        reasons = ("down", "ejected", "asleep", "doubt", "load")
        return {one for one in reasons if page[f'extproc_endpoint_closed{{endpoint="{name}",reason="{one}"}}']}

    assert closed("a") == closed("b") == set()
    desk.controller.observe("a", Load(asleep=True), desk.now)
    assert (closed("a"), closed("b")) == ({"asleep"}, set())
    desk.controller.set_up("a", desk.now, is_up=False)
    desk.controller.observe("a", Load(asleep=False), desk.now)
    assert (closed("a"), closed("b")) == ({"down"}, set())
    for _ in range(5):
        desk.controller.release(desk.offer(), desk.now, Answer.FAILED)
    assert closed("b") == {"doubt"}, "the last one is not ejected"
    desk.controller.endpoints["b"].health.ejected_until = desk.now + 1
    desk.controller.endpoints["b"].health._look()
    assert closed("b") == {"ejected", "doubt"}


def test_an_endpoint_that_nobody_has_heard_of_may_be_used_and_is_not_known(desk):
    desk.controller.set_up("a", desk.now, is_up=None)
    page = desk.page()
    assert [page[f'extproc_endpoint_{what}{{endpoint="a"}}'] for what in ("up", "known")] == [1, 0]
    assert page['extproc_endpoint_known{endpoint="b"}'] == 1


def test_the_limit_that_holds_an_endpoints_line_has_a_line_and_an_endpoint_with_room_has_none(desk):
    def limits() -> set[str]:
        return {name for name in desk.page() if name.startswith("extproc_limited_by{")}

    desk.offer()
    assert len(limits()) == 1, "one of two is full"
    desk.offer()
    assert limits() == {f'extproc_limited_by{{endpoint="{name}",limit="limit"}}' for name in "ab"}
    desk.controller.set_up("a", desk.now, is_up=False)
    assert 'extproc_limited_by{endpoint="a",limit="down"}' in limits()


def test_for_how_long_an_endpoint_has_been_full_is_counted_from_when_it_became_so(desk):
    def full() -> float:
        return desk.page()['extproc_endpoint_full_seconds{endpoint="a"}']

    assert full() == 0.0
    for _ in range(2):
        desk.offer()  # one at each
    desk.now += 3.0
    desk.offer()  # finds it full
    assert full() == 3.0
    desk.controller.set_up("a", desk.now, is_up=False)
    desk.now += 2.0
    assert full() == 5.0, "it is another reason, and no room all the same"


def test_requests_that_found_no_room_are_counted_by_what_held_them_once_they_leave(desk):
    waiting = [desk.offer(request_class="high") for _ in range(4)][2:]
    assert not [name for name in desk.page() if name.startswith("extproc_held_requests_total")], "they still wait"
    for decision in desk.controller.drain(desk.now):
        desk.metrics.decided(decision)
    desk.metrics.cancelled(waiting[0], 1.0)
    assert desk.page()['extproc_held_requests_total{class="high",limit="limit"}'] == 3


def test_the_share_of_the_budget_is_counted_by_the_requests_own_budget_and_not_where_none_may_wait(desk):
    running = [desk.offer(), desk.offer()]
    desk.controller.set_policy(replace(desk.controller.policy, shed=False), desk.now)
    waiting = Ticket(Request("own", desk.now, request_class="low", budget_s=10.0))
    assert desk.controller.offer(waiting, desk.now) == []
    desk.now += 4.0
    for decision in desk.controller.release(running[0], desk.now):
        desk.metrics.decided(decision)
    page = desk.page()
    assert page['extproc_budget_used_ratio_bucket{class="low",le="0.3"}'] == 2, "the two that ran at once"
    assert page['extproc_budget_used_ratio_bucket{class="low",le="0.4"}'] == 3
    assert page['extproc_queue_wait_seconds_bucket{class="low",le="5.0"}'] == 3
    desk.controller.release(running[1], desk.now)
    now = Ticket(Request("now", desk.now, request_class="low", budget_s=0.0))
    for decision in desk.controller.offer(now, desk.now):
        desk.metrics.decided(decision)
    page = desk.page()
    assert page['extproc_budget_used_ratio_count{class="low"}'] == 3
    assert page['extproc_queue_wait_seconds_count{class="low"}'] == 4


def test_telemetry_is_stale_when_old_or_never_there_and_not_said_of_what_is_not_scraped(desk):
    desk.telemetry.ages = {"a": 10.5}
    assert desk.page()['extproc_telemetry_stale{endpoint="a"}'] == 1
    assert 'extproc_telemetry_stale{endpoint="b"}' not in desk.page()
    desk.telemetry.ages = {"a": 9.5, "b": None}
    assert desk.page()['extproc_telemetry_stale{endpoint="a"}'] == 0
    assert desk.page()['extproc_telemetry_stale{endpoint="b"}'] == 1


def test_unknown_classes_are_counted_whoever_is_refused_or_served_and_never_become_labels(desk):
    for request_class in ("high", "", "Low", "platinum"):
        desk.offer(request_class=request_class)
    page = desk.page()
    assert page['extproc_ignored_values_total{header="class"}'] == 0, "two run, and two wait undecided"
    for decision in desk.controller.drain(desk.now):
        desk.metrics.decided(decision)
    for request_class in ("gold", "low", ""):
        desk.offer(request_class=request_class)
    page = desk.page()
    assert page['extproc_ignored_values_total{header="class"}'] == 3
    assert page['extproc_ignored_values_total{header="budget"}'] == 3
    assert not [name for name in page if "platinum" in name]


def test_tenants_that_are_named_have_a_line_each_and_all_others_one_together(desk):
    assert not [name for name in desk.page() if name.startswith("extproc_tenant_inflight")], "no rules, no lines"
    rules = TenantRules({"acme": TenantRule(max_in_flight=1)}, TenantRule(max_in_flight=1))
    desk.controller.set_policy(replace(desk.controller.policy, tenants=rules), desk.now)
    for tenant in ("acme", "acme", "made-up", "made-up", "made-up", "another"):
        ticket = Ticket(Request("r", desk.now, tenant=tenant))
        for decision in desk.controller.offer(ticket, desk.now):
            desk.metrics.decided(decision)
    lines = {name: value for name, value in desk.page().items() if name.startswith("extproc_tenant_")}
    assert lines == {
        'extproc_tenant_inflight_requests{tenant="acme"}': 1,
        'extproc_tenant_inflight_requests{tenant="*"}': 2,
        'extproc_tenant_limited_total{tenant="acme"}': 1,
        'extproc_tenant_limited_total{tenant="*"}': 2,
    }


def test_a_long_page_is_written_in_pieces_that_together_are_the_librarys_own_text():
    desk = Metered(endpoints=PIECE_LINES)
    pieces = list(desk.metrics.pieces())
    text = b"".join(pieces).decode()
    stable = [line for line in text.splitlines() if "process_" not in line]
    whole = generate_latest(desk.metrics.registry).decode()
    assert stable == [line for line in whole.splitlines() if "process_" not in line]
    assert max(piece.count(b"\n") for piece in pieces) <= PIECE_LINES + 2
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))


def test_a_page_is_one_moment_whatever_happens_while_it_is_written(desk):
    desk.streams = 1
    desk.offer()
    pieces = desk.metrics.pieces()
    first = next(pieces)
    desk.streams = 0
    desk.offer()
    text = (first + b"".join(pieces)).decode()
    assert "extproc_streams 1.0" in text
    inflight = [line for line in text.splitlines() if line.startswith("extproc_inflight_requests{")]
    assert sum(float(line.split()[-1]) for line in inflight) == 1


def test_every_value_is_a_number_and_none_a_truth_which_no_encoder_of_otlp_takes(desk):
    desk.telemetry.ages["a"] = 1.0
    desk.offer()
    values = [sample.value for family in desk.metrics.collect() for sample in family.samples]
    assert len(values) > 50
    assert not [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
