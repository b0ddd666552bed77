"""Telemetry as a brake: what closes an endpoint, and when it is ignored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.load import Load
from extproc.admission.ticket import State
from extproc.admission.values import Policy

from .desk import CLASSES, Desk, in_use, one


def test_a_full_kv_cache_closes_an_endpoint_and_better_telemetry_opens_it() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.observe("a", Load(kv_usage=0.95))
    guest = desk.ask()
    assert guest.state is State.WAITING
    desk.observe("a", Load(kv_usage=0.94))
    assert guest.state is State.LEASED


def test_usage_is_a_share_and_not_a_percentage() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.observe("a", Load(kv_usage=0.5, gpu_usage=1.0))
    assert desk.ask().state is State.LEASED, "half is below 95 %, and GPU use is not looked at unless asked"
    assert Policy().max_kv_usage <= 1.0


def test_gpu_use_closes_an_endpoint_if_asked() -> None:
    desk = Desk(one("a", 10), max_gpu_usage=0.9)
    desk.ask()
    desk.observe("a", Load(gpu_usage=0.9))
    assert desk.ask().state is State.WAITING


def test_stale_telemetry_opens_a_closed_endpoint() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.observe("a", Load(kv_usage=1.0))
    guest = desk.ask()
    desk.advance(9.99)
    assert guest.state is State.WAITING
    desk.advance(0.01)
    assert guest.state is State.LEASED
    assert desk.endpoint("a").reading.page is None, "and is shown as unknown"


def test_a_shorter_life_of_telemetry_counts_from_its_reload() -> None:
    """Found by storm seed 1: what was known stayed known for the old time."""
    desk = Desk(one("a", 10))
    desk.observe("a", Load(kv_usage=0.1))
    desk.advance(2.0)
    desk.set_policy(Policy(classes=CLASSES, stale_after_s=1.0))
    assert desk.endpoint("a").reading.page is None


@pytest.mark.parametrize("load_at", [0.1, 0.7, 1e6 + 0.1, 12345.678])
@pytest.mark.parametrize("stale_after_s", [0.2, 0.3, 10.1])
def test_a_tick_at_the_very_moment_telemetry_becomes_stale_forgets_it(load_at: float, stale_after_s: float) -> None:
    """Found by reading: (a + b) - a < b in floating point, so the deadline stayed due for ever."""
    desk = Desk(one("a"), stale_after_s=stale_after_s)
    desk.now += load_at
    desk.observe("a", Load(running=1.0))
    desk.advance(stale_after_s)
    assert desk.endpoint("a").reading.page is None
    assert desk.core.next_deadline() is None


def test_unknown_telemetry_closes_nothing() -> None:
    desk = Desk(one("a", 10))
    desk.ask()
    desk.observe("a", Load())
    assert desk.ask().state is State.LEASED


def test_an_idle_engine_is_never_closed_by_its_cache() -> None:
    desk = Desk(one("a", 10))
    desk.observe("a", Load(kv_usage=1.0, running=0.0))
    assert desk.ask().state is State.LEASED


def test_readings_become_stale_one_by_one_and_wake_nobody_before() -> None:
    desk = Desk(one("never read"), one("a"), one("b"))
    began = desk.now
    desk.observe("a", Load(running=1.0))
    assert desk.core.next_deadline() == began + 10.0
    desk.advance(4.0)
    desk.observe("b", Load(running=1.0))
    assert desk.core.next_deadline() == began + 10.0
    desk.advance(6.0)
    assert (desk.endpoint("a").reading.page, desk.endpoint("b").reading.page is None) == (None, False)
    assert desk.core.next_deadline() == began + 14.0
    desk.advance(4.0)
    assert desk.endpoint("b").reading.page is None


def test_a_reload_forgets_no_fresh_telemetry() -> None:
    desk = Desk(one("a"))
    desk.observe("a", Load(running=1.0))
    desk.advance(1.0)
    desk.set_policy(Policy(classes=CLASSES, stale_after_s=20.0))
    assert desk.endpoint("a").reading.page is not None
    assert desk.core.next_deadline() == desk.now + 19.0


@pytest.mark.parametrize("load", [Load(kv_usage=1.0, running=0.0), Load(kv_usage=1.0, running=5.0), Load(kv_usage=1.0)])
def test_an_endpoint_whose_cache_is_full_gets_one_request_at_a_time(load: Load) -> None:
    """None at all would be for ever where the figure is wrong: blocks that are only kept for reuse."""
    desk = Desk(one("a", 10))
    desk.observe("a", load)
    first, second, third = desk.fill(3)
    assert in_use([first, second, third]) == [True, False, False]
    desk.release(first)
    assert in_use([second, third]) == [True, False]
    desk.observe("a", Load(kv_usage=0.5, running=0.0))
    assert in_use([second, third]) == [True, True]


def test_of_a_page_whose_counters_are_not_believed_its_gauges_are() -> None:
    gauges = Load(
        running=1.0, waiting=2.0, kv_usage=0.3, gpu_usage=0.4, kv_capacity_tokens=5, max_running=6, context_tokens=7,
        asleep=False, adapters=("lora",), adapter_slots=8,
    )  # fmt: skip
    counters = {"preemptions": 1, "prompt_tokens": 2, "output_tokens": 3, "first_tokens": 4, "cached_tokens": 5}
    assert replace(gauges, tokens_per_s=9.0, **counters).without_counters() == gauges
