"""`extproc envoy-config --unqueued`: a load balancer's probe is answered when all is full, and costs no slot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .kit.clients import H1Request, complete_many
from .kit.commands import envoy_config, extproc
from .kit.envoy import Envoy
from .kit.stack import local
from .kit.upstream import behave


@pytest.mark.parametrize("flags", [[], ["--fail-open"]], ids=["fail-closed", "fail-open"])
def test_an_unqueued_path_is_answered_while_the_only_slot_is_taken_and_does_not_count(stack, tmp_path, flags):
    here = stack(config={"max_running_requests": 1, "first_byte_probe": True})
    http = local()
    listeners = ["--http", http, "--envoy-admin", local(), "--access-log", "none"]
    unqueued = ["--unqueued", "/health", "/v1/models"]
    bootstrap = envoy_config("--config", here.sidecar.path, *flags, *listeners, *unqueued)
    path = tmp_path / "unqueued.yaml"
    path.write_text(bootstrap)
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert checked.returncode == 0, checked.stdout
    assert all("access_log" in line for line in checked.stderr.splitlines()), checked.stderr  # there is none, as asked
    with Envoy(bootstrap, tmp_path, name="front"), ThreadPoolExecutor(2) as pool:

        def post(name: str, *behaviour: tuple[str, str]):
            url = f"http://{http}/v1/chat/completions"
            return pool.submit(complete_many, url, 1, lambda _: {"x-test-id": name, **dict(behaviour)})

        running = post("runs", behave("ok", hold="head"))
        here.wait_in_flight("a", 1)
        waiting = post("waits")
        here.wait_waiting(1)
        try:
            for number, asked in enumerate(["/health", "/v1/models?limit=1"]):
                headers = [("x-test-id", f"probe-{number}"), ("x-upstream-cluster", "nowhere")]
                with H1Request(http, asked, headers, method="GET") as probe:
                    probe.send().read_all()
                    assert probe.status == 200, (asked, probe.received)
            near = H1Request(http, "/health/x", [("x-test-id", "near")], method="POST").send()
            here.wait_waiting(2)  # not the exact path: it waits like any other
            near.rst()
            here.wait_waiting(1)
            assert here.in_flight("a") == 1
        finally:
            here.upstreams["a"].release("runs")
        assert [future.result()[0].status for future in (running, waiting)] == [200, 200]
    here.wait_idle()
    assert here.outcomes("dispatched") == 2
    paths = [record.path for record in here.upstreams["a"].records() if record.request_id.startswith("probe")]
    assert paths == ["/health", "/v1/models?limit=1"]
