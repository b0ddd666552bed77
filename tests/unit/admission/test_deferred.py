"""Requests that wait in an engine for the slot of an adapter: they take no place that others could have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.controller import Controller
from extproc.admission.limit import AdaptiveLimit
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Policy, Request

from .desk import Desk, one

ALL = frozenset({"base", "law", "med", "art"})
BUSY = Load(running=8.0, waiting=8.0, kv_usage=0.2, tokens_per_s=400.0, adapters=("law",), adapter_slots=1)
START = 16


def desk() -> Desk:
    """One endpoint that holds 8 requests for `law`, and 8 for `med`."""
    here = Desk(one("a", None, models=ALL))
    here.fill(8, model="law")
    here.fill(8, model="med")
    here.advance(1.0)
    assert limit(here).value == START
    return here


def limit(here: Desk) -> AdaptiveLimit:
    found = here.endpoint("a").limit
    assert isinstance(found, AdaptiveLimit)
    return found


def read(here: Desk, load: Load, times: int = 1) -> None:
    for _ in range(times):
        here.observe("a", load)
        here.advance(1.0)


def test_who_waits_for_the_slot_of_an_adapter_takes_no_part_of_the_limit() -> None:
    here = desk()
    late = here.ask(model="law")
    assert here.where(late) is None
    read(here, replace(BUSY, waiting_adapters=("law", "med")))
    assert here.where(late) == "a"
    assert limit(here).value == limit(here).own + 8


def test_the_queue_for_a_slot_is_no_full_batch_and_a_queue_for_the_batch_is_one() -> None:
    here = desk()
    read(here, replace(BUSY, waiting_adapters=("med",)), times=20)
    assert (limit(here).batch, limit(here).own > START) == (None, True)
    read(here, replace(BUSY, waiting_adapters=("law",)), times=4)
    assert (limit(here).batch, limit(here).value) == (8, 8)


@pytest.mark.parametrize(
    "load",
    [
        replace(BUSY, waiting_adapters=("med",), adapter_slots=2),
        replace(BUSY, waiting_adapters=("art",)),
        replace(BUSY, waiting_adapters=None),
        replace(BUSY, waiting_adapters=("med",), adapter_slots=None),
    ],
    ids=["a slot is free", "none is ours", "nobody says who waits", "nobody says how many fit"],
)
def test_nobody_is_deferred_where(load: Load) -> None:
    here = desk()
    read(here, load, times=4)
    assert (here.endpoint("a").deferred.count, limit(here).value) == (0, 8)


def test_prompts_that_wait_for_a_slot_are_not_under_way_nor_are_those_that_will() -> None:
    here = Desk(one("a", None, models=ALL), max_prompt_tokens=4000)
    full = replace(BUSY, running=1.0, waiting=1.0, waiting_adapters=("med",), first_tokens=0)
    here.observe("a", replace(full, waiting=0.0, waiting_adapters=()))
    here.ask(model="med", prompt_tokens=3000)
    late = here.ask(model="law", prompt_tokens=3000)
    assert here.where(late) is None
    here.observe("a", full)
    assert here.where(late) == "a"
    here.release(late)
    more = [here.ask(model=model, prompt_tokens=3000) for model in ("med", "law", "law")]
    assert [here.where(prompt) for prompt in more] == ["a", "a", None]


def test_an_endpoint_is_as_full_as_its_batch_is() -> None:
    here = Desk(one("a", None, models=ALL | {"solo"}), one("b", 8, models=ALL | {"duo"}))
    here.fill(8, model="solo")
    here.fill(5, model="duo")
    here.observe("a", replace(BUSY, tokens_per_s=None, waiting_adapters=("solo",)))
    assert (limit(here).value, limit(here).own) == (START + 8, START)
    here.fill(4, model="solo")
    assert here.where(here.ask(model="base")) == "b"


def test_what_makes_answers_slow_is_what_runs_not_who_is_deferred() -> None:
    here = desk()
    read(here, replace(BUSY, running=1.0, waiting=0.0, tokens_per_s=100.0, waiting_adapters=()), times=4)
    read(here, replace(BUSY, tokens_per_s=50.0, waiting_adapters=("med",)), times=12)
    assert limit(here).own < 8


def test_what_was_deferred_is_forgotten_with_a_stale_page() -> None:
    here = desk()
    read(here, replace(BUSY, waiting_adapters=("med",)))
    assert limit(here).value > limit(here).own
    here.advance(60.0)
    assert limit(here).value == limit(here).own


def test_a_limit_that_a_person_chose_stays_whatever_waits() -> None:
    here = Desk(one("a", 16, models=ALL))
    here.fill(16, model="med")
    here.advance(1.0)
    read(here, replace(BUSY, waiting_adapters=("med",)))
    assert here.where(here.ask(model="law")) is None


# ---- a page that names no adapters

NAMELESS = Load(running=2.0, waiting=6.0, kv_usage=0.2, tokens_per_s=400.0)


def of_two_models(here: Desk, count: int = 8) -> list[Ticket]:
    """`count` requests for two models in turn, which wait or run at `a`."""
    return [here.ask(model=("law", "med")[number % 2]) for number in range(count)]


def passes_over(here: Desk, load: Load = NAMELESS, *, times: int = 2, models: tuple[str, str] = ("law", "med")) -> None:
    """So many times the last of eight ends in a second, and two of eight run: nobody before it has begun."""
    held = [here.ask(model=models[number % 2]) for number in range(8)]
    here.advance(1.0)
    here.observe("a", load)
    for _ in range(times):
        here.release(held.pop(), Answer.OK)
        here.advance(1.0)
        here.observe("a", replace(load, waiting=(load.waiting or 0.0) - 1))
        held.append(here.ask(model=models[1]))
        here.advance(1.0)
        here.observe("a", load)


def nameless(most: int | None = 16) -> Desk:
    here = Desk(one("a", most, models=ALL))
    here.advance(1.0)
    return here


def test_answers_before_their_turn_show_that_who_waits_is_deferred_where_no_page_names_adapters() -> None:
    here = nameless(None)
    passes_over(here)
    assert here.endpoint("a").deferred.count == 6
    assert (limit(here).batch, limit(here).value) == (None, limit(here).own + 6)


def test_a_batch_that_was_found_in_a_queue_for_slots_is_none() -> None:
    here = nameless(None)
    held = of_two_models(here)
    here.advance(1.0)
    read(here, NAMELESS, times=4)
    assert (limit(here).batch, limit(here).value) == (2, 2)
    for waiting in (5.0, 4.0, 3.0):
        here.release(held.pop(), Answer.OK)
        here.advance(1.0)
        here.observe("a", replace(NAMELESS, waiting=waiting))
    assert limit(here).batch is None
    read(here, replace(NAMELESS, waiting=waiting), times=4)
    assert limit(here).batch is None


def test_one_answer_before_its_turn_shows_nothing_and_two_are_forgotten_some_minutes_later() -> None:
    here = nameless()
    passes_over(here, times=1)
    assert here.endpoint("a").deferred.count == 0
    here = nameless()
    passes_over(here)
    read(here, replace(NAMELESS, tokens_per_s=None), times=50)
    assert here.endpoint("a").deferred.count == 6
    read(here, replace(NAMELESS, tokens_per_s=None), times=50)
    assert here.endpoint("a").deferred.count == 0


@pytest.mark.parametrize(
    ("load", "models"),
    [
        (NAMELESS, ("law", "law")),
        (replace(NAMELESS, waiting=7.0), ("law", "med")),
        (replace(NAMELESS, kv_usage=0.93), ("law", "med")),
        (replace(NAMELESS, preemptions=1), ("law", "med")),
    ],
    ids=["one model", "others' requests are there, too", "a full cache", "some were put back"],
)
def test_answers_before_their_turn_show_nothing_where(load: Load, models: tuple[str, str]) -> None:
    here = nameless()
    passes_over(here, load, times=4, models=models)
    assert here.endpoint("a").deferred.count == 0


def test_a_last_one_that_waited_and_ends_with_all_others_before_the_next_page_had_its_turn() -> None:
    here = nameless()
    for _ in range(4):
        held = [here.ask(model=model) for model in ("law", "med", "law")]
        here.advance(1.0)
        here.observe("a", replace(NAMELESS, running=2.0, waiting=1.0))
        for ticket in reversed(held):
            here.release(ticket, Answer.OK)
        here.advance(1.0)
        here.observe("a", replace(NAMELESS, running=0.0, waiting=0.0))
    passes_over(here, times=1)
    assert here.endpoint("a").deferred.count == 0


def test_who_ends_soon_after_all_before_it_have_begun_or_left_had_its_turn() -> None:
    """An engine that begins with many in a second, as where prompts are short and were waited for."""
    here = nameless()
    for _ in range(4):
        held = of_two_models(here)
        here.advance(1.0)
        here.observe("a", NAMELESS)
        here.release(held[-1], Answer.OK)
        here.advance(1.0)
        here.observe("a", replace(NAMELESS, running=7.0, waiting=0.0))
        for ticket in held[:-1]:
            here.release(ticket, Answer.OK)
        here.advance(1.0)
        here.observe("a", replace(NAMELESS, running=0.0, waiting=0.0))
    held = of_two_models(here)
    here.advance(1.0)
    for _ in range(4):
        here.observe("a", NAMELESS)
        here.release(held.pop(), Answer.UNKNOWN)  # its client left
        held.append(here.ask(model="med"))
        here.advance(1.0)
    assert here.endpoint("a").deferred.count == 0


# ---- what is learned meanwhile

WAITS = Load(
    running=1.0, waiting=4.0, tokens_per_s=100.0, adapters=("law",), waiting_adapters=("med",), adapter_slots=1
)
RUNS = replace(WAITS, waiting=0.0, adapters=("med",), waiting_adapters=())
COUNTS = {"first_tokens": 0, "prompt_tokens": 0, "output_tokens": 0}


@pytest.mark.parametrize("counts", [COUNTS, {}], ids=["an engine that counts", "one that doesn't"])
def test_a_lease_of_another_sidecar_that_waits_for_a_slot_has_not_begun_whatever_that_one_thinks(counts) -> None:
    core = Controller(Policy())
    core.put_endpoint(one("a", None, models=ALL), 0.0)
    core.offer(Ticket(Request("law", 0.0, model="law")), 0.0)
    core.offer(Ticket(Request("med", 0.0, model="med")), 0.0)
    core.observe("a", replace(WAITS, **counts), 1.0)
    late = Ticket(Request("late", 0.5, model="med"))
    core.adopt(late, "a", 1.3, held_s=0.8, begun=True)
    assert (late.prompt_pending, late.leased_at, late in core.endpoints["a"].leases) == (True, 0.5, True)


@pytest.mark.parametrize("probe", [True, False], ids=["first tokens are seen", "nothing tells of them"])
def test_prompts_that_wait_for_a_slot_say_nothing_of_what_prompts_take_of_the_cache(probe: bool) -> None:
    here = Desk(one("a", 16, models=ALL, kv_capacity_tokens=100_000), first_byte_probe=probe, max_prompt_tokens=10**6)
    read(here, replace(WAITS, running=0.0, waiting=0.0, kv_usage=0.0, waiting_adapters=()))
    first = here.ask(model="law", prompt_tokens=20_000)
    here.advance(0.5)
    here.first_token(first)
    here.fill(4, model="med", prompt_tokens=10_000)
    read(here, replace(WAITS, kv_usage=0.2), times=30)
    assert here.endpoint("a").kv.real == pytest.approx(1.0, abs=0.02)


def counting(**policy: bool) -> tuple[Desk, list[Ticket]]:
    """An endpoint that counts first tokens, with four long prompts that wait for a slot."""
    here = Desk(one("a", 64, models=ALL), max_prompt_tokens=10**6, **policy)
    read(here, replace(WAITS, waiting=0.0, waiting_adapters=(), **COUNTS), times=2)
    waiting = here.fill(4, model="med", prompt_tokens=8000)
    here.advance(1.0)
    read(here, replace(WAITS, **COUNTS), times=2)
    return here, waiting


def test_whose_adapter_runs_now_the_engine_counts_before_those_that_came_meanwhile() -> None:
    here, waiting = counting()
    new = here.fill(4, model="base", prompt_tokens=1000)
    here.now += 0.01
    here.observe("a", replace(RUNS, first_tokens=4, prompt_tokens=32_000, output_tokens=0))
    assert [ticket.prompt_pending for ticket in waiting + new] == [False] * 4 + [True] * 4
    assert here.ask(model="base", prompt_tokens=1000).prompt_tokens == 1000
    assert here.ask(model="med", prompt_tokens=8000).prompt_tokens == 8000


def test_an_answer_that_came_between_two_pages_is_counted_before_those_that_still_wait() -> None:
    here, waiting = counting()
    new = here.ask(model="base", prompt_tokens=1000)
    here.release(waiting[1], Answer.OK)
    here.observe("a", replace(WAITS, waiting=3.0, first_tokens=1, prompt_tokens=8000, output_tokens=100))
    assert [ticket.prompt_pending for ticket in (waiting[0], new)] == [True, True]
    assert here.ask(model="base", prompt_tokens=1000).prompt_tokens == 1000


def test_who_leaves_while_it_waits_for_a_slot_is_never_counted() -> None:
    here, waiting = counting()
    for ticket in waiting:
        here.release(ticket, Answer.UNKNOWN)
    new = here.ask(model="base", prompt_tokens=1000)
    here.observe("a", replace(WAITS, waiting=0.0, first_tokens=1, prompt_tokens=1000, output_tokens=0))
    assert (new.prompt_pending, here.endpoint("a").prefill.tokens) == (False, 0)


def test_prompts_whose_adapter_runs_are_under_way_again_and_so_they_are_once_the_page_is_stale() -> None:
    here, waiting = counting()
    assert here.endpoint("a").prefill.tokens == 0
    here.observe("a", replace(RUNS, **COUNTS))
    assert here.endpoint("a").prefill.tokens == 32_000
    here, waiting = counting()
    here.advance(60.0)
    assert here.endpoint("a").prefill.tokens == sum(ticket.work_tokens for ticket in waiting) == 32_000


@pytest.mark.parametrize("probe", [True, False], ids=["its first byte is seen", "the engine counts"])
def test_to_wait_for_a_slot_is_not_to_write(probe: bool) -> None:
    """Also where the prompt was predicted to be computed before a page told who waits."""
    here, waiting = counting(first_byte_probe=probe)
    read(here, replace(WAITS, **COUNTS), times=20)
    here.now += 0.5
    if probe:
        here.first_token(waiting[0])
    here.now += 2.0
    begun_s = 2.0 if probe else 3.5  # nothing tells but the last page on which it waited
    assert here.endpoint("a").writing_s(waiting[0], here.now) == pytest.approx(begun_s)
