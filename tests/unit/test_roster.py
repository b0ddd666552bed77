"""The roster and the clusters file: an endpoint is used when Envoy knows it, a cluster stays as long as its leases."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.admission.controller import Controller
from extproc.admission.events import EndpointsPut, Event
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Request
from extproc.config import EndpointConfig, HealthCheckConfig
from extproc.endpoints import roster
from extproc.endpoints.health import HealthChecks
from extproc.endpoints.roster import Roster
from extproc.envoy import clusters
from extproc.envoy.clusters import ClustersFile
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.tasks import Tasks
from tests.unit.endpoint_lists import config, endpoint, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# ---- the clusters file


def test_the_clusters_file_is_read_back_as_it_was_written_and_its_version_rises(tmp_path):
    path = tmp_path / "clusters.yaml"
    routes = {"a": "10.0.0.1:1", "b@[fd00::1]:2": "[fd00::1]:2", "c": "vllm.svc:3"}
    first = ClustersFile(str(path))
    assert first.read() is None
    version = first.write(routes, routes.values(), config(health_check={}))
    assert ClustersFile(str(path)).read() == routes
    assert ClustersFile(str(path)).write({}, (), config()) > version
    assert ClustersFile(str(path)).read() == {}
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[", "resources: 3", "resources: [{name: a}]", "x: {}", "\0"])
def test_a_clusters_file_that_says_nothing_is_written_anew(tmp_path, text):
    path = tmp_path / "clusters.yaml"
    path.write_text(text)
    assert ClustersFile(str(path)).read() == {}


# ---- the roster


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(roster, "TICK_S", 0.005)


class House:
    """A roster on a real gate, its clusters file, and who follows."""

    def __init__(self, path: Path | None, **keys: Any) -> None:
        if path is not None:
            keys["envoy_clusters_file"] = str(path)
        self.config = config(enable_queue=True, max_running_requests=1, **keys)
        self.gate = Gate(Controller(self.config.policy()), asyncio.get_running_loop())
        self.reception = Reception(self.gate, Headers(), Ages(30.0))
        self.envoy = FakeEnvoy()
        self.followed: dict[str, str] = {}
        self.sent: list[str] = []
        self.roster = Roster(
            *(self.gate, self.reception, self.config),
            file=ClustersFile(str(path)) if path is not None else None,
            envoy=self.envoy if path is not None else None,
            put=lambda one, _: self.followed.__setitem__(one.name, one.address),
            remove=lambda name: self.followed.pop(name, None),
            tasks=Tasks(),
        )

    def change(self, **keys: Any) -> None:
        self.config = self.config.model_copy(update={"endpoints": config(**keys).endpoints})
        self.roster.configure(self.config)

    def ask(self, model: str | None = None) -> Ticket:
        ticket = Ticket(
            Request("r", self.gate.now(), model=model),
            lambda decision: self.sent.append(self.reception.steer(decision.endpoint)),
        )
        self.gate.offer(ticket)
        return ticket

    def file(self) -> dict[str, str]:
        return ClustersFile(self.config.envoy_clusters_file).read() or {}

    def placed(self) -> dict[str, str]:
        found = self.gate.controller.endpoints.values()
        return {one.name: one.spec.cluster for one in found if not one.removed}


class FakeEnvoy:
    """Knows the version that the test lets it know."""

    known: int | None = 0

    async def version(self) -> int | None:
        return self.known


def live(story: Callable[[House], Any], path: Path | None, **keys: Any) -> None:
    async def main() -> None:
        here = House(path, **keys)
        here.roster.start()
        try:
            async with asyncio.timeout(30):
                await story(here)
        finally:
            await here.roster.stop()

    asyncio.run(main())


def test_a_new_endpoint_is_written_at_once_and_used_only_when_envoy_knows_it(tmp_path):
    path = tmp_path / "c.yaml"

    async def story(here: House) -> None:
        assert here.placed() == {"a": "a"}  # no file was there: no Envoy runs yet
        here.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.2:8000")])
        await until(lambda: here.file() == {"a": "10.0.0.1:8000", "b": "10.0.0.2:8000"})
        here.envoy.known = int(yaml.safe_load(path.read_text())["version_info"]) - 1
        for _ in range(20):
            await asyncio.sleep(0)
        assert here.placed() == {"a": "a"}
        here.envoy.known += 1
        await until(lambda: here.placed() == {"a": "a", "b": "b"})
        assert here.followed == {"a": "10.0.0.1:8000", "b": "10.0.0.2:8000"}

    live(story, path, endpoints=[endpoint("a")])


def test_endpoints_that_come_and_change_in_one_moment_are_one_event_that_finds_their_clusters_known():
    async def story(here: House) -> None:
        waiting = [here.ask() for _ in range(4)][-1]
        told: list[Event] = []
        here.gate.controller.watch(lambda event, _: told.append(event))
        now = [
            endpoint("a", max_running_requests=2),
            endpoint("b", "10.0.0.2:8000", cluster="cluster-b"),
            endpoint("c", "10.0.0.3:8000"),
        ]
        here.change(endpoints=now)
        puts = [event for event in told if isinstance(event, EndpointsPut)]
        assert [[spec.name for spec in event.specs] for event in puts] == [["a", "b", "c"]]
        await until(lambda: waiting.state is State.LEASED)
        assert sorted(here.sent) == sorted(here.reception.steer(name) for name in "aabc")
        assert list(here.followed) == ["a", "b", "c"]
        here.change(endpoints=now)
        assert [event for event in told if isinstance(event, EndpointsPut)] == puts, "nothing changed"

    live(story, None, endpoints=[endpoint("a")])


def test_of_many_that_change_in_one_moment_those_who_follow_are_told_some_in_each_turn_and_in_order(monkeypatch):
    """The moment itself is the core's alone: 500 endpoints held up all requests for 26 ms, most of it for logs."""
    monkeypatch.setattr(roster, "TOLD_IN_A_TURN", 3)
    log: list[tuple[str, str]] = []

    async def story(here: House) -> None:
        here.roster._put = lambda one, _: log.append((one.name, one.address))
        here.roster._remove = lambda name: log.append((name, "gone"))
        here.change(endpoints=[endpoint(name, f"10.0.0.{number}:1") for number, name in enumerate("bcdefgh")])
        assert list(here.placed()) == list("bcdefgh"), "requests go by the new file from this moment on"
        assert not log
        here.change(endpoints=[endpoint("b", "10.0.0.0:1"), endpoint("c", "10.0.0.9:1")])
        assert list(here.placed()) == ["b", "c"]
        assert not log, "what came first is told first"
        for turn in range(1, 6):
            await asyncio.sleep(0)
            assert len(log) <= 3 * turn
        await until(lambda: not here.roster._untold)
        came = [(name, f"10.0.0.{number}:1") for number, name in enumerate("bcdefgh")]
        assert log == [*came, ("a", "gone"), ("c", "10.0.0.9:1"), *((name, "gone") for name in "defgh")]

    live(story, None, endpoints=[endpoint("a")])


def test_one_who_follows_and_fails_keeps_the_others_from_nothing(monkeypatch):
    monkeypatch.setattr(roster, "TOLD_IN_A_TURN", 1)
    told: list[str] = []

    def put(one: EndpointConfig, _: bool) -> None:
        told.append(one.name)
        if one.name == "c":
            raise ValueError(one.name)

    async def story(here: House) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(str(context["exception"])))
        here.roster._put = put
        here.change(endpoints=[endpoint(name, f"10.0.0.{number}:1") for number, name in enumerate("abcd")])
        with pytest.raises(ValueError, match="c"):
            await here.roster.settled()

    live(story, None, endpoints=[endpoint("a", "10.0.0.0:1")])
    assert told == ["b", "c", "c", "d"]


@pytest.mark.parametrize("fails", ["put_endpoints", "remove_endpoints"])
def test_a_change_that_the_core_cannot_take_over_is_made_with_the_next_one_and_all_who_follow_are_told(
    fails, monkeypatch
):
    async def story(here: House) -> None:
        def fail(_: object) -> None:
            raise RuntimeError("a fault, once")

        with monkeypatch.context() as once:
            once.setattr(here.gate, fails, fail)
            with pytest.raises(RuntimeError):
                here.change(endpoints=[endpoint("b", "10.0.0.2:1")])
        here.change(endpoints=[endpoint("b", "10.0.0.2:1"), endpoint("c", "10.0.0.3:1")])
        await until(lambda: here.followed == {"b": "10.0.0.2:1", "c": "10.0.0.3:1"})
        assert list(here.placed()) == ["b", "c"]

    live(story, None, endpoints=[endpoint("a")])


@pytest.mark.parametrize(
    ("fails", "meanwhile", "then"), [("put_endpoints", "ab", "a"), ("remove_endpoints", "a", "ab")]
)
def test_a_change_that_the_core_took_over_before_a_fault_is_undone_by_the_next_one(fails, meanwhile, then, monkeypatch):
    def some(names: str) -> list[dict[str, Any]]:
        return [endpoint(name, f"10.0.0.{number}:1") for number, name in enumerate(names)]

    async def story(here: House) -> None:
        take_over = getattr(here.gate, fails)

        def take_over_and_fail(what: object) -> None:
            take_over(what)
            raise RuntimeError("a fault, once")

        with monkeypatch.context() as once:
            once.setattr(here.gate, fails, take_over_and_fail)
            with pytest.raises(RuntimeError):
                here.change(endpoints=some(meanwhile))
        here.change(endpoints=some(then))
        assert list(here.placed()) == list(then)
        await until(lambda: list(here.followed) == list(then))

    live(story, None, endpoints=some(then))


def rows(names: str, count: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [endpoint(f"{names}{n}", f"10.{first + 1}.{n // 250}.{n % 250}:8000", **more) for n in range(count)]


async def seen_in_each_turn(here: House, look: Callable[[], object]) -> list[object]:
    """What is seen between the pieces of a change of many, from just after it was asked for."""
    seen = [look()]
    while here.roster._pieces:
        await asyncio.sleep(0)
        seen.append(look())
    return seen


def test_where_many_come_and_many_go_those_who_go_stay_until_all_others_are_there():
    async def story(here: House) -> None:
        here.change(endpoints=rows("new", 120, 1))
        seen = await seen_in_each_turn(here, lambda: set(here.placed()))
        old, new = {f"old{n}" for n in range(60)}, {f"new{n}" for n in range(120)}
        assert seen[0] == old
        assert seen[-1] == new
        between = [names for names in seen if names not in (old, new)]
        assert len(between) > 1
        assert all(old <= names for names in between)
        assert sorted(between, key=len) == between

    live(story, None, endpoints=rows("old", 60))


def test_a_model_that_moves_in_a_change_of_many_is_served_in_every_turn():
    async def story(here: House) -> None:
        changed = rows("e", 60, 0, models=["sim"], max_running_requests=2)
        here.change(
            endpoints=[*changed, *rows("a", 1, 1, models=["sim"]), *rows("b", 1, 2, models=["sim", "moves", "new"])]
        )

        def served_by() -> str:
            ticket = Ticket(Request("r", here.gate.now(), model="moves"))
            here.gate.offer(ticket)
            assert ticket.endpoint is not None
            here.gate.close(ticket, Answer.OK)
            return ticket.endpoint.name

        seen = await seen_in_each_turn(here, served_by)
        assert (seen[0], seen[-3], seen[-2]) == ("a0", "a0", "b0"), "then it is told what the file names"
        assert here.reception.named_models == {"sim", "moves", "new"}
        assert len(seen) > 2
        assert here.gate.controller.endpoints["e59"].limit.value == 2

    lists = [*rows("a", 1, 1, models=["sim", "moves"]), *rows("b", 1, 2, models=["sim"])]
    live(story, None, endpoints=[*rows("e", 60, 0, models=["sim"]), *lists])


def test_where_many_of_other_models_come_and_many_go_nobody_has_to_name_a_model_meanwhile():
    async def story(here: House) -> None:
        def is_sent() -> bool:
            ticket = Ticket(Request("r", here.gate.now()))
            here.gate.offer(ticket)
            here.gate.close(ticket, Answer.OK)
            return ticket.endpoint is not None

        here.change(endpoints=rows("new", 60, 1, models=["new"]))
        assert all(await seen_in_each_turn(here, is_sent))

    live(story, None, endpoints=rows("old", 60, models=["old"]))


def test_what_is_found_before_a_file_of_many_has_its_turn_takes_nothing_from_it():
    async def story(here: House) -> None:
        here.change(endpoints=rows("new", 200, 1))
        here.roster.report("dns", config(endpoints=[endpoint("pod", "10.0.0.3:8000")]).endpoints)
        await here.roster.settled()
        assert set(here.placed()) == {"pod", *(f"new{n}" for n in range(200))}

    live(story, None, endpoints=rows("old", 3))


def test_changes_of_many_that_follow_each_other_do_not_make_a_turn_longer():
    async def story(here: House) -> None:
        for limit in (2, 3, 4):
            here.change(endpoints=rows("new", 200, 1, max_running_requests=limit))
        seen = await seen_in_each_turn(here, lambda: sum(name.startswith("new") for name in here.placed()))
        assert seen == [0, 0, *range(0, 201, roster.PUT_IN_A_TURN), 200, 200]

    live(story, None, endpoints=rows("old", 3))


def test_a_request_that_is_sent_amid_a_change_of_many_keeps_the_cluster_of_one_who_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LINGER_S", 0.05)
    many = roster.PUT_IN_A_TURN + 1

    async def story(here: House) -> None:
        here.change(endpoints=rows("e", many, max_running_requests=2))
        late = here.ask()
        assert late.endpoint is not None
        assert late.endpoint.name == "goes"
        await here.roster.settled()
        assert "goes" not in here.placed()
        await asyncio.sleep(0.1)  # longer than the while
        assert "goes" in here.file()
        here.gate.close(late)
        await until(lambda: "goes" not in here.file())

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("goes"), *rows("e", many)])


def test_no_cluster_is_dropped_amid_a_change_of_many_while_requests_may_be_sent_there(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LINGER_S", 0.0)
    monkeypatch.setattr(roster, "TICK_S", 0.0)
    many = roster.PUT_IN_A_TURN + 1

    async def story(here: House) -> None:
        running = here.ask()
        here.change(endpoints=[endpoint("goes", "10.0.9.2:8000"), *rows("e", many)])
        await asyncio.sleep(0)  # from now on it looks at each turn for what may be dropped
        here.change(endpoints=rows("e", many, max_running_requests=2))
        look = lambda: set(here.placed().values()) <= here.roster._routes.keys()  # noqa: E731
        assert all(await seen_in_each_turn(here, look))
        here.gate.close(running)

    first = [endpoint("first", "10.0.9.1:8000"), endpoint("goes", "10.0.9.2:8000")]
    live(story, tmp_path / "c.yaml", endpoints=[*first, *rows("e", many)])


def test_a_cluster_stays_for_those_who_were_sent_there_by_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LINGER_S", 0.05)

    async def story(here: House) -> None:
        running = here.ask()
        here.change(endpoints=[endpoint("b", cluster="c")])
        await until(lambda: here.placed() == {"b": "c"})
        here.change(endpoints=[])
        await asyncio.sleep(0.1)  # longer than the while
        assert "c" in here.file()
        here.gate.close(running)
        await until(lambda: here.file() == {})

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a", cluster="c")])


def test_a_cluster_stays_for_those_who_were_sent_there_under_the_name_before(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LINGER_S", 0.02)

    async def story(here: House) -> None:
        running, waiting = here.ask(), here.ask()
        here.envoy.known = 10**15
        here.change(endpoints=[endpoint("b")])
        await until(lambda: here.placed() == {"b": "b"})
        assert len(here.sent) == 1  # the server's only slot is taken, whatever its name
        await asyncio.sleep(0.1)  # longer than the while
        assert here.file() == {"a": "10.0.0.1:8000", "b": "10.0.0.1:8000"}
        here.gate.close(running)
        assert here.sent[1:] == [here.reception.steer("b")]
        await until(lambda: set(here.file()) == {"b"})
        here.gate.close(waiting)

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


def test_a_change_amid_a_change_of_many_takes_its_place():
    async def story(here: House) -> None:
        here.change(endpoints=rows("new", 200, 1))
        while not any(name.startswith("new") for name in here.placed()):  # noqa: ASYNC110 - turns are counted
            await asyncio.sleep(0)
        assert sum(name.startswith("new") for name in here.placed()) < 200
        here.change(endpoints=rows("last", 60, 2))
        await here.roster.settled()
        assert set(here.placed()) == {f"last{n}" for n in range(60)}
        for _ in range(30):
            await asyncio.sleep(0)
        assert set(here.placed()) == set(here.followed) == {f"last{n}" for n in range(60)}

    live(story, None, endpoints=rows("old", 3))


def test_a_piece_that_the_core_cannot_take_over_keeps_the_others_from_nothing_and_is_made_with_the_next_change(
    monkeypatch,
):
    async def story(here: House) -> None:
        loop, faults = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: faults.append(context["exception"]))
        put, calls = Gate.put_endpoints, []

        def fails_once(gate: Gate, specs: Any) -> None:
            calls.append(specs)
            if len(calls) == 1:
                raise RuntimeError("a bug")
            put(gate, specs)

        monkeypatch.setattr(Gate, "put_endpoints", fails_once)
        here.change(endpoints=rows("new", 120, 1))
        with pytest.raises(RuntimeError, match="a bug"):  # else a reload of so many counts as taken over
            await here.roster.settled()
        await asyncio.sleep(0)
        assert [str(fault) for fault in faults] == ["a bug"]
        assert len(here.placed()) == 120 - roster.PUT_IN_A_TURN
        here.change(endpoints=rows("new", 120, 1))
        await here.roster.settled()
        assert len(here.placed()) == 120

    live(story, None, endpoints=rows("old", 3))


def test_an_envoy_that_never_says_a_word_is_not_waited_for_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(roster, "GIVE_UP_S", 0.05)

    async def story(here: House) -> None:
        here.envoy.known = None
        here.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.2:8000")])
        await until(lambda: "b" in here.placed())

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])
    assert "no word in 0.05s that Envoy knows a new cluster" in caplog.text


def test_a_removed_endpoints_cluster_stays_until_its_last_lease_is_back_and_a_while_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LINGER_S", 0.05)

    async def story(here: House) -> None:
        ticket = here.ask()
        here.change(endpoints=[])
        assert here.placed() == {}
        assert here.followed == {}
        await asyncio.sleep(0.1)  # longer than the while
        assert "a" in here.file()
        here.reception.steer("a")
        here.gate.close(ticket)
        await until(lambda: here.file() == {})
        await until(lambda: "a" not in here.reception._endpoints)
        with pytest.raises(KeyError):
            here.reception.steer("a")

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


def test_a_moved_endpoint_gets_a_second_cluster_and_nothing_there_until_envoy_knows_it(tmp_path):
    async def story(here: House) -> None:
        running = here.ask()
        here.change(endpoints=[endpoint("a", "10.0.0.9:8000", max_running_requests=2)])
        assert here.placed() == {"a": "a"}
        held = here.ask()
        assert len(here.sent) == 1
        here.envoy.known = 10**15
        await until(lambda: here.placed() == {"a": "a@10.0.0.9:8000"})
        assert here.sent[1] == here.reception.steer("a") != here.sent[0]
        assert here.followed == {"a": "10.0.0.9:8000"}
        here.change(endpoints=[endpoint("a")])  # and back again: the old cluster is still there
        assert here.placed() == {"a": "a"}
        for ticket in (running, held):
            here.gate.close(ticket)

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


@pytest.mark.parametrize("how", ["by another one", "at another address", "at another address, under another name"])
def test_whom_the_file_replaces_serves_until_envoy_knows_who_comes_in_its_place(tmp_path, monkeypatch, how):
    """Of 150 requests 52 were refused, though the old server and the new one both lived."""
    monkeypatch.setattr(roster, "LINGER_S", 0.02)
    ours = {"models": ["m"], "max_running_requests": 9}
    old = endpoint("a", **ours)
    new = {
        "by another one": [endpoint("b", "10.0.0.9:8000", **ours), endpoint("c", "10.0.0.3:8000", models=["n"])],
        "at another address": [endpoint("a", "10.0.0.9:8000", **ours)],
        "at another address, under another name": [endpoint("b", "10.0.0.9:8000", models=["m", "n"])],
    }[how]

    async def story(here: House) -> None:
        here.envoy.known = None
        here.change(endpoints=new)
        await asyncio.sleep(0.1)  # longer than clusters that nobody needs are kept
        assert here.placed() == {"a": "a"}
        assert here.file()["a"] == "10.0.0.1:8000"
        ticket = here.ask("m")
        assert here.sent == [here.reception.steer("a")]
        here.envoy.known = 10**15
        await until(lambda: here.placed().get(new[0]["name"]) not in (None, "a"))
        assert set(here.placed()) == {one["name"] for one in new}
        await asyncio.sleep(0.1)
        assert here.file()["a"] == "10.0.0.1:8000"  # for its lease
        here.gate.close(ticket)
        await until(lambda: set(here.file().values()) == {one["address"] for one in new})

    live(story, tmp_path / "c.yaml", endpoints=[old])


def test_whom_nobody_replaces_whose_models_others_serve_or_whom_a_source_sees_no_more_goes_at_once(tmp_path):
    two = [endpoint("a"), endpoint("b", "10.0.0.2:8000")]

    async def story(here: House) -> None:
        here.change(endpoints=[endpoint("b", "10.0.0.2:8000"), endpoint("c", "10.0.0.9:8000")])
        assert here.placed() == {"b": "b"}
        here.change(endpoints=[])
        assert here.placed() == {}
        here.envoy.known = 10**15
        here.roster.report("kubernetes", config(endpoints=two).endpoints)
        await until(lambda: set(here.placed()) == {"a", "b"})
        here.envoy.known = None
        here.roster.report("kubernetes", config(endpoints=[endpoint("d", "10.0.0.4:8000")]).endpoints)
        assert here.placed() == {}

    live(story, tmp_path / "c.yaml", endpoints=two)


def test_a_sidecar_that_starts_knows_what_the_one_before_wrote_but_not_what_moved_since(tmp_path):
    path = tmp_path / "c.yaml"
    before = {"a": "10.0.0.1:8000", "b": "10.0.0.2:8000", "pod": "10.0.0.3:8000"}
    ClustersFile(str(path)).write(before, (), config())

    async def story(here: House) -> None:
        assert here.placed() == {"a": "a"}
        assert before.items() <= here.file().items()  # its Envoy may still need them
        assert here.file()["b@10.0.0.7:8000"] == "10.0.0.7:8000"
        here.roster.report("kubernetes", config(endpoints=[endpoint("pod", "10.0.0.3:8000")]).endpoints)
        assert here.placed() == {"a": "a", "pod": "pod"}
        here.envoy.known = 10**15
        await until(lambda: here.placed().get("b") == "b@10.0.0.7:8000")

    live(story, path, endpoints=[endpoint("a"), endpoint("b", "10.0.0.7:8000")])


def test_the_file_wins_over_what_is_found_and_an_address_is_used_once(tmp_path, caplog):
    async def story(here: House) -> None:
        here.envoy.known = 10**15
        seen = [endpoint("a", "10.0.0.5:8000"), endpoint("twin"), endpoint("c", "10.0.0.6:8000")]
        here.roster.report("dns", config(endpoints=seen).endpoints)
        await until(lambda: "c" in here.placed())
        assert here.followed == {"a": "10.0.0.1:8000", "c": "10.0.0.6:8000"}
        here.roster.report("dns", None)
        assert here.placed() == {"a": "a"}

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])
    assert "dns: twin at 10.0.0.1:8000 is left out" in caplog.text


def test_two_ports_of_a_pod_from_two_items_are_two_endpoints(tmp_path):
    async def story(here: House) -> None:
        here.envoy.known = 10**15
        here.roster.report("k8s 1", config(endpoints=[endpoint("pod", "10.0.0.5:8000")]).endpoints)
        here.roster.report("k8s 2", config(endpoints=[endpoint("pod", "10.0.0.5:8001")]).endpoints)
        await until(lambda: len(here.placed()) == 3)
        assert here.followed == {"a": "10.0.0.1:8000", "pod": "10.0.0.5:8000", "pod-8001": "10.0.0.5:8001"}

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


def test_a_found_address_that_is_not_allowed_gets_nothing_and_one_with_our_clusters_name_gets_another(tmp_path, caplog):
    async def story(here: House) -> None:
        here.envoy.known = 10**15
        found = [endpoint("near", "127.0.0.1:22"), EndpointConfig(name="unsteered", address="10.0.0.6:1")]
        here.roster.report("dns", [*config(endpoints=found[:1]).endpoints, found[1]])
        await until(lambda: "unsteered" in here.placed())
        assert here.placed() == {"a": "a", "unsteered": "unsteered@10.0.0.6:1"}
        assert here.roster.left_out == 1

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])
    assert "dns: near at 127.0.0.1:22 is left out: its address is not in allowed_addresses" in caplog.text


def test_a_clusters_file_that_cannot_be_written_is_a_start_error_then_only_a_delay(tmp_path, caplog):
    directory = tmp_path / "d"
    directory.mkdir()

    async def story(here: House) -> None:
        here.envoy.known = 10**15
        directory.rename(tmp_path / "away")
        here.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.2:8000")])
        await until(lambda: "can't write" in caplog.text)
        assert here.placed() == {"a": "a"}
        (tmp_path / "away").rename(directory)
        await until(lambda: "b" in here.placed())

    with pytest.raises(Exception, match="envoy_clusters_file: can't write"):
        live(story, tmp_path / "none" / "c.yaml")
    live(story, directory / "c.yaml", endpoints=[endpoint("a")])
    assert caplog.text.count("can't write") == 1


def test_without_a_clusters_file_changes_work_at_once_and_say_what_envoy_must_know(caplog):
    async def story(here: House) -> None:
        here.change(endpoints=[endpoint("a", cluster="other"), endpoint("b", "10.0.0.2:8000")])
        assert here.placed() == {"a": "other", "b": "b"}
        assert here.reception._endpoints == {"other": "a", "b": "b"}
        here.change(endpoints=[])
        assert here.placed() == {}

    live(story, None, endpoints=[endpoint("a")])
    assert "Envoy's own cluster b decides where requests go" in caplog.text


@pytest.mark.parametrize("count", [roster.LOGGED_EACH, 300])
def test_a_change_of_many_is_one_line_in_the_log_and_its_endpoints_are_named_at_level_debug(count, caplog):
    async def story(here: House) -> None:
        with caplog.at_level("DEBUG", "extproc.discovery"):
            here.change(endpoints=rows("new", count, 10))
            await here.roster.settled()

    live(story, None, endpoints=[])
    lines = [(record.levelname, record.message) for record in caplog.records if record.name == "extproc.discovery"]
    each = [level for level, text in lines if ": Envoy cluster" not in text and "Envoy cluster new" in text]
    assert each == ["INFO" if count == roster.LOGGED_EACH else "DEBUG"] * count
    more = "" if count == roster.LOGGED_EACH else f" and {count - roster.LOGGED_EACH} more"
    others = [text for level, text in lines if level != "DEBUG" and ", Envoy cluster" not in text]
    assert [text for text in others if "by hand" in text and more in text] == others[-1:]
    assert len(others) == (1 if count == roster.LOGGED_EACH else 2)


def test_a_changed_limit_reaches_waiting_requests(tmp_path):
    async def story(here: House) -> None:
        for _ in range(3):
            here.ask()
        assert len(here.sent) == 1
        here.change(endpoints=[endpoint("a", max_running_requests=3)])
        assert len(here.sent) == 3

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


def test_one_that_comes_while_another_is_up_gets_nothing_before_its_first_health_check():
    """Found on call: what waited went to a new endpoint in the moment in which it came, and nobody listened there."""

    async def story(house: House) -> None:
        house.gate.set_up("a", is_up=True)
        first, waits = house.ask(), house.ask()
        house.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.2:1")])
        assert (first.state, waits.state) == (State.LEASED, State.WAITING)
        assert house.gate.controller.endpoints["b"].condition == "down"
        house.gate.set_up("b", is_up=True)
        await until(lambda: waits.state is State.LEASED)
        late = house.ask()
        house.change(endpoints=[endpoint("c", "10.0.0.3:1"), endpoint("d", "10.0.0.4:1")])
        assert house.gate.controller.endpoints["c"].condition == "unknown", "where all are replaced, any is better"
        await until(lambda: late.state is State.LEASED)

    live(story, None, endpoints=[endpoint("a")], health_check={})


@pytest.mark.parametrize(
    ("stays", "comes", "condition"),
    [
        ("chat", "code", "unknown"),  # nobody serves it yet: what asked for it waited for the check, or was refused
        ("chat", "chat code", "unknown"),
        ("chat code", "code", "down"),
        ("", "code", "down"),
        ("chat", "", "unknown"),
    ],
)
def test_one_that_is_alone_for_a_model_need_not_wait_for_its_first_health_check(stays, comes, condition):
    async def story(house: House) -> None:
        house.gate.set_up("a", is_up=True)
        house.change(
            endpoints=[
                endpoint("a", models=stays.split()),
                endpoint("b", "10.0.0.2:1", models=comes.split()),
            ]
        )
        assert house.gate.controller.endpoints["b"].condition == condition

    live(story, None, endpoints=[endpoint("a", models=stays.split())], health_check={})


def test_where_all_are_replaced_there_is_an_endpoint_to_go_to_in_every_turn_until_all_are_told():
    """The health checks were told of the new ones before they heard that the old ones went, and kept all down."""

    async def story(house: House) -> None:
        how = HealthCheckConfig.model_validate({"interval": "10s"})
        checks = HealthChecks(house.gate.set_up, how, Tasks(), house.gate.heard_at)
        house.roster._put = lambda one, waits: checks.put(one.name, one.address, waits=waits)
        house.roster._remove = checks.remove
        await checks.start()
        try:
            house.roster.configure(
                house.config.model_copy(update={"endpoints": config(endpoints=rows("old", 30)).endpoints})
            )
            await house.roster.settled()
            for name, patient in checks._patients.items():
                checks._judge(name, patient, how, None)
            house.change(endpoints=rows("new", 30, 100))
            turns = 0
            while house.roster._pieces or house.roster._untold:
                turns += 1
                assert any(one.available for one in house.gate.controller.endpoints.values())
                await asyncio.sleep(0)
            assert turns > 1
        finally:
            await checks.stop()

    live(story, None, endpoints=[endpoint("a")], health_check={"interval": "10s"})


def test_one_that_moves_or_comes_back_beside_others_gets_nothing_before_its_first_check_either():
    async def story(house: House) -> None:
        for name in "ab":
            house.gate.set_up(name, is_up=True)
        for _ in range(2):
            house.ask()
        core = house.gate.controller.endpoints
        house.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.9:1")])
        assert [core[name].condition for name in "ab"] == ["up", "down"]
        house.change(endpoints=[endpoint("b", "10.0.0.9:1")])
        house.gate.set_up("b", is_up=True)
        assert core["a"].removed, "its request still runs"
        house.change(endpoints=[endpoint("a"), endpoint("b", "10.0.0.9:1")])
        assert [core[name].condition for name in "ab"] == ["down", "up"]

    live(story, None, endpoints=[endpoint("a"), endpoint("b", "10.0.0.2:1")], health_check={})


def test_a_thousand_endpoints_found_at_once_are_placed_within_seconds(tmp_path):
    """It took 28 s, all of them without a turn of the loop, when each of them made the core put all others in order."""

    async def story(here: House) -> None:
        here.envoy.known = 10**15
        seen = [endpoint(f"e{number}", f"10.0.{number // 250}.{number % 250}:8000") for number in range(1000)]
        here.roster.report("dns", config(endpoints=seen).endpoints)
        async with asyncio.timeout(10):
            while len(here.placed()) < 1000:  # noqa: ASYNC110 - what changes has no event
                await asyncio.sleep(0.01)

    live(story, tmp_path / "c.yaml")


# ---- asking Envoy


def test_envoys_word_counts_only_when_nothing_warms_up(monkeypatch):
    from aiohttp import web

    pages = {
        'cluster_manager.cds.version_text: "12"\ncluster_manager.warming_clusters: 0\n': 12,
        'cluster_manager.cds.version_text: "12"\ncluster_manager.warming_clusters: 1\n': None,
        'cluster_manager.cds.version_text: ""\ncluster_manager.warming_clusters: 0\n': None,
        "garbage": None,
    }

    async def main() -> None:
        page = ""

        async def stats(_: web.Request) -> web.Response:
            return web.Response(text=page)

        app = web.Application()
        app.router.add_get("/stats", stats)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        for page, expected in pages.items():  # noqa: B007 - the handler reads it
            assert await clusters.EnvoyAdmin(address).version() == expected
        await runner.cleanup()
        assert await clusters.EnvoyAdmin(address).version() is None

    asyncio.run(main())


def test_what_an_endpoint_failed_at_its_old_address_is_not_counted_against_the_new_one():
    """Also where Envoy's own file says which address its cluster has."""

    async def story(here: House) -> None:
        here.reception.bad_answers["a"][Answer.FAILED] += 40
        here.change(endpoints=[endpoint("a", max_running_requests=3)])
        assert here.reception.bad_answers["a"][Answer.FAILED] == 40, "the same server"
        here.change(endpoints=[endpoint("a", "10.0.0.9:8000", max_running_requests=3)])
        assert here.reception.bad_answers["a"][Answer.FAILED] == 0
        assert here.reception.steer("a")

    live(story, None, endpoints=[endpoint("a")])
