"""A sidecar that dies, or leaves, takes nobody's request with it, and its successor fills no engine above its limit."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from .kit.clients import Completion, complete_many
from .kit.processes import Child, http_get, wait_until
from .kit.stack import Sidecar, Stack
from .kit.upstream import behave

LIMIT = 4


def body(max_tokens: int) -> bytes:
    message = {"role": "user", "content": "hi"}
    return json.dumps({"model": "sim", "stream": True, "max_tokens": max_tokens, "messages": [message]}).encode()


CONFIG = {
    "max_running_requests": LIMIT,
    "classes": [{"name": "default", "budget": "60s"}],
    "scrape_interval": "200ms",
}


@pytest.fixture
def engines(tmp_path):
    """Two simulated engines that would run far more requests than they are allowed here: name -> address."""
    with contextlib.ExitStack() as running:
        found = {}
        for name in ("one", "two"):
            command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--port", "0"]
            child = running.enter_context(Child([*command, "--max-num-seqs", "64"], tmp_path / f"{name}.log"))
            found[name] = child.wait_line(r"listening on http://(\S+)").group(1)
        yield found


def peak(address: str) -> int:
    """The most requests that an engine ever held at once."""
    page = json.loads(http_get(address, "/debug/peaks")[1])
    return int(page["peak_running"]) + int(page["peak_waiting"])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_restarted_sidecar_counts_the_answers_that_outlived_it_and_fills_no_engine_above_its_limit(
    tmp_path, engines, end
):
    """Their leases died with the first sidecar; what the engines' metrics say they run takes their place."""
    config = {**CONFIG, "drain_timeout": "10s"}
    endpoints = {name: {"address": address} for name, address in engines.items()}
    with Stack(tmp_path, upstreams=(), endpoints=endpoints, config=config) as here, ThreadPoolExecutor(2) as pool:

        def send(name: str, max_tokens: int) -> Future[list[Completion]]:
            def headers(number: int) -> dict[str, str]:
                return {"x-test-id": f"{name}-{number}"}

            return pool.submit(complete_many, here.url, 2 * LIMIT, headers, body=body(max_tokens), timeout_s=90)

        running = send("running", 400)  # ten seconds: longer than a restart takes on a busy machine
        for name in engines:
            here.wait_in_flight(name, LIMIT)
        held = send("held", 20)
        here.wait_waiting(2 * LIMIT)
        here.sidecar.child.signal(end)
        here.sidecar.child.wait_exit()
        here.sidecar.child.stop()
        here.sidecar.start()
        wait_until(lambda: sum(endpoint["foreign"] for endpoint in here.sidecar.queues()["endpoints"]) > 0)
        answers = running.result() + held.result()
        assert Counter(answer.status for answer in answers) == {200: 4 * LIMIT}
        assert not [answer.error for answer in answers if answer.error]
        here.wait_idle()
        wait_until(lambda: [endpoint["foreign"] for endpoint in here.sidecar.queues()["endpoints"]] == [0, 0])
    assert "Traceback" not in here.sidecar.child.output()
    assert {name: peak(address) for name, address in engines.items()} == {"one": LIMIT, "two": LIMIT}


def test_two_sidecars_behind_one_envoy_are_restarted_in_turn_under_load_without_an_error(tmp_path, engines):
    """Each hands over what it holds: Envoy sends it again, to the other one."""
    config = {**CONFIG, "drain_timeout": "10s"}
    endpoints = {name: {"address": address} for name, address in engines.items()}
    with contextlib.ExitStack() as running:
        here = running.enter_context(Stack(tmp_path, upstreams=(), endpoints=endpoints, config=config))
        second = {key: value for key, value in here.sidecar.config.items() if key not in ("listen", "admin")}
        sidecars = [here.sidecar, running.enter_context(Sidecar(second, tmp_path, name="second"))]
        front = here.add_envoy("two", sidecars=[sidecar.listen for sidecar in sidecars])
        pool = running.enter_context(ThreadPoolExecutor(1))
        count = 90
        answers = pool.submit(
            complete_many,
            front.url,
            count,
            lambda n: {"x-test-id": f"r-{n}"},
            body=body(40),
            gap_s=0.05,
            timeout_s=90,
        )
        for sidecar in sidecars:
            wait_until(lambda sidecar=sidecar: sidecar.queues()["waiting_total"] > 0, 30)
            sidecar.child.signal(signal.SIGTERM)
            assert sidecar.child.wait_exit() == 0
            sidecar.child.stop()
            sidecar.start()
        results = answers.result()
        assert Counter(answer.status for answer in results) == {200: count}
        assert not [answer.error for answer in results if answer.error]
        for sidecar in sidecars:
            assert "Traceback" not in sidecar.child.output()


@pytest.mark.parametrize("ahead_s", [6.0, -6.0])
def test_a_clock_that_is_not_envoys_costs_nobody_its_budget(tmp_path, ahead_s):
    """By a clock six seconds ahead, all of them would be older than their budget as they come, and be refused."""
    config = {"classes": [{"name": "default", "budget": "5s"}]}
    here = Stack(tmp_path, config=config)
    here.sidecar.child.argv = [
        sys.executable,
        "-m",
        "tests.e2e.kit.stalling",
        str(here.sidecar.path),
        "0",
        str(ahead_s),
    ]
    with here, ThreadPoolExecutor(1) as pool:

        def held(number: int) -> dict[str, str]:
            return {"x-test-id": f"c-{number}", **dict([behave(hold="head")])}

        asked = pool.submit(complete_many, here.url, 6, held, gap_s=0.1)
        here.wait_waiting(5)
        for number in range(6):
            here.upstreams["a"].release(f"c-{number}")
        assert Counter(answer.status for answer in asked.result()) == {200: 6}
        assert here.sidecar.metrics()["extproc_clock_offset_seconds"] == pytest.approx(ahead_s, abs=0.2)
