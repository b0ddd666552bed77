"""What a reload changed, in lines that say key, old and new."""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

import pytest
from pydantic import ValidationError

from extproc.config import Config, changes, parse_config, sections


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
    old = (
        "health_check: {headers: {a: old-secret}}\nreplicas: {listen: '127.0.0.1:1', valkey: {url: 'valkey://u:old@h'}}"
    )
    new = old.replace("old", "new")
    lines = ["health_check.headers.a: changed", "replicas.valkey.url: changed"]
    assert changes(config(old), config(new)) == lines
    assert changes(config(old), config(old.replace("a: old-secret", ""))) == ["health_check.headers.a: changed"]


def test_a_budget_of_its_own_is_told_where_one_came_of_the_wanted_first_token():
    old, new = "classes: [{name: a, ttft: 2s}]", "classes: [{name: a, ttft: 2s, budget: 30s}]"
    assert changes(config(old), config(new)) == ["classes[a].budget: unset -> 30s"]
    assert [one.classes[0].budget_s for one in map(config, (old, new, "classes: [{name: a}]"))] == [1.6, 30, 30]


def test_a_default_that_is_written_out_is_no_change():
    """`headers: can't change while running` was said of it."""
    assert config("headers: {model: x-model}\nenable_queue: false").headers == config("").headers


def test_of_a_long_list_it_is_told_what_came_and_what_went():
    def of(names: list[str]) -> Config:
        return config(f"endpoints: [{{name: a, address: 'h:1', models: {names}}}]")

    names = [f"a-model-number-{number}" for number in range(20)]
    assert changes(of(names), of([*names[:-1], "new"])) == [
        "endpoints[a].models: 1 come (new), 1 go (a-model-number-19)"
    ]
    assert changes(of(names), of(names[::-1])) == ["endpoints[a].models: in another order"]


FULL: dict[str, Any] = {
    "tls": {"envoy": {"server_name": "a", "ca_file": "/c"}},
    "endpoints": [{"name": "e", "address": "h:1"}],
    "discovery": [{"dns": {"name": "d", "port": 1}, "kubernetes": {"service": "s"}}],
    "inference_pool": {"name": "p"},
    "classes": [{"name": "c", "on_refusal": {"cluster": "o"}}],
    "overflow_clusters": [{"name": "o"}],
    "tenants": {"named": [{"name": "t"}], "others": {}},
    "routes": [{"path": "/a"}],
    "replicas": {
        "listen": "127.0.0.1:1",
        "valkey": {"url": "valkey://h:1"},
        "kubernetes_lease": {},
        "tls": {"cert_file": "/a", "key_file": "/b", "ca_file": "/c", "server_name": "n"},
    },
    **{key: {} for key in ("health_check", "adaptive_limit", "picker", "headers", "learning")},
}
VALUES: tuple[Any, ...] = (
    *(
        True,
        False,
        3,
        2,
        0.5,
        0.25,
        1.5,
        10,
        "7s",
        "x-other",
        "/p",
        "/p.yaml",
        "http://h/x",
        "valkey://h:2",
        "unix:/p",
        "h:9",
    ),
    *("10.0.0.9:9", "other", "vllm", "bound", "GET", ["GET"], [1], ["10.0.0.0/8"], {"a": "b"}, "0600", "h2", "models"),
    *("anthropic", "json", "asyncio", "endpoint-picker", "pick", "together", "ipv4"),
)


def _another(path: str, key: str) -> list[str]:
    """What is told of another value of a key of the section at `path`."""
    for value in VALUES:
        data = copy.deepcopy(FULL)
        section: Any = data
        for part in path.split(".") if path else ():
            section = section.setdefault(part.removesuffix("[]"), {})
            section = section[0] if part.endswith("[]") else section
        if section.get(key) == value:
            continue
        section[key] = value
        with contextlib.suppress(ValidationError):
            old, new = Config.model_validate(FULL), Config.model_validate(data)
            if old != new:
                return changes(old, new)
    raise AssertionError(f"no other value for {path}.{key}")


KEYS = [
    (path, field.alias or name)
    for path, section in [("", Config), *sections()]
    for name, field in section.model_fields.items()
    if (f"{path}." if path else "") + name not in {one.removesuffix("[]") for one, _ in sections()}
]


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[f"{path}.{key}" for path, key in KEYS])
def test_a_change_of_any_key_is_told_with_both_values(path, key):
    lines = _another(path, key)
    assert lines
    for line in lines:
        assert (
            re.search(r" is (gone|new|of)\b|: changed$", line) or len(set(line.partition(": ")[2].split(" -> "))) == 2
        )
