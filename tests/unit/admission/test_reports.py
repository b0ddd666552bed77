"""Load that comes with answers (ORCA): sparse, many a second, and merged with what the metrics page said."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.limit import DEFAULT_LAW
from extproc.admission.load import Load
from extproc.admission.ticket import State
from extproc.admission.values import Answer

from .desk import Desk, one

SATURATED_S = LAWS.health.full_s

HOT, COOL = Load(kv_usage=0.97), Load(kv_usage=0.5)


def test_a_report_of_a_full_kv_cache_closes_the_endpoint_and_a_better_one_opens_it() -> None:
    desk = Desk(one("a", 10), one("b", 1))
    desk.fill(2)
    desk.report("a", HOT)
    guest = desk.ask()
    assert guest.state is State.WAITING
    desk.report("b", COOL)
    assert guest.state is State.WAITING, "what b says is b's affair"
    desk.report("a", COOL)
    assert desk.where(guest) == "a"


def test_the_last_report_counts_where_the_page_said_nothing_since() -> None:
    desk = Desk(one("a", 10))
    desk.observe("a", Load(running=3, waiting=1, kv_usage=0.2, gpu_usage=0.6, tokens_per_s=50.0))
    desk.report("a", Load(waiting=4, kv_usage=0.3))
    assert desk.endpoint("a").known == Load(3, 4, 0.3, 0.6, 50.0)
    desk.report("a", Load(running=5, kv_usage=0.9))
    assert desk.endpoint("a").known == Load(5, 1, 0.9, 0.6, 50.0)
    desk.observe("a", Load(waiting=0, kv_usage=0.1))
    assert desk.endpoint("a").known == Load(5, 0, 0.1)
    desk.observe("a", Load(running=1))
    assert desk.endpoint("a").known == Load(1)
    assert desk.endpoint("a").reading.report is None


def test_a_page_without_kv_use_does_not_open_what_a_report_closed_and_one_with_it_does() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.report("a", HOT)
    guest = desk.ask()
    desk.observe("a", Load(running=7))
    assert guest.state is State.WAITING
    desk.observe("a", Load(running=7, kv_usage=0.1))
    assert guest.state is State.LEASED


def test_what_others_have_in_the_kv_cache_is_known_by_report_as_by_page() -> None:
    desk = Desk(one("a", 10, kv_capacity_tokens=10_000))
    desk.ask()
    desk.report("a", Load(kv_usage=0.9))
    excess = desk.endpoint("a").kv.excess
    assert 0 < excess < 9000
    desk.ask()
    desk.report("a", Load(kv_usage=0.9))
    assert 0 < desk.endpoint("a").kv.excess < excess, "our own part has grown"
    desk.observe("a", Load(running=7))
    assert desk.endpoint("a").kv.excess > 0
    desk.observe("a", Load(running=7, kv_usage=0.0))
    assert desk.endpoint("a").kv.excess == 0


def test_a_report_without_kv_use_does_not_open_what_the_page_closed() -> None:
    desk = Desk(one("a", 10, kv_capacity_tokens=10_000))
    desk.ask()
    desk.observe("a", HOT)
    excess = desk.endpoint("a").kv.excess
    desk.report("a", Load(running=1, waiting=0))
    assert desk.endpoint("a").closed_until is not None
    assert desk.endpoint("a").kv.excess == excess > 0


def test_a_report_without_kv_use_makes_no_older_report_last() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.report("a", HOT)
    desk.report("a", Load(running=1, waiting=0))
    assert desk.endpoint("a").known == Load(1, 0)
    assert desk.ask().state is State.LEASED


def test_a_report_of_low_kv_use_does_not_open_what_gpu_use_closed() -> None:
    desk = Desk(one("a", 10), max_gpu_usage=0.9)
    desk.ask()
    desk.observe("a", Load(gpu_usage=0.95))
    desk.report("a", COOL)
    assert desk.ask().state is State.WAITING


def test_a_report_does_not_cut_short_how_long_a_full_engine_is_left_alone() -> None:
    desk = Desk(one("a", 10))
    first, _ = desk.fill(2)
    desk.release(first, Answer.SATURATED)
    desk.report("a", COOL)
    guest = desk.ask()
    assert guest.state is State.WAITING
    desk.advance(SATURATED_S)
    assert guest.state is State.LEASED


def test_an_endpoint_without_a_page_opens_with_its_last_answer() -> None:
    """Nobody would tell it that the cache is empty again."""
    desk = Desk(one("a", 10, kv_capacity_tokens=10_000))
    tickets = desk.fill(2)
    desk.report("a", HOT)
    guest = desk.ask()
    desk.release(tickets[0])
    assert guest.state is State.WAITING
    desk.release(tickets[1])
    assert guest.state is State.LEASED
    assert desk.endpoint("a").kv.excess == 0
    assert desk.endpoint("a").known == HOT


def test_an_endpoint_with_a_page_waits_for_that() -> None:
    desk = Desk(one("a", 10))
    ticket = desk.ask()
    desk.observe("a", COOL)
    desk.report("a", HOT)
    guest, another = desk.ask(), desk.ask()
    desk.release(ticket)
    assert (guest.state, another.state) == (State.LEASED, State.WAITING), "one at a time until the page says more"
    desk.observe("a", COOL)
    assert another.state is State.LEASED


def test_reports_become_stale_by_themselves() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.report("a", HOT)
    guest = desk.ask()
    desk.advance(9.99)
    assert guest.state is State.WAITING
    desk.advance(0.01)
    assert guest.state is State.LEASED
    assert desk.endpoint("a").known is None
    assert desk.core._fleet.due_at is None


@pytest.mark.parametrize("last", [HOT, COOL])
def test_when_the_page_is_stale_the_report_is_what_is_known(last: Load) -> None:
    desk = Desk(one("a", 10), one("b", kv_capacity_tokens=10_000))
    desk.fill(2)
    for name in "ab":
        desk.observe(name, Load(running=4, kv_usage=0.1, first_tokens=0))
    desk.advance(5.0)
    for name in "ab":
        desk.report(name, last)
    excess = desk.endpoint("b").kv.excess
    desk.advance(5.0)
    for endpoint in (desk.endpoint("a"), desk.endpoint("b")):
        assert endpoint.reading.page is None
        assert endpoint.known == last
        assert not endpoint.sees_first_tokens
    assert desk.endpoint("b").kv.excess == excess > 0
    assert desk.ask().state is (State.WAITING if last is HOT else State.LEASED)


def test_when_the_report_is_stale_the_page_is_what_is_known() -> None:
    desk = Desk(one("a", 10, kv_capacity_tokens=10_000))
    desk.ask()
    desk.report("a", HOT)
    guest = desk.ask()
    desk.advance(5.0)
    desk.observe("a", Load(running=4))
    assert guest.state is State.WAITING
    desk.advance(5.0)
    assert guest.state is State.LEASED
    assert desk.endpoint("a").known == Load(running=4)
    assert desk.endpoint("a").kv.excess == 0


def test_any_number_of_reports_moves_neither_the_limit_nor_the_prompts_nor_the_next_reading() -> None:
    """`World.report` checks that nothing counted moves; here, that the next look at the page counts as without them."""
    values = []
    for reports in (0, 1000):
        desk = Desk(one("a", None))
        desk.observe("a", Load(running=10, tokens_per_s=1000, first_tokens=0))
        desk.fill(DEFAULT_LAW.start + 5)
        for _ in range(reports):
            desk.advance(0.9 / reports)
            said = Load(running=10, kv_usage=0.99, preemptions=1, tokens_per_s=1.0, first_tokens=9)
            desk.report("a", said)
        desk.report("a", COOL)
        desk.advance(100.0 + 1.0 - desk.now)
        desk.observe("a", Load(running=10, tokens_per_s=1000, first_tokens=3))
        endpoint = desk.endpoint("a")
        values.append((endpoint.limit.value, endpoint.prefill.tokens, endpoint.prefill.limit))
    assert values[0] == values[1]
    assert values[0][0] > DEFAULT_LAW.start


def test_the_size_of_the_kv_cache_may_come_with_a_report_unless_the_config_says_it() -> None:
    desk = Desk(one("a"), one("b", kv_capacity_tokens=500))
    for name in "ab":
        desk.report(name, Load(kv_capacity_tokens=4096))
    assert (desk.endpoint("a").kv.capacity, desk.endpoint("b").kv.capacity) == (4096, 500)
    desk.put(one("b"))
    assert desk.endpoint("b").kv.capacity == 4096


def test_a_report_of_an_unknown_endpoint_is_ignored() -> None:
    desk = Desk(one("a"))
    desk.report("nowhere", HOT)
    assert desk.endpoint("a").known is None


def test_the_size_of_a_cache_that_a_report_told_is_forgotten_with_it() -> None:
    desk = Desk(one("a", 10))
    desk.report("a", Load(kv_capacity_tokens=1))
    assert desk.endpoint("a").kv.capacity == 1
    desk.advance(desk.core.policy.stale_after_s)
    assert desk.endpoint("a").kv.capacity is None
    desk.observe("a", Load(kv_capacity_tokens=5000))
    desk.report("a", Load(kv_capacity_tokens=1))
    assert desk.endpoint("a").kv.capacity == 5000, "the page's word goes first, and lasts"
