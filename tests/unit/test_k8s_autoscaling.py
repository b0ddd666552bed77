"""What the scalers ask for is there, has an answer when it must, and the numbers are theirs."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

from extproc.admission.controller import Controller
from extproc.config import parse_config
from extproc.observe.metrics import Metrics
from tests.conftest import TOOL_MISSING
from tests.e2e.kit.processes import run
from tests.unit.k8s.rendering import (
    K8S,
    Document,
    gateway,
    one,
    rendered,
)

__all__ = ["rendered"]  # a fixture


def test_an_apply_leaves_the_scalers_number_of_engines_alone(rendered):
    assert one(rendered("overlays/gateway"), "Deployment", "vllm")["spec"]["replicas"] == 2
    documents = rendered("overlays/gateway", "autoscaling")
    assert "replicas" not in one(documents, "Deployment", "vllm")["spec"]
    assert gateway(documents)["spec"]["replicas"] == 2


def test_the_scalers_query_has_no_answer_without_the_sidecar_and_the_queue_without_endpoints(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(f"{TOOL_MISSING}promtool, of Debian's prometheus")
    (trigger,) = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())["spec"]["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "else no answer is 0 work"
    waits = {"series": 'extproc_queue_depth{job="extproc", endpoint="*", class="a"}', "values": "7x2"}
    runs = {"series": 'extproc_inflight_requests{job="extproc", endpoint="e"}', "values": "5x2"}
    cases: list[tuple[list[Document], list[Document]]] = [
        ([waits, runs], [{"labels": "{}", "value": 12}]),
        ([waits], [{"labels": "{}", "value": 7}]),
        ([], []),
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{"expr": trigger["metadata"]["query"], "eval_time": "1m", "exp_samples": samples}],
        }
        for series, samples in cases
    ]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": tests}))
    done = run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scaler_asks_for_metrics_that_the_sidecar_has():
    scaled = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())
    policy = parse_config("{}", "none", {}).policy()
    known = {family.name for family in Metrics(Controller(policy), lambda: 0).registry.collect()}
    for trigger in scaled["spec"]["triggers"]:
        asked = set(re.findall(r"extproc_\w+", trigger["metadata"]["query"]))
        assert "extproc_queue_depth" in asked
        assert asked <= known
