"""The books of a KV cache against what its engine says is in use."""

from __future__ import annotations

import pytest

from extproc.admission.kv import KvBooks
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

from .desk import Desk, in_use, one

LAW = LAWS.kv

CAPACITY = 100_000


def ticket(prompt: int, output: int = 0) -> Ticket:
    made = Ticket(Request("r", 0.0))
    made.prompt_tokens = made.work_tokens = prompt
    made.output_tokens = output
    return made


def books(*booked: tuple[int, int]) -> KvBooks:
    kv = KvBooks(CAPACITY)
    for prompt, output in booked:
        kv.add(ticket(prompt, output))
    return kv


def read(kv: KvBooks, usage: float, seconds: int = 60) -> None:
    for _ in range(seconds):
        kv.learn(usage, kv.prompts, kv.outputs, 1.0)


# ---- what requests share


def test_prompts_that_share_most_of_their_tokens_take_less_room() -> None:
    """Fifty prompts with one system prompt of 1,500 tokens are in the cache for 27 % of what they are booked for."""
    kv = books(*[(2000, 0)] * 45)
    assert not kv.fits(ticket(2500))
    read(kv, 0.25)
    assert kv.tokens == pytest.approx(25_000, rel=0.01)
    assert kv.fits(ticket(20_000))
    assert not kv.fits(ticket(250_000))


@pytest.mark.parametrize(("waiting", "learns"), [(0.0, True), (3.0, False), (None, False)])
def test_without_a_word_of_first_tokens_all_prompts_are_in_the_cache_if_nobody_waits_inside(
    waiting: float | None,
    learns: bool,
) -> None:
    """Else an engine that counts none, as SGLang and TensorRT-LLM, is booked for each copy of a shared prompt."""
    desk = Desk(one("a", 100, kv_capacity_tokens=CAPACITY))
    desk.fill(20, prompt_tokens=4000, max_output_tokens=1)
    for _ in range(60):
        desk.advance(1.0)
        desk.observe("a", Load(running=20.0, waiting=waiting, kv_usage=0.1))
    assert (desk.endpoint("a").kv.real < 0.2) is learns


def test_what_answers_take_is_not_taken_for_prompts() -> None:
    """Answers are half written in the mean."""
    kv = books(*[(1000, 500)] * 40)
    read(kv, (40_000 + 40 * 250) / CAPACITY)
    assert kv.real == pytest.approx(1.0, rel=0.01)


def test_one_reading_says_little_and_the_longer_the_time_since_the_one_before_the_more() -> None:
    kv = books(*[(2000, 0)] * 40)
    kv.learn(0.2, kv.prompts, 0, 1.0)
    once = kv.real
    assert 0.9 < once < 1.0
    kv = books(*[(2000, 0)] * 40)
    kv.learn(0.2, kv.prompts, 0, 5.0)
    assert kv.real < once


@pytest.mark.parametrize(("usage", "real"), [(0.0, LAW.least_real), (1.0, 1.0)])
def test_a_prompt_takes_never_more_than_is_booked_and_always_something(usage: float, real: float) -> None:
    kv = books(*[(1000, 0)] * 20)
    read(kv, usage, 200)
    assert kv.real == pytest.approx(real, rel=0.01)


def test_a_cache_with_little_in_it_says_nothing_of_prompts() -> None:
    kv = books((int(LAW.enough * CAPACITY), 0))
    read(kv, 0.0)
    assert kv.real == 1.0
    kv = KvBooks(None)
    kv.add(ticket(50_000))
    read(kv, 0.0)
    assert kv.real == 1.0


@pytest.mark.parametrize(("usage", "waiting", "preemptions"), [(LAW.pressed, 1.0, 0), (0.5, 0.0, 1), (0.5, None, 2)])
def test_pressure_inside_the_engine_takes_the_room_back(usage: float, waiting: float | None, preemptions: int) -> None:
    kv = books(*[(2000, 0)] * 40)
    read(kv, 0.2)
    before = kv.real
    kv.judge(usage, waiting, preemptions, 1.0, wanted=False)
    assert kv.real == pytest.approx((1.0 + before) / 2)


@pytest.mark.parametrize(("usage", "waiting", "preemptions"), [(0.5, 9.0, 0), (0.99, 0.0, 0), (0.99, None, None)])
def test_neither_a_queue_beside_an_empty_cache_nor_a_full_one_alone_is_pressure(
    usage: float, waiting: float | None, preemptions: int | None
) -> None:
    kv = books(*[(2000, 0)] * 40)
    read(kv, 0.2)
    before = kv.real
    kv.judge(usage, waiting, preemptions, 1.0, wanted=False)
    assert kv.real == before


# ---- what others have there, and how far the figure is believed


def test_what_the_engine_uses_beyond_our_books_is_somebody_elses() -> None:
    kv = books((10_000, 0))
    kv.compare(0.5)
    assert kv.excess == 40_000
    assert kv.fits(ticket(int(LAW.share * CAPACITY) - 50_000))
    assert not kv.fits(ticket(int(LAW.share * CAPACITY) - 50_000 + 1))
    kv.compare(None)
    assert kv.excess == 0.0


def test_a_figure_that_no_pressure_confirms_is_doubted_and_then_not_believed_at_all() -> None:
    """Blocks that are kept for reuse alone look as full as others."""
    kv = books((10_000, 0))
    for second in range(int(LAW.doubt_s)):
        assert kv.trust == pytest.approx(1.0 - second / LAW.doubt_s)
        kv.judge(0.99, 0.0, 0, 1.0, wanted=True)
    kv.compare(0.99)
    assert (kv.trust, kv.excess) == (0.0, 0.0)
    kv.judge(0.99, 3.0, 0, 1.0, wanted=True)
    kv.compare(0.99)
    assert kv.trust == 1.0
    assert kv.excess > 80_000


@pytest.mark.parametrize(("waiting", "wanted"), [(0.0, False), (None, True)])
def test_a_figure_is_not_doubted_while_nobody_waits_or_the_engine_does_not_say_who_does(
    waiting: float | None, wanted: bool
) -> None:
    kv = books((10_000, 0))
    for _ in range(100):
        kv.judge(0.99, waiting, 0, 1.0, wanted=wanted)
    assert kv.trust == 1.0


def test_a_lease_that_is_over_leaves_no_token_in_the_books_and_stays_in_the_turnover() -> None:
    kv, held = KvBooks(CAPACITY), ticket(3000, 200)
    kv.add(held)
    assert (kv.pressure, kv.turnover) == (3200 / (LAW.share * CAPACITY), 3200)
    kv.remove(held)
    assert (kv.prompts, kv.outputs, kv.tokens, kv.turnover) == (0, 0, 0.0, 3200)


def test_without_a_known_size_everything_fits_and_nothing_presses() -> None:
    kv = KvBooks(None)
    kv.add(ticket(10**9))
    kv.compare(1.0)
    assert kv.fits(ticket(10**9))
    assert (kv.pressure, kv.excess) == (0.0, 0.0)


# ---- at an endpoint


def seconds(desk: Desk, count: int, load: Load) -> None:
    for _ in range(count):
        desk.advance(1.0)
        desk.observe("a", load)


def test_an_endpoint_whose_prompts_share_their_beginning_takes_more_of_them() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=CAPACITY))
    tickets = desk.fill(100, prompt_tokens=2000, max_output_tokens=0, budget_s=1e9)
    assert sum(in_use(tickets)) == 46
    desk.observe("a", Load(running=46.0, waiting=0.0, kv_usage=0.2, first_tokens=0))
    seconds(desk, 20, Load(running=46.0, waiting=0.0, kv_usage=0.2, first_tokens=46, preemptions=0))
    assert sum(in_use(tickets)) > 80


def test_a_hot_figure_that_nothing_confirms_closes_an_endpoint_no_longer_than_it_is_believed() -> None:
    desk = Desk(one("a", 10))
    desk.fill(1)
    hot = Load(running=1.0, waiting=0.0, kv_usage=0.99, preemptions=0)
    desk.observe("a", hot)
    guest = desk.ask()
    seconds(desk, int(LAW.doubt_s) - 1, hot)
    assert guest.state is State.WAITING
    seconds(desk, 1, hot)
    assert guest.state is State.LEASED
    other = desk.ask()
    assert other.state is State.LEASED
    seconds(desk, 1, Load(running=1.0, waiting=4.0, kv_usage=0.99, preemptions=0))
    assert desk.ask().state is State.WAITING, "now it is confirmed"
