"""Broken endpoints beside a good one, on real Envoy: one row each, and how few requests it may cost to find out.

"bad" answers at once whatever it is asked; "good" takes its time. Without judgement the bad one, always idle, gets all.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from extproc.admission.laws import LAWS

from .kit.clients import complete_many
from .kit.loops import close, sever
from .kit.processes import PATIENCE_S, free_port, take_turns, wait_until
from .kit.upstream import behave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kit.stack import Stack

QUIET_S = LAWS.health.quiet_s

PATIENT = [{"name": "default", "budget": "30s"}]
HEALTH = {"interval": "100ms", "timeout": "300ms"}
GOOD = dict([behave("sse", events=3, wait_s=0.02, gap_s=0.01)])
FEW = 12
"""What it may cost to find out one that nobody has heard of: a few at first, then one at a time."""
LIMIT = 8


class Canned:
    """A server that answers every request but GET /health and /metrics by the same bytes, and counts what is posted."""

    def __init__(
        self, answer: bytes, *, health_s: float = 0.0, page: str = "", idle_s: float = 60.0, gap_s: float = 0.0
    ) -> None:
        """`gap_s`: between an answer's head and the rest of it."""
        self.answer, self.page, self.health_s, self.idle_s, self.gap_s = answer, page, health_s, idle_s, gap_s
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.served = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Canned:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)

    async def _end(self) -> None:
        await close(self._server)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await sever()
        await take_turns()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            idle_since = self._loop.time()
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line.partition(b":")[2]))
                if head.startswith(b"GET /health"):
                    await asyncio.sleep(self.health_s)
                    writer.write(answer(200, "ok"))
                elif head.startswith(b"GET /metrics"):
                    writer.write(answer(200, self.page))
                else:
                    self.served += head.startswith(b"POST ")  # not what the sidecar itself asks
                    if not self.answer or self._loop.time() - idle_since > self.idle_s:
                        break
                    head, between, rest = self.answer.partition(b"\r\n\r\n")
                    if self.gap_s:
                        writer.write(head + between)
                        await asyncio.sleep(self.gap_s)
                        writer.write(rest)
                    else:  # in one piece: two may be read one after the other
                        writer.write(self.answer)
                await writer.drain()
                idle_since = self._loop.time()
        writer.close()


def answer(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} said\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


ASLEEP = '# TYPE vllm:engine_sleep_state gauge\nvllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0\n'
ROWS = {
    "A1 404 to all": (answer(404, '{"error": "model not found"}'), "refused"),
    "A1 401 to all": (answer(401, "who are you"), "refused"),
    "A1 400 to all": (answer(400, "no such model"), "refused"),
    "A1 500 to all": (answer(500, "broken"), "error"),
    "A2 loads for ever": (answer(503, '{"error": "Loading model"}'), "saturated"),
    "A2 429 with nothing running": (answer(429, "full of nothing"), "saturated"),
    "H3 200 and not a byte": (answer(200, ""), "empty"),
    "takes the request and hangs up": (b"", "broke_off"),
}
"""What it answers, and what /metrics calls that."""


def costs(here: Stack, count: int = 120) -> int:
    """How many of `count` requests did not get a good answer."""
    answers = complete_many(here.url, count, lambda n: {"x-test-id": f"r-{n}", **GOOD})
    return sum(one.status != 200 or bool(one.error) or not one.body for one in answers)


@pytest.mark.parametrize("checked", [False, True], ids=["no health checks", "passes its health checks"])
@pytest.mark.parametrize("row", ROWS)
def test_one_that_refuses_what_its_peer_serves_costs_a_few_requests(stack, row, checked):
    canned, kind = ROWS[row]
    with Canned(canned) as bad:
        config: dict[str, Any] = {"max_running_requests": LIMIT, "classes": PATIENT}
        most = LIMIT + FEW if checked else FEW  # whose checks pass is sent as many as it may run
        if checked:
            config["health_check"] = HEALTH
        here = stack(upstreams=("good",), endpoints={"bad": {"address": bad.address}}, config=config)
        if checked:
            wait_until(lambda: here.endpoint("bad")["state"] == "up")
        assert costs(here) <= most
        here.wait_idle()
        sent = here.endpoint("bad")["dispatched"]
        assert sent <= most
        counts = bad_answers(here)
        assert counts.pop(("bad", kind)) == sent
        assert set(counts.values()) <= {0}, "the good one gave none, and no answer is two kinds"


def bad_answers(here: Stack) -> dict[tuple[str, str], float]:
    """What /metrics counts, by endpoint and kind."""
    found = {}
    for name, value in here.sidecar.metrics().items():
        if name.startswith("extproc_bad_answers_total"):
            _, kind, _, endpoint, _ = name.split('"')
            found[endpoint, kind] = value
    return found


SHOWN = {
    "H3 200 and an empty body in chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "A1 500 with a body, whose first byte is no token": answer(500, "broken"),
}


@pytest.mark.parametrize("row", SHOWN)
def test_where_the_first_byte_is_shown_a_head_alone_is_no_answer_and_a_refusals_body_none_either(stack, row):
    with Canned(SHOWN[row]) as bad:
        config = {"max_running_requests": LIMIT, "classes": PATIENT, "first_byte_probe": True}
        here = stack(upstreams=("good",), endpoints={"bad": {"address": bad.address}}, config=config)
        slow = dict([behave("sse", events=2, gap_s=2.0)])  # on a busy machine one may end before its byte is shown
        complete_many(here.url, 8, lambda _: slow)  # heads alone are believed until a byte has been shown
        here.wait_idle()
        before = here.endpoint("bad")["dispatched"]
        assert costs(here) <= LIMIT + FEW
        here.wait_idle()
        assert here.endpoint("bad")["dispatched"] - before <= LIMIT + FEW


def test_where_first_bytes_are_shown_a_whole_answer_whose_head_came_before_it_is_still_a_good_one(stack):
    """The end of such an answer's stream often reaches us before the probe that shows its first byte."""
    with contextlib.ExitStack() as servers:
        names = [f"whole-{number}" for number in range(8)]
        whole = {name: servers.enter_context(Canned(answer(200, "all of it"), gap_s=0.02)) for name in names}
        config = {"max_running_requests": LIMIT, "classes": PATIENT, "first_byte_probe": True}
        endpoints = {name: {"address": server.address} for name, server in whole.items()}
        here = stack(upstreams=("good",), endpoints=endpoints, config=config)
        for name in ("good", *names):  # the first shows that the probe is there
            (one,) = complete_many(here.url, 1, lambda _, to=name: {"x-upstream-cluster": to, **GOOD})
            assert one.status == 200
        here.wait_idle()
        assert [server.served for server in whole.values()] == [1] * len(names)
        assert {name: here.endpoint(name)["state"] for name in names} == dict.fromkeys(names, "up")


def test_a3_one_whose_page_says_that_it_sleeps_gets_nothing(stack):
    with Canned(answer(500, "asleep"), page=ASLEEP) as bad:
        here = stack(
            upstreams=("good",),
            endpoints={"bad": {"address": bad.address, "metrics_url": f"http://{bad.address}/metrics"}},
            config={"max_running_requests": 4, "classes": PATIENT, "scrape_interval": "100ms", "health_check": HEALTH},
        )
        wait_until(lambda: here.endpoint("bad")["state"] == "asleep")
        assert costs(here, 40) == 0
        assert bad.served == 0
        bad.page = ASLEEP.replace("0.0", "1.0")
        wait_until(lambda: here.endpoint("bad")["state"] == "up")


def test_a6_one_that_is_too_busy_for_its_health_check_serves_on(stack):
    with Canned(answer(200, "tokens"), health_s=0.0) as busy:
        here = stack(
            upstreams=(),
            endpoints={"busy": {"address": busy.address}},
            config={"max_running_requests": 4, "health_check": {**HEALTH, "unhealthy_threshold": 1}},
        )
        wait_until(lambda: here.endpoint("busy")["state"] == "up")
        busy.health_s = 5.0
        until = time.monotonic() + 1.5  # five checks
        statuses: Counter[int] = Counter()
        while time.monotonic() < until:
            statuses.update(one.status for one in complete_many(here.url, 4, lambda n: {"x-test-id": f"b-{n}"}))
        assert statuses.keys() == {200}
        wait_until(
            lambda: here.endpoint("busy")["state"] == "down", message="and one that is silent altogether is down"
        )


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address where nobody listens, and nobody else will."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{kept.getsockname()[1]}"


def few_of(here: Stack, endpoint: str) -> float:
    """What one may cost that is found out: a few, twice as many in each step that a busy machine is late to tell."""
    here.wait_idle()
    failed = [one for one in here.envoy.access_log_lines() if one["cluster"] == endpoint and one["code"] == 503]
    assert failed
    late_s = max(one["duration_ms"] - one["queue"]["wait_ms"] for one in failed) / 1000
    return FEW + LAWS.health.few * 2 ** (late_s / LAWS.health.step_s)


def test_a7_h9_one_that_was_never_there_is_unknown_and_costs_a_burst_a_few(stack):
    with nobody() as address:
        here = stack(
            upstreams=("good",),
            endpoints={"bad": {"address": address}},
            config={"max_running_requests": 64, "classes": PATIENT},
        )
        assert {one["name"]: one["state"] for one in here.sidecar.queues()["endpoints"]} == {
            "good": "unknown",
            "bad": "unknown",
        }
        assert not here.endpoint("bad")["up"]
        assert costs(here, 400) <= few_of(here, "bad")
        assert here.endpoint("good")["state"] == "up"
        assert not here.endpoint("bad")["up"]


def test_h16_one_that_died_in_a_quiet_time_costs_a_burst_a_few(stack):
    config = {"max_running_requests": 64, "classes": PATIENT, "scrape_interval": "0s"}
    here = stack(upstreams=("good", "dies"), config=config)
    assert costs(here, 40) == 0
    assert here.endpoint("dies")["state"] == "up"
    here.upstreams["dies"].down()
    time.sleep(QUIET_S + 0.2)  # the quiet time itself
    assert costs(here, 300) <= few_of(here, "dies")


def test_g3_a_blink_that_all_share_refuses_nobody_afterwards(stack):
    hasty = [{"name": "default", "budget": "4s"}]  # who was put out for it would be for five
    here = stack(upstreams=("a", "b", "c"), config={"max_running_requests": 8, "classes": hasty})
    assert costs(here, 60) == 0
    with ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(complete_many, here.url, 200, lambda n: {"x-test-id": f"m-{n}", **GOOD}, gap_s=0.004)
        time.sleep(0.2)  # the outage itself, not a wait for something
        for upstream in here.upstreams.values():
            upstream.down()
        time.sleep(0.5)
        for upstream in here.upstreams.values():
            upstream.up()
        assert costs(here, 100) == 0
        meanwhile.result()

    def all_are_up() -> bool:
        assert costs(here, 20) == 0
        return {one["state"] for one in here.sidecar.queues()["endpoints"]} == {"up"}

    wait_until(all_are_up)  # on a busy machine one may not have been asked again yet


MISTAKES = {"answered 400": (400, ("ok", {"status": 400})), "hung up on": (503, ("rst", {"events": 0}))}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_clients_own_mistake_holds_nobody_back(stack, mistake):
    """A server may hang up on a body that is too big for it, and end its answer, a 413, with that."""
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 8, "classes": PATIENT})
    status, (kind, how) = MISTAKES[mistake]
    bad = dict([behave(kind, **how)])
    assert costs(here, 40) == 0
    answers = complete_many(here.url, 200, lambda n: {"x-test-id": f"b-{n}", **bad})
    assert Counter(one.status for one in answers) == {status: 200}
    assert {one["state"] for one in here.sidecar.queues()["endpoints"]} == {"up"}
    assert costs(here, 40) == 0


def test_a_client_that_names_an_endpoint_for_its_bad_requests_does_not_put_it_out(stack):
    """Five in a row did, while its peer served others: for 5 s, then 10, at most 60."""
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 8, "classes": PATIENT})
    bad = dict([behave("ok", status=400)])
    slow = dict([behave("sse", events=3, wait_s=0.1, gap_s=0.1)])
    assert costs(here, 40) == 0
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(complete_many, here.url, 200, lambda n: {"x-test-id": f"o-{n}", **slow}, gap_s=0.02)
        states = set()
        while not others.done():
            answers = complete_many(here.url, 6, lambda n: {"x-upstream-cluster": "a", "x-test-id": f"b-{n}", **bad})
            assert Counter(one.status for one in answers) == {400: 6}
            states.add(here.endpoint("a")["state"])
        assert Counter(one.status for one in others.result()) == {200: 200}
    assert states == {"up"}


@pytest.mark.parametrize(("idle", "statuses"), [("300ms", {200}), ("60s", {503})])
def test_a5_no_request_meets_a_connection_that_its_server_closes_when_idle(stack, idle, statuses):
    """The server made certain of the race: on a connection that was idle for 0.5 s it closes on the next request.

    Envoy does not try that one again, and must not: whether an engine has begun with it, nobody can tell. So it has to
    close first. Where it does not, the endpoint is left in: it is the last one, as in a pool whose members all do it.
    """
    with Canned(answer(200, "tokens"), idle_s=0.5) as server:
        here = stack(
            upstreams=(),
            endpoints={"a": {"address": server.address}},
            config={"max_running_requests": 1, "upstream_idle_timeout": idle, "classes": PATIENT},
        )
        assert complete_many(here.url, 1, lambda _: {"x-test-id": "first"})[0].status == 200
        for number in range(3):
            time.sleep(0.7)  # the pause is what is tested
            assert complete_many(here.url, 1, lambda _, n=number: {"x-test-id": f"i-{n}"})[0].status in statuses
            if statuses == {503}:
                assert complete_many(here.url, 1, lambda _, n=number: {"x-test-id": f"o-{n}"})[0].status == 200
        here.wait_idle()
        assert here.endpoint("a")["state"] == "up"
        assert here.endpoint("a")["dispatched"] == server.served


def plain_reset(bootstrap: dict[str, Any]) -> None:
    (listener,) = bootstrap["static_resources"]["listeners"]
    (host,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    host["routes"][0]["route"]["retry_policy"]["retry_on"] = "reset"


@pytest.mark.parametrize(("edit", "status", "runs"), [(None, 503, 1), (plain_reset, 503, 2)], ids=["ours", "reset"])
def test_a5_a_request_that_its_server_read_before_it_hung_up_is_not_run_again(stack, edit, status, runs):
    """Why the idle timeout must do: Envoy's `reset` can't tell this from a connection that was closed when idle."""
    with Canned(b"") as server:
        here = stack(upstreams=(), endpoints={"a": {"address": server.address}}, edit=edit)
        assert complete_many(here.url, 1, lambda _: {"x-test-id": "r"})[0].status == status
        here.wait_idle()
        assert (server.served, here.endpoint("a")["dispatched"]) == (runs, 1)


def test_a5_what_its_server_refused_to_begin_is_sent_again_as_one_lease_and_one_run(stack):
    """Over HTTP/2 a server says so (REFUSED_STREAM); where nothing listened for a moment, nothing can have begun."""
    here = stack(protocol="h2", upstreams=("a",))
    (answer,) = complete_many(here.url, 1, lambda _: {"x-test-id": "r", **dict([behave("ok", refuse=1)])})
    assert answer.status == 200
    here.wait_idle()
    assert [record.attempt for record in here.upstreams["a"].records() if record.finished] == [2]
    assert here.endpoint("a")["dispatched"] == 1
    assert here.endpoint("a")["state"] == "up"


class Calls(grpc.GenericRpcHandler):
    """A gRPC engine: each call has this status, in trailers behind a head that says 200."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.served = 0

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.served += 1
        if self.code is not grpc.StatusCode.OK:
            context.send_initial_metadata(())  # else the status of an abort comes in the head
            context.abort(self.code, "not here")
        time.sleep(0.02)  # a good one takes its time, so that the bad one, always idle, would get all
        return request


@contextlib.contextmanager
def grpc_engine(calls: Calls) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8), handlers=[calls])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address
    server.stop(None).wait()


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE], ids=lambda code: code.name)
def test_a_grpc_engine_that_refuses_all_in_its_trailers_costs_a_few_calls(stack, code):
    good, bad = Calls(grpc.StatusCode.OK), Calls(code)
    with grpc_engine(good) as first, grpc_engine(bad) as second:
        endpoints = {"good": {"address": first}, "bad": {"address": second}}
        config = {"max_running_requests": LIMIT, "classes": PATIENT, "scrape_interval": "0s"}
        here = stack(protocol="h2", upstreams=(), endpoints=endpoints, config=config)
        with grpc.insecure_channel(here.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary("/vllm.grpc.engine.VllmEngine/Generate")
            calls = [call.future(b"a prompt", timeout=2 * PATIENCE_S) for _ in range(60)]
            codes = Counter(one.code() for one in calls)
        assert codes[code] == bad.served <= FEW
        assert codes[grpc.StatusCode.OK] == good.served == 60 - bad.served


def test_a_dead_grpc_engine_costs_a_few_calls_though_envoys_errors_for_them_have_status_200(stack):
    good = Calls(grpc.StatusCode.OK)
    with grpc_engine(good) as first:
        endpoints = {"good": {"address": first}, "bad": {"address": f"127.0.0.1:{free_port()}"}}
        config = {"max_running_requests": LIMIT, "classes": PATIENT, "scrape_interval": "0s"}
        here = stack(protocol="h2", upstreams=(), endpoints=endpoints, config=config)
        with grpc.insecure_channel(here.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary("/vllm.grpc.engine.VllmEngine/Generate")
            codes = Counter(one.code() for one in [call.future(b"a prompt", timeout=2 * PATIENCE_S) for _ in range(60)])
        assert 0 < codes[grpc.StatusCode.UNAVAILABLE] <= FEW
        assert codes[grpc.StatusCode.OK] == good.served == 60 - codes[grpc.StatusCode.UNAVAILABLE]
        assert bad_answers(here)["bad", "failed"] == codes[grpc.StatusCode.UNAVAILABLE]


def test_one_that_lacks_a_single_model_costs_a_few_requests_and_keeps_the_others(stack):
    here = stack(upstreams=("good", "bad"), config={"max_running_requests": LIMIT, "classes": PATIENT})
    lacks = dict([behave("ok", status=404, at="bad")])

    def ask(number: int) -> dict[str, str]:
        headers = {"x-test-id": f"l-{number}", "x-model": "loaded"}
        return headers if number % 5 > 1 else {**headers, "x-model": "lost", **lacks}

    answers = complete_many(here.url, 200, ask, gap_s=0.005)
    assert Counter(one.status for one in answers)[404] <= FEW
    wait_until(lambda: here.endpoint("bad").get("left_out_for") == ["lost"])
    assert here.endpoint("bad")["state"] == "up"
    assert {
        one.status for one in complete_many(here.url, 40, lambda n: {"x-test-id": f"m-{n}", "x-model": "loaded"})
    } == {200}
    assert here.sidecar.metrics()['extproc_endpoint_models_left_out{endpoint="bad"}'] == 1
