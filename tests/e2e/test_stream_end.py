"""How Envoy ends a request's ext_proc stream, event by event: it is the end that gives the lease back.

One test per way in which a request ends (answered, given up by either side, timed out, refused), for each protocol.
That response_trailer_mode SEND keeps the stream open to the last byte is a consequence of Envoy's code, not a promise
of its documentation: these tests pin it against the Envoy in use. In each, endpoint `a` takes one request at a time, so
a lease that came back late or twice would show in the request that follows.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from .kit.clients import H1Request, H2Client, H2Stream
from .kit.processes import free_port, wait_until
from .kit.stack import local
from .kit.upstream import SSE_DONE, Upstream, behave, sse_event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import StackFactory
    from .kit.stack import Front, Stack

EVENTS = b"".join(sse_event(number) for number in range(3))
LEAVING = [("h1", "fin"), ("h1", "half_close"), ("h1", "rst"), ("h2", "rst_stream"), ("h2", "fin"), ("h2", "rst")]
SHORT_S = 2.0  # the timeouts of the impatient Envoy

_numbers = iter(range(1, 10_000))


class Rows:
    """One stack for all rows: one sidecar, and three Envoys in front of it.

    fronts      "h1" and "h2": as rendered, named after the protocol to the upstream
    impatient   as "h2", but with a short message_timeout and route timeout, and with retries
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.upstream: Upstream = stack.upstreams["a"]
        self.fronts = {
            "h1": stack.front,
            "h2": stack.add_envoy("h2", protocol="h2", edit=_spoil_clusters),
        }
        self.impatient = stack.add_envoy("impatient", protocol="h2", edit=_make_impatient)

    @contextlib.contextmanager
    def ask(
        self, front: Front, client: str, kind: str = "ok", *, model: str = "a", also: str = "", **how: float | str
    ) -> Iterator[tuple[str, H1Request | H2Stream]]:
        """Send a request; its id, and its client's end. `also` is a queue budget."""
        request_id = f"r{next(_numbers)}"
        headers = [("x-test-id", request_id), ("x-model", model), behave(kind, **how)]
        if also:
            headers.append(("x-queue-budget", also))
        with contextlib.ExitStack() as open_now:
            if client == "h1":
                yield request_id, open_now.enter_context(H1Request(front.address, headers=headers, body=b"{}")).send()
            else:
                connection = open_now.enter_context(H2Client(front.address))
                yield request_id, connection.request(headers=headers, body=b"{}")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Endpoint `a` is taken by another request meanwhile; afterwards that one has ended well."""
        with self.ask(self.fronts["h1"], "h1", "sse", hold="body") as (request_id, request):
            assert request.read_chunk() == sse_event(0)
            assert self.stack.in_flight("a") == 1
            try:
                yield
            finally:
                self.upstream.release(request_id)
            assert request.read_all() == EVENTS + SSE_DONE
            assert request.complete

    def log_entry(self, front: Front, request_id: str) -> dict[str, Any]:
        """Envoy's access log entry of this request."""
        return front.envoy.wait_access_log(lambda entry: entry.get("test_id") == request_id)

    def settled(self) -> None:
        """Every lease is back within 2 s, nothing waits, and a next request is served at once."""
        self.stack.wait_idle(2)
        with self.ask(self.fronts["h1"], "h1") as (_, request):
            assert request.read_head() == 200
            assert request.read_all() == b"x" * 100
        self.stack.wait_idle(2)


def _manager(bootstrap: dict[str, Any]) -> dict[str, Any]:
    (listener, *_) = bootstrap["static_resources"]["listeners"]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    for log in manager.get("access_log", []):
        log["typed_config"]["log_format"]["json_format"]["test_id"] = "%REQ(X-TEST-ID)%"
    return manager


def _spoil_clusters(bootstrap: dict[str, Any]) -> None:
    """Let `dead-…` refuse connections and leave `nowhere-…` without clusters; to the sidecar all look healthy."""
    _manager(bootstrap)
    clusters = bootstrap["static_resources"]["clusters"]
    clusters[:] = [cluster for cluster in clusters if not cluster["name"].startswith("nowhere")]
    for dead in (cluster for cluster in clusters if cluster["name"].startswith("dead")):
        (endpoint,) = dead["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = free_port()


def _make_impatient(bootstrap: dict[str, Any]) -> None:
    _spoil_clusters(bootstrap)
    manager = _manager(bootstrap)
    (ext_proc, *_) = (one for one in manager["http_filters"] if "ext_proc" in one["name"])
    ext_proc["typed_config"]["message_timeout"] = f"{SHORT_S}s"
    for host in manager["route_config"]["virtual_hosts"]:
        for route in host["routes"]:
            if "cluster_header" in route.get("route", {}):
                route["route"]["timeout"] = f"{SHORT_S}s"
                route["route"]["retry_policy"] = {"retry_on": "reset,connect-failure", "num_retries": 2}


@pytest.fixture(scope="module")
def rows(module_stack: StackFactory) -> Rows:
    # One faulty endpoint per test that uses it: after some failures in a row an endpoint is given a rest.
    faulty = [f"{fault}-{way}" for fault in ("dead", "nowhere") for way in ("h1-h1", "h1-h2", "h2-h1", "h2-h2")]
    endpoints: dict[str, Any] = {name: {"models": [name], "address": local()} for name in faulty}
    endpoints["a"] = {"models": ["a"]}
    return Rows(module_stack(upstreams=["a"], endpoints=endpoints, edit=_spoil_clusters))


@pytest.fixture(params=["h1", "h2"])
def client(request: pytest.FixtureRequest) -> str:
    """The protocol between client and Envoy."""
    return str(request.param)


@pytest.fixture(params=["h1", "h2"])
def upstream(request: pytest.FixtureRequest) -> str:
    """The protocol between Envoy and upstream."""
    return str(request.param)


# Answers that come whole


@pytest.mark.parametrize(
    ("kind", "hold", "status", "body"),
    [
        ("sse", "body", 200, EVENTS + SSE_DONE),
        ("ok", "body", 200, b"x" * 100),
        ("empty", "head", 204, b""),
        ("ok", "head", 200, b"x" * 100),
    ],
    ids=["chunked", "content-length", "no-content", "late-head"],
)
def test_the_lease_is_held_to_the_last_byte_of_an_answer(
    rows: Rows, client: str, upstream: str, kind: str, hold: str, status: int, body: bytes
) -> None:
    with rows.ask(rows.fronts[upstream], client, kind, hold=hold) as (request_id, request):
        if hold == "body":
            assert request.read_chunk()
        rows.upstream.wait_for(request_id)
        with rows.ask(rows.fronts[upstream], client) as (next_id, next_request):
            rows.stack.wait_waiting(1)
            assert rows.stack.in_flight("a") == 1
            assert rows.upstream.seen(next_id) == []
            rows.upstream.release(request_id)
            assert request.read_all() == body
            assert (request.status, request.complete) == (status, True)
            assert next_request.read_head() == 200
            assert next_request.read_all() == b"x" * 100
    assert rows.upstream.wait_ended(request_id).finished
    assert rows.log_entry(rows.fronts[upstream], request_id)["flags"] == "-"
    rows.settled()


def test_the_lease_is_held_to_the_end_of_an_answer_with_trailers(rows: Rows, client: str) -> None:
    with rows.ask(rows.fronts["h2"], client, "trailers", hold="body") as (request_id, request):
        assert request.read_chunk() == sse_event(0)
        assert rows.stack.in_flight("a") == 1
        rows.upstream.release(request_id)
        assert request.read_all() == EVENTS + SSE_DONE
        assert (request.status, request.complete) == (200, True)
        if isinstance(request, H2Stream):
            assert ("x-trailer", "here") in request.trailers
    rows.settled()


def test_events_reach_the_client_one_by_one(rows: Rows, client: str, upstream: str) -> None:
    with rows.ask(rows.fronts[upstream], client, "sse", events=5, hold="events") as (request_id, request):
        for number in range(5):
            assert request.read_chunk() == sse_event(number)
            rows.upstream.release(f"{request_id}.{number}")
        assert request.read_all() == b"".join(map(sse_event, range(5))) + SSE_DONE
    rows.settled()


# Clients that leave


def leave(request: H1Request | H2Stream, how: str) -> None:
    if isinstance(request, H1Request):
        getattr(request, how)()
    elif how == "rst_stream":
        request.rst()
    else:
        getattr(request.client, how)()


@pytest.mark.parametrize(("protocol", "how"), LEAVING)
@pytest.mark.parametrize("hold", ["head", "body"])
def test_a_client_that_leaves_during_its_answer_gives_the_lease_back(
    rows: Rows, upstream: str, protocol: str, how: str, hold: str
) -> None:
    with rows.ask(rows.fronts[upstream], protocol, "sse", hold=hold) as (request_id, request):
        if hold == "body":
            assert request.read_chunk() == sse_event(0)
        rows.upstream.wait_for(request_id)
        assert rows.stack.in_flight("a") == 1
        leave(request, how)
        rows.stack.wait_idle()
        assert rows.upstream.wait_ended(request_id).aborted
    entry = rows.log_entry(rows.fronts[upstream], request_id)
    assert entry["flags"] == ("DR" if how == "rst_stream" else "DC")
    rows.settled()


@pytest.mark.parametrize(("protocol", "how"), LEAVING)
def test_a_client_that_leaves_while_it_waits_never_reaches_an_upstream(rows: Rows, protocol: str, how: str) -> None:
    front = rows.fronts["h1"]
    cancelled = rows.stack.outcomes("cancelled")
    with rows.busy(), rows.ask(front, protocol) as (request_id, request):
        rows.stack.wait_waiting(1)
        leave(request, how)
        rows.stack.wait_waiting(0)
        assert rows.stack.in_flight("a") == 1
    rows.settled()
    assert rows.upstream.seen(request_id) == []
    assert rows.log_entry(front, request_id)["flags"] == ("DR" if how == "rst_stream" else "DC")
    assert rows.stack.outcomes("cancelled") == cancelled + 1


# Upstreams that fail


@pytest.mark.parametrize("kind", ["rst", "fin"])
def test_an_upstream_that_breaks_off_gives_the_lease_back(rows: Rows, client: str, upstream: str, kind: str) -> None:
    with rows.ask(rows.fronts[upstream], client, kind, events=2, hold="body") as (request_id, request):
        assert request.read_chunk() == sse_event(0)
        assert rows.stack.in_flight("a") == 1
        rows.upstream.release(request_id)
        rows.stack.wait_idle()
        request.read_all()
        assert (request.status, request.complete) == (200, False)
    flags = rows.log_entry(rows.fronts[upstream], request_id)["flags"]
    assert flags == {"h1rst": "UPE", "h1fin": "UPE", "h2rst": "UR", "h2fin": "UC"}[upstream + kind]
    rows.settled()


@pytest.mark.parametrize("kind", ["rst", "fin"])
def test_an_upstream_that_breaks_off_before_its_head_gives_the_lease_back(
    rows: Rows, client: str, upstream: str, kind: str
) -> None:
    with rows.ask(rows.fronts[upstream], client, kind, events=0, hold="head") as (request_id, request):
        rows.upstream.wait_for(request_id)
        assert rows.stack.in_flight("a") == 1
        rows.upstream.release(request_id)
        assert request.read_head() == 503
        request.read_all()
    assert len(rows.upstream.seen(request_id)) == 1
    assert rows.log_entry(rows.fronts[upstream], request_id)["flags"] == ("UR" if upstream + kind == "h2rst" else "UC")
    rows.settled()


@pytest.mark.parametrize(("fault", "flags"), [("dead", "UF"), ("nowhere", "NC")])
def test_a_dispatch_that_finds_nobody_gives_the_lease_back(
    rows: Rows, client: str, upstream: str, fault: str, flags: str
) -> None:
    model = f"{fault}-{client}-{upstream}"
    with rows.ask(rows.fronts[upstream], client, model=model) as (request_id, request):
        assert request.read_head() == 503
        request.read_all()
        rows.stack.wait_idle()
    assert rows.upstream.seen(request_id) == []
    assert rows.log_entry(rows.fronts[upstream], request_id)["flags"].split(",")[-1] == flags
    if fault == "nowhere":  # who comes next to a dead one waits until its page is there again
        with rows.ask(rows.fronts[upstream], client, model=model) as (_, request):
            assert request.read_head() == 503, "the endpoint's only lease was not given back"
    rows.settled()


# Envoy's own timers and retries


def test_a_route_timeout_before_the_head_gives_the_lease_back(rows: Rows, client: str) -> None:
    with rows.ask(rows.impatient, client, hold="head") as (request_id, request):
        rows.upstream.wait_for(request_id)
        assert rows.stack.in_flight("a") == 1
        assert request.read_head() == 504
        request.read_all()
        assert rows.upstream.wait_ended(request_id).aborted
    assert "UT" in rows.log_entry(rows.impatient, request_id)["flags"]
    rows.settled()


def test_a_route_timeout_during_the_answer_gives_the_lease_back(rows: Rows, client: str) -> None:
    with rows.ask(rows.impatient, client, "sse", hold="body") as (request_id, request):
        assert request.read_chunk() == sse_event(0)
        assert rows.stack.in_flight("a") == 1
        assert rows.upstream.wait_ended(request_id).aborted
        rows.stack.wait_idle()
        request.read_all()
        assert (request.status, request.complete) == (200, False)
    assert "UT" in rows.log_entry(rows.impatient, request_id)["flags"]
    rows.settled()


def test_a_retried_request_keeps_its_one_lease_through_all_attempts(rows: Rows, client: str) -> None:
    dispatched = rows.stack.outcomes("dispatched")
    with rows.ask(rows.impatient, client, "sse", fail=2, hold="body") as (request_id, request):
        assert request.read_chunk() == sse_event(0)
        assert rows.stack.in_flight("a") == 1
        rows.upstream.release(request_id)
        assert request.read_all() == EVENTS + SSE_DONE
    assert [seen.cut for seen in rows.upstream.seen(request_id)] == [True, True, False]
    rows.stack.wait_idle()
    assert rows.stack.outcomes("dispatched") == dispatched + 1
    rows.settled()


def test_a_request_that_outwaits_the_message_timeout_is_refused_and_forgotten(rows: Rows, client: str) -> None:
    cancelled = rows.stack.outcomes("cancelled")
    with rows.busy(), rows.ask(rows.impatient, client) as (request_id, request):
        rows.stack.wait_waiting(1)
        # 504 with failure_mode_allow false; with true the request goes on un-steered, to a route that leads nowhere.
        assert request.read_head() in (503, 504)
        rows.stack.wait_waiting(0)
        assert rows.stack.in_flight("a") == 1
    assert rows.upstream.seen(request_id) == []
    rows.settled()
    assert rows.stack.outcomes("cancelled") == cancelled + 1


# Our own refusals


def test_an_unknown_model_is_refused_with_a_reason_and_takes_no_lease(rows: Rows, client: str, upstream: str) -> None:
    with rows.ask(rows.fronts[upstream], client, model="what") as (request_id, request):
        assert request.read_head() == 404
        body = json.loads(request.read_all())
        assert request.header("x-extproc-outcome") == "unknown_model"
        assert body["error"]["message"]
    assert rows.upstream.seen(request_id) == []
    rows.settled()


def test_a_request_that_waits_out_its_budget_is_refused_and_takes_no_lease(rows: Rows, client: str) -> None:
    expired = rows.stack.outcomes("budget_expired")
    with rows.busy(), rows.ask(rows.fronts["h1"], client, also="300ms") as (request_id, request):
        rows.stack.wait_waiting(1)
        assert request.read_head() == 429
        assert request.header("x-extproc-outcome") == "budget_expired"
        assert int(request.header("retry-after") or 0) >= 1
        request.read_all()
        rows.stack.wait_waiting(0)
        assert rows.stack.in_flight("a") == 1
    assert rows.upstream.seen(request_id) == []
    assert rows.stack.outcomes("budget_expired") == expired + 1
    rows.settled()


# Clients that do not read


def test_the_lease_is_held_while_a_slow_client_keeps_envoy_from_passing_the_answer_on(
    rows: Rows, upstream: str
) -> None:
    size = 40_000_000
    front = rows.fronts[upstream]
    paused = "cluster.a.upstream_flow_control_paused_reading_total"
    before = front.envoy.stats(paused)[paused]
    with rows.ask(front, "h1", size=size) as (request_id, request):
        assert request.read_head() == 200
        wait_until(lambda: front.envoy.stats(paused)[paused] > before, message="Envoy stops reading the upstream")
        assert rows.stack.in_flight("a") == 1
        assert rows.upstream.wait_for(request_id).open
        assert len(request.read_all()) == size
    rows.settled()


def test_an_answer_that_fits_envoys_buffers_is_over_before_its_client_reads_it(rows: Rows, client: str) -> None:
    with rows.ask(rows.fronts["h1"], client, size=40_000) as (request_id, request):
        rows.upstream.wait_ended(request_id)
        rows.settled()
        assert request.read_all() == b"x" * 40_000
        assert request.complete
