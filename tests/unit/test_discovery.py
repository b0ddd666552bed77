"""Sources, the followed file, the clusters file, the roster: what is seen and kept, and in which order it happens."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import Request, RequestClass
from extproc.app import App
from extproc.config import Config, DnsConfig, EndpointConfig, load_config, parse_config
from extproc.endpoints import roster
from extproc.endpoints.discovery import dns, file, source
from extproc.endpoints.discovery.dns import Dns
from extproc.endpoints.discovery.file import ConfigFile
from extproc.endpoints.discovery.source import Sources
from extproc.endpoints.names import address_of, name_of
from extproc.endpoints.roster import Roster
from extproc.envoy import clusters
from extproc.envoy.clusters import ClustersFile
from extproc.errors import ConfigError
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.objectives import classes_of
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def until(condition: Callable[[], object], timeout_s: float = 3.0) -> None:
    """Wait until `condition` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what changes has no event
            await asyncio.sleep(0.002)


def config(**keys: Any) -> Config:
    return parse_config(yaml.safe_dump(keys), "test", {})


def endpoint(name: str, address: str = "10.0.0.1:8000", **more: Any) -> dict[str, Any]:
    return {"name": name, "address": address, **more}


# ---- names


def test_a_name_made_of_an_address_is_a_valid_name():
    assert name_of("10.0.0.1:8000") == "10.0.0.1:8000"
    assert name_of(address_of("fd00::1", 8000)) == "fd00::1:8000"
    for host in ("::1", "::", "fd00::1", "10.0.0.1"):
        address = address_of(host, 1)
        assert config(endpoints=[endpoint(name_of(address), address)]).endpoints[0].address == address


# ---- the configuration


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"discovery": [{"dns": {"name": "x", "port": 1}}]}, "discovery: needs envoy_clusters_file"),
        ({"discovery": [{}]}, "discovery[0]: needs one of dns and kubernetes"),
        ({"discovery": [{"dns": {"name": "x"}}]}, "discovery[0].dns: needs one of port and ports"),
        ({"discovery": [{"dns": {"nam": "x", "name": "x", "port": 1}}]}, "unknown key; did you mean 'name'?"),
        ({"discovery": [{"kubernetes": {}}]}, "discovery[0].kubernetes: needs one of service and selector"),
        ({"discovery": [{"kubernetes": {"service": "a", "port": 0}}]}, "discovery[0].kubernetes.port: must be a port"),
        ({"inference_pool": {"name": "vllm"}, "dialect": "cluster-header"}, "inference_pool: is for gateways that ask"),
        ({"inference_pool": {}}, "inference_pool.name: is required"),
        ({"inference_pool": {"name": "No Name"}}, "inference_pool.name: "),
        ({"envoy_clusters_file": "clusters.yaml"}, "envoy_clusters_file: must be an absolute path that ends in .yaml"),
        ({"envoy_clusters_file": "/clusters.json"}, "envoy_clusters_file: must be an absolute path"),
        ({"health_check": {"path": "health"}}, "health_check.path: must be the path of a URL"),
        ({"health_check": {"intervall": "1s"}}, "health_check.intervall: unknown key; did you mean 'interval'?"),
        ({"health_check": {"interval": "0s"}}, "health_check.interval: must be longer than 0s"),
    ],
)
def test_mistakes_in_what_discovers_endpoints_are_named(keys, words):
    if "discovery" in keys and "envoy_clusters_file" not in words:
        keys = {"envoy_clusters_file": "/c.yaml", **keys}
    with pytest.raises(ConfigError) as caught:
        config(**keys)
    assert any(words in problem for problem in caught.value.problems), caught.value.problems


def test_an_inference_pool_makes_an_endpoint_picker_that_needs_no_clusters_file():
    assert config(inference_pool={"name": "vllm"}).picks
    assert not config().picks


@pytest.mark.parametrize(
    ("name", "priority", "expected"),
    [
        ("batch", 99, "batch"),  # the class of its name, whatever the priority
        ("a", 10, "interactive"),
        ("b", 9, "standard"),
        ("c", 1000, "interactive"),
        ("d", -1000, "batch"),
        ("e", 0, "standard"),  # the first of two
    ],
)
def test_an_objective_is_in_the_class_of_its_name_else_of_its_priority_or_the_next_lower(name, priority, expected):
    priorities = (("standard", 0), ("other", 0), ("interactive", 10), ("batch", -10))
    classes = [RequestClass(klass, value, 30.0) for klass, value in priorities]
    assert classes_of({name: priority}, classes) == {name: expected}


# ---- the followed file


class Followed:
    """A config file that is followed, and what was taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adopted: list[Config] = []
        self.count = {"success": 0, "failure": 0}
        self.file = ConfigFile(path, lambda: load_config(path, {}), self.adopt, self.count)

    def adopt(self, fresh: Config) -> None:
        if fresh.max_queued_requests == 13:
            raise ConfigError("adopt", ["13 is bad luck"])
        self.adopted.append(fresh)

    def run(self, story: Callable[[Followed], Any]) -> None:
        async def main() -> None:
            task = asyncio.create_task(self.file.run(load_config(self.path, {})))
            try:
                await story(self)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(file, "POLL_S", 0.02)
    monkeypatch.setattr(file, "STILL_S", 0.01)
    monkeypatch.setattr(roster, "TICK_S", 0.005)
    monkeypatch.setattr(source, "RESTART_S", 0.01)


def test_a_config_map_whose_symlink_is_swapped_is_read_again(tmp_path):
    """As the kubelet does it: file -> ..data/file, ..data -> a dated directory, replaced by a rename."""
    for version, limit in (("v1", 1), ("v2", 2)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "c.yaml").write_text(f"max_running_requests: {limit}")
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "c.yaml").symlink_to("..data/c.yaml")

    async def story(here: Followed) -> None:
        (tmp_path / "..new").symlink_to("v2")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until(lambda: [one.max_running_requests for one in here.adopted] == [2])

    Followed(tmp_path / "c.yaml").run(story)


def test_each_way_to_be_bad_is_counted_once_and_a_good_file_is_taken_over_again(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")

    async def story(here: Followed) -> None:
        for number, text in enumerate(("max_running_requests: x", "endpoints: [", "max_queued_requests: 13"), 1):
            path.write_text(text)
            await until(lambda n=number: here.count["failure"] == n)
        path.unlink()
        await until(lambda: here.count["failure"] == 4)
        path.write_text("max_running_requests: 2")
        await until(lambda: here.count["success"] == 1)

    here = Followed(path)
    here.run(story)
    assert here.count == {"success": 1, "failure": 4}
    assert [one.max_running_requests for one in here.adopted] == [2]
    assert "13 is bad luck" in caplog.text
    assert "can't be read" in caplog.text


def test_a_file_that_is_only_touched_is_not_taken_over_but_a_signal_always_reads(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")
    reads: list[int] = []

    async def story(here: Followed) -> None:
        real = here.file._content
        here.file._content = lambda: reads.append(1) or real()
        for number in (1, 2):
            os.utime(path, (number, number))
            await until(lambda n=number: len(reads) >= n)
        assert here.adopted == []
        here.file.poke()
        await until(lambda: len(here.adopted) == 1)

    Followed(path).run(story)


def test_a_file_that_is_being_written_is_read_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "STILL_S", 0.05)
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")

    async def story(here: Followed) -> None:
        with path.open("w") as writing:  # truncated: valid YAML, and no endpoints
            for letter in "max_running_requests: 2\n":
                writing.write(letter)
                writing.flush()
                await asyncio.sleep(0.01)
        await until(lambda: here.adopted)

    here = Followed(path)
    here.run(story)
    assert [one.max_running_requests for one in here.adopted] == [2]
    assert here.count["failure"] == 0


def test_a_fifo_where_the_file_was_is_a_failed_reload_and_what_replaces_it_is_read(tmp_path):
    path = tmp_path / "sidecar.yaml"
    path.write_text("max_queued_requests: 1\n")

    async def story(here: Followed) -> None:
        path.unlink()
        os.mkfifo(path)
        here.file.poke()
        await until(lambda: here.count["failure"] >= 1)
        assert here.file.is_refused
        path.unlink()
        path.write_text("max_queued_requests: 2\n")
        await until(lambda: [one.max_queued_requests for one in here.adopted] == [2])

    Followed(path).run(story)


def test_a_file_that_loses_all_endpoints_is_refused_unless_it_says_so():
    keys = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}

    async def main() -> None:
        app = App(config(**keys, endpoints=[endpoint("a")]), asyncio.get_running_loop())
        with pytest.raises(ConfigError, match=r"endpoints: all are gone.*say `endpoints: \[\]`"):
            app.adopt(config(**keys))
        app.adopt(config(**keys, endpoints=[]))
        assert app.config.endpoints == []

    asyncio.run(main())


# ---- DNS


def test_dns_reports_each_answer_and_nothing_at_all_when_a_lookup_fails(monkeypatch, caplog):
    answers: list[Any] = [["10.0.0.2:1", "10.0.0.1:1", "10.0.0.1:1"], OSError("no such name"), [], ["[fd00::1]:1"]]
    reports: list[list[tuple[str, str]]] = []

    async def lookup(host: str, port: int) -> list[str]:
        assert (host, port) == ("vllm", 1)
        answer = answers.pop(0) if answers else ["[fd00::1]:1"]
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def main() -> None:
        found = DnsConfig.model_validate({"name": "vllm", "port": 1, "interval": "1ms", "max_running_requests": 3})
        task = asyncio.create_task(
            Dns(found, lookup).run(lambda seen: reports.append([(e.name, e.address) for e in seen]))
        )
        await until(lambda: len(reports) >= 2)
        task.cancel()

    asyncio.run(main())
    assert reports[:2] == [[("10.0.0.1:1", "10.0.0.1:1"), ("10.0.0.2:1", "10.0.0.2:1")], [("fd00::1:1", "[fd00::1]:1")]]
    assert caplog.text.count("can't be looked up") == 1


def test_the_loops_resolver_finds_localhost():
    assert "127.0.0.1:80" in asyncio.run(dns.resolve("localhost", 80))
    with pytest.raises(OSError, match=r".+"):
        asyncio.run(dns.resolve("nowhere.invalid", 80))


# ---- the running sources


class Scripted:
    """A source that reports what it is told to."""

    made: list[Scripted]

    def __init__(self, found: Any) -> None:
        self.config = found
        self.report: Callable[[Any], None] | None = None
        self.fail = False
        Scripted.made.append(self)

    async def run(self, report: Any) -> None:
        self.report = report
        while not self.fail:  # noqa: ASYNC110 - set from outside the loop's tasks
            await asyncio.sleep(0.001)
        self.fail = False
        raise RuntimeError("a bug")


@pytest.fixture
def scripted(monkeypatch):
    Scripted.made = []
    monkeypatch.setattr(source, "_source_of", lambda config, *_: Scripted(config))
    return Scripted.made


def found(**keys: Any) -> Any:
    return config(envoy_clusters_file="/c.yaml", discovery=[{"dns": {"name": "x", "port": 1, **keys}}]).sources[0]


def test_a_changed_source_keeps_what_was_seen_until_it_sees_something_and_a_removed_one_takes_it_away(scripted):
    async def main() -> None:
        reports: list[Any] = []
        sources = Sources(lambda name, seen: reports.append((name, seen)))
        sources.configure([found()])
        sources.configure([found()])
        await until(lambda: len(scripted) == 1 and scripted[0].report)
        scripted[0].report([1])
        sources.configure([found(max_running_requests=3)])
        await until(lambda: len(scripted) == 2 and scripted[1].report)
        assert reports == [("dns x:1", [1])]
        sources.configure([])
        assert reports == [("dns x:1", [1]), ("dns x:1", None)]
        await sources.stop()

    asyncio.run(main())


def test_a_source_with_a_bug_is_started_again_and_one_that_sees_too_much_is_cut(scripted, caplog, monkeypatch):
    monkeypatch.setattr(source, "MOST", 2)

    async def main() -> None:
        reports: list[Any] = []
        sources = Sources(lambda _, seen: reports.append(seen))
        sources.configure([found()])
        await sources.wait_first(0.01)
        await until(lambda: scripted[0].report)
        scripted[0].fail = True
        await until(lambda: not scripted[0].fail)
        scripted[0].report = None
        await until(lambda: scripted[0].report)
        scripted[0].report([1, 2, 3])
        await sources.wait_first(1)
        assert reports == [[1, 2]]
        await sources.stop()

    asyncio.run(main())
    assert "nothing seen in 0.01s" in caplog.text
    assert "a bug" in caplog.text
    assert "sees 3 endpoints; only the first 2 are used" in caplog.text


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
            put=lambda one: self.followed.__setitem__(one.name, one.address),
            remove=self.followed.__delitem__,
            tasks=Tasks(),
        )

    def change(self, **keys: Any) -> None:
        self.config = self.config.model_copy(update={"endpoints": config(**keys).endpoints})
        self.roster.configure(self.config)

    def ask(self) -> Ticket:
        ticket = Ticket(
            Request("r", self.gate.now()), lambda decision: self.sent.append(self.reception.steer(decision.endpoint))
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
        await until(lambda: here.reception.endpoint_of("a") is None)
        with pytest.raises(KeyError):
            here.reception.steer("a")

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


def test_a_moved_endpoint_gets_a_second_cluster_and_nothing_until_envoy_knows_it(tmp_path):
    async def story(here: House) -> None:
        running = here.ask()
        here.change(endpoints=[endpoint("a", "10.0.0.9:8000", max_running_requests=2)])
        assert here.placed() == {}
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
        assert (here.reception.endpoint_of("a"), here.reception.endpoint_of("other")) == (None, "a")
        here.change(endpoints=[])
        assert here.placed() == {}

    live(story, None, endpoints=[endpoint("a")])
    assert "endpoint b: Envoy's own cluster b decides where its requests go" in caplog.text


def test_a_changed_limit_reaches_waiting_requests(tmp_path):
    async def story(here: House) -> None:
        for _ in range(3):
            here.ask()
        assert len(here.sent) == 1
        here.change(endpoints=[endpoint("a", max_running_requests=3)])
        assert len(here.sent) == 3

    live(story, tmp_path / "c.yaml", endpoints=[endpoint("a")])


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
