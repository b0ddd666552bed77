"""examples/batch.py against a full house: it waits as long as it is told, and each line gets one answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .kit.clients import H1Request
from .kit.upstream import behave

ROOT = Path(__file__).parents[2]
CLASSES = [{"name": "standard", "priority": 0, "budget": "20s"}, {"name": "batch", "priority": -10, "budget": "100ms"}]


@pytest.fixture(scope="module")
def here(module_stack):
    """One slot, so that one request of somebody else is a full house."""
    return module_stack(upstreams=("a",), config={"classes": CLASSES, "max_running_requests": 1, "shed": False})


def batch(here, directory: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-W", "error", str(ROOT / "examples/batch.py"), "requests.jsonl", "results.jsonl"]
    return subprocess.Popen(
        [*argv, "--to", f"http://{here.address}", "--at-once", "4"], cwd=directory, text=True, stderr=subprocess.PIPE
    )


def results(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def test_a_batch_waits_for_as_long_as_it_is_told_and_loses_and_doubles_nothing(here, tmp_path):
    ids = [f"line-{number}" for number in range(8)]
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [json.dumps({"custom_id": one, "url": "/v1/chat/completions", "body": body}) for one in ids]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    (tmp_path / "results.jsonl").write_text('{"custom_id": "line-0", "response": {}}\n{"custom_id": "line-1", "resp')
    with H1Request(here.address, headers=[("x-test-id", "other"), behave(hold="head")]).send() as other:
        here.wait_in_flight("a", 1)
        running = batch(here, tmp_path)
        here._wait(lambda _: here.outcomes("budget_expired") >= 4, 10.0, "the first four are refused")
        refused_at = time.monotonic()
        assert here.outcomes("budget_expired") == 4, "nobody comes back before Retry-After"
        here.upstreams["a"].release("other")
        assert other.read_head() == 200
        other.read_all()
    said = running.communicate(timeout=30)[1]
    assert running.returncode == 0, said
    assert time.monotonic() - refused_at >= 0.9, "Retry-After is a second at least"
    assert "7 sent, 0 failed" in said
    told = results(tmp_path)
    assert sorted(one["custom_id"] for one in told) == ids
    assert {one["response"]["status_code"] for one in told[1:]} == {200}
    page = here.sidecar.metrics()
    assert page['extproc_requests_total{class="batch",outcome="budget_expired"}'] >= 4
    again = batch(here, tmp_path)
    assert "0 sent, 0 failed" in again.communicate(timeout=30)[1]
