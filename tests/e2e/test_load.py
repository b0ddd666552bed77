"""Thousands at once, all let go or refused in one moment, and a sidecar that stalls meanwhile. `make faults`: 10,000"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from .kit.awake import lost_s
from .kit.clients import complete_many
from .kit.envoy import Envoy
from .kit.load import HELD_KIB, Blocker, descriptors, memory_bytes
from .kit.mirror import mirror_bootstrap
from .kit.processes import free_port, wait_until
from .kit.stack import Stack, local
from .kit.upstream import behave

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .kit.clients import Completion

LONG = os.environ.get("EXTPROC_LONG") == "1"
BUDGET = [{"name": "default", "budget": "120s"}]
BRIEF = dict([behave("sse", events=2, wait_s=0.02)])


def test_all_that_are_held_can_go_in_one_moment(stack, tmp_path):
    """An endpoint with room for all of them appears while they wait; Envoy's flood guard sees them all end at once.

    Also says what one held request costs.
    """
    count = 10_000 if LONG else 1_500
    mirror = f"127.0.0.1:{free_port()}"  # a native server: the kit's own would be the slowest part by far
    here = stack(
        protocol="h2",
        endpoints={"mirror": {"address": mirror, "models": ["nobody asks for it"]}},
        config={"classes": BUDGET, "max_queued_requests": 2 * count, "max_running_requests": 1},
    )
    with Envoy(mirror_bootstrap(mirror, local()), tmp_path, name="mirror"), ThreadPoolExecutor(2) as pool:
        blocker = Blocker(pool, here)
        pids = {"sidecar": here.sidecar.child.pid, "Envoy": here.envoy.child.pid}
        before = {name: memory_bytes(pid) for name, pid in pids.items()}
        files = descriptors(pids["sidecar"])
        held = pool.submit(complete_many, here.url, count, lambda n: {"x-test-id": f"h-{n}"}, timeout_s=100)
        here.wait_waiting(count, timeout_s=60)
        each = {name: (memory_bytes(pid) - before[name]) / count / 1024 for name, pid in pids.items()}
        print({name: f"{kib:.1f} KiB per held request" for name, kib in each.items()})
        a, room = here.sidecar.config["endpoints"]
        here.sidecar.write_config(endpoints=[a, {**room, "models": [], "max_running_requests": 2 * count}])
        began = time.monotonic()
        here.sidecar.child.signal(signal.SIGHUP)
        here.wait_waiting(0)
        print(f"all {count} let go {time.monotonic() - began:.2f} s after the reload was asked for")
        answers = held.result()
        assert Counter((one.status, one.error) for one in answers) == {(200, ""): count}
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert descriptors(pids["sidecar"]) <= files + 4 + count / 1000  # Envoy keeps a connection per 1,024 streams
    if count >= 10_000:  # fixed costs vanish in so many
        assert each["sidecar"] <= HELD_KIB, each


def test_over_the_longest_queue_the_last_are_refused_by_rule_and_the_others_served(stack):
    count, most = (10_500, 10_000) if LONG else (700, 500)
    here = stack(config={"classes": BUDGET, "max_queued_requests": most, "max_running_requests": 64})
    with ThreadPoolExecutor(2) as pool:
        blocker = Blocker(pool, here, 64)
        asked = pool.submit(complete_many, here.url, count, lambda n: {"x-test-id": f"q-{n}"}, timeout_s=110)
        wait_until(lambda: here.outcomes("queue_full") == count - most, 60, "the rest is refused")
        here.wait_waiting(most)
        blocker.free()
        said = Counter((one.status, one.headers.get("x-extproc-outcome")) for one in asked.result())
        assert said == {(200, None): most, (429, "queue_full"): count - most}
        assert blocker.statuses() == {200}
    here.wait_idle()


def test_thousands_refused_in_one_moment_all_get_their_429(stack):
    """Envoy's flood guard closes a connection on which too many streams end at once; so the gate delivers in bursts."""
    count = 8000 if LONG else 2500
    here = stack(config={"classes": BUDGET, "max_running_requests": 1, "hand_over": False})
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


def test_a_flood_of_tiny_budgets_and_made_up_tenants_delays_nobody_of_a_higher_class(stack):
    """Each of the flood waits some milliseconds and is refused, or takes a slot: the urgent pass them all."""
    count = 10_000 if LONG else 400
    classes = [{"name": "low", "budget": "60s"}, {"name": "urgent", "priority": 9, "budget": "60s"}]
    here = stack(config={"classes": classes, "max_running_requests": 4, "max_queued_requests": 2 * count})

    def low(number: int) -> dict[str, str]:
        asks = {"x-request-class": "low", "x-tenant-id": f"t{number}", "x-queue-budget": f"{1 + number % 9}ms"}
        return {"x-test-id": f"low-{number}", **asks, **BRIEF}

    def urgent(number: int) -> dict[str, str]:
        return {"x-test-id": f"urgent-{number}", "x-request-class": "urgent", **BRIEF}

    lost_before_s = lost_s()
    with ThreadPoolExecutor(1) as pool:
        flood = pool.submit(complete_many, here.url, count, low, timeout_s=110)
        wait_until(lambda: here.outcomes("budget_expired") + here.outcomes("budget_predicted") > 0, 60)
        answers = complete_many(here.url, 40, urgent, gap_s=0.02, timeout_s=100)
        assert {(one.status, one.error) for one in answers} == {(200, "")}
        told = Counter((one.status, one.headers.get("x-extproc-outcome"), one.error) for one in flood.result())
        refused = {(429, "budget_expired", ""), (429, "budget_predicted", "")}
        assert told.keys() <= {(200, None, ""), *refused}, told
    here.wait_idle()

    def urgents() -> list[dict[str, Any]]:
        return [one for one in here.envoy.access_log_lines() if one["queue"] and one["queue"]["class"] == "urgent"]

    wait_until(lambda: len(urgents()) == 40)
    entries = urgents()
    waits = sorted(entry["queue"]["wait_ms"] for entry in entries)
    lasted = sorted(entry["duration_ms"] for entry in entries)
    print(f"beside {count} of the flood, by Envoy's log: waits {waits[20]} and at most {waits[-1]} ms, ", end="")
    print(f"whole requests {lasted[20]} and at most {lasted[-1]} ms")
    reading_ms = count * 0.5  # all came in one moment; who comes in it stands in the sockets, where nobody can reorder
    reading_ms += 1000 * (lost_s() - lost_before_s)
    assert waits[-1] < 1000 + reading_ms
    assert lasted[-1] < 5000 + reading_ms


class Arrivals:
    """Requests that come at a steady pace while something happens: `gap_s` apart, until `with` ends."""

    def __init__(self, url: str, count: int, gap_s: float) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._asked: Future[list[Completion]] = self._pool.submit(
            complete_many, url, count, lambda n: {"x-test-id": f"s-{n}"}, gap_s=gap_s, timeout_s=90
        )

    def statuses(self) -> Counter[tuple[int, str]]:
        answers = self._asked.result()
        self._pool.shutdown()
        return Counter((one.status, one.error) for one in answers)


def test_a_stalled_event_loop_loses_nobody(tmp_path):
    """grpc-core drops calls that Python has not accepted yet, above 1,000, unless told otherwise."""
    count = 3500
    here = Stack(tmp_path, config={"max_running_requests": 200, "classes": BUDGET})
    here.sidecar.child.argv = [sys.executable, "-m", "tests.e2e.kit.stalling", str(here.sidecar.path)]
    with here:
        here.sidecar.child.signal(signal.SIGUSR1)  # 4 s
        answers = complete_many(here.url, count, lambda n: {"x-test-id": f"s-{n}"}, timeout_s=90)
        assert Counter(answer.status for answer in answers) == {200: count}
        here.wait_idle()


@pytest.mark.parametrize("stall_s", [4.0, 7.0] if LONG else [1.5])
def test_a_stopped_process_loses_nobody_who_came_before_or_meanwhile(stack, stall_s):
    """SIGSTOP: not even gRPC's threads run. 7 s is just within Envoy's keepalive (5 s + 3 s)."""
    count = 3000 if LONG else 400
    here = stack(config={"max_running_requests": 100, "classes": BUDGET})
    arrivals = Arrivals(here.url, count, stall_s * 1.2 / count)
    wait_until(lambda: len(here.upstreams["a"].records()) > 20)
    here.sidecar.child.signal(signal.SIGSTOP)
    waker = threading.Timer(stall_s, lambda: here.sidecar.child.signal(signal.SIGCONT))
    waker.start()
    waker.join()
    assert arrivals.statuses() == {(200, ""): count}
    here.wait_idle()
    seen = [record.request_id for record in here.upstreams["a"].records() if record.request_id]  # others: no client's
    assert len(seen) == len(set(seen)) == count
