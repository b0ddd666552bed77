"""An endpoint that is much slower than its peers is told, by tokens where pages tell of them, else by answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from extproc.admin.http import Admin
from extproc.admission.load import Load
from extproc.admission.values import Answer, EndpointSpec
from extproc.commands.top import lines
from extproc.observe.paces import LEAST_ANSWERS, SILENT_S, Paces
from tests.unit.admin_room import Room


class Fleet:
    """Endpoints of four slots, and who compares them, on a clock that a test moves."""

    def __init__(self, *models: str) -> None:
        self.room = Room(endpoints=0)
        self.core = self.room.gate.controller
        for number, listed in enumerate(models):
            spec = EndpointSpec(f"vllm-{number}", models=frozenset(listed.split()), max_running_requests=4)
            self.room.gate.put_endpoint(spec)
        self.paces = Paces(self.core)

    def tell(self, tokens_per_s: dict[str, float]) -> None:
        """Have pages say so much while four run, for ten seconds."""
        for _ in range(10):
            self.room.clock.now += 1.0
            for name, rate in tokens_per_s.items():
                load = Load(4.0, 0.0, 0.2, tokens_per_s=rate, prompt_tokens=100, output_tokens=int(rate))
                self.core.observe(name, load, self.room.clock.now)

    def answer(self, seconds: float, took_s: dict[str, float], slots: int = 4) -> None:
        """Keep `slots` requests running at each endpoint, whose answers take so long."""
        running = {name: [] for name in took_s}
        for _ in range(int(2 * seconds)):
            self.room.clock.now += 0.5
            now = self.room.clock.now
            for name, tickets in running.items():
                for ticket in [one for one in tickets if now - one.leased_at >= took_s[name]]:
                    self.room.gate.close(ticket, Answer.OK)
                    tickets.remove(ticket)
                while len(tickets) < slots:
                    tickets.extend(self.room.offer(1, allowed=frozenset([name])))
            self.paces.sample(now)
        for ticket in (ticket for tickets in running.values() for ticket in tickets):
            self.room.gate.close(ticket)


def test_an_engine_whose_tokens_take_ten_times_as_long_is_ten_times_as_slow() -> None:
    fleet = Fleet("", "", "")
    fleet.room.offer(12)
    fleet.tell({"vllm-0": 195.0, "vllm-1": 19.5, "vllm-2": 195.0})
    found = fleet.paces.slowness()
    assert found["vllm-1"] == pytest.approx(10.0, rel=0.01)
    assert found["vllm-0"] == found["vllm-2"] == pytest.approx(1 / 5.5, rel=0.01), "one of its peers is slow"
    family, _ = fleet.paces.collect()
    assert {sample.labels["endpoint"]: sample.value for sample in family.samples} == found


def test_one_that_hangs_behind_its_heads_is_told_as_silent_and_not_as_slow() -> None:
    """It read SLOW x42, and no alert fired before an hour: its checks passed, and its page had no pace to compare."""
    fleet = Fleet("", "", "")
    fleet.room.admin = Admin("127.0.0.1:0", fleet.room.gate, fleet.room.metrics, paces=fleet.paces)
    fleet.room.offer(12)
    for _ in range(3):
        fleet.tell({"vllm-0": 195.0, "vllm-1": 195.0, "vllm-2": 195.0})
        fleet.paces.sample(fleet.room.clock.now)
    assert set(fleet.paces.silent().values()) == {0.0}
    for second in range(1, 91):
        fleet.room.clock.now += 1.0
        for name in fleet.core.endpoints:
            rate = 0.0 if name == "vllm-1" else 195.0
            load = Load(4.0, 0.0, 0.2, tokens_per_s=rate, prompt_tokens=0, output_tokens=int(rate))
            fleet.core.observe(name, load, fleet.room.clock.now)
        fleet.paces.sample(fleet.room.clock.now)
        view = asyncio.run(fleet.room.admin.view())
        words = next(line for line in lines(view, 120, 24) if line.startswith("vllm-1"))
        assert ("NO TOKEN FOR" in words) == (second >= SILENT_S)
    silent = {sample.labels["endpoint"]: sample.value for sample in [*fleet.paces.collect()][1].samples}
    assert silent == {"vllm-0": 0.0, "vllm-1": 90.0, "vllm-2": 0.0}
    assert "vllm-1" not in fleet.paces.slowness()
    assert "NO TOKEN FOR 90 s" in words
    assert "SLOW" not in words


def test_who_is_idle_or_tells_no_tokens_is_not_silent() -> None:
    fleet = Fleet("", "")
    fleet.room.offer(2)
    fleet.tell({"vllm-0": 195.0})
    fleet.paces.sample(fleet.room.clock.now)
    assert set(fleet.paces.silent()) == {"vllm-0"}
    fleet.room.clock.now += 100.0
    for ticket in [*fleet.core.endpoints["vllm-0"].leases]:
        fleet.room.gate.close(ticket, Answer.OK)
    fleet.paces.sample(fleet.room.clock.now)
    assert fleet.paces.silent() == {}
    fleet.room.clock.now += 100.0
    fleet.paces.sample(fleet.room.clock.now)
    fleet.room.offer(1, allowed=frozenset(["vllm-0"]))
    assert fleet.paces.silent() == {"vllm-0": 0.0}, "it was idle before"


def test_one_whose_page_could_not_be_read_was_not_silent_meanwhile() -> None:
    """Or was read by another sidecar, which led: the alert asks for nothing but one reading above a minute."""
    fleet = Fleet("")
    fleet.room.offer(2)
    fleet.tell({"vllm-0": 195.0})
    for _ in range(100):
        fleet.room.clock.now += 1.0
        fleet.core.tick(fleet.room.clock.now)
        fleet.paces.sample(fleet.room.clock.now)
    for tokens_per_s in (None, 0.0):  # a first page tells no differences
        assert fleet.paces.silent() == {}
        load = Load(4.0, 0.0, tokens_per_s=tokens_per_s, output_tokens=None if tokens_per_s is None else 0)
        fleet.core.observe("vllm-0", load, fleet.room.clock.now)
    assert fleet.paces.silent() == {"vllm-0": 0.0}
    fleet.room.clock.now += 1.0
    fleet.paces.sample(fleet.room.clock.now)
    assert fleet.paces.silent() == {"vllm-0": 1.0}


@pytest.mark.parametrize(("tokens_per_s", "tokens"), [(None, 500), (0.0, 0)], ids=["counts at the end", "embeddings"])
def test_an_engine_that_counts_an_answers_tokens_when_it_ends_or_has_none_is_not_called_silent_while_it_works(
    tokens_per_s: float | None, tokens: int
) -> None:
    """As TGI and llama.cpp do: one answer of two minutes was an alert."""
    fleet = Fleet("")
    fleet.room.offer(1)
    for second in range(120):
        fleet.room.clock.now += 1.0
        load = Load(1.0, 0.0, tokens_per_s=tokens_per_s, output_tokens=0 if second else tokens)
        fleet.core.observe("vllm-0", load, fleet.room.clock.now)
        fleet.paces.sample(fleet.room.clock.now)
        assert fleet.paces.silent() == {}


def test_engines_without_a_page_are_compared_by_how_long_their_answers_take_for_people_and_for_no_alert() -> None:
    fleet = Fleet("", "", "")
    fleet.answer(200.0, {"vllm-0": 1.0, "vllm-1": 10.0, "vllm-2": 1.0})
    found = fleet.paces.slowness()
    assert found["vllm-1"] == pytest.approx(10.0, rel=0.2)
    family, _ = fleet.paces.collect()
    assert family.samples == [], "one client's long answers look the same: that is no alert"
    fleet.answer(200.0, {"vllm-0": 1.0, "vllm-1": 1.0, "vllm-2": 1.0}, slots=2)
    assert fleet.paces.slowness()["vllm-1"] == pytest.approx(1.0, rel=0.5), "what was is forgotten"


def test_short_answers_that_readings_meet_at_their_beginning_or_their_end_make_no_endpoint_slow() -> None:
    """Of equal engines one read SLOW x19, at four requests every four seconds."""
    fleet = Fleet("", "")
    fleet.room.offer(8)
    for _ in range(10):
        for running, rates in ((4.0, (6.0, 120.0)), (0.0, (114.0, 0.0))):
            fleet.room.clock.now += 1.0
            for name, rate in zip(fleet.core.endpoints, rates, strict=True):
                load = Load(running, 0.0, tokens_per_s=rate, prompt_tokens=100, output_tokens=int(rate))
                fleet.core.observe(name, load, fleet.room.clock.now)
    assert fleet.paces.by_tokens() == {}


def test_one_long_answer_makes_no_endpoint_slow() -> None:
    fleet = Fleet("", "")
    fleet.room.offer(1, allowed=frozenset(["vllm-1"]))
    fleet.answer(100.0, {"vllm-0": 1.0})
    assert "vllm-1" not in fleet.paces.slowness()
    assert LEAST_ANSWERS > 1


@pytest.mark.parametrize("models", [("a", "b"), ("a",)])
def test_who_serves_something_else_or_is_alone_has_no_peers(models: tuple[str, ...]) -> None:
    fleet = Fleet(*models)
    for model in models:
        fleet.room.offer(1, model=model)
    fleet.tell(dict(zip(fleet.core.endpoints, (195.0, 19.5), strict=False)))
    assert fleet.paces.slowness() == {}


def test_who_has_nothing_to_do_is_no_peer_and_a_follower_tells_nothing() -> None:
    fleet = Fleet("", "")
    busy = fleet.room.offer(8)
    fleet.tell({"vllm-0": 195.0, "vllm-1": 19.5})
    assert len(fleet.paces.slowness()) == 2
    fleet.paces._decides = lambda: False
    assert fleet.paces.slowness() == {}
    fleet.paces._decides = lambda: True
    for ticket in busy:
        if ticket.endpoint is not None and ticket.endpoint.name == "vllm-1":
            fleet.room.gate.close(ticket, Answer.OK)
    assert fleet.paces.slowness() == {}


def test_top_and_the_view_say_who_is_slow_and_put_it_first_where_not_all_fit() -> None:
    fleet = Fleet(*[""] * 30)
    room = fleet.room
    room.admin = Admin("127.0.0.1:0", room.gate, room.metrics, paces=fleet.paces)
    room.offer(120)
    fleet.tell({name: 19.5 if name == "vllm-17" else 195.0 for name in fleet.core.endpoints})
    view = asyncio.run(room.admin.view())
    assert [one["name"] for one in view["endpoints"] if "times_slower" in one] == ["vllm-17"]
    first = next(line for line in lines(view, 120, 24) if line.startswith("vllm-"))
    assert first.startswith("vllm-17")
    assert "SLOW x10" in first


def test_one_that_is_killed_leaves_no_survivor_that_is_called_slow() -> None:
    """It read SLOW x4, and the runbook said to take it out: its dead peer's refused connections were quick answers."""
    fleet = Fleet("", "")
    fleet.room.gate.controller.set_policy(replace(fleet.core.policy, enable_queue=False), fleet.room.clock.now)
    for name in fleet.core.endpoints:
        fleet.room.gate.set_up(name, is_up=True)
    fleet.answer(200.0, {"vllm-0": 2.0, "vllm-1": 2.0})
    for _ in range(600):
        fleet.room.clock.now += 0.02
        for ticket in fleet.room.offer(1, allowed=frozenset(["vllm-1"])):
            if ticket.endpoint is not None:
                fleet.room.gate.close(ticket, Answer.FAILED)
    fleet.paces.sample(fleet.room.clock.now)
    assert fleet.core.endpoints["vllm-1"].dispatched > 120 + LEAST_ANSWERS
    assert fleet.paces.slowness().get("vllm-0", 1.0) == pytest.approx(1.0, rel=0.3), "refusals are no answers"
    fleet.room.gate.set_up("vllm-1", is_up=False)
    assert fleet.paces.slowness() == {}, "it is alone"


def test_one_that_hangs_with_its_page_and_is_down_for_that_is_told_as_silent() -> None:
    """`top` said DOWN and four in flight, and no alert could fire: its page was stale, so nothing was told of it."""
    fleet = Fleet("", "")
    for name in fleet.core.endpoints:
        fleet.room.gate.set_up(name, is_up=True)
    fleet.room.offer(8)
    fleet.tell({"vllm-0": 195.0, "vllm-1": 195.0})
    fleet.paces.sample(fleet.room.clock.now)
    fleet.room.gate.set_up("vllm-1", is_up=False)
    for _ in range(100):
        fleet.room.clock.now += 1.0
        load = Load(4.0, 0.0, 0.2, tokens_per_s=195.0, prompt_tokens=0, output_tokens=195)
        fleet.core.observe("vllm-0", load, fleet.room.clock.now)
        fleet.core.tick(fleet.room.clock.now)
        fleet.paces.sample(fleet.room.clock.now)
    found = fleet.paces.silent()
    assert found["vllm-0"] == 0.0
    assert found["vllm-1"] == pytest.approx(100.0 - fleet.core.policy.stale_after_s, abs=2.0)
    fleet.room.admin = Admin("127.0.0.1:0", fleet.room.gate, fleet.room.metrics, paces=fleet.paces)
    view = asyncio.run(fleet.room.admin.view())
    assert any(line.startswith("vllm-1") and "DOWN, NO TOKEN FOR" in line for line in lines(view, 120, 24))
    for ticket in [*fleet.core.endpoints["vllm-1"].leases]:
        fleet.room.gate.close(ticket, Answer.FAILED)
    assert "vllm-1" not in fleet.paces.silent(), "it was killed: what it ran is over"
