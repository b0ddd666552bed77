"""examples/batch.py against a full house: it waits as long as it is told, and each line gets one answer."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from .kit.clients import H1Request
from .kit.processes import PATIENCE_S, wait_until
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


def spans(here, code: int) -> list[tuple[float, float]]:
    """When each request of the batch that was answered so began and ended, by Envoy's clock."""
    lines = [
        line for line in here.envoy.access_log_lines() if line["code"] == code and line["queue"]["class"] == "batch"
    ]
    began = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    return [(begin, begin + line["duration_ms"] / 1000) for begin, line in zip(began, lines, strict=True)]


def test_a_batch_waits_for_as_long_as_it_is_told_and_loses_and_doubles_nothing(here, tmp_path):
    ids = [f"line-{number}" for number in range(8)]
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [json.dumps({"custom_id": one, "url": "/v1/chat/completions", "body": body}) for one in ids]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    (tmp_path / "results.jsonl").write_text('{"custom_id": "line-0", "response": {}}\n{"custom_id": "line-1", "resp')
    with H1Request(here.address, headers=[("x-test-id", "other"), behave(hold="head")]).send() as other:
        here.wait_in_flight("a", 1)
        running = batch(here, tmp_path)
        wait_until(lambda: here.outcomes("budget_expired") >= 4, message="the first four are refused")
        here.upstreams["a"].release("other")
        assert other.read_head() == 200
        other.read_all()
    said = running.communicate(timeout=2 * PATIENCE_S)[1]
    assert running.returncode == 0, said
    assert "7 sent, 0 failed" in said
    told = results(tmp_path)
    assert sorted(one["custom_id"] for one in told) == ids
    assert {one["response"]["status_code"] for one in told[1:]} == {200}
    page = here.sidecar.metrics()
    assert page['extproc_requests_total{class="batch",outcome="budget_expired"}'] >= 4
    again = batch(here, tmp_path)
    assert "0 sent, 0 failed" in again.communicate(timeout=2 * PATIENCE_S)[1]
    wait_until(lambda: len(spans(here, 200)) == 7, message="the access log is written")
    first_refused = min(end for _, end in spans(here, 429))
    begun = sorted(begin for code in (429, 200) for begin, _ in spans(here, code))
    assert begun[4] - first_refused >= 0.99, "the fifth try comes a second after the first refusal, as Retry-After says"


def test_a_line_of_json_ends_at_a_newline_and_at_no_other_separator(tmp_path):
    left_of = runpy.run_path(str(ROOT / "examples/batch.py"))["left_of"]
    lines = [
        json.dumps({"custom_id": f"{number} \u2028 \u0085", "url": "/"}, ensure_ascii=False) for number in range(2)
    ]
    (tmp_path / "requests").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "results").write_text(lines[0] + "\n" + lines[1][:5], encoding="utf-8")
    (left,) = left_of(tmp_path / "requests", tmp_path / "results")
    assert left["custom_id"] == "1 \u2028 \u0085"
