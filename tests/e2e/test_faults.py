"""The sidecar dies, hangs, drains, or sees the clock jump; on real Envoy. `make faults` runs the long versions.

What endpoints, clients, load and hostile input can do is in test_endpoint_faults, test_client_faults, test_load and
test_hostile; docs/reliability.md has the promises.
"""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .kit.awake import awake, lost_s
from .kit.clients import complete_many
from .kit.extproc_raw import RawChannel
from .kit.processes import http_ok, wait_until
from .kit.shipped import ROOT, Shipped
from .kit.stack import Sidecar, Stack
from .kit.upstream import SSE_DONE, behave, sse_event

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .kit.clients import Completion

LONG = os.environ.get("EXTPROC_LONG") == "1"
"""Set by `make faults`."""
RUNNING, HELD = 50, 200
STALL_S = 0.3
"""When nobody comes for half a second all have come back: a machine that stalls for so long takes them out of order."""
ANSWER = b"".join(sse_event(number) for number in range(3)) + SSE_DONE


class Full:
    """The shipped files with 50 answers under way, of which a first event was sent, and 200 requests held behind them.

    Held requests come 2 ms apart, and Envoy's request id says their turn.
    """

    def __init__(self, here: Shipped, pool: ThreadPoolExecutor) -> None:
        self.here, self.sidecar = here, here.sidecar

        def answer(number: int) -> dict[str, str]:
            return {"x-test-id": f"run-{number}", **dict([behave("sse", hold="body")])}

        def turn(number: int) -> dict[str, str]:
            return {"x-test-id": f"held-{number:03}", "x-request-id": f"held-{number:03}"}

        self._running: Future[list[Completion]] = pool.submit(complete_many, here.url, RUNNING, answer, timeout_s=60)
        wait_until(lambda: len(here.reached()) == RUNNING, message=f"{RUNNING} answers under way")
        self._held: Future[list[Completion]] = pool.submit(
            complete_many, here.url, HELD, turn, gap_s=0.002, timeout_s=60
        )
        wait_until(lambda: self.sidecar.queues()["waiting_total"] == HELD, message=f"{HELD} held")

    def finish(self) -> None:
        """Let the answers end, and see that nobody noticed anything."""
        for number in range(RUNNING):
            self.here.release(f"run-{number}")
        running, held = self._running.result(), self._held.result()
        assert Counter((one.status, one.error) for one in running + held) == {(200, ""): RUNNING + HELD}
        assert {one.body for one in running} == {ANSWER}, "an answer under way was touched"
        reached = self.here.reached()
        assert len(reached) == len(set(reached)) == RUNNING + HELD, "dispatched twice"
        wait_until(self._is_idle, message="all books empty")

    def _is_idle(self) -> bool:
        page = self.sidecar.queues()
        return not page["waiting_total"] and not any(one["in_flight"] for one in page["endpoints"])

    def waits_s(self) -> list[float]:
        """How long each held request waited in all, as Envoy's access log has it."""

        def lines() -> list[dict[str, Any]]:
            said = self.here.envoy.access_log_lines()
            return [entry for entry in said if str(entry.get("request_id")).startswith("held-")]

        wait_until(lambda: len(lines()) == HELD, message="the access log is written")
        return [entry["queue"]["wait_ms"] / 1000 for entry in lines()]

    def misplaced(self) -> int:
        """By how many places, at most, a held request was dispatched before or after its turn."""
        turns = [int(name.removeprefix("held-")) for name in self.here.reached() if name.startswith("held-")]
        return max(abs(place - turn) for place, turn in enumerate(turns))


def shipped(directory: Path) -> Shipped:
    return Shipped(directory, config={"max_running_requests": RUNNING // 2, "drain_timeout": "200ms"})


# ---- it dies

DOWN_S = (0.0, 2.0, 4.5) if LONG else (0.5,)


@pytest.mark.parametrize("down_s", DOWN_S)
def test_a_killed_sidecar_costs_200_held_and_50_running_requests_nothing(tmp_path, down_s):
    """Envoy replays held headers to the restarted one (retry_policy of grpc_service); running answers need no sidecar.

    By `kill -9`, which is also what the kernel's OOM killer sends.
    """
    for turn in range(5):
        (tmp_path / str(turn)).mkdir()
        with shipped(tmp_path / str(turn)) as here, ThreadPoolExecutor(2) as pool:
            full = Full(here, pool)
            died, before_s = time.monotonic(), lost_s()
            here.kill(signal.SIGKILL)
            time.sleep(down_s)
            away_s = time.monotonic() - died
            full.sidecar.start()
            full.finish()
            # Age is counted from Envoy's stamp: what was waited for the dead one is part of it.
            assert min(full.waits_s()) >= away_s - 0.1
        assert "Traceback" not in full.sidecar.child.output()
        if lost_s() - before_s < STALL_S:
            break
    # As many as run at once may reach the upstreams in any order. Without the gate's gathering it is over 100.
    assert full.misplaced() <= RUNNING


@pytest.mark.skipif(not LONG, reason="minutes: make faults")
def test_a_sidecar_that_dies_three_times_in_a_row_costs_nothing(tmp_path):
    with shipped(tmp_path) as here, ThreadPoolExecutor(2) as pool:
        full = Full(here, pool)
        for _ in range(3):
            here.kill(signal.SIGKILL)
            time.sleep(1)
            full.sidecar.start()
        full.finish()


@pytest.mark.skipif(not LONG, reason="minutes: make faults")
def test_a_sidecar_whose_memory_ran_out_costs_nothing(tmp_path):
    """A memory cgroup shrunk under it: the kernel's own OOM killer. Skipped where cgroups can't be made."""
    group = Path("/sys/fs/cgroup/memory/extproc-test")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup: {error}")
    try:
        with shipped(tmp_path) as here, ThreadPoolExecutor(2) as pool:
            full = Full(here, pool)
            (group / "cgroup.procs").write_text(str(full.sidecar.child.pid))
            (group / "memory.limit_in_bytes").write_text("2M")  # what it asks for from now on
            with RawChannel(full.sidecar.listen) as raw, raw.open() as stream:
                stream.send(bytes(3_900_000))  # makes it ask
                assert full.sidecar.child.wait_exit() == -signal.SIGKILL, "not by the OOM killer"
            full.sidecar.child.stop()
            full.sidecar.start()
            full.finish()
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


# ---- it hangs

HUNG_S = (3.0, 12.0) if LONG else (1.0,)


@pytest.mark.parametrize("hung_s", HUNG_S)
def test_a_hung_sidecar_costs_200_held_and_50_running_requests_nothing(tmp_path, hung_s):
    """12 s is past Envoy's keepalive, which drops the connection after 8 s: then it replays too."""
    with shipped(tmp_path) as here, ThreadPoolExecutor(2) as pool:
        full = Full(here, pool)
        full.sidecar.child.signal(signal.SIGSTOP)
        time.sleep(hung_s)
        full.sidecar.child.signal(signal.SIGCONT)
        full.finish()
        assert min(full.waits_s()) >= hung_s - 0.1


@pytest.mark.skipif(not LONG, reason="minutes: make faults")
def test_a_hung_sidecar_that_is_replaced_costs_nothing(tmp_path):
    """What a liveness probe does: it hangs, is killed, and comes back."""
    with shipped(tmp_path) as here, ThreadPoolExecutor(2) as pool:
        full = Full(here, pool)
        full.sidecar.child.signal(signal.SIGSTOP)
        time.sleep(5)
        here.kill(signal.SIGKILL)
        full.sidecar.start()
        full.finish()


# ---- it drains


class Load:
    """Clients that ask one after the other until `with` ends, each on a new connection."""

    def __init__(self, url: str, clients: int) -> None:
        self.answers: list[Completion] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, client)) for client in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.answers) > 2 * len(self._threads), message="traffic")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let each finish what it asked, and ask no more."""
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, url: str, client: int) -> None:
        turn = 0
        while not self._ending.is_set():
            turn += 1
            ask = {"x-test-id": f"t{client}.{turn}", **dict([behave("sse", events=3, gap_s=0.02)])}
            self.answers += complete_many(url, 1, lambda _, ask=ask: ask, timeout_s=50)


def test_the_steps_of_the_upgrade_page_cost_nobody_anything_under_load(tmp_path):
    """SIGTERM, and the new one started at once, while the old one still has both ports: docs/upgrade.md."""
    with Shipped(tmp_path, config={"max_running_requests": 2}) as here:
        old, new = here.sidecar, Sidecar(here.sidecar.config, tmp_path, name="new")
        with Load(here.url, 12) as load:
            wait_until(lambda: old.queues()["waiting_total"] > 0, message="somebody waits")
            old.child.signal(signal.SIGTERM)
            with new:
                assert old.child.wait_exit() == 0
                seen = len(load.answers)
                wait_until(lambda: len(load.answers) > seen + 40, message="the new one serves")
                load.end()
        assert Counter((one.status, one.headers.get("x-extproc-outcome")) for one in load.answers).keys() == {
            (200, None)
        }
        assert all(one.body == ANSWER and not one.error for one in load.answers)
        reached = here.reached()
        assert len(reached) == len(set(reached)) == len(load.answers), "each was run once"
    for one in (old, new):
        assert "Traceback" not in one.child.output()


@pytest.mark.parametrize("clients", [3, 12] if LONG else [12])
def test_a_drain_under_load_costs_nothing_but_the_documented_503_for_those_it_could_not_place(tmp_path, clients):
    """One sidecar with 4 slots that hands nothing over, the next one started when it is gone: clients see a pause.

    With more clients than slots somebody always waits, and those who wait when the grace ends are told so.
    """
    grace_s = 10.0 if LONG else 2.0
    config = {"max_running_requests": 2, "hand_over": False, "drain_timeout": f"{grace_s}s"}
    with Shipped(tmp_path, config=config) as here:
        sidecar = here.sidecar
        with Load(here.url, clients) as load:
            began = awake()
            sidecar.child.signal(signal.SIGTERM)
            wait_until(lambda: not http_ok(sidecar.admin, "/readyz"), grace_s, "readiness off")
            assert sidecar.child.wait_exit() == 0
            assert awake() - began <= grace_s + 5
            sidecar.child.stop()
            sidecar.start()
            seen = len(load.answers)
            wait_until(lambda: len(load.answers) > seen + 20, message="traffic goes on")
    said = Counter((one.status, one.headers.get("x-extproc-outcome")) for one in load.answers)
    refused = said.pop((503, "draining"), 0)
    assert said.keys() == {(200, None)}
    assert refused == 0 or clients > 4  # with 12: 35 of 304 once, those that waited and those that came while it left
    assert all(one.body == ANSWER and not one.error for one in load.answers if one.status == 200)
    reached = here.reached()
    assert len(reached) == len(set(reached))
    assert "Traceback" not in sidecar.child.output()


def test_a_drain_without_the_time_to_place_all_says_so_with_503_and_lets_answers_run_out(tmp_path):
    config = {"max_running_requests": 2, "hand_over": False, "drain_timeout": "3s"}
    with Shipped(tmp_path, config=config) as here:
        with ThreadPoolExecutor(2) as pool:

            def answer(number: int) -> dict[str, str]:
                return {"x-test-id": f"run-{number}", **dict([behave("sse", hold="body")])}

            running = pool.submit(complete_many, here.url, 4, answer)
            wait_until(lambda: len(here.reached()) == 4)
            held = pool.submit(complete_many, here.url, 30, lambda n: {"x-test-id": f"held-{n}"})
            wait_until(lambda: here.sidecar.queues()["waiting_total"] == 30)
            here.sidecar.child.signal(signal.SIGTERM)
            refused = held.result()
            assert {(one.status, one.headers["x-extproc-outcome"]) for one in refused} == {(503, "draining")}
            assert here.sidecar.child.returncode is None, "answers still run"
            for number in range(4):
                here.release(f"run-{number}")
            assert {(one.status, one.body) for one in running.result()} == {(200, ANSWER)}
            assert here.sidecar.child.wait_exit() == 0
        assert "Traceback" not in here.sidecar.child.output()
        assert len(here.reached()) == 4


# ---- the clock


def test_nothing_that_waits_or_is_timed_looks_at_the_wall_clock():
    """Everything else runs on monotonic time, and so can't notice that the wall clock jumps."""
    allowed = {
        "extproc/stream/ages.py",  # ages of requests; the next test moves its clock
        "extproc/envoy/clusters.py",  # a version number
        "extproc/transport/tls.py",  # certificates end by the wall clock
        "extproc/transport/completion/loop.py",  # gRPC's core takes deadlines on it, milliseconds ahead
        "extproc/observe/traces.py",  # spans say when they were
        "extproc/observe/otlp.py",  # so do measurements
        "extproc/admin/http.py",  # the story of a request says when, to people
        "extproc/replicas/stores/lease.py",  # a Lease says when it was renewed, to people
    }
    looks = set()
    for path in sorted((ROOT / "extproc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}:
                    looks.add(str(path.relative_to(ROOT)))
    served = {name for name in looks if not name.startswith(("extproc/engine/", "extproc/simulate/"))}
    assert served <= allowed


@pytest.mark.parametrize("jump_s", [3600, -3600] if LONG else [3600])
def test_a_wall_clock_that_jumps_while_requests_wait_changes_nothing(tmp_path, jump_s):
    """The sidecar's wall clock alone is moved (kit/stalling.py); Envoy's stamps stay as they are, an hour off."""
    here = Stack(tmp_path, config={"max_running_requests": 1, "classes": [{"name": "default", "budget": "20s"}]})
    here.sidecar.child.argv = [sys.executable, "-m", "tests.e2e.kit.stalling", str(here.sidecar.path), str(jump_s)]
    with here, ThreadPoolExecutor(2) as pool:
        block = {"x-test-id": "block", **dict([behave(hold="head")])}
        blocker = pool.submit(complete_many, here.url, 1, lambda _: block)
        here.wait_in_flight("a", 1)
        held = pool.submit(complete_many, here.url, 20, lambda n: {"x-test-id": f"h-{n}"}, gap_s=0.02)
        wait_until(lambda: len(here.waiting()) >= 10)  # they come every 20 ms: a busy machine may look at no tenth
        here.sidecar.child.signal(signal.SIGUSR2)
        here.wait_waiting(20)
        assert all(0 <= row["age_s"] < 10 and 10 < row["budget_left_s"] <= 20 for row in here.waiting())
        here.upstreams["a"].release("block")
        assert [one.status for one in held.result() + blocker.result()] == [200] * 21
        turns = [record.request_id for record in here.upstreams["a"].records()]
        assert turns == ["block", *(f"h-{number}" for number in range(20))]
        here.wait_idle()
