"""Where a gateway may go instead of the endpoint picked: some room is kept there, and no limit is passed."""

from __future__ import annotations

import random

import pytest

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

CLASSES = (RequestClass("std", 0, 30.0),)
LIMIT = 8
"""The least of which one may be kept."""
CACHE = 100_000


class Pick:
    """A core whose gateway goes to any of the choices that a request was given, and tells so when an answer begins."""

    def __init__(self, count: int, limit: int = LIMIT, most: int = 2, cache: int | None = None, **policy: bool) -> None:
        self.core = Controller(Policy(classes=CLASSES, shed=False, next_choices=most, **policy))
        self.now, self.limit, self.cache = 0.0, limit, cache
        for number in range(count):
            self.put(f"e{number}")
            self.core.set_up(f"e{number}", now=0.0, is_up=True)

    def put(self, name: str, limit: int | None = None, cache: int | None = None) -> None:
        limit, cache = self.limit if limit is None else limit, self.cache if cache is None else cache
        spec = EndpointSpec(name, name, max_running_requests=limit, kv_capacity_tokens=cache)
        self.core.put_endpoint(spec, self.now)

    def ask(self, **request: object) -> Ticket:
        ticket = Ticket(Request("r", self.now, **request))
        self.core.offer(ticket, self.now)
        return ticket

    def fill(self, name: str, but: int = 0, **request: object) -> list[Ticket]:
        """Have all slots of an endpoint taken, `but` so many."""
        endpoint = self.core.endpoints[name]
        filled = []
        while endpoint.sequences + endpoint.reserved < endpoint.limit.value - but:
            ticket = self.ask(home=name, **request)
            self.core.move(ticket, name, self.now)
            filled.append(ticket)
        return filled

    def reserved(self) -> int:
        kept = [(one.reserved, one.kv.promised) for one in self.core.endpoints.values()]
        assert all(tokens == 0 for slots, tokens in kept if not slots)
        return sum(slots for slots, _ in kept)


def test_a_request_that_waits_goes_before_what_could_be_kept():
    pick = Pick(2)
    for name in ("e0", "e1"):
        pick.core.observe(name, Load(kv_usage=1.0), 0.0)
        pick.core.move(pick.ask(home=name), name, 0.0)
    waits = [pick.ask() for _ in range(2 * LIMIT - 2)]
    assert pick.core.waiting == len(waits), "each takes one at a time: its cache is full"
    pick.core.tick(Policy().stale_after_s)  # both are open again, in one moment
    assert {ticket.state for ticket in waits} == {State.LEASED}
    assert {ticket.choices for ticket in waits} == {()}


def test_nothing_is_kept_of_what_a_request_of_several_sequences_waits_for():
    pick = Pick(2)
    pick.fill("e0", but=4)
    pick.fill("e1", but=4)
    wide = pick.ask(sequences=5)
    passing = pick.ask()
    assert (wide.state, passing.state) == (State.WAITING, State.LEASED)
    assert passing.choices == ()


def test_a_next_choice_whose_last_slot_it_would_be_is_none():
    pick = Pick(2)
    pick.fill("e1", but=2)
    first = pick.ask(home="e0")
    assert [one.name for one in first.choices] == ["e1"]
    pick.core.move(first, "e0", 1.0)
    pick.fill("e1", but=1)
    assert pick.ask(home="e0").choices == ()


def test_an_endpoint_of_fewer_slots_than_eight_is_nobodys_next_choice():
    assert Pick(2, limit=7).ask().choices == ()


def test_a_burst_loses_no_more_than_an_eighth_of_the_slots_until_answers_begin():
    """400 at once for 8 endpoints of 50: what is kept and never comes holds up 48 of them, and that not for long."""
    pick = Pick(8, limit=50, most=3)
    burst = [pick.ask() for _ in range(400)]
    running = [one for one in burst if one.state is State.LEASED]
    assert len(running) == 352
    assert {one.reserved for one in pick.core.endpoints.values()} == {6}
    for ticket in running:
        pick.core.move(ticket, ticket.endpoint.name, 1.0)
    assert {one.state for one in burst} == {State.LEASED}


def test_the_cache_that_a_prompt_will_take_is_kept_too():
    pick = Pick(2, cache=CACHE, limit=50)
    long = pick.ask(home="e0", prompt_tokens=8_000, max_output_tokens=0)
    assert [one.name for one in long.choices] == ["e1"]
    others = [pick.ask(home="e1", prompt_tokens=10_000, max_output_tokens=0) for _ in range(18)]
    assert pick.core.waiting > 0
    pick.core.move(long, "e1", 1.0)
    assert pick.core.endpoints["e1"].kv.tokens <= LAWS.kv.share * CACHE
    for ticket in [long, *others]:
        pick.core.release(ticket, 2.0)
    assert pick.reserved() == 0


def test_a_prompt_that_would_keep_more_than_an_eighth_of_a_cache_has_no_next_choice():
    pick = Pick(2, cache=CACHE)
    assert pick.ask(home="e0", prompt_tokens=12_000, max_output_tokens=0).choices == ()
    assert pick.ask(home="e0", prompt_tokens=11_000, max_output_tokens=0).choices != ()


@pytest.mark.parametrize("big", [{"sequences": 9}, {"prompt_tokens": 150_000}])
def test_an_idle_endpoint_takes_a_request_that_is_too_big_for_it_though_a_slot_is_kept_there(big):
    pick = Pick(2, cache=CACHE)
    ticket = pick.ask(home="e0")
    assert [one.name for one in ticket.choices] == ["e1"]
    assert pick.ask(home="e1", **big).state is State.LEASED


@pytest.mark.parametrize(
    "wide",
    [
        {"sequences": 8},
        {"sequences": 8, "prompt_tokens": 150_000},
        {"prompt_tokens": 90_000, "max_output_tokens": 0},
        {"sequences": 9, "prompt_tokens": 90_000, "max_output_tokens": 0},
    ],
)
def test_what_fits_in_a_limit_alone_and_not_beside_what_is_kept_waits_for_that_whatever_other_limit_it_passes(wide):
    pick = Pick(2, cache=CACHE)
    ticket = pick.ask(home="e0", prompt_tokens=5_000)
    waits = pick.ask(home="e1", **wide)
    assert waits.state is State.WAITING
    pick.core.move(ticket, "e0", 1.0)
    assert waits.state is State.LEASED


@pytest.mark.parametrize("fewer", [{"limit": 1}, {"limit": 2}, {"cache": CACHE // 4}])
def test_what_is_kept_shuts_no_idle_endpoint_whose_limits_fell_below_it(fewer):
    pick = Pick(2, cache=CACHE)
    first = pick.ask(home="e0", prompt_tokens=11_000, max_output_tokens=0)
    assert [one.name for one in first.choices] == ["e1"]
    pick.put("e1", **fewer)
    sequences = fewer.get("limit", 1)
    more = [pick.ask(home="e1", sequences=sequences, prompt_tokens=15_000, max_output_tokens=0) for _ in range(2)]
    assert [one.state for one in more] == [State.LEASED, State.WAITING]
    assert more[0].endpoint.name == "e1"


def test_while_nothing_is_held_a_full_endpoint_is_a_next_choice_and_nothing_is_kept():
    pick = Pick(2, limit=2, enable_queue=False)
    tickets = [pick.ask() for _ in range(10)]
    assert {len(ticket.choices) for ticket in tickets} == {1}
    assert pick.reserved() == 0
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.core.set_policy(Policy(classes=CLASSES, shed=False, next_choices=1), 1.0)
    for ticket in tickets:
        pick.core.release(ticket, 2.0)
    assert list(pick.core.endpoints) == ["e0"]
    assert pick.reserved() == 0


def test_what_an_endpoint_had_reserved_that_goes_and_comes_back_is_not_counted_twice():
    pick = Pick(2)
    ticket = pick.ask()
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.put("e1")
    pick.core.release(ticket, 3.0)
    assert pick.reserved() == 0


def test_what_an_endpoint_had_reserved_that_goes_and_comes_back_is_still_kept_there():
    pick = Pick(2)
    ticket = pick.ask(home="e0")
    assert [one.name for one in ticket.choices] == ["e1"]
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.put("e1")
    pick.core.set_up("e1", 2.0, is_up=True)
    for _ in range(LIMIT):
        pick.ask(home="e1")
    pick.core.move(ticket, "e1", 3.0)
    assert len(pick.core.endpoints["e1"].leases) == LIMIT


def test_an_endpoint_that_is_gone_is_forgotten_once_nothing_is_reserved_there():
    pick = Pick(2)
    ticket = pick.ask()
    (other,) = ticket.choices
    pick.core.remove_endpoints([other.name], 1.0)
    pick.core.release(ticket, 2.0)
    assert other.name not in pick.core.endpoints


def test_who_answers_from_a_next_choice_that_goes_holds_its_slot_there_to_the_end():
    pick = Pick(2)
    ticket = pick.ask(home="e0")
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.core.move(ticket, "e1", 2.0)
    assert list(pick.core.endpoints["e1"].leases) == [ticket]
    pick.core.release(ticket, 3.0)
    assert list(pick.core.endpoints) == ["e0"]


@pytest.mark.parametrize("seed", range(4))
def test_wherever_gateways_go_along_their_lists_no_endpoint_ever_runs_more_than_its_limits(seed):
    """What really runs where is counted here: from the pick on, each may be at any of its choices."""
    draw, pick = random.Random(seed), Pick(5, cache=CACHE)
    begun: dict[Ticket, None] = {}
    unsure: list[Ticket] = []
    waiting: list[Ticket] = []
    moved = 0
    for step in range(4000):
        pick.now += 0.01
        if step % 50 == 0:
            crowd = draw.randrange(4, 40)
        if draw.random() < 0.6 and len(begun) + len(unsure) + len(waiting) < crowd:
            size = 90_000 if draw.random() < 0.01 else draw.choice((500, 500, 5_000, 11_000))
            sequences = LIMIT if draw.random() < 0.01 else draw.choice((1, 1, 1, 2))
            waiting.append(pick.ask(sequences=sequences, prompt_tokens=size, max_output_tokens=0))
        elif unsure and draw.random() < 0.5:
            ticket = unsure.pop(draw.randrange(len(unsure)))
            served = draw.choice((ticket.endpoint, ticket.endpoint, *ticket.choices))
            moved += served is not ticket.endpoint
            pick.core.move(ticket, served.name, pick.now)
            pick.core.answered(ticket, pick.now)
            begun[ticket] = None
        elif begun or unsure:
            ticket = draw.choice([*begun, *unsure])
            begun.pop(ticket, None)
            unsure = [one for one in unsure if one is not ticket]
            pick.core.release(ticket, pick.now, draw.choice((Answer.OK, Answer.UNKNOWN)))
        unsure += [ticket for ticket in waiting if ticket.state is State.LEASED]
        waiting = [ticket for ticket in waiting if ticket.state is State.WAITING]
        for name, endpoint in pick.core.endpoints.items():
            may_run = [one for one in (*begun, *unsure) if endpoint in (one.endpoint, *one.choices)]
            assert sum(one.sequences for one in may_run) <= LIMIT, name
            assert sum(one.kv_tokens for one in may_run) <= LAWS.kv.share * CACHE, name
            assert endpoint.reserved == sum(one.sequences for one in may_run if one.endpoint is not endpoint)
            assert endpoint.reserved <= LIMIT / 8
    assert moved > 50
    for ticket in (*begun, *unsure):
        pick.core.release(ticket, pick.now)
    assert pick.reserved() == 0


@pytest.mark.parametrize("seed", range(4))
def test_however_limits_change_nobody_waits_beside_an_idle_endpoint_that_keeps_more_than_it_would_now(seed):
    """And what may run at one beside another grows no further above a limit that fell."""
    draw, pick = random.Random(seed), Pick(3, cache=CACHE)
    open_: list[Ticket] = []
    before: dict[str, int] = {}
    kept_too_much = 0
    for _ in range(3000):
        pick.now += 0.01
        event = draw.random()
        if event < 0.05:
            pick.put(f"e{draw.randrange(3)}", draw.choice((1, 2, LIMIT, 16)), draw.choice((CACHE, CACHE // 8)))
            before = {}  # what is there, stays
        elif event < 0.5 and len(open_) < 30:
            sequences, size = draw.choice((1, 1, 1, 2)), draw.choice((500, 5_000, 11_000))
            open_.append(pick.ask(sequences=sequences, prompt_tokens=size, max_output_tokens=0))
        elif open_:
            ticket = open_.pop(draw.randrange(len(open_)))
            if ticket.state is State.LEASED:
                pick.core.release(ticket, pick.now, Answer.OK)
            else:
                pick.core.cancel(ticket, pick.now)
        for name, endpoint in pick.core.endpoints.items():
            held = endpoint.sequences + endpoint.reserved
            assert held <= max(endpoint.limit.value, before.get(name, held)) or len(endpoint.leases) == 1, name
            before[name] = held
            kept = 8 * endpoint.reserved > endpoint.limit.value
            kept_too_much += kept
            assert endpoint.leases or not kept or not pick.core.waiting, name
    assert kept_too_much > 20


def test_no_full_endpoint_is_a_next_choice_while_another_has_room_however_often_rooms_changed():
    """The heap of rooms holds entries out of date: behind those that it names first, there is somebody with room."""
    count, limit = 40, 16
    pick, draw = Pick(count, limit, most=1), random.Random(1)
    held: list[Ticket] = []
    for number in range(1500):
        pick.now += 0.01
        ticket = pick.ask()
        held.append(ticket)
        spare = [one for one in pick.core.endpoints.values() if one is not ticket.endpoint and one.spares_for(ticket)]
        assert ticket.choices or len(spare) < 8, f"pick {number}: nobody is listed while {len(spare)} have room"
        pick.core.move(ticket, ticket.endpoint.name, pick.now)
        while len(held) > 0.6 * count * limit:
            pick.core.release(held.pop(draw.randrange(len(held))), pick.now)
