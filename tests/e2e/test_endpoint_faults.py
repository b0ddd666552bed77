"""Endpoints that die, hang, refuse, dawdle or flap: each request ends in exactly one outcome, and none is stuck."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from .kit.clients import H1Request, complete_many
from .kit.commands import extproc
from .kit.processes import Child, free_port, wait_until
from .kit.stack import local
from .kit.upstream import SSE_DONE, behave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kit.clients import Completion
    from .kit.stack import Stack

LONG = os.environ.get("EXTPROC_LONG") == "1"
CHECK = {"interval": "100ms", "timeout": "300ms", "unhealthy_threshold": 2}
PATIENT = [{"name": "default", "budget": "30s"}]


class Deaf:
    """A server that accepts connections and never says a word, until `close`."""

    def __init__(self, *, backlog: int = 256) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.port))
        self._socket.listen(backlog)

    def __enter__(self) -> Deaf:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@contextlib.contextmanager
def unreachable() -> Iterator[str]:
    """An address where connecting itself hangs: a listener whose queue of connections is full."""
    with Deaf(backlog=0) as deaf, contextlib.ExitStack() as queue:
        for _ in range(4):
            one = queue.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", deaf.port))
        yield deaf.address


def settle(here: Stack, offered: int) -> None:
    """All books are empty, and say of each request what became of it, once."""
    here.wait_idle()
    outcomes = here.sidecar.queues()["outcomes"]
    assert sum(outcomes.values()) == offered, outcomes
    left = sum(one["dispatched"] for one in here.sidecar.queues()["endpoints"])
    assert left == outcomes.get("dispatched", 0) + outcomes.get("rerouted", 0)
    wait_until(lambda: here.sidecar.metrics()["extproc_streams"] == 0, message="all streams gone")


def reached(here: Stack, *names: str) -> list[str]:
    """The ids of requests that reached these upstreams (all, if none is named), without health checks."""
    upstreams = [here.upstreams[name] for name in names] if names else here.upstreams.values()
    return [record.request_id for one in upstreams for record in one.records() if record.request_id]


def whole(answers: list[Completion]) -> list[Completion]:
    return [one for one in answers if one.status == 200 and not one.error]


def test_an_endpoint_that_refuses_connections_is_left_out_and_its_pool_serves_on(stack):
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 4})
    here.upstreams["a"].down()
    answers = complete_many(here.url, 60, lambda n: {"x-test-id": f"f-{n}"}, gap_s=0.01)
    late = complete_many(here.url, 20, lambda n: {"x-test-id": f"l-{n}"})
    statuses = Counter(answer.status for answer in (*answers, *late))
    assert statuses[200] + statuses[503] == 80
    settle(here, 80)
    assert here.endpoint("a")["dispatched"] == statuses[503], "what was sent there is lost, and nothing else"
    assert here.sidecar.metrics()['extproc_bad_answers_total{answer="failed",endpoint="a"}'] == statuses[503]
    # Five failures in a row, and those that were under way, eject it; then a trial each 5 s and more.
    assert 1 <= statuses[503] <= 20
    assert not here.endpoint("a")["up"]


@contextlib.contextmanager
def dead(how: str) -> Iterator[str]:
    """An address where nobody serves: it refuses connections, by number or by name, or lets them hang."""
    if how == "hangs":
        with unreachable() as address:
            yield address
    else:
        yield f"{'localhost' if how == 'has a name' else '127.0.0.1'}:{free_port()}"


@pytest.mark.parametrize(
    ("how", "protocol"),
    [
        ("refuses", "h1"),
        ("refuses", "h2"),
        ("hangs", "h1"),
        pytest.param(
            "hangs", "h2", marks=pytest.mark.skipif(not LONG, reason="EXTPROC_LONG is not set: `make faults`")
        ),
        ("has a name", "h1"),
    ],
)
def test_with_a_second_try_a_server_that_takes_no_connection_costs_no_client_an_error(stack, how, protocol):
    """Those that are sent there come back, and wait in order for the one slot elsewhere."""
    with dead(how) as address:
        here = stack(
            upstreams=("b",),
            protocol=protocol,
            config={"second_try": local(), "classes": PATIENT},
            endpoints={"a": {"address": address, "max_running_requests": 20}, "b": {"max_running_requests": 1}},
        )
        answers = complete_many(here.url, 30, lambda n: {"x-test-id": f"t-{n}"}, body=b"x" * 100_000)
    assert Counter(answer.status for answer in answers) == {200: 30}
    served = sorted((one.arrived_at, one.ended_at or 0.0) for one in here.upstreams["b"].records() if one.request_id)
    assert all(before[1] <= after[0] for before, after in pairwise(served)), "one at a time"
    assert sorted(reached(here)) == sorted(f"t-{n}" for n in range(30)), "each was run once"
    tries = int(here.sidecar.metrics()["extproc_second_tries_total"])
    assert tries >= 1
    settle(here, 30 + tries)


@pytest.mark.parametrize("more", ["", "second_try"])
@pytest.mark.parametrize("checked", [False, True])
def test_while_nobody_takes_connections_requests_wait_for_one_to_come_back(stack, more, checked):
    """Each trial cost a client's request: 57 of 240 got 503 while three servers restarted for 15 s, the looks at their
    pages all the while refused; and with second tries those that had been to all three were refused after 60 ms."""
    config = {"classes": PATIENT, **({"second_try": local()} if more else {})}
    here = stack(upstreams=("a", "b", "c"), config={**config, **({"health_check": {}} if checked else {})})
    assert complete_many(here.url, 12, lambda n: {"x-test-id": f"before-{n}"})[-1].status == 200
    for upstream in here.upstreams.values():
        upstream.down()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete_many, here.url, 80, lambda n: {"x-test-id": f"f-{n}"}, gap_s=0.05)
        wait_until(lambda: here.sidecar.queues()["waiting_total"] >= 60, message="who comes waits")
        for upstream in here.upstreams.values():
            upstream.up()
        answers = Counter(answer.status for answer in asked.result())
    assert set(answers) <= {200, 503}
    assert answers[503] <= (0 if more else 9), "what came before the first failures were known"


def test_an_endpoint_that_is_killed_mid_stream_costs_only_its_own_answers(stack):
    """Those are cut, the clients see it, their slots come back; what waits goes to the other endpoint."""
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 8, "health_check": CHECK, "classes": PATIENT})
    with ThreadPoolExecutor(2) as pool:

        def answer(number: int) -> dict[str, str]:
            return {"x-test-id": f"run-{number}", **dict([behave("sse", hold="body")])}

        running = pool.submit(complete_many, here.url, 16, answer)
        here.wait_in_flight("a", 8)
        here.wait_in_flight("b", 8)
        wait_until(lambda: len(reached(here)) == 16)
        waiting = pool.submit(complete_many, here.url, 40, lambda n: {"x-test-id": f"wait-{n}"})
        here.wait_waiting(40)
        on_a = reached(here, "a")
        here.upstreams["a"].down()
        wait_until(lambda: here.in_flight("a") == 0, message="the slots at a come back")
        for number in range(16):
            here.upstreams["b"].release(f"run-{number}")
        for one in running.result():
            if f"run-{one.number}" in on_a:
                assert (one.status, bool(one.error)) == (200, True), "its head was through, its body was cut"
            else:
                assert (one.status, one.error, one.body.endswith(SSE_DONE)) == (200, "", True)
        fates = Counter((one.status, one.headers.get("x-extproc-outcome")) for one in waiting.result())
        # Until a is known to be gone, some are sent there, and fail as Envoy's 503. None is lost, none is stuck.
        assert fates[200, None] + fates[503, None] == 40
        assert fates[503, None] <= 16
    settle(here, 56)


def test_a_hung_endpoint_keeps_its_slots_and_nothing_else(stack):
    """It accepts and never answers. Its limit bounds who is stuck there; a client that gives up gives its slot back."""
    with Deaf() as deaf:
        here = stack(
            upstreams=("a",),
            endpoints={"deaf": {"address": deaf.address}},
            config={"max_running_requests": 4, "classes": PATIENT},
        )
        with contextlib.ExitStack() as clients:
            for number in range(12):
                headers = [("x-test-id", f"first-{number}")]
                clients.enter_context(H1Request(here.address, headers=headers, body=b"{}")).send()
            wait_until(lambda: len(reached(here)) == 8, message="four are stuck, eight are served")
            here.wait_in_flight("deaf", 4)
            served = complete_many(here.url, 30, lambda n: {"x-test-id": f"w-{n}"})
            assert len(whole(served)) == 30
            assert here.in_flight("deaf") == 4
        settle(here, 42)


def test_health_checks_find_a_hung_endpoint_before_any_request_does(stack):
    with Deaf() as deaf:
        here = stack(
            upstreams=("a",),
            endpoints={"deaf": {"address": deaf.address}},
            config={"max_running_requests": 4, "health_check": CHECK, "classes": PATIENT},
        )
        wait_until(lambda: not here.endpoint("deaf")["up"])
        answers = complete_many(here.url, 30, lambda n: {"x-test-id": f"w-{n}"})
        assert len(whole(answers)) == 30
        assert here.endpoint("deaf")["dispatched"] == 0
        settle(here, 30)


@pytest.mark.skipif(not LONG, reason="waits for Envoy's connect timeouts: make faults")
def test_an_endpoint_that_hangs_while_connecting_is_left_out(stack):
    """Envoy gives up connecting after 2 s (connect_timeout), tries once more, answers 503; five of those eject it."""
    with unreachable() as address:
        here = stack(
            upstreams=("a",),
            endpoints={"far": {"address": address}},
            config={"max_running_requests": 8, "classes": PATIENT},
        )
        answers = complete_many(here.url, 60, lambda n: {"x-test-id": f"f-{n}"})
        assert Counter(one.status for one in answers).keys() <= {200, 503}
        assert 60 - len(whole(answers)) <= 16
        late = complete_many(here.url, 20, lambda n: {"x-test-id": f"l-{n}"})
        assert len(whole(late)) >= 19  # a trial may be among them
        settle(here, 80)


def test_an_endpoint_that_is_slow_to_accept_only_makes_its_requests_late(stack):
    here = stack(upstreams=("a",), config={"max_running_requests": 4})
    loop = here.upstreams["a"]._loop
    began = time.monotonic()
    loop.call_soon_threadsafe(time.sleep, 0.8)  # its kernel takes connections, and nobody looks at them
    answers = complete_many(here.url, 20, lambda n: {"x-test-id": f"s-{n}"})
    assert len(whole(answers)) == 20
    assert time.monotonic() - began >= 0.8
    settle(here, 20)


def test_when_all_endpoints_go_and_come_back_each_request_has_one_end_and_service_resumes(stack):
    """Without health checks: failures alone tell. The one last endpoint of a pool is tried again after 5 s."""
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 2, "classes": PATIENT})
    with ThreadPoolExecutor(2) as pool:

        def answer(number: int) -> dict[str, str]:
            return {"x-test-id": f"run-{number}", **dict([behave("sse", hold="body")])}

        running = pool.submit(complete_many, here.url, 4, answer)
        wait_until(lambda: len(reached(here)) == 4)
        waiting = pool.submit(complete_many, here.url, 30, lambda n: {"x-test-id": f"w-{n}"})
        here.wait_waiting(30)
        for upstream in here.upstreams.values():
            upstream.down()
        assert len(running.result()) == 4
        wait_until(lambda: here.sidecar.queues()["waiting_total"] < 30)
        for upstream in here.upstreams.values():
            upstream.up()
        fates = Counter((one.status, one.headers.get("x-extproc-outcome")) for one in waiting.result())
        assert set(fates) <= {(200, None), (503, None)}, fates
        assert fates[200, None] >= 10
        assert len(whole(complete_many(here.url, 10, lambda n: {"x-test-id": f"late-{n}"}))) == 10
    settle(here, 44)


@pytest.mark.skipif(not LONG, reason="waits out ejections: make faults")
def test_a_flapping_endpoint_strands_nobody(stack):
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 4, "health_check": CHECK, "classes": PATIENT})
    ending = threading.Event()

    def flap() -> None:
        while not ending.wait(0.15):
            here.upstreams["a"].down()
            if not ending.wait(0.15):
                here.upstreams["a"].up()

    flapping = threading.Thread(target=flap)
    flapping.start()
    count = 4000
    try:

        def answer(number: int) -> dict[str, str]:
            return {"x-test-id": f"f-{number}", **dict([behave("sse", events=3, gap_s=0.005)])}

        answers = complete_many(here.url, count, answer, gap_s=0.005, timeout_s=40)
    finally:
        ending.set()
        flapping.join()
    here.upstreams["a"].up()
    assert {one.status for one in answers} <= {200, 502, 503}, "no hang, no refusal"
    assert len(whole(answers)) >= count // 2
    seen = reached(here)
    assert len(seen) == len(set(seen)), "dispatched twice"
    wait_until(lambda: here.endpoint("a")["up"], message="a is trusted again")
    assert len(whole(complete_many(here.url, 20, lambda n: {"x-test-id": f"late-{n}"}))) == 20
    settle(here, count + 20)


@pytest.mark.parametrize("protocol", ["h1", "h2"])
def test_envoy_counts_the_answers_that_a_server_breaks_off_and_not_those_whose_client_leaves(stack, protocol):
    """Behind the head of an answer Envoy tells ext_proc nothing of how it ends: ExtprocAnswersCut asks Envoy itself."""
    here = stack(upstreams=("a",), protocol=protocol, config={"max_running_requests": 4})
    names = ("upstream_cx_destroy_remote_with_active_rq", "upstream_rq_rx_reset")

    def cut() -> int:
        return sum(here.front.envoy.stats("cluster.a.")[f"cluster.a.{name}"] for name in names)

    leaves = [("x-test-id", "leaves"), behave("sse", events=50, gap_s=0.1)]
    with H1Request(here.front.address, headers=leaves, body=b"{}") as request:
        assert request.send().read_chunk()
    here.wait_idle()
    assert cut() == 0
    answers = complete_many(
        here.url, 6, lambda n: {"x-test-id": f"c-{n}", **dict([behave("rst", events=3, gap_s=0.05)])}
    )
    assert {one.status for one in answers} == {200}
    assert not whole(answers)
    assert cut() == 6
    page = here.front.envoy.get("/stats/prometheus?usedonly")  # as our PodMonitor asks
    told = [name for name in names if f'envoy_cluster_{name}{{envoy_cluster_name="a"}}' in page]
    assert told == [names[protocol == "h2"]], "the alert goes by one of the two: the other is not there"
    line = here.front.envoy.wait_access_log(lambda entry: entry["code"] == 200 and entry["flags"] not in ("-", "DC"))
    assert line["flags"] in ("UPE", "UR", "UC")
    settle(here, 7)


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_answers_that_break_off_end_once_and_give_their_slots_back(stack, how):
    here = stack(upstreams=("a",), config={"max_running_requests": 4})
    answers = complete_many(here.url, 40, lambda n: {"x-test-id": f"b-{n}", **dict([behave(how, events=n % 3)])})
    assert not whole(answers)
    assert {one.status for one in answers} <= {200, 502, 503}
    settle(here, 40)


def test_an_engine_that_is_frozen_with_its_pages_is_said_to_hang(stack, tmp_path):
    """It was `DOWN, 4/4` and no more: no alert could fire, and no word said that its clients wait till it is killed."""
    engine = [sys.executable, "-m", "extproc", "engine", "--max-num-seqs", "2", "--port", "0"]
    with contextlib.ExitStack() as running:
        engines = [running.enter_context(Child(engine, tmp_path / f"{n}.log", name=n)) for n in ("one", "two")]
        addresses = [one.wait_line(r" listening on http://(\S+)").group(1) for one in engines]
        here = stack(
            upstreams=(),
            endpoints={name: {"address": at} for name, at in zip(("a", "b"), addresses, strict=True)},
            config={"max_running_requests": 2, "health_check": CHECK, "telemetry_stale_after": "500ms",
                    "scrape_interval": "100ms"},
        )  # fmt: skip
        body = b'{"model": "sim", "stream": true, "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]}'
        kind = ("content-type", "application/json")
        for number in range(4):
            headers = [kind, ("x-request-id", f"r{number}")]
            running.enter_context(H1Request(here.address, headers=headers, body=body)).send()
        here.wait_in_flight("b", 2)
        wait_until(lambda: here.endpoint("b")["load"].get("tokens_per_s"), message="it writes")
        engines[1].signal(signal.SIGSTOP)
        silent = 'extproc_endpoint_silent_seconds{endpoint="b"}'
        wait_until(lambda: here.sidecar.metrics().get(silent, 0.0) > 3.0, message="it is told as silent")
        wait_until(lambda: here.endpoint("b")["state"] == "down")
        wait_until(lambda: here.sidecar.metrics()['extproc_endpoint_silent_seconds{endpoint="a"}'] == 0.0)
        (held,) = [one["id"] for one in here.sidecar.queues()["running"] if one["endpoint"] == "b"][:1]
        told = extproc("why", held, "--admin", here.sidecar.admin).stdout
        assert "b is down now. What a dead server runs ends at once: so this one hangs" in told
        engines[1].signal(signal.SIGKILL)
        here.wait_in_flight("b", 0)
        wait_until(lambda: silent not in here.sidecar.metrics())
