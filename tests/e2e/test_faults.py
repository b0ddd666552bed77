"""Nothing is lost: floods, stalls, deserters, broken endpoints, on real Envoy. `make faults` runs the long versions."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from .kit.clients import H1Request, complete_many
from .kit.stack import Stack
from .kit.upstream import behave

LONG = os.environ.get("EXTPROC_LONG") == "1"
"""Set by `make faults`."""


class Blocker:
    """Takes slots of endpoint a until they are freed."""

    _used = 0

    def __init__(self, pool: ThreadPoolExecutor, here, count: int = 1) -> None:
        first = Blocker._used
        Blocker._used += count
        self._upstream = here.upstreams["a"]
        self._ids = [f"block-{number}" for number in range(first, first + count)]

        def headers(number: int) -> dict[str, str]:
            return {"x-test-id": self._ids[number], **dict([behave(hold="head")])}

        self._answers = pool.submit(complete_many, here.url, count, headers, timeout_s=120)
        here.wait_in_flight("a", count)

    def free(self) -> None:
        for one in self._ids:
            self._upstream.release(one)

    def statuses(self) -> set[int]:
        return {answer.status for answer in self._answers.result()}


def test_thousands_refused_in_one_moment_all_get_their_429(stack):
    """Envoy's flood guard closes a connection on which too many streams end at once; so the gate delivers in bursts."""
    count = 8000 if LONG else 2500
    here = stack(config={"classes": [{"name": "default", "budget": "60s"}], "max_running_requests": 1})
    with ThreadPoolExecutor(2) as pool:
        blocker = Blocker(pool, here)
        held = pool.submit(complete_many, here.url, count, lambda n: {"x-test-id": f"h-{n}"}, timeout_s=120)
        here.wait_waiting(count, timeout_s=60)
        here.sidecar.child.signal(signal.SIGTERM)  # its drain refuses all that can't be placed, at once
        statuses = Counter(answer.status for answer in held.result())
        assert statuses == {503: count}
        assert {answer.headers.get("x-extproc-outcome") for answer in held.result()} == {"draining"}
        blocker.free()
        assert blocker.statuses() == {200}
    assert "Traceback" not in here.sidecar.child.output()


def test_a_stalled_event_loop_loses_nobody(tmp_path):
    """grpc-core drops calls that Python has not accepted yet, above 1,000, unless told otherwise."""
    count = 3500
    here = Stack(tmp_path, config={"max_running_requests": 200})
    here.sidecar.child.argv = [sys.executable, "-m", "tests.e2e.kit.stalling", str(here.sidecar.path)]
    with here:
        here.sidecar.child.signal(signal.SIGUSR1)
        answers = complete_many(here.url, count, lambda n: {"x-test-id": f"s-{n}"}, timeout_s=90)
        assert Counter(answer.status for answer in answers) == {200: count}
        here.wait_idle()


def test_clients_that_leave_while_they_wait_never_reach_an_engine(stack):
    here = stack()
    with ThreadPoolExecutor(1) as pool:
        blocker = Blocker(pool, here)
        waiting = [H1Request(here.address, headers=[("x-test-id", f"gone-{n}")], body=b"{}") for n in range(20)]
        for request in waiting:
            request.__enter__().send()
        here.wait_waiting(20)
        for index, request in enumerate(waiting):
            (request.fin, request.half_close, request.rst)[index % 3]()
        here.wait_waiting(0)
        for request in waiting:
            request.__exit__()
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert not [record for record in here.upstreams["a"].records() if record.request_id.startswith("gone-")]
    assert here.outcomes("cancelled") == 20


@pytest.mark.parametrize("leave", ["fin", "rst"])
def test_an_abandoned_big_upload_is_noticed_while_it_is_held_and_is_not_run_for_nobody(stack, leave):
    """With Envoy's default buffer of 1 MiB the disconnect goes unnoticed over HTTP/1.1, and a ghost is dispatched."""
    here = stack()
    with ThreadPoolExecutor(1) as pool:
        blocker = Blocker(pool, here)
        size = 6 << 20
        with H1Request(here.address, headers=[("x-test-id", "ghost")], body=b"x" * size) as upload:
            upload.send()
            here.wait_waiting(1)
            getattr(upload, leave)()
            here.wait_waiting(0, timeout_s=5)
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert not here.upstreams["a"].seen("ghost")


def test_opens_and_cancels_by_the_thousand_leave_nothing_behind(stack):
    rounds = 20 if LONG else 4
    here = stack(config={"max_running_requests": 2})

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{here.sidecar.child.pid}/fd"))  # noqa: PTH208

    def one_round(number: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            blocker = Blocker(pool, here, 2)
            answers = complete_many(here.url, 500, lambda n: {"x-test-id": f"c-{number}-{n}"}, timeout_s=0.6)
            assert {answer.status for answer in answers} == {0}
            blocker.free()
            assert blocker.statuses() == {200}
        here.wait_idle(5)

    one_round(0)
    before = descriptors()
    for number in range(1, rounds):
        here.upstreams["a"].clear()
        one_round(number)
    assert descriptors() <= before + 2
    assert here.sidecar.metrics()["extproc_streams"] == 0


def test_an_endpoint_that_refuses_connections_is_left_out_and_its_pool_serves_on(stack):
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 4})
    here.upstreams["a"].down()
    answers = complete_many(here.url, 60, lambda n: {"x-test-id": f"f-{n}"}, gap_s=0.01)
    statuses = Counter(answer.status for answer in answers)
    assert statuses[200] + statuses[503] == 60
    assert statuses[503] <= 12  # five failures in a row, and those that were under way, eject it
    late = complete_many(here.url, 20, lambda n: {"x-test-id": f"l-{n}"})
    assert {answer.status for answer in late} == {200}
    here.upstreams["a"].up()
    here.wait_idle()


def test_a_hung_sidecar_fails_nobody_who_came_before_and_recovers(stack):
    here = stack(config={"max_running_requests": 1})
    with ThreadPoolExecutor(2) as pool:
        blocker = Blocker(pool, here)
        held = pool.submit(complete_many, here.url, 10, lambda n: {"x-test-id": f"h-{n}"})
        here.wait_waiting(10)
        here.sidecar.child.signal(signal.SIGSTOP)
        blocker.free()
        assert blocker.statuses() == {200}  # a running answer needs no sidecar
        resumed = time.monotonic()
        here.sidecar.child.signal(signal.SIGCONT)
        assert Counter(answer.status for answer in held.result()) == {200: 10}
        assert time.monotonic() - resumed < 10
    here.wait_idle()
