"""observability/: alerts and dashboard ask only for what exists, and each alert has a page for the night."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain, combinations
from pathlib import Path

import pytest
import yaml

from extproc.admission.controller import Controller
from extproc.admission.values import Policy
from extproc.observe.capacity import Capacity
from extproc.observe.metrics import Metrics
from extproc.observe.paces import Paces
from extproc.observe.served import Served
from extproc.replicas.observe import ReplicaMetrics

ROOT = Path(__file__).parents[2]
HOME = ROOT / "observability"
RULES = [rule for group in yaml.safe_load((HOME / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((HOME / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
WORDS = {"by", "on", "unless", "and", "or", "bool", "group_left", "absent", "without", "offset"}


def exported() -> set[str]:
    """The names of all series that our code exports, in every mode, and those of Envoy that a test has seen."""
    names = {"up"} | set(json.loads((HOME / "envoy-metrics.json").read_text()))
    suffixes = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"]}
    controller = Controller(Policy())
    ours = Metrics(controller, lambda: 0, rehearsed={}).registry.collect()
    others = (Capacity(controller, float), Paces(controller), Served(controller), ReplicaMetrics())
    for family in chain(ours, *(one.collect() for one in others)):
        names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    return names


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression asks for: words that are no label, function, keyword or duration."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", expression)
    bare = re.sub(r"\b(by|on|without|group_left|ignoring)\s*\([^)]*\)", "", bare)
    return {word for word in re.findall(r"\b[a-z_][a-z0-9_]*\b(?!\s*\()", bare) if word not in WORDS}


def run(promtool: str, *arguments: str, cwd: Path) -> None:
    done = subprocess.run([promtool, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reader_of_expressions_finds_metrics_and_nothing_else():
    text = 'sum by (class) (rate(a_total{x="y_total"}[5m])) > on () 0.5 * max by (class) (b_seconds) unless c == 1'
    assert names_in(text) == {"a_total", "b_seconds", "c"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exported_and_leads_to_its_runbook(rule):
    assert names_in(rule["expr"]) <= exported()
    assert names_in(rule["expr"])
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook"}
    page, _, anchor = notes["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    assert f"### {rule['alert']}\n" in (ROOT / page).read_text(), "no heading in the runbook"


def test_the_runbook_has_no_alert_that_is_gone():
    headings = re.findall(r"^### (Extproc\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_runbook_says_what_clients_notice_a_command_that_shows_it_and_what_to_do(rule):
    _, _, rest = (ROOT / "docs/runbook.md").read_text().partition(f"### {rule['alert']}\n")
    section, _, _ = rest.partition("\n##")
    points = re.findall(r"^- \*\*(\w+)\*\*: (.+(?:\n  .+)*)", section, re.MULTILINE)
    assert [point for point, _ in points] == ["Clients", "See", "Do"]
    see = dict(points)["See"]
    assert re.search(r"`(extproc|curl|for|kubectl) [^`]+`|\blogs?\b", see), see


def test_alerts_are_valid_and_fire_where_they_should_and_nowhere_else(promtool):
    run(promtool, "check", "rules", "alerts.yaml", cwd=HOME)
    run(promtool, "test", "rules", "alerts_test.yaml", cwd=HOME)
    text = (HOME / "alerts_test.yaml").read_text()
    untested = [rule["alert"] for rule in RULES if f'{{alertname="{rule["alert"]}"' not in text]
    assert not untested


def test_near_max_streams_is_measured_by_the_breaker_that_we_render():
    bootstrap = yaml.safe_load((ROOT / "envoy/sidecar.yaml").read_text())
    clusters = {cluster["name"]: cluster for cluster in bootstrap["static_resources"]["clusters"]}
    breaker = clusters["extproc_queue"]["circuit_breakers"]["thresholds"][0]["max_requests"]
    (rule,) = (rule for rule in RULES if rule["alert"] == "ExtprocNearMaxStreams")
    assert {int(number) for number in re.findall(r"> (\d+)", rule["expr"])} == {breaker * 8 // 10}


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_a_panel_asks_for_what_is_exported(title, query):
    assert names_in(query) <= exported()
    assert names_in(query)


def test_the_panel_of_what_passes_the_queue_by_counts_what_its_alert_counts():
    """With the bypass on it showed 0: the filter, which counts what it lets go, is not asked then."""
    (rule,) = (rule for rule in RULES if rule["alert"] == "ExtprocFallbackInUse")
    (query,) = (query for title, query in QUERIES if title == "Passed the queue by")
    assert set(re.findall(r"envoy_\w+(?:\{[^}]+\})?", query)) == set(
        re.findall(r"envoy_\w+(?:\{[^}]+\})?", rule["expr"])
    )


def test_every_query_of_the_dashboard_is_valid(promtool, tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for number, (_, query) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(promtool, "check", "rules", "rules.yaml", cwd=tmp_path)


def test_panels_have_ids_of_their_own_no_fixed_datasource_and_do_not_overlap():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {"${datasource}"}
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart, (one, other)


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_a_tool_that_is_missing_is_a_skip_here_and_a_failure_under_ci(tmp_path, ci, status):
    (tmp_path / "test_it.py").write_text(
        "from tests.conftest import tool\n"
        "def test_with_a_tool():\n    tool('no-such-program', 'no-such-package')\n"
        "def test_else():\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "/dev/null", "-rs", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "CI": ci}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    assert "tool missing: no-such-program" in done.stdout
