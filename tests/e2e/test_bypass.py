"""Past the queue by one call to Envoy's admin port: a sidecar that hangs holds nobody who comes after it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from extproc.envoy.bootstrap import BYPASS

from .kit.clients import complete_many
from .kit.commands import envoy_config, extproc
from .kit.envoy import Envoy
from .kit.stack import local
from .kit.upstream import behave


@pytest.mark.parametrize("flags", [[], ["--fail-open"]], ids=["fail-closed", "fail-open"])
def test_the_bypass_serves_at_once_beside_a_sidecar_that_hangs_and_ends_without_a_restart(stack, tmp_path, flags):
    here = stack(config={"max_running_requests": 1, "first_byte_probe": True, "request_fields": True})
    http = local()
    listeners = ["--http", http, "--envoy-admin", local(), "--access-log", str(tmp_path / "front.log")]
    bootstrap = envoy_config("--config", here.sidecar.path, *flags, *listeners)
    path = tmp_path / "front.yaml"
    path.write_text(bootstrap)
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert checked.returncode == 0, checked.stdout

    with Envoy(bootstrap, tmp_path, name="front") as front, ThreadPoolExecutor(4) as pool:

        def post(name: str, *behaviour: tuple[str, str]):
            url = f"http://{http}/v1/chat/completions"
            return pool.submit(complete_many, url, 1, lambda _: {"x-test-id": name, **dict(behaviour)})

        runs = post("runs", behave("ok", hold="head"))
        here.wait_in_flight("a", 1)
        waits = post("waits", behave("ok", hold="head"))
        here.wait_waiting(1)
        os.kill(here.sidecar.child.pid, signal.SIGSTOP)
        try:
            front.set_runtime(BYPASS, 100)
            [past] = post("past").result(timeout=6)  # by 8 s Envoy gives such a sidecar up
            assert (past.status, past.headers.get("x-extproc-outcome")) == (200, "unsteered")
            assert not waits.done()
        finally:
            os.kill(here.sidecar.child.pid, signal.SIGCONT)
        here.upstreams["a"].release("runs")
        here.wait_waiting(0)
        here.wait_in_flight("a", 1)  # what was held still goes by the queue's decision, and has a slot
        front.set_runtime(BYPASS, 0)
        again = post("again")
        here.wait_waiting(1)
        here.upstreams["a"].release("waits")
        assert [future.result()[0].status for future in (runs, waits, again)] == [200] * 3
    here.wait_idle()
    assert here.outcomes("dispatched") == 3
