"""Hostile input: what no Envoy would send, and what clients can send through Envoy. `make faults`: longer."""

from __future__ import annotations

import heapq
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.errors import ProtocolError
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session

from .kit.clients import H1Request, H2Client, complete_many
from .kit.extproc_raw import RawChannel, StreamEnd
from .kit.fuzz import Fuzzer, corpus
from .kit.load import Growth, memory_bytes
from .kit.processes import wait_until
from .kit.stack import Sidecar
from .kit.upstream import Upstream, behave

if TYPE_CHECKING:
    from collections.abc import Callable

    from .kit.stack import Stack

LONG = os.environ.get("EXTPROC_LONG") == "1"
SIM = corpus()["request-bare"]


# ---- sessions in process


class Loop:
    """A loop whose time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._called_off: set[int] = set()
        self._made = 0

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_at(self.now, callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        self._made += 1
        number = self._made
        heapq.heappush(self._timers, (when, number, callback))
        called_off = self._called_off

        class Timer:
            def cancel(self) -> None:
                called_off.add(number)

        return Timer()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, number, callback = heapq.heappop(self._timers)
            if number not in self._called_off:
                callback()
        self.now = end


class Victim:
    """A reception with two endpoints, and sessions that a fuzzer talks to."""

    CLUSTERS = frozenset({"cluster-a", "cluster-b"})

    def __init__(self) -> None:
        self.loop = Loop()
        classes = (RequestClass("default", 0, 5.0), RequestClass("interactive", 10, 2.0))
        self.core = Controller(Policy(classes=classes, session_memory=20))
        self.gate = Gate(self.core, self.loop)
        self.reception = Reception(self.gate, Headers(), Ages(5.0), "extproc_request")
        for name, models in (("a", ("sim",)), ("b", ())):
            self.reception.put_cluster(name, f"cluster-{name}")
            self.gate.put_endpoint(
                EndpointSpec(name, cluster=f"cluster-{name}", models=frozenset(models), max_running_requests=2)
            )
        self.replies = 0
        self.refused = 0

    def take(self, data: bytes) -> None:
        """Judge a reply: it parses, and steers nowhere but to a cluster that the config names."""
        self.replies += 1
        reply = pb.ProcessingResponse.FromString(data)
        assert reply.WhichOneof("response") is not None
        for option in reply.request_headers.response.header_mutation.set_headers:
            assert option.header.raw_value.decode() in self.CLUSTERS

    def feed(self, session: Session, message: bytes) -> bool:
        """Whether the stream goes on."""
        try:
            session.receive(message)
        except ProtocolError:
            self.refused += 1
            return False
        return not session.over

    def check_empty(self) -> None:
        assert self.reception.streams == 0
        assert not self.reception.running
        assert self.core.waiting == 0
        assert not any(endpoint.leases for endpoint in self.core.endpoints.values())
        assert len(self.core._placing.sessions) <= 20

    def serves(self) -> bool:
        """Whether a good request is answered at once."""
        before = self.replies
        session = Session(self.reception, self.take)
        session.receive(SIM)
        session.end()
        return self.replies == before + 1


@pytest.mark.parametrize("seed", range(20) if LONG else (1,))
def test_mutated_messages_in_any_order_are_answered_or_refused_and_leave_nothing_behind(seed):
    fuzzer, victim = Fuzzer(seed), Victim()
    open_sessions: list[Session] = []
    for number in range(15_000 if LONG else 4_000):
        session = Session(victim.reception, victim.take)
        if all(victim.feed(session, message) for message in fuzzer.conversation()):
            open_sessions.append(session)
        else:
            session.end()
        if len(open_sessions) > 30:
            open_sessions.pop(fuzzer.dice.randrange(len(open_sessions))).end()
        if number % 50 == 0:
            victim.loop.advance(fuzzer.dice.random() * 3)
    assert victim.replies > 1000
    assert victim.refused > 1000
    for session in open_sessions:
        session.end()
    victim.loop.advance(10)
    victim.check_empty()
    assert victim.serves()


def test_a_million_names_are_not_remembered():
    """Tenants, sessions, models and ids that clients make up are kept as long as their requests, and no longer."""
    victim = Victim()
    for number in range(12_000):
        message = pb.ProcessingRequest()
        name = f"made-up-{number}".encode() * 30
        for key in ("x-tenant-id", "x-session-id", "x-model", "x-request-class", "x-request-id"):
            message.request_headers.headers.headers.add(key=key, raw_value=name)
        session = Session(victim.reception, victim.take)
        victim.feed(session, message.SerializeToString())
        session.end()
    victim.check_empty()
    assert all(len(share) <= 10_000 for pool in victim.core.pools() for share in pool.shares.values())
    assert len(victim.core._books.pools.by_model) == 1


# ---- a live server


def test_a_fuzzed_server_ends_each_stream_properly_keeps_nothing_and_serves_on(tmp_path):
    """Every stream ends: OK when we closed it, INVALID_ARGUMENT when it made no sense."""
    fuzzer = Fuzzer(2)
    endpoints = [{"name": "a", "address": "127.0.0.1:9", "max_running_requests": 2}]
    config = {"enable_queue": True, "endpoints": endpoints, "drain_timeout": "200ms"}
    growth, ends = Growth(), set()
    with Sidecar(config, tmp_path) as sidecar:
        for batch in range(700 if LONG else 6):
            with RawChannel(sidecar.listen) as channel:
                streams = [channel.open() for _ in range(50)]
                for stream in streams:
                    for message in fuzzer.conversation():
                        stream.send(message)
                    if fuzzer.dice.random() < 0.2:
                        stream.cancel()
                    else:
                        stream.half_close()
                for stream in streams:
                    try:
                        while True:
                            pb.ProcessingResponse.FromString(stream.read())
                    except StreamEnd as end:
                        ends.add(end.code)
            wait_until(lambda: sidecar.metrics()["extproc_streams"] == 0, message="all streams gone")
            page = sidecar.queues()
            assert (page["waiting_total"], page["endpoints"][0]["in_flight"]) == (0, 0)
            if batch >= 80:
                growth.add((batch + 1) * 50, memory_bytes(sidecar.child.pid))
        code = grpc.StatusCode
        assert {code.OK, code.INVALID_ARGUMENT} <= ends <= {code.OK, code.INVALID_ARGUMENT, code.CANCELLED}
        with RawChannel(sidecar.listen) as channel, channel.open() as stream:
            stream.send(SIM)
            pb.ProcessingResponse.FromString(stream.read())
        assert "Traceback" not in sidecar.child.output()
        assert_log_is_sound(sidecar)
    if growth.samples:
        print(growth)
        # Messages of up to a megabyte leave the allocators' pools at different sizes: 5 MiB more or less are noise.
        assert growth.slope < 250, growth


def assert_log_is_sound(sidecar: Sidecar) -> None:
    """No line that a client wrote, none without end."""
    for line in sidecar.child.lines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ extproc|\{", line), line
        assert len(line) < 1000


# ---- through Envoy

BROKEN_OFF = 0
"""No answer: Envoy closes the connection beside its 400 or 431, and the reset may overtake them."""


BARE = {"x-model": "sim"}


@pytest.fixture(scope="module")
def front(module_stack):
    """Endpoint a for model `sim`, b for model `b`; and an Envoy cluster `secret` that the sidecar does not know."""
    with Upstream("secret") as secret:

        def add_secret(bootstrap: dict[str, Any]) -> None:
            clusters = bootstrap["static_resources"]["clusters"]
            (a,) = (cluster for cluster in clusters if cluster["name"] == "a")
            address = {"socket_address": {"address": "127.0.0.1", "port_value": secret.port}}
            assignment = {
                "cluster_name": "secret",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            }
            clusters.append({**a, "name": "secret", "load_assignment": assignment})

        classes = [{"name": "default", "budget": "20s"}, {"name": "interactive", "priority": 10, "budget": "20s"}]
        here = module_stack(
            upstreams=("a", "b"),
            endpoints={"a": {"models": ["sim"]}, "b": {"models": ["b"]}},
            config={"max_running_requests": 4, "classes": classes},
            edit=add_secret,
        )
        here.upstreams["secret"] = secret
        yield here
        assert not secret.records(), "a cluster that the config does not name was reached"
        assert_log_is_sound(here.sidecar)
        assert_labels_are_ours(here)


def assert_labels_are_ours(here: Stack) -> None:
    """Every label of every metric comes from the config or a fixed set, whatever clients have sent."""
    found = {value for name in here.sidecar.metrics() for value in re.findall(r'="([^"]*)"', name)}
    strange = {value for value in found if "evil" in value or "made-up" in value or len(value) > 60}
    assert not strange
    classes = {
        match for name in here.sidecar.metrics() for match in re.findall(r'[{,](?:request_)?class="([^"]*)"', name)
    }
    assert classes <= {"default", "interactive"}


def cases(name: str) -> list[str]:
    return [name, name.upper(), name.title(), name.replace("x-", "X-", 1)]


SPOOFS = [
    *([(form, "secret")] for form in cases("x-upstream-cluster")),
    [(form, "secret") for form in cases("x-upstream-cluster")],
    [("x-upstream-cluster", "a"), ("x-upstream-cluster", "secret")],
    [("x-upstream-cluster", ""), ("X-Upstream-Cluster", "secret")],
    [("x-upstream-cluster", "secret, a")],
    [("x-upstream-cluster", "unsteered")],
    [("x-upstream-cluster", "extproc_queue")],
    [(form, "127.0.0.1:{secret}") for form in cases("x-gateway-destination-endpoint")],
    [("x-envoy-original-dst-host", "127.0.0.1:{secret}")],
    [("x-envoy-internal", "true"), ("x-forwarded-for", "10.0.0.1"), ("x-upstream-cluster", "secret")],
    [("connection", "x-upstream-cluster"), ("x-upstream-cluster", "secret")],
    [("x-envoy-original-path", "/secret"), ("x-original-url", "/secret")],
]


@pytest.mark.parametrize("spoof", SPOOFS, ids=range(len(SPOOFS)))
def test_no_header_of_a_client_chooses_its_cluster(front, spoof):
    """The fixture checks that `secret` was never reached."""
    headers = [(name, value.format(secret=front.upstreams["secret"].port)) for name, value in spoof]
    for model, wanted in (("sim", "a"), ("b", "b")):
        name = f"spoof-{os.urandom(4).hex()}"
        tagged = [("x-test-id", name), ("x-model", model), *headers]
        with H1Request(front.address, headers=tagged, body=b"{}") as request:
            assert request.send().read_head() == 200
        assert front.upstreams[wanted].seen(name)
        if "connection" not in dict(headers):  # HTTP/2 has no such header
            with H2Client(front.address) as client:
                stream = client.request(headers=[(key.lower(), value) for key, value in tagged], body=b"{}")
                assert stream.read_head() == 200
        reached = {one for one in ("a", "b", "secret") if front.upstreams[one].seen(name)}
        assert reached == {wanted}
        arrived = {key for record in front.upstreams[wanted].seen(name) for key, _ in record.headers}
        assert "x-upstream-cluster" not in arrived
    front.wait_idle()


@pytest.mark.parametrize(
    "headers",
    [
        [("x-envoy-retry-on", "5xx,reset"), ("x-envoy-max-retries", "20")],
        [("x-envoy-upstream-rq-per-try-timeout-ms", "50"), ("x-envoy-hedge-on-per-try-timeout", "true")],
    ],
    ids=["retry", "hedge"],
)
@pytest.mark.parametrize("pretend", [[], [("x-forwarded-for", "10.0.0.1")]], ids=["stranger", "as-if-internal"])
def test_no_header_of_a_client_has_its_request_run_more_than_once(front, headers, pretend):
    """Envoy would retry or hedge for clients that it takes for its own; each run takes an engine, under one lease."""
    name = f"again-{os.urandom(4).hex()}"
    how = behave("ok", fail=3) if "retry" in headers[0][0] else behave("ok", wait_s=0.4)
    asked = [("x-test-id", name), ("x-model", "sim"), how]
    with H1Request(front.address, headers=[*asked, *headers, *pretend], body=b"{}") as request:
        request.send().read_head()
    front.wait_idle()
    assert len(front.upstreams["a"].seen(name)) == 1


ODD = [
    ("crlf", b"a\r\nx-upstream-cluster: secret"),
    ("lf", b"a\nx-upstream-cluster: secret"),
    ("nul", b"a\x00b"),
    ("not utf-8", b"\xff\xfe\xc0\x80"),
    ("overlong", b"\xc0\xae\xc0\xae/"),
    ("line separators", "x\u2028\u0085evil INFO".encode()),
    ("terminal", b"\x1b[2J"),
    ("quotes", b'"}\n# HELP evil\nevil 1'),
    ("long", b"made-up" * 1000),
    ("format", b"%s%s%n{0}{evil}"),
]
REFUSED = {"crlf", "lf", "nul", "terminal", "quotes"}
"""Of these Envoy makes no header: a line ends, or it answers 400."""


@pytest.mark.parametrize(("what", "value"), ODD, ids=[what for what, _ in ODD])
def test_odd_bytes_in_any_header_that_we_read_are_refused_by_envoy_or_are_just_a_value(front, what, value):
    """The request is served or refused as a whole (400); it never gets past the queue, nor into a label or log line."""
    text = value.decode("latin-1")
    for header in ("x-model", "x-request-class", "x-tenant-id", "x-session-id", "x-queue-budget", "x-request-id"):
        name = f"odd-{os.urandom(4).hex()}"
        with H1Request(front.address, headers=[("x-test-id", name), (header, text)], body=b"{}") as request:
            status = request.send().read_head()
        assert status in (200, 400, BROKEN_OFF) or (status, header) == (404, "x-model"), (header, what)
        reached = [one for one in ("a", "b", "secret") if front.upstreams[one].seen(name)]
        assert len(reached) == (status == 200), reached
        if status in (400, BROKEN_OFF):
            return  # such bytes are no header at all, of whatever name; closing takes Envoy a second
    front.wait_idle()


def test_refusals_with_odd_ids_write_one_line_each(stack):
    here = stack(endpoints={"a": {"models": ["sim"]}})
    for value in (value for what, value in ODD if what not in REFUSED):
        headers = [("x-request-id", value.decode("latin-1")), ("x-model", "nobody's")]
        with H1Request(here.address, headers=headers, body=b"{}") as request:
            assert request.send().read_head() == 404
    assert here.outcomes("unknown_model") == len(ODD) - len(REFUSED)
    wait_until(lambda: "unknown_model" in here.sidecar.child.output())
    assert_log_is_sound(here.sidecar)


def test_header_floods_are_refused_by_envoy_or_served(front):
    """Just below Envoy's 60 KiB our routing header is one too many: Envoy says 500, and the lease comes back."""
    refused = {431, BROKEN_OFF}
    for many, size, expected in ((80, 200, {200}), (90, 600, {500}), (1000, 20, refused)):
        flood = [("x-test-id", "flood"), ("x-model", "sim"), *((f"x-flood-{n}", "v" * size) for n in range(many))]
        with H1Request(front.address, headers=flood, body=b"{}") as request:
            assert request.send().read_head() in expected, (many, size)
        front.wait_idle()
    same = [("x-tenant-id", f"t-{number}") for number in range(60)]
    flood = [("x-test-id", "flood"), ("x-model", "sim"), *same]
    with H1Request(front.address, headers=flood, body=b"{}") as request:
        assert request.send().read_head() == 200
    front.wait_idle()


def test_a_class_given_twice_or_in_capitals_is_one_of_ours_or_the_default(front):
    for headers in (
        {"X-REQUEST-CLASS": "interactive"},
        {"x-request-class": "evil"},
        {"x-request-class": "INTERACTIVE"},
        {"x-request-class": "default,interactive"},
    ):
        (answer,) = complete_many(front.url, 1, lambda _, headers=headers: {**BARE, "x-test-id": "class", **headers})
        assert answer.status == 200
    twice = [
        *BARE.items(),
        ("x-test-id", "class"),
        ("x-request-class", "evil"),
        ("x-request-class", "interactive"),
    ]
    with H1Request(front.address, headers=twice, body=b"{}") as request:
        assert request.send().read_head() == 200
    front.wait_idle()


def test_thousands_of_made_up_names_are_no_labels(front):
    """The fixture looks at every label at the end."""
    count = 3000 if LONG else 300
    names = ("x-tenant-id", "x-session-id", "x-request-class")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            complete_many,
            front.url,
            count,
            lambda n: {**BARE, "x-test-id": "l", **dict.fromkeys(names, f"made-up-{n}")},
        )
        assert {one.status for one in asked.result()} == {200}
    front.wait_idle()
    assert len(front.sidecar.metrics()) < 500
