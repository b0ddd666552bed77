"""What engines run that is not ours."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.reading import MOST_LET, Foreign
from extproc.admission.values import EndpointSpec, RequestClass

from .desk import Desk

FOREIGN_S = LAWS.foreign.steady_s


def test_what_an_engine_runs_when_first_looked_at_counts_against_its_limit() -> None:
    """A sidecar that was killed left answers running; its successor has no leases for them."""
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.observe("a", Load(running=2, waiting=1))
    tickets = desk.fill(3)
    assert [desk.where(ticket) for ticket in tickets] == ["a", None, None]


def test_what_ran_before_gives_its_room_back_when_it_ends() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.observe("a", Load(running=4))
    first, second, third = desk.fill(3)
    desk.advance(1.0)
    desk.observe("a", Load(running=3))
    assert [desk.where(ticket) for ticket in (first, second)] == ["a", None]
    desk.observe("a", Load(running=3))  # this one was not there yet when the page was written
    assert desk.core.endpoints["a"].foreign == 3
    desk.advance(1.0)
    desk.observe("a", Load(running=3))  # now it is one of the three
    assert desk.where(second) == "a"
    desk.advance(1.0)
    desk.observe("a", Load(running=2))
    assert desk.core.endpoints["a"].foreign == 0
    assert desk.where(third) == "a"


def test_later_telemetry_never_finds_new_foreign_requests() -> None:
    """Between two looks at an engine what it holds and what we lent differ by what is on the way."""
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.observe("a", Load(running=0))
    desk.advance(1.0)
    desk.observe("a", Load(running=4, waiting=9))
    assert all(desk.where(ticket) == "a" for ticket in desk.fill(4))


def test_a_new_look_at_who_else_is_there_forgets_nobody_for_ours_that_are_on_their_way() -> None:
    """Found by the storm of sidecars: a page between grants and their arrival took those for a dead one's."""
    desk = Desk(EndpointSpec("a", max_running_requests=8))
    desk.observe("a", Load(running=3))
    desk.fill(4)  # not there yet
    desk.endpoint("a").meet_again()
    desk.observe("a", Load(running=3))
    assert desk.endpoint("a").foreign == 3
    desk.advance(1.0)
    desk.endpoint("a").meet_again()
    desk.observe("a", Load(running=5))
    assert desk.endpoint("a").foreign == 1


def test_steady_traffic_of_others_does_not_keep_us_out_for_ever() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4), classes=(RequestClass("std", 0, 600.0),))
    desk.observe("a", Load(running=4))
    tickets = desk.fill(4)
    for _ in range(int(FOREIGN_S) + 1):
        desk.advance(1.0)
        desk.observe("a", Load(running=4))
    assert sum(desk.where(ticket) == "a" for ticket in tickets) == 2
    for _ in range(3 * int(FOREIGN_S)):
        desk.advance(1.0)
        desk.observe("a", Load(running=4))
    assert all(desk.where(ticket) == "a" for ticket in tickets)


def full_of_others(spec: EndpointSpec, **policy: Any) -> Desk:
    """Let its page say for some seconds that others keep its batch full, and a queue inside."""
    desk = Desk(spec, **policy)
    for _ in range(5):
        desk.observe("a", Load(running=30, waiting=10, kv_usage=0.99))
        desk.advance(1.0)
    return desk


def test_where_others_fill_an_engine_past_the_queue_a_learned_limit_holds_a_few_of_ours_back_in_vain() -> None:
    """Nine of ten requests came another way, and of ours two thirds were refused that least request would serve."""
    desk = full_of_others(EndpointSpec("a"))
    assert desk.endpoint("a").foreign >= desk.endpoint("a").limit.value
    tickets = desk.fill(12)
    assert sum(desk.where(ticket) == "a" for ticket in tickets) == 40 // LAWS.foreign.each


@pytest.mark.parametrize(
    "pages", [(1e6,) * 6, (1e6, 0.0) * 3, (0.0, 0.0, 1e6) * 2], ids=["always", "now and then", "rarely"]
)
def test_a_page_that_tells_of_a_million_others_lets_no_more_of_ours_in_than_a_few(pages: tuple[float, ...]) -> None:
    """It lifted all limits: 164 were at an engine of eight slots, and none of them went elsewhere."""
    desk = Desk(EndpointSpec("a"))
    desk.fill(100)
    for running in pages:
        desk.observe("a", Load(running=running, waiting=0, max_running=8))
        desk.advance(1.0)
    assert 8 <= len(desk.leased) <= MOST_LET


def test_below_the_batch_size_a_queue_inside_is_of_others_and_no_reason_against_a_higher_limit() -> None:
    """It stayed at the 16 that it starts with, before engines of 32 that others filled: each of ours waited 30 s."""
    desk = Desk(EndpointSpec("a"))
    desk.fill(40)
    for _ in range(8):
        desk.observe("a", Load(running=32, waiting=8, tokens_per_s=600.0, kv_usage=0.5, output_tokens=600))
        desk.advance(1.0)
    assert desk.endpoint("a").limit.batch == 32
    assert desk.endpoint("a").limit.value == 32


def beside_four_of_eight(spec: EndpointSpec, **policy: Any) -> Desk:
    """Let its pages say that an engine with a batch of eight runs four of others, who came after its first page."""
    desk = Desk(spec, **policy)
    for running in (0, 4, 4):
        desk.observe("a", Load(running=running, waiting=0, max_running=8))
        desk.advance(1.0)
    return desk


def test_others_who_stay_in_a_batch_take_places_of_ours() -> None:
    """Ours were as many as the batch has places, and waited behind others inside: of two sidecars that share nothing
    a third was answered in time, and nine of ten is."""
    desk = beside_four_of_eight(EndpointSpec("a"))
    tickets = desk.fill(12)
    assert sum(desk.where(ticket) == "a" for ticket in tickets) == 4
    desk.advance(1.0)
    desk.observe("a", Load(running=6, waiting=0, max_running=8))
    assert sum(desk.where(ticket) == "a" for ticket in tickets) == 6, "there are two now"


def test_what_one_page_shows_beside_ours_may_be_ours_that_have_just_ended() -> None:
    desk = Desk(EndpointSpec("a"))
    for running in (0, 4):
        desk.observe("a", Load(running=running, waiting=0, max_running=8))
        desk.advance(1.0)
    assert sum(desk.where(ticket) == "a" for ticket in desk.fill(12)) == 8


def test_what_a_page_shows_again_and_again_while_ours_end_is_no_others() -> None:
    """An exporter that looks every 15 s: what had ended took places of ours until it looked again."""
    desk = Desk(EndpointSpec("a"))
    ours = desk.fill(8)
    for _ in range(6):
        desk.observe("a", Load(running=8, waiting=0, max_running=8))
        desk.advance(1.0)
        if len(ours) > 2:
            desk.release(ours.pop())
    assert sum(desk.where(ticket) == "a" for ticket in desk.fill(12)) == 6


@pytest.mark.parametrize("chosen", [{"max_running_requests": 8}, {"kv_capacity_tokens": 1_000_000}])
def test_where_a_person_chose_a_number_others_take_no_places(chosen: dict[str, int]) -> None:
    desk = beside_four_of_eight(EndpointSpec("a", **chosen))
    assert sum(desk.where(ticket) == "a" for ticket in desk.fill(12)) == 8


def test_a_number_that_is_chosen_now_gives_others_places_back_at_once() -> None:
    desk = beside_four_of_eight(EndpointSpec("a"))
    tickets = desk.fill(12)
    desk.put(EndpointSpec("a", kv_capacity_tokens=1_000_000))
    assert sum(desk.where(ticket) == "a" for ticket in tickets) == 8


def test_below_the_batch_size_others_take_no_places() -> None:
    """What the wanted time per token allows is ours: it shrinks by what others make slow."""
    desk = Desk(EndpointSpec("a"))
    for running in (0, 4, 4):
        desk.observe("a", Load(running=running, waiting=0, max_running=64))
        desk.advance(1.0)
    limit = desk.endpoint("a").limit
    assert limit.value < 64
    assert sum(desk.where(ticket) == "a" for ticket in desk.fill(40)) == limit.value


def test_thresholds_that_a_person_chose_hold_beside_others_too() -> None:
    desk = full_of_others(EndpointSpec("a"), max_kv_usage=0.9)
    assert sum(desk.where(ticket) == "a" for ticket in desk.fill(12)) <= 1


@pytest.mark.parametrize("chosen", [{"max_running_requests": 16}, {"kv_capacity_tokens": 100}])
def test_a_number_that_a_person_chose_holds_beside_others_too(chosen: dict[str, int]) -> None:
    desk = full_of_others(EndpointSpec("a", **chosen))
    assert [desk.where(ticket) for ticket in desk.fill(12)] == [None] * 12


def test_a_number_that_is_chosen_now_holds_from_now_on() -> None:
    desk = full_of_others(EndpointSpec("a"))
    desk.core.put_endpoint(EndpointSpec("a", max_running_requests=4), desk.now)
    assert [desk.where(ticket) for ticket in desk.fill(12)] == [None] * 12


def test_foreign_requests_are_forgotten_with_stale_telemetry() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.observe("a", Load(running=4))
    (ticket,) = desk.fill(1)
    assert desk.where(ticket) is None
    desk.advance(desk.core.policy.stale_after_s)
    assert desk.where(ticket) == "a"


def test_leases_granted_before_the_first_telemetry_are_not_foreign() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.fill(2)
    desk.observe("a", Load(running=2))
    assert all(desk.where(ticket) == "a" for ticket in desk.fill(2))


def test_telemetry_that_does_not_say_what_runs_tells_nothing_of_others() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=2))
    desk.observe("a", Load(kv_usage=0.5))
    desk.observe("a", Load(running=1))  # the first that says it
    assert [desk.where(ticket) for ticket in desk.fill(2)] == ["a", None]


def test_a_page_that_no_longer_says_what_runs_takes_its_foreign_requests_back() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    desk.observe("a", Load(running=4, kv_usage=0.1))
    (ticket,) = desk.fill(1)
    assert desk.where(ticket) is None
    desk.observe("a", Load(kv_usage=0.1))
    assert desk.where(ticket) == "a"


def test_a_page_that_lies_about_what_runs_keeps_an_endpoint_closed_no_longer_than_a_true_one() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4), classes=(RequestClass("std", 0, 600.0),))
    desk.observe("a", Load(running=1e6))
    (ticket,) = desk.fill(1)
    for _ in range(int(FOREIGN_S) + 1):
        assert desk.where(ticket) is None or desk.now >= FOREIGN_S
        desk.advance(1.0)
        desk.observe("a", Load(running=1e6))
    assert desk.where(ticket) == "a"


def test_a_count_that_is_mostly_of_others_requests_does_not_make_an_engine_seem_slow() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=100))
    page = Load(first_tokens=0, running=30.0, waiting=0.0)
    desk.observe("a", page)

    def predicted_s() -> float:
        ticket = desk.ask(prompt_tokens=9000)
        return ticket.computed_at - desk.now

    before_s = predicted_s()
    for _ in range(6):
        desk.advance(1.0)
        desk.observe("a", page)
    assert desk.endpoint("a").foreign > 20
    assert predicted_s() == pytest.approx(before_s)


def test_an_answer_runs_beside_what_others_sent_too() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=100))
    desk.observe("a", Load(running=7.0, waiting=3.0))
    assert [desk.ask(sequences=sequences).beside for sequences in (1, 2)] == [11, 13]


def test_where_a_few_others_run_out_each_first_token_counted_is_one_of_ours() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=100))
    desk.observe("a", Load(first_tokens=0, running=1.0, waiting=0.0))
    ours = desk.fill(6, prompt_tokens=600)
    desk.observe("a", Load(first_tokens=2, running=7.0, waiting=0.0))
    assert desk.endpoint("a").foreign == 1
    assert [ticket.prompt_pending for ticket in ours] == [False, False, True, True, True, True]


def test_one_more_that_is_left_to_telemetry_makes_them_no_fewer_though_the_limit_has_fallen() -> None:
    others = Foreign()
    others.add(20, 32, 0.0)
    others.add(1, 16, 1.0)
    assert others.count == 20


def test_what_is_left_behind_while_pages_show_ours_alone_keeps_its_places_at_the_next_page() -> None:
    foreign = Foreign()
    for now in range(20):
        foreign.follow(Load(running=2, waiting=0), (), 2, 8, float(now))
    foreign.add(2, 8, 19.5)
    foreign.follow(Load(running=2, waiting=0), (), 2, 8, 20.0)
    assert foreign.count == 2


def test_a_page_that_shows_what_one_did_long_ago_shows_others_where_ours_were_then() -> None:
    foreign = Foreign()
    for ours in (8, 2, 2):
        foreign.follow(Load(running=8, waiting=0), (), ours, 8, 0.0, is_learned=True, in_batch=True)
        if ours == 8:
            foreign.forget()
    assert foreign.takes == 6


@pytest.mark.parametrize(("most", "lets"), [(16, MOST_LET), (40, 40), (64, 50)])
def test_for_others_sake_as_many_are_let_in_as_the_limit_is_or_a_few_above_a_low_one(most: int, lets: int) -> None:
    foreign = Foreign()
    foreign.follow(Load(running=50 * LAWS.foreign.each, waiting=0), (), 0, most, 0.0, is_learned=True)
    assert foreign.lets == lets
