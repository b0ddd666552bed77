"""What real Envoy answers in the place of a server that can't be used: its words, and what we take each of them for."""

from __future__ import annotations

import contextlib
import socket
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from extproc.admission.laws import LAWS

from .kit.clients import complete_many
from .kit.processes import free_port, http_get, wait_until
from .kit.upstream import behave
from .test_broken_endpoints import Canned, answer
from .test_endpoint_faults import Deaf, unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .kit.stack import Stack

    Edit = Callable[[dict[str, Any]], None]

EXTENSIONS = "type.googleapis.com/envoy.extensions"
HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
RESET = "upstream_reset_before_response_started"
SLOW = dict([behave("sse", events=3, wait_s=0.02, gap_s=0.01)])
PATIENT = [{"name": "default", "budget": "30s"}]
FINE = answer(200, "fine")
BIG_HEAD = b"HTTP/1.1 200 OK\r\nx-big: " + b"y" * 90_000 + b"\r\ncontent-length: 1\r\n\r\nz"


def refused() -> contextlib.AbstractContextManager[str]:
    return contextlib.nullcontext(f"127.0.0.1:{free_port()}")


def unknown_name() -> contextlib.AbstractContextManager[str]:
    return contextlib.nullcontext("nowhere.invalid:8000")


@contextlib.contextmanager
def says(said: bytes = FINE) -> Iterator[str]:
    with Canned(said) as server:
        yield server.address


@contextlib.contextmanager
def deaf() -> Iterator[str]:
    with Deaf() as server:
        yield server.address


def clusters(bootstrap: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = bootstrap["static_resources"]["clusters"]
    return found


def manager(bootstrap: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    return dict(found["typed_config"])


def cluster(**keys: object) -> Callable[[str], Edit]:
    """Have the row's cluster have these keys."""

    def of(row: str) -> Edit:
        def edit(bootstrap: dict[str, Any]) -> None:
            next(one for one in clusters(bootstrap) if one["name"] == row).update(deepcopy(keys))

        return edit

    return of


def breaker(**most: int) -> Callable[[str], Edit]:
    return cluster(circuit_breakers={"thresholds": [most]})


def http(**options: object) -> Callable[[str], Edit]:
    explicit = {"explicit_http_config": {"http_protocol_options": {}}, **options}
    return cluster(typed_extension_protocol_options={HTTP: {"@type": f"type.googleapis.com/{HTTP}", **explicit}})


def drops(row: str) -> Edit:
    category = {"category": "all", "drop_percentage": {"numerator": 100}}

    def edit(bootstrap: dict[str, Any]) -> None:
        one = next(one for one in clusters(bootstrap) if one["name"] == row)
        one["load_assignment"]["policy"] = {"drop_overloads": [category]}

    return edit


def none(row: str) -> Edit:
    def edit(bootstrap: dict[str, Any]) -> None:
        clusters(bootstrap)[:] = [one for one in clusters(bootstrap) if one["name"] != row]

    return edit


def in_maintenance(row: str) -> Edit:
    def edit(bootstrap: dict[str, Any]) -> None:
        layer = {"name": "rows", "static_layer": {f"upstream.maintenance_mode.{row}": 100}}
        bootstrap["layered_runtime"] = {"layers": [layer]}

    return edit


def route(change: Callable[[dict[str, Any]], None]) -> Callable[[str], Edit]:
    """Have the row's requests have a route of their own, as steered ones have, but changed."""

    def of(row: str) -> Edit:
        def edit(bootstrap: dict[str, Any]) -> None:
            (host,) = manager(bootstrap)["route_config"]["virtual_hosts"]
            *_, steered = (one for one in host["routes"] if "cluster_header" in one.get("route", {}))
            own = deepcopy(steered)
            own["match"]["headers"].append({"name": "x-model", "string_match": {"exact": row}})
            change(own)
            host["routes"].insert(0, own)

        return edit

    return of


def timing(**keys: object) -> Callable[[str], Edit]:
    return route(lambda own: own["route"].update(deepcopy(keys)))


def trying(**keys: object) -> Callable[[str], Edit]:
    return route(lambda own: own["route"]["retry_policy"].update(deepcopy(keys)))


def direct(own: dict[str, Any]) -> None:
    del own["route"]
    own["direct_response"] = {"status": 503}


def filtered(name: str, kind: str, **config: object) -> Callable[[str], Edit]:
    """Have a filter behind ours answer the row's requests."""

    def of(row: str) -> Edit:
        def edit(bootstrap: dict[str, Any]) -> None:
            filters = manager(bootstrap)["http_filters"]
            text = deepcopy(config)
            if name == "fault":
                text["headers"] = [{"name": "x-model", "string_match": {"exact": row}}]
            filters.insert(
                len(filters) - 1,
                {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": f"{EXTENSIONS}.{kind}", **text}},
            )

        return edit

    return of


ABORTS = {"abort": {"http_status": 503, "percentage": {"numerator": 100}}}
SCRIPT = """
function envoy_on_request(handle)
  if handle:headers():get("x-model") == "lua" then handle:respond({[":status"] = "500"}, "x") end
end
"""
TLS = {"name": "tls", "typed_config": {"@type": f"{EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext"}}
NOWHERE = {"source_address": {"address": "192.0.2.1", "port_value": 0}}
CHECKS = {
    "timeout": "0.2s",
    "interval": "0.1s",
    "no_traffic_interval": "0.1s",
    "unhealthy_threshold": 1,
    "healthy_threshold": 1,
    "tcp_health_check": {},
}
ROWS: dict[str, tuple[Any, Callable[[str], Edit] | None, str, str | None]] = {
    "no-cluster": (says, none, "cluster_not_found", "no_cluster"),
    "no-name": (unknown_name, None, "no_healthy_upstream", "no_server_address"),
    "envoys-checks": (
        refused,
        cluster(common_lb_config={"healthy_panic_threshold": {"value": 0}}, health_checks=[CHECKS]),
        "no_healthy_upstream",
        "no_server_address",
    ),
    "refuses": (
        refused,
        None,
        f"{RESET}{{remote_connection_failure|delayed_connect_error:_Connection_refused}}",
        "failed",
    ),
    "connecting-hangs": (unreachable, cluster(connect_timeout="0.3s"), f"{RESET}{{connection_timeout}}", "failed"),
    "tls-to-plain": (says, cluster(transport_socket=TLS, connect_timeout="0.3s"), f"{RESET}{{", "failed"),
    "no-source": (says, cluster(upstream_bind_config=NOWHERE), f"{RESET}{{local_connection_failure|", "failed"),
    "hangs-up": (lambda: says(b""), None, f"{RESET}{{connection_termination}}", "broke_off"),
    "no-http": (lambda: says(b"NOT HTTP\r\n\r\n"), None, f"{RESET}{{protocol_error}}", "broke_off"),
    "head-too-big": (lambda: says(BIG_HEAD), None, f"{RESET}{{protocol_error}}", "broke_off"),
    "http2-to-http1": (
        says,
        http(explicit_http_config={"http2_protocol_options": {}}),
        f"{RESET}{{protocol_error}}",
        "broke_off",
    ),
    "breaker": (says, breaker(max_requests=0), f"{RESET}{{overflow}}", "breaker_open"),
    "breaker-pending": (
        says,
        breaker(max_connections=0, max_pending_requests=0),
        f"{RESET}{{overflow}}",
        "breaker_open",
    ),
    "maintenance": (says, in_maintenance, "maintenance_mode", "dropped"),
    "drops": (says, drops, "unconditional_drop_overload", "dropped"),
    "route-timeout": (deaf, timing(timeout="0.3s"), "response_timeout", "timeout"),
    "try-timeout": (deaf, trying(per_try_timeout="0.3s"), "upstream_per_try_timeout", "timeout"),
    "try-idle": (deaf, trying(per_try_idle_timeout="0.3s"), "upstream_per_try_idle_timeout", "timeout"),
    "stream-idle": (deaf, timing(idle_timeout="0.3s"), "stream_idle_timeout", "timeout"),
    "max-duration": (
        deaf,
        timing(max_stream_duration={"max_stream_duration": "0.3s"}),
        "max_duration_timeout",
        "timeout",
    ),
    "cluster-max-duration": (
        deaf,
        http(common_http_protocol_options={"max_stream_duration": "0.3s"}),
        "upstream_max_stream_duration_reached",
        "timeout",
    ),
    "direct-response": (says, route(direct), "direct_response", None),
    "fault-filter": (says, filtered("fault", "filters.http.fault.v3.HTTPFault", **ABORTS), "fault_filter_abort", None),
    "lua": (
        says,
        filtered("lua", "filters.http.lua.v3.Lua", default_source_code={"inline_string": SCRIPT}),
        "lua_response",
        None,
    ),
    "engines-503": (lambda: says(answer(503, "loading")), None, "via_upstream", "saturated"),
    "good": (says, None, "via_upstream", None),
}
"""What is wrong: the server, Envoy's configuration of it, the words that Envoy has for it, and our name."""


def counted(here: Stack, endpoint: str) -> list[str]:
    """The kinds of bad answers that /metrics has of an endpoint."""
    found = []
    for name, value in here.sidecar.metrics().items():
        if name.startswith("extproc_bad_answers_total") and f'endpoint="{endpoint}"' in name and value:
            found.append(name.split('"')[1])
    return found


def test_each_way_in_which_a_server_cannot_be_used_has_a_name_that_is_the_same_everywhere(stack):
    """In Envoy's words, in /metrics, and in what `extproc why` says."""
    with contextlib.ExitStack() as servers:
        endpoints = {name: {"address": servers.enter_context(row[0]()), "models": [name]} for name, row in ROWS.items()}

        def edit(bootstrap: dict[str, Any]) -> None:
            for name, (_, change, _, _) in ROWS.items():
                if change is not None:
                    change(name)(bootstrap)

        config = {"max_running_requests": 4, "classes": PATIENT, "scrape_interval": "0s"}
        here = stack(upstreams=(), endpoints=endpoints, config=config, edit=edit)
        failure = "cluster.envoys-checks.health_check.failure"
        wait_until(lambda: here.envoy.stats(failure)[failure], message="Envoy's own check has failed")
        names = list(ROWS)
        complete_many(here.url, len(names), lambda n: {"x-request-id": names[n], "x-model": names[n]})
        here.wait_idle()
        seen, wanted = {}, {}
        for name, (_, _, words, kind) in ROWS.items():
            entry = here.envoy.wait_access_log(lambda line, name=name: line["request_id"] == name)
            seen[name] = entry["details"][: len(words)], counted(here, name)
            wanted[name] = words, [kind] if kind else []
        assert seen == wanted
        for name in ("no-cluster", "no-name", "breaker", "route-timeout", "refuses"):
            told = http_get(here.sidecar.admin, f"/debug/requests/{name}")[1].decode()
            assert f"it got no good answer ({ROWS[name][3]}): " in told


def test_an_endpoint_that_envoy_lacks_costs_the_few_that_were_sent_at_once_and_the_log_and_queues_say_what_to_do(stack):
    with says() as address:
        config = {"max_running_requests": 20, "classes": PATIENT, "scrape_interval": "0s"}
        here = stack(upstreams=("good",), endpoints={"bad": {"address": address}}, config=config, edit=none("bad"))
        answers = complete_many(here.url, 100, lambda n: {"x-test-id": f"n-{n}", **SLOW})
        lost = sum(one.status != 200 for one in answers)
        assert 1 <= lost <= 3 * LAWS.health.few, "and twice as many in 0.1 s that a busy machine is late to tell"
        assert counted(here, "bad") == ["no_cluster"]
        # Once its time is over it is tried, by one request at a time.
        row = here.endpoint("bad")
        assert row["state"] in ("ejected", "on trial")
        assert (row["dispatched"], row["up"]) == (lost, False)
        assert row["refusal"]["answer"] == "no_cluster"
        assert "Envoy has no cluster bad: add it to Envoy's configuration" in row["refusal"]["what"]
        said = f"(no_cluster): {row['refusal']['what']}"
        wait_until(lambda: said in here.sidecar.child.output(), message="the log says so, too")


def test_a_breaker_of_envoys_below_our_limit_puts_no_good_server_out(stack):
    here = stack(
        upstreams=("a", "b"),
        config={"max_running_requests": 16, "classes": PATIENT, "scrape_interval": "0s"},
        edit=breaker(max_requests=4)("a"),
    )
    lost = []
    for burst in range(3):
        answers = complete_many(here.url, 60, lambda n, b=burst: {"x-test-id": f"{b}-{n}", **SLOW})
        here.wait_idle()
        lost.append(sum(one.status != 200 for one in answers))
        assert here.endpoint("a")["state"] == "up"
    assert 1 <= lost[0] <= 12, "what was sent before Envoy let any not through"
    assert max(lost[1:]) <= 4, "and one more now and then"
    assert counted(here, "a") == ["breaker_open"]
    assert "endpoint a: breaker_open: Envoy lets no more through to cluster a" in here.sidecar.child.output()


def test_a_client_whose_upload_stalls_is_told_from_a_server_that_hangs(stack):
    """Without the buffer filter, as an Envoy of one's own may be, it holds a slot: Envoy's words are the same."""

    def edit(bootstrap: dict[str, Any]) -> None:
        timing(idle_timeout="0.3s")("a")(bootstrap)
        filters = manager(bootstrap)["http_filters"]
        filters[:] = [one for one in filters if one["name"] != "envoy.filters.http.buffer"]

    with deaf() as address:
        config = {"max_running_requests": 4, "classes": PATIENT, "scrape_interval": "0s"}
        here = stack(upstreams=(), endpoints={"a": {"address": address, "models": ["a"]}}, config=config, edit=edit)
        host, _, port = here.url.removeprefix("http://").partition("/")[0].partition(":")
        with socket.create_connection((host, int(port))) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-model: a\r\nx-request-id: late\r\n"
            client.sendall(f"{head}content-length: 9\r\n\r\nhalf".encode())
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        entry = here.envoy.wait_access_log(lambda line: line["request_id"] == "late")
        assert entry["details"] == "stream_idle_timeout"
        here.wait_idle()
        assert counted(here, "a") == []
