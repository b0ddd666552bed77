"""Requests that wait in an engine for the slot of an adapter: they take no place that others could have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.limit import AdaptiveLimit
from extproc.admission.load import Load

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
