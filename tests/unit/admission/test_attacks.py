"""Bugs that an adversary found, each pinned: nobody may take the queue, or the endpoints, from the others."""

from __future__ import annotations

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.settling import PIECE
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

from .desk import let_all_go

CLASSES = (RequestClass("default", 0, 100.0),)


def room(*specs: EndpointSpec, **policy) -> Controller:
    core = Controller(Policy(classes=CLASSES, shed=False, **policy))
    for spec in specs:
        core.put_endpoint(spec, 0.0)
        core.set_up(spec.name, 0.0, is_up=True)
    return core


def offer(core: Controller, now: float = 0.0, **request) -> Ticket:
    ticket = Ticket(Request("r", now, **request))
    core.offer(ticket, now)
    return ticket


def at(ticket: Ticket) -> str:
    assert ticket.state is State.LEASED
    return ticket.endpoint.name


def test_one_engines_page_does_not_spoil_the_estimates_of_answers_for_all():
    core = room(*(EndpointSpec(name, "", frozenset(), 1000, 100_000) for name in ("liar", "a", "b")))
    core.observe("liar", Load(first_tokens=0), 0.0)
    core.release(next(t for t in [offer(core) for _ in range(9)] if at(t) == "liar"), 1.0, Answer.OK)
    core.observe("liar", Load(output_tokens=2**52, prompt_tokens=2**52, first_tokens=1), 1.0)
    taken = [offer(core, 1.0, prompt_tokens=100) for _ in range(500)]
    assert sum(ticket.state is State.LEASED and at(ticket) != "liar" for ticket in taken) >= 300


def test_changed_rules_of_order_do_not_let_new_requests_pass_those_that_wait():
    for first, second in ((True, False), (False, True)):
        core = room(EndpointSpec("a", max_running_requests=1), fair=first)
        running = offer(core, tenant="x", prompt_tokens=500)
        old = [offer(core, tenant="x", prompt_tokens=500) for _ in range(2)]
        core.set_policy(Policy(classes=CLASSES, shed=False, fair=second), 1.0)
        new = [offer(core, 1.0, tenant="x", prompt_tokens=500) for _ in range(2)]
        order = []
        for _ in range(4):
            (decision,) = core.release(running, 2.0)
            running = decision.ticket
            order.append(running)
        assert order == old + new


def test_ten_thousand_that_wait_are_let_go_in_order_and_no_event_lets_all_of_them_go():
    core = room(EndpointSpec("a", max_running_requests=1), max_queued_requests=20_000)
    tickets = [offer(core, tenant=f"t{number % 7}") for number in range(10_001)]
    waiting = sorted(tickets[1:], key=lambda ticket: ticket.key)
    went = let_all_go(core, 1.0, at_once=PIECE)
    assert [decision.ticket for decision in went] == waiting


def test_without_an_engine_that_counts_prompts_the_announced_tokens_are_believed():
    core = room(EndpointSpec("a", max_running_requests=2000))
    for _ in range(1000):
        offer(core, prompt_tokens=50)
    assert offer(core, prompt_tokens=50).prompt_tokens == 50


def test_engines_that_begin_to_count_late_do_not_throw_the_estimates_off():
    core = room(EndpointSpec("a", max_running_requests=5000))
    for _ in range(3000):
        offer(core, prompt_tokens=100)
    core.observe("a", Load(prompt_tokens=500, first_tokens=5), 1.0)
    assert 90 <= offer(core, 1.0, prompt_tokens=100).prompt_tokens <= 110


LIES = (
    Load(running=0.0, waiting=0.0, kv_usage=0.0, tokens_per_s=1e12, output_tokens=2**52, prompt_tokens=2**52),
    Load(running=1e9, waiting=1e9, kv_usage=1.0, preemptions=2**40, first_tokens=0),
    Load(asleep=True),
    Load(asleep=False, max_running=10**9, kv_capacity_tokens=1, context_tokens=10**9),
    Load(first_tokens=2**40, output_tokens=0, cached_tokens=2**50, gpu_usage=1.0),
)


def healths(*, is_lying: bool) -> tuple[list[str], list[int]]:
    """Two engines that serve beside one that serves nothing and may lie: how each is, and what each was sent."""
    core = room(*(EndpointSpec(name, max_running_requests=8) for name in ("a", "b", "liar")))
    sent = dict.fromkeys(core.endpoints, 0)
    for step in range(200):
        now = step / 10
        for name in ("a", "b"):
            core.observe(name, Load(running=2.0, waiting=0.0, output_tokens=200, first_tokens=2), now)
        if is_lying:
            core.observe("liar", LIES[step % len(LIES)], now)
        tickets = [offer(core, now) for _ in range(3)]
        for ticket in tickets:
            sent[at(ticket)] += 1
            core.release(ticket, now, Answer.FAILED if at(ticket) == "liar" else Answer.OK)
        core.tick(now)
    return [endpoint.health.condition for endpoint in core.endpoints.values()], list(sent.values())


def test_whatever_ones_page_says_the_others_stay_up_and_it_is_left_out_for_what_it_does():
    conditions, sent = healths(is_lying=True)
    assert conditions[:2] == ["up", "up"]
    assert sent[2] <= 20, "its page says that it is idle and makes tokens: its answers count"
    assert healths(is_lying=False)[0][:2] == conditions[:2]


def test_tokens_on_a_page_that_is_not_believed_are_no_sign_of_life():
    """Health checks that time out count for nothing while tokens flow: such a page would keep a hung engine up."""
    core = room(*(EndpointSpec(name, max_running_requests=8) for name in ("a", "b", "c", "liar")))
    for step in range(100):
        now = float(step)
        made = dict.fromkeys(core.endpoints, 0)
        for ticket in [offer(core, now) for _ in range(12)]:
            made[at(ticket)] += 200
            core.release(ticket, now + 0.5, Answer.OK)
        for name, tokens in made.items():
            core.observe(
                name, Load(running=3.0, waiting=0.0, output_tokens=tokens * (100 if name == "liar" else 1)), now + 0.5
            )
    heard = {name: core.endpoints[name].health.heard_at for name in ("a", "liar")}
    for name in heard:
        core.observe(name, Load(running=3.0, waiting=0.0, output_tokens=100_000), 200.0)
    assert core.endpoints["liar"].counters.doubted
    assert not core.endpoints["a"].counters.doubted
    assert core.endpoints["a"].health.heard_at == 200.0
    assert core.endpoints["liar"].health.heard_at == heard["liar"] < 200.0
