"""Who is there: names, what the configuration says of sources, DNS, and sources while they run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admission.values import RequestClass
from extproc.app import App
from extproc.config import Config, DnsConfig
from extproc.endpoints.discovery import dns, source
from extproc.endpoints.discovery.dns import Dns
from extproc.endpoints.discovery.source import Sources
from extproc.endpoints.names import address_of, name_of
from extproc.errors import ConfigError
from extproc.stream.objectives import classes_of
from extproc.stream.wire import Incoming, Kind
from tests.unit.endpoint_lists import config, endpoint, until

if TYPE_CHECKING:
    from collections.abc import Callable

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
    ("keys", "hands_over"),
    [
        ({}, True),
        ({"dialect": "endpoint-picker"}, True),
        ({"inference_pool": {"name": "vllm"}}, False),
        ({"inference_pool": {"name": "vllm"}, "hand_over": True}, True),
        ({"dialect": "endpoint-picker", "hand_over": False}, False),
    ],
)
def test_only_a_gateways_own_envoy_is_not_left_what_waits_at_sigterm_unless_a_key_says_so(keys, hands_over):
    assert config(**keys).hands_over is hands_over


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
    assert classes_of({name: priority}, classes, {}) == {name: expected}


def test_an_objective_that_the_file_lists_is_in_that_class_with_or_without_kubernetes():
    classes = [RequestClass("standard", 0, 30.0), RequestClass("batch", -10, 30.0)]
    listed = config(classes=[{"name": "standard"}, {"name": "batch", "objectives": ["nightly", "bulk"]}]).objectives
    assert classes_of({"nightly": 0, "chat": 0}, classes, listed) == {
        "nightly": "batch", "bulk": "batch", "chat": "standard",
    }  # fmt: skip


def test_a_sidecar_puts_an_objective_that_its_file_lists_into_that_class_and_follows_a_reload():
    """With objectives of a cluster or without, and whatever priority the cluster says."""

    def keys(objective: str) -> Config:
        return config(
            listen="127.0.0.1:0", admin="127.0.0.1:0", dialect="endpoint-picker",
            classes=[{"name": "standard"}, {"name": "batch", "priority": -10, "objectives": [objective]}],
        )  # fmt: skip

    async def main() -> list[str]:
        app = App(keys("nightly"), asyncio.get_running_loop())

        def asked() -> str:
            opening = Incoming(Kind.REQUEST_HEADERS, {"x-gateway-inference-objective": "nightly"})
            return app.reception.requests.read(opening, 0.0, {}).request_class

        classes = [asked()]
        app._rank({"nightly": 5})
        classes.append(asked())
        app.adopt(keys("weekly"))
        classes.append(asked())
        app.adopt(keys("nightly"))
        return [*classes, asked()]

    assert asyncio.run(main()) == ["batch", "batch", "standard", "batch"]


def test_who_asks_for_a_dry_run_gets_no_queue_before_the_restart_that_it_needs():
    """The documents said to set both keys: one was in use a second later, and held and refused until the restart."""

    async def main() -> list[tuple[bool, tuple[str, ...]]]:
        def keys(**ours: object) -> Config:
            return config(listen="127.0.0.1:0", admin="127.0.0.1:0", **ours)

        app, seen = App(keys(), asyncio.get_running_loop()), []
        for ours in ({"enable_queue": True, "dry_run": True}, {"enable_queue": True}, {"dry_run": True}):
            app.adopt(keys(**ours))
            seen.append((app.gate.controller.policy.enable_queue, app._restart_needed))
        app.adopt(keys(enable_queue=True))
        app.adopt(keys(enable_queue=True, dry_run=True))
        return [*seen, (app.gate.controller.policy.enable_queue, app._restart_needed)]

    assert asyncio.run(main()) == [
        (False, ("dry_run", "enable_queue")),
        (True, ()),
        (False, ("dry_run",)),
        (True, ("dry_run",)),  # it was on: that it goes on is no surprise
    ]


def test_a_fault_of_ours_at_the_endpoints_of_a_reload_keeps_none_of_its_sources_back(monkeypatch):
    async def main() -> list[object]:
        app = App(config(listen="127.0.0.1:0", admin="127.0.0.1:0"), asyncio.get_running_loop())
        told: list[object] = []
        monkeypatch.setattr(app.sources, "configure", told.append)

        def fails(_: Config) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(app.roster, "configure", fails)
        with pytest.raises(ZeroDivisionError):
            app.adopt(config(listen="127.0.0.1:0", admin="127.0.0.1:0", default_model="m"))
        assert app.reception.requests.default_model == "m"
        return told

    assert len(asyncio.run(main())) == 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([], ["chat"], "classes[1].objectives: 'chat' is the name of classes[0]; each means one class"),
        (["a"], ["b", "a"], "classes[1].objectives: 'a' is in classes[0].objectives already; each means one class"),
        (["a", "a"], [], "classes[0].objectives: 'a' is in classes[0].objectives already; each means one class"),
    ],
)
def test_an_objective_that_means_two_classes_is_an_error(first, second, said):
    with pytest.raises(ConfigError) as caught:
        config(classes=[{"name": "chat", "objectives": first}, {"name": "batch", "objectives": second}])
    assert said in str(caught.value)


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


@pytest.mark.parametrize(
    ("family", "seen"),
    [
        ({}, {"10.0.0.1:1", "10.0.0.2:1"}),
        ({"family": "ipv6"}, {"[fd00::1]:1", "[fd00::2]:1"}),
        ({"family": "any"}, {"10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "[fd00::2]:1"}),
    ],
    ids=["unsaid", "ipv6", "any"],
)
def test_a_dual_stack_name_brings_each_server_once_unless_told_otherwise(family, seen):
    reports: list[set[str]] = []

    async def lookup(_host: str, _port: int) -> list[str]:
        return ["10.0.0.1:1", "[fd00::1]:1", "10.0.0.2:1", "[fd00::2]:1"]

    async def main() -> None:
        found = DnsConfig.model_validate({"name": "vllm", "port": 1, "interval": "1ms", **family})
        task = asyncio.create_task(Dns(found, lookup).run(lambda all_: reports.append({e.address for e in all_})))
        await until(lambda: reports)
        task.cancel()

    asyncio.run(main())
    assert reports[0] == seen


def test_the_loops_resolver_finds_localhost():
    assert "127.0.0.1:80" in asyncio.run(dns.resolve("localhost", 80))
    with pytest.raises(OSError, match=r".+"):
        asyncio.run(dns.resolve("nowhere.invalid", 80))


# ---- the running sources


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(source, "RESTART_S", 0.01)


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


def of_service(port: int, **keys: Any) -> Any:
    """A source in Kubernetes: several may look at one Service."""
    item = {"kubernetes": {"service": "x", "port": port, **keys}}
    return config(envoy_clusters_file="/c.yaml", discovery=[item]).sources[0]


def test_a_changed_source_keeps_what_was_seen_until_it_sees_something_and_a_removed_one_takes_it_away(scripted):
    async def main() -> None:
        reports: list[Any] = []
        sources = Sources(lambda name, seen: reports.append((name, seen)))
        sources.configure([found()])
        sources.configure([found()])
        await until(lambda: len(scripted) == 1 and scripted[0].report)
        scripted[0].report([found().endpoint("a", "10.0.0.1:1")])
        sources.configure([found(port=None, ports=[1], family="any")])
        await until(lambda: len(scripted) == 2 and scripted[1].report)
        assert reports == [("dns x:1", [found().endpoint("a", "10.0.0.1:1")])]
        sources.configure([])
        assert reports[1:] == [("dns x:1", None)]
        await sources.stop()

    asyncio.run(main())


def test_what_is_said_of_all_that_a_source_finds_holds_at_once_though_it_sees_nothing_any_more(scripted):
    """An API server that is away for an hour kept a lowered limit out for an hour."""

    async def main() -> None:
        reports: list[Any] = []
        sources = Sources(lambda _, seen: reports.append(seen))
        sources.configure([found(max_running_requests=8)])
        sources.configure([found(max_running_requests=7)])
        assert reports == []  # nothing was seen yet, which is not to see that nothing is there
        await until(lambda: scripted[-1].report)
        scripted[-1].report([found(max_running_requests=7).endpoint("a", "10.0.0.1:1")])
        sources.configure([found(max_running_requests=4, models=["m"], interval="9s")])
        one = reports[-1][0]
        assert (one.name, one.address, one.max_running_requests, one.models) == ("a", "10.0.0.1:1", 4, ["m"])
        await sources.stop()

    asyncio.run(main())


def test_of_two_sources_at_one_service_each_keeps_its_own_when_the_other_goes_or_changes(scripted):
    """The second took over what the first had seen, ports that the file names no more, and lost its own."""

    async def main() -> None:
        seen: dict[str, Any] = {}

        def report(name: str, endpoints: Any) -> None:
            seen[name] = endpoints

        def addresses() -> list[str]:
            return [one.address for endpoints in seen.values() for one in endpoints or ()]

        sources = Sources(report)
        sources.configure([of_service(1), of_service(2)])
        await until(lambda: len(scripted) == 2 and all(one.report for one in scripted))
        for one in scripted:
            one.report([one.config.endpoint(f"a-{one.config.port}", f"10.0.0.1:{one.config.port}")])
        sources.configure([of_service(2, models=["m"])])
        assert addresses() == ["10.0.0.1:2"]
        sources.configure([of_service(3), of_service(2)])
        assert addresses() == ["10.0.0.1:2"]
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
