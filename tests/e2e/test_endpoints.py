"""Endpoints that come and go under live traffic: reload, clusters that Envoy learns, discovery, health."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from .kit.clients import complete_many
from .kit.commands import envoy_config
from .kit.envoy import Envoy, give_up_soon
from .kit.kube_api import KubeApi, slice_of
from .kit.processes import wait_until
from .kit.stack import local
from .kit.upstream import Upstream, behave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kit.clients import Completion
    from .kit.stack import Stack


def header(prefix: str, **more: str):
    return lambda number: {"x-test-id": f"{prefix}-{number}", **more}


def hold(prefix: str):
    return header(prefix, **dict([behave("ok", hold="head")]))


def listed(here: Stack, *names: str, **more: Any) -> list[dict[str, Any]]:
    """What `endpoints` of a config says about these upstreams."""
    return [{"name": name, "address": here.upstreams[name].address, **more} for name in names]


def reload(here: Stack, **changes: Any) -> None:
    """Change the file, send SIGHUP, wait until it was taken over."""
    before = reloads(here, "success")
    here.sidecar.write_config(**changes)
    here.sidecar.child.signal(signal.SIGHUP)
    wait_until(lambda: reloads(here, "success") > before, message="a reload")


def reloads(here: Stack, result: str) -> float:
    return here.sidecar.metrics()[f'extproc_config_reloads_total{{result="{result}"}}']


def names(here: Stack, *, up: bool | None = None) -> set[str]:
    """Endpoints that /queues lists (up: only those that are)."""
    return {one["name"] for one in here.sidecar.queues()["endpoints"] if up is None or one["up"] is up}


class Traffic:
    """Clients that ask one after the other, on connections of their own, until the end of `with`."""

    def __init__(self, here: Stack, clients: int = 6) -> None:
        self.answers: list[Completion] = []
        self._here = here
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self.more(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(20)

    def _ask(self, client: int) -> None:
        turn = 0
        while not self._ending.is_set():
            turn += 1
            ask = header(f"t{client}.{turn}", **dict([behave("sse", events=3, gap_s=0.005)]))
            self.answers += complete_many(self._here.url, 1, ask, timeout_s=15)

    def more(self, count: int = 30) -> None:
        """Wait for that many further answers."""
        target = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= target, 15, f"{count} answers more")

    def check(self) -> None:
        """Every client got a whole 200."""
        bad = [
            (answer.status, answer.headers, answer.error)
            for answer in self.answers
            if answer.status != 200 or answer.error
        ]
        assert not bad, (len(bad), len(self.answers), bad[:3])


# ---- the configuration file


def test_a_raised_limit_lets_waiting_requests_go_at_once(stack):
    here = stack(config={"max_running_requests": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 6, hold("r"))
        here.wait_waiting(5)
        reload(here, max_running_requests=4)
        here.wait_in_flight("a", 4)
        reload(here, endpoints=listed(here, "a", max_running_requests=6))
        here.wait_in_flight("a", 6)
        reload(here, max_running_requests=2)  # the endpoint's own limit stays
        assert here.endpoint("a")["limit"] == 6
        for number in range(6):
            here.upstreams["a"].release(f"r-{number}")
        assert [answer.status for answer in running.result()] == [200] * 6


def test_a_changed_file_is_seen_without_a_signal(stack):
    here = stack(config={"classes": [{"name": "default", "budget": "20s"}]})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 3, hold("r"))
        here.wait_waiting(2)
        here.sidecar.write_config(max_running_requests=3)
        here.wait_in_flight("a", 3, timeout_s=4)
        for number in range(3):
            here.upstreams["a"].release(f"r-{number}")
        assert [answer.status for answer in running.result()] == [200] * 3
    assert (reloads(here, "success"), reloads(here, "failure")) == (1, 0)


def test_a_removed_endpoints_waiting_requests_move_and_its_running_ones_end_well(stack):
    here = stack(upstreams=("a", "b"), config={"max_queue_wait_time": "20s"})
    session = {"x-session-id": "s"}
    complete_many(here.url, 1, header("first", **session))
    (home,) = (name for name in here.upstreams if here.upstreams[name].seen("first-0"))
    other = {"a": "b", "b": "a"}[home]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            complete_many, here.url, 1, header("run", **session, **dict([behave("sse", hold="body")]))
        )
        here.upstreams[home].wait_for("run-0")
        waiting = pool.submit(complete_many, here.url, 4, header("wait", **session))
        here.wait_waiting(4)
        reload(here, endpoints=listed(here, other))
        assert [answer.status for answer in waiting.result()] == [200] * 4
        assert here.in_flight(home) == 1
        here.upstreams[home].release("run-0")
        (answer,) = running.result()
    assert (answer.status, answer.error) == (200, "")
    assert all(here.upstreams[other].seen(f"wait-{number}") for number in range(4))
    wait_until(lambda: names(here) == {other})


def test_a_bad_file_changes_nothing_and_every_problem_is_logged(stack):
    here = stack()
    with Traffic(here, 2) as traffic:
        here.sidecar.path.write_text("endpoints: [{name: a}]\nmax_running_requests: 0\nlistn: x\n")
        here.sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: reloads(here, "failure") == 1)
        traffic.more(10)
        said = here.sidecar.child.output()
        for problem in ("endpoints[0].address: is required", "max_running_requests: must be", "listn: unknown key"):
            assert problem in said
        assert here.endpoint("a")["limit"] == 1
        here.sidecar.write_config()
        here.sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: reloads(here, "success") == 1)
        traffic.more(10)
    traffic.check()


def test_changed_rules_hold_for_requests_from_then_on(stack):
    here = stack(config={"enable_queue": False})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 2, hold("run"))
        here.wait_in_flight("a", 2)
        reload(here, enable_queue=True, classes=[{"name": "hasty", "budget": "200ms"}])
        (answer,) = complete_many(here.url, 1, header("late"))
        assert (answer.status, answer.headers["x-extproc-outcome"]) == (429, "budget_expired")
        for number in range(2):
            here.upstreams["a"].release(f"run-{number}")
        assert [answer.status for answer in running.result()] == [200] * 2


def test_a_key_that_cannot_change_keeps_its_value_and_is_named(stack):
    here = stack()
    admin = here.sidecar.admin
    reload(here, admin=local(), dry_run=True, max_running_requests=7)
    assert here.endpoint("a")["limit"] == 7
    reload(here, max_running_requests=8)
    assert here.sidecar.child.output().count("admin, dry_run: can't change while running") == 2  # still so
    here.sidecar.config["admin"] = admin


# ---- clusters that Envoy learns


@pytest.fixture
def dynamic(stack, tmp_path):
    """Start stacks whose Envoy follows a clusters file that the sidecar writes."""

    def start(config: dict[str, Any] | None = None, **how: Any) -> Stack:
        file = tmp_path / "clusters.yaml"
        return stack(config={"envoy_clusters_file": str(file), "max_running_requests": 4, **(config or {})}, **how)

    return start


@contextlib.contextmanager
def more_upstreams(here: Stack, *added: str) -> Iterator[None]:
    with contextlib.ExitStack() as running:
        for name in added:
            here.upstreams[name] = running.enter_context(Upstream(name))
        yield


def reached(here: Stack, name: str, count: int = 5) -> None:
    """Wait until this upstream got that many requests from now on."""
    target = len(here.upstreams[name].records()) + count
    wait_until(lambda: len(here.upstreams[name].records()) >= target, message=f"{name} gets requests")


def test_endpoints_added_removed_and_replaced_under_load_cost_no_client_an_error(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b", "c"):
        with Traffic(here) as traffic:
            reload(here, endpoints=listed(here, "a", "b"))  # added
            reached(here, "b")
            reload(here, endpoints=listed(here, "b"))  # removed, and its server goes as soon as it is idle
            wait_until(lambda: names(here) == {"b"})
            here.upstreams["a"].down()
            traffic.more()
            reload(here, endpoints=[{"name": "b", "address": here.upstreams["c"].address}])  # the same name, moved
            reached(here, "c")
            wait_until(lambda: here.upstreams["b"].open_requests() == 0)
            here.upstreams["b"].down()
            here.upstreams["a"].up()
            reload(here, endpoints=listed(here, "a"))  # all replaced at once
            reached(here, "a")
            traffic.more()
        traffic.check()
        assert here.endpoint("a")["cluster"] == "a"


def test_what_waits_goes_to_a_new_endpoint_only_when_envoy_knows_it(dynamic):
    here = dynamic({"max_running_requests": 1, "max_queue_wait_time": "0s"}, upstreams=("a",))
    with more_upstreams(here, "b"), ThreadPoolExecutor(2) as pool:
        running = pool.submit(complete_many, here.url, 1, hold("run"))
        here.wait_in_flight("a", 1)
        waiting = pool.submit(complete_many, here.url, 12, header("wait"))
        here.wait_waiting(12)
        reload(here, endpoints=[*listed(here, "a"), *listed(here, "b", max_running_requests=12)])
        assert [answer.status for answer in waiting.result()] == [200] * 12
        here.upstreams["a"].release("run-0")
        assert running.result()[0].status == 200
    assert here.upstreams["b"].records()


def test_a_replaced_endpoints_old_cluster_stays_until_its_leases_are_back(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b"), ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 1, hold("old"))
        here.upstreams["a"].wait_for("old-0")
        reload(here, endpoints=[{"name": "a", "address": here.upstreams["b"].address}])
        moved = f"a@{here.upstreams['b'].address}"
        wait_until(lambda: here.endpoint("a")["cluster"] == moved and here.endpoint("a")["state"] == "unknown")
        assert here.endpoint("a")["in_flight"] == 1
        assert complete_many(here.url, 1, header("new"))[0].status == 200
        assert here.upstreams["b"].seen("new-0")
        assert {"a", moved} <= clusters(here)
        here.upstreams["a"].release("old-0")
        assert running.result()[0].status == 200
        wait_until(lambda: "a" not in clusters(here), 8, "the old cluster goes, 2 s after its last lease")
        assert moved in clusters(here)


def clusters(here: Stack) -> set[str]:
    """The clusters that Envoy has."""
    return {line.split("::")[0] for line in here.envoy.get("/clusters").splitlines()}


def test_with_envoys_admin_address_a_new_endpoint_is_used_as_soon_as_envoy_has_it(dynamic):
    admin = local()

    def edit(bootstrap: dict[str, Any]) -> None:
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = int(admin.rsplit(":", 1)[1])

    here = dynamic({"envoy_admin": admin}, upstreams=("a",), edit=edit)
    with more_upstreams(here, "b"), Traffic(here) as traffic:
        reload(here, endpoints=listed(here, "a", "b"))
        began = time.monotonic()
        wait_until(lambda: "b" in names(here))
        assert time.monotonic() - began < 0.8  # without it: 1 s
        reached(here, "b")
    traffic.check()


def test_a_restarted_sidecar_knows_what_envoy_knows(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b"):
        here.sidecar.child.stop()
        here.sidecar.write_config(endpoints=listed(here, "a", "b"))
        here.sidecar.start()
        assert names(here) == {"a"}  # known; b must wait until Envoy has had time to see it
        wait_until(lambda: names(here) == {"a", "b"})
        answers = complete_many(here.url, 12, header("after"))
        assert {answer.status for answer in answers} == {200}
        assert here.upstreams["b"].records()


def test_without_a_sidecar_the_fail_open_bootstrap_serves_from_the_clusters_file(dynamic, tmp_path):
    here = dynamic({"health_check": {"interval": "100ms"}}, upstreams=("a", "b"))
    http = local()
    addresses = ("--http", http, "--envoy-admin", local(), "--access-log", "none")
    bootstrap = give_up_soon(envoy_config("--config", here.sidecar.path, "--fail-open", *addresses))
    here.sidecar.child.stop()
    here.upstreams["a"].down()
    with Envoy(bootstrap, tmp_path, name="open") as envoy:
        healthy = "cluster.extproc_any_endpoint.membership_healthy"
        wait_until(lambda: envoy.stats(healthy)[healthy] == 1, message="Envoy's own checks see one of two")
        here.upstreams["a"].up()
        wait_until(lambda: envoy.stats(healthy)[healthy] == 2, message="without any traffic, it sees that one is back")
        here.upstreams["a"].down()
        wait_until(lambda: envoy.stats(healthy)[healthy] == 1)
        answers = complete_many(f"http://{http}/v1/chat/completions", 10, header("open"))
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["x-extproc-outcome"] for answer in answers} == {"unsteered"}


# ---- sources


def test_pods_that_come_and_go_in_kubernetes_cost_no_client_an_error(dynamic, tmp_path):
    with KubeApi() as api, Upstream("a") as a, Upstream("b") as b:
        api.put(slice_of("s-a", {"pod-a": "127.0.0.1"}, port=a.port))
        source = {"service": "vllm", "namespace": "ml", "api": api.url, "max_running_requests": 3}
        here = dynamic({"discovery": [{"kubernetes": source}], "allowed_addresses": ["127.0.0.0/8"]}, upstreams=())
        assert names(here) == {"pod-a"}  # seen before the sidecar was ready
        assert here.endpoint("pod-a")["limit"] == 3
        with Traffic(here) as traffic:
            api.put(slice_of("s-b", {"pod-b": "127.0.0.1"}, port=b.port))
            wait_until(lambda: names(here) == {"pod-a", "pod-b"})
            api.drop()
            gone = slice_of("s-a", {"pod-a": "127.0.0.1"}, port=a.port)
            gone["endpoints"][0]["conditions"] = {"ready": False, "serving": True, "terminating": True}
            api.put(gone)
            wait_until(lambda: names(here) == {"pod-b"})
            a.down()
            traffic.more()
            api.down()  # the API server is away: all stays as it is
            traffic.more()
        traffic.check()
        assert len(b.records()) > 30


def test_a_model_at_zero_replicas_waits_for_its_first_pod_longer_than_its_class_may_wait(dynamic):
    with KubeApi() as api, Upstream("pod") as pod:
        source = {"service": "vllm", "namespace": "ml", "api": api.url, "models": ["asleep"]}
        config = {"discovery": [{"kubernetes": source}], "allowed_addresses": ["127.0.0.0/8"]}
        budgets = {"classes": [{"name": "default", "budget": "200ms"}], "no_endpoint_budget": "20s"}
        here = dynamic({**config, **budgets}, upstreams=("a",), endpoints={"a": {"models": ["awake"]}})
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(complete_many, here.url, 3, header("first", **{"x-model": "asleep"}))
            here.wait_waiting(3)
            (hasty,) = complete_many(here.url, 1, header("hasty", **{"x-model": "asleep", "x-queue-budget": "300ms"}))
            assert (hasty.status, hasty.headers["retry-after"]) == (503, "20")
            (wrong,) = complete_many(here.url, 1, header("wrong", **{"x-model": "nobody's"}))
            assert wrong.status == 404
            api.put(slice_of("s", {"pod": "127.0.0.1"}, port=pod.port))
            assert [(answer.status, answer.head_s > 0.3) for answer in waiting.result()] == [(200, True)] * 3
        assert len(pod.records()) == 3


def test_addresses_of_a_name_are_endpoints(dynamic):
    with Upstream("a") as a:
        source = {"name": "127.0.0.1", "port": a.port, "interval": "50ms", "models": ["sim"]}
        here = dynamic({"discovery": [{"dns": source}], "allowed_addresses": ["127.0.0.0/8"]}, upstreams=())
        assert names(here) == {a.address}
        assert complete_many(here.url, 1, header("one", **{"x-model": "sim"}))[0].status == 200
        assert complete_many(here.url, 1, header("two", **{"x-model": "other"}))[0].status == 404
        reload(here, discovery=[])
        wait_until(lambda: names(here) == set())


# ---- health

CHECK = {"interval": "50ms", "timeout": "500ms", "unhealthy_threshold": 2}


def test_when_all_endpoints_are_down_requests_wait_for_one_to_come_back(stack):
    here = stack(upstreams=("a", "b"), config={"health_check": CHECK})
    for upstream in here.upstreams.values():
        upstream.down()
    wait_until(lambda: names(here, up=True) == set())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete_many, here.url, 6, header("wait"))
        here.wait_waiting(6)
        here.upstreams["b"].up()
        assert [answer.status for answer in waiting.result()] == [200] * 6
    assert names(here, up=True) == {"b"}


def test_when_none_comes_back_within_the_budget_the_answer_is_503_with_retry_after(stack):
    here = stack(config={"health_check": CHECK, "classes": [{"name": "default", "budget": "300ms"}]})
    here.upstreams["a"].down()
    wait_until(lambda: names(here, up=True) == set())
    (answer,) = complete_many(here.url, 1, header("late"))
    assert (answer.status, answer.headers["x-extproc-outcome"]) == (503, "no_endpoint")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.head_s >= 0.3


def test_an_endpoint_found_dead_costs_nobody_an_error_and_is_used_again_when_it_is_back(stack):
    here = stack(upstreams=("a", "b"), config={"health_check": CHECK, "max_running_requests": 4})
    here.upstreams["b"].down()
    wait_until(lambda: names(here, up=True) == {"a"})
    with Traffic(here) as traffic:
        here.upstreams["b"].up()
        reached(here, "b", 20)  # more than health checks alone could be
        wait_until(lambda: here.endpoint("b")["dispatched"] > 5)
        reload(here, health_check=None)
        traffic.more()
    traffic.check()
