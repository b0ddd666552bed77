"""LoRA adapters: a request goes where its adapter is loaded, while there is room to spare."""

from __future__ import annotations

from dataclasses import replace

from extproc.admission.load import Load

from .desk import Desk, one

ALL = frozenset({"base", "law", "med", "art"})


def desk(*names: str, limit: int = 8) -> Desk:
    return Desk(*[one(name, limit, models=ALL) for name in names or ("a", "b")])


def tell(here: Desk, name: str, *adapters: str, slots: int = 2) -> None:
    here.observe(name, Load(running=0.0, waiting=0.0, adapters=adapters, adapter_slots=slots))


def test_a_request_goes_where_its_adapter_is_loaded_although_another_endpoint_is_emptier() -> None:
    here = desk()
    tell(here, "b", "law")
    assert [here.where(here.ask(model="law")) for _ in range(3)] == ["b", "b", "b"]
    assert here.where(here.ask(model="med")) == "a"
    assert here.where(here.ask(model="base")) == "a"


def test_with_adapter_affinity_off_a_request_goes_to_the_emptiest_and_a_reload_switches_it() -> None:
    here = desk()
    tell(here, "b", "law")
    for is_on, goes in ((False, "a"), (True, "b"), (False, "a")):
        here.set_policy(replace(here.core.policy, adapter_affinity=is_on))
        assert here.where(here.ask(model="law")) == goes
        here.release(*here.leased)


def test_an_endpoint_that_is_half_full_attracts_nobody() -> None:
    here = desk(limit=4)
    tell(here, "b", "law")
    assert [here.where(here.ask(model="law")) for _ in range(4)] == ["b", "b", "a", "a"]


def test_of_two_that_have_it_the_emptier_one_goes_first() -> None:
    here = desk("a", "b", "c")
    tell(here, "b", "law")
    tell(here, "c", "law")
    assert sorted(str(here.where(here.ask(model="law"))) for _ in range(4)) == ["b", "b", "c", "c"]


def test_an_adapter_that_is_idle_stays_loaded_until_others_take_its_slot() -> None:
    here = desk()
    tell(here, "b", "law")
    tell(here, "b")
    assert here.where(here.ask(model="law")) == "b"
    tell(here, "b", "med", "art")
    assert here.where(here.ask(model="law")) == "a"


def test_a_page_that_names_nothing_changes_nothing_and_an_endpoint_that_is_gone_is_forgotten() -> None:
    here = desk()
    tell(here, "b", "law")
    here.observe("b", Load(running=1.0))
    assert here.where(here.ask(model="law")) == "b"
    (ticket,) = here.leased
    here.remove("b")
    here.release(ticket)
    assert here.where(here.ask(model="law")) == "a"
    assert not here.core._books.adapters.by_name


def test_an_endpoint_that_does_not_serve_a_model_gets_none_of_it_whatever_its_page_says() -> None:
    law = frozenset({"law"})
    here = Desk(one("a", 8, models=law), one("b", 8, models=frozenset({"med"})), one("c", 8, models=law))
    tell(here, "b", "law")
    assert sorted(str(here.where(here.ask(model="law"))) for _ in range(2)) == ["a", "c"]


def test_one_that_has_no_cache_for_it_does_not_keep_it_from_another() -> None:
    here = Desk(one("a", 8, models=ALL), one("b", 8, models=ALL, kv_capacity_tokens=6_000))
    tell(here, "b", "law")
    assert here.where(here.ask(model="law", prompt_tokens=2000)) == "b"
    assert here.where(here.ask(model="law", prompt_tokens=4000)) == "a"


def test_one_that_has_it_goes_before_an_emptier_one_without_a_slot_for_it_until_it_is_twice_as_full() -> None:
    for other, goes in ((("med", "art"), ["b"] * 3), (("med",), ["b", "b", "a"])):
        here = Desk(one("a", 8, models=ALL | {"solo"}), one("b", 8, models=ALL))
        here.fill(3, model="solo")
        tell(here, "a", *other)
        tell(here, "b", "law")
        here.fill(2, model="law")
        assert [here.where(here.ask(model="law")) for _ in range(3)] == goes, other
