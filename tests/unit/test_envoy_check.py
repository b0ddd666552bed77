"""`extproc check --envoy`: unsafe Envoy settings are named with their place and what would be right."""

from __future__ import annotations

import pytest
import yaml

from extproc.config import parse_config
from extproc.envoy_check import check_envoy
from extproc.envoy_config import EnvoyOptions, render
from extproc.errors import ConfigError

CONFIG = parse_config("endpoints: [{name: a, address: 'h:1'}]\nclasses: [{name: default, budget: 40s}]", "file", {})


def check(tmp_path, change=None) -> list[str]:
    bootstrap = yaml.safe_load(render(CONFIG, EnvoyOptions()))
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    if change is not None:
        change(manager, manager["http_filters"][0]["typed_config"])
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(bootstrap))
    return check_envoy(CONFIG, path)


def test_what_we_render_passes(tmp_path):
    assert check(tmp_path) == []


def test_a_message_timeout_below_the_longest_budget_is_named(tmp_path):
    (problem,) = check(tmp_path, lambda _, ext_proc: ext_proc.update(message_timeout="30s"))
    assert "message_timeout: 30s is not above the longest budget, 40s" in problem
    assert problem.startswith("static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0]")


def test_an_unset_message_timeout_is_envoys_200_ms(tmp_path):
    (problem,) = check(tmp_path, lambda _, ext_proc: ext_proc.pop("message_timeout"))
    assert "message_timeout: 0.2s" in problem


def test_a_stream_idle_timeout_below_the_budget_is_named(tmp_path):
    (problem,) = check(tmp_path, lambda manager, _: manager.update(stream_idle_timeout="40s"))
    assert "stream_idle_timeout: 40s" in problem


def test_a_mode_that_loses_the_end_of_the_answer_is_named(tmp_path):
    (problem,) = check(tmp_path, lambda _, ext_proc: ext_proc["processing_mode"].pop("response_trailer_mode"))
    assert "response_trailer_mode: must be SEND" in problem


def test_a_bootstrap_without_our_filter_and_one_that_is_no_yaml_are_named(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("static_resources: {}")
    assert "has no envoy.filters.http.ext_proc filter" in check_envoy(CONFIG, path)[0]
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="no valid YAML"):
        check_envoy(CONFIG, path)
    with pytest.raises(ConfigError, match="can't be read"):
        check_envoy(CONFIG, tmp_path / "none.yaml")
