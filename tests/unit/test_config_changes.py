"""What a reload changed, in lines that say key, old and new."""

from __future__ import annotations

import pytest

from extproc.config import Config, changes, parse_config
from extproc.config.changes import _changes


def config(text: str) -> Config:
    return parse_config(text, "file", {})


ONE = "endpoints: [{name: a, address: 'h:1', max_running_requests: 4, models: [x, y]}]"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("", "", []),
        ("", "enable_queue: true", ["enable_queue: false -> true"]),
        ("", "max_running_requests: 8", ["max_running_requests: unset -> 8"]),
        ("", "headers: {model: x-llm}", ["headers.model: [x-model] -> [x-llm]"]),
        ("", "scrape_interval: 250ms", ["scrape_interval: 1s -> 0.25s"]),
        ("", "health_check: {}", ["health_check: unset -> a mapping"]),
        (ONE, ONE.replace("4", "9"), ["endpoints[a].max_running_requests: 4 -> 9"]),
        (ONE, ONE.replace("[x, y]", "[x]"), ["endpoints[a].models: [x, y] -> [x]"]),
        (ONE, ONE.replace("name: a", "name: b"), ["endpoints: a is gone", "endpoints: b is new (h:1)"]),
        (
            "classes: [{name: x}, {name: y, budget: 5s}]",
            "classes: [{name: y, budget: 6s}, {name: x}]",
            [
                "classes[y].budget: 5s -> 6s",
                "classes: in another order: y, x",
                "classes: who names none is of y now, and was of x",
            ],
        ),
        (
            "classes: [{name: x}, {name: y}]",
            "classes: [{name: y}]",
            ["classes: x is gone", "classes: who names none is of y now, and was of x"],
        ),
        ("classes: [{name: x}, {name: y}]", "classes: [{name: x}]", ["classes: y is gone"]),
        (
            "envoy_clusters_file: /c.yaml\ndiscovery: [{dns: {name: a, port: 1}}]",
            "envoy_clusters_file: /c.yaml\ndiscovery: [{dns: {name: b, port: 1}}]",
            ["discovery[0].dns.name: a -> b"],
        ),
    ],
)
def test_each_difference_is_a_line_with_key_old_and_new(old, new, lines):
    assert changes(config(old), config(new)) == lines


def test_what_may_be_a_secret_is_not_written_to_a_log():
    lines = list(_changes({"metrics_headers": {"a": "old"}}, {"metrics_headers": {"a": "new"}}, "endpoints[a]"))
    assert lines == ["endpoints[a].metrics_headers: changed"]
