"""What the configuration says of telemetry: what is scraped, and how load is judged."""

from __future__ import annotations

import pytest

from extproc.config import Config, parse_config, target_of
from extproc.endpoints.telemetry.engines import ENGINES
from extproc.endpoints.telemetry.target import Target
from extproc.errors import ConfigError


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "file", {})
    return caught.value.problems


def test_the_configuration_says_what_is_scraped_and_how_load_is_judged():
    config = parse_config(
        """
        scrape_interval: 250ms
        telemetry_stale_after: 4s
        max_gpu_perc: 90
        gpu_utilization_perc: 97
        endpoints:
        - {name: a, address: '10.0.0.1:8000', models: [llama]}
        - {name: b, address: '[::1]:8000', engine: trtllm}
        - {name: c, address: 'c:1', engine: triton, metrics_url: 'http://c:8002/metrics',
           gpu_metrics_url: 'http://node:9400/metrics', gpu_metrics_labels: {gpu: '0', Hostname: n}}
        """,
        "file",
        {"EXTPROC_SCRAPE_TIMEOUT": "100ms"},
    )
    assert (config.scrape_interval, config.scrape_timeout) == (0.25, 0.1)
    policy = config.policy()
    assert (policy.max_kv_usage, policy.max_gpu_usage, policy.stale_after_s) == (0.9, 0.97, 4.0)
    assert [target_of(endpoint) for endpoint in config.endpoints] == [
        Target(
            "a",
            "http://10.0.0.1:8000/metrics",
            own=frozenset({"10.0.0.1:8000", "llama"}),
            base="http://10.0.0.1:8000",
        ),
        Target(
            "b",
            "http://[::1]:8000/prometheus/metrics",
            "trtllm",
            own=frozenset({"[::1]:8000"}),
            base="http://[::1]:8000",
        ),
        Target(
            "c",
            "http://c:8002/metrics",
            "triton",
            "http://node:9400/metrics",
            (("Hostname", "n"), ("gpu", "0")),
            own=frozenset({"c:1"}),
            base="http://c:1",
        ),
    ]


def test_the_defaults_are_those_of_the_contract():
    config = Config()
    assert (config.scrape_interval, config.scrape_timeout, config.telemetry_stale_after) == (1.0, 0.5, 10.0)
    assert (config.policy().max_kv_usage, config.policy().max_gpu_usage) == (0.95, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scrape_timeout: 0s", "scrape_timeout: must be longer than 0s"),
        ("telemetry_stale_after: 0", "telemetry_stale_after: must be longer than 0s"),
        ("scrape_interval: -1s", "scrape_interval: must be a duration"),
        ("max_gpu_perc: 0", "max_gpu_perc: must be 1 or more"),
        ("max_gpu_perc: 101", "max_gpu_perc: must be 100 or less"),
        ("gpu_utilization_perc: 90", "gpu_utilization_perc: needs gpu_metrics_url"),
        ("endpoints: [{name: a, address: 'h:1', engine: vlm}]", "endpoints[0].engine: must be 'auto', 'vllm'"),
        ("endpoints: [{name: a, address: 'h:1', metrics_url: h}]", "endpoints[0].metrics_url: must be a URL"),
        (
            "endpoints: [{name: a, address: 'h:1', gpu_metrics_labels: {gpu: 0}}]",
            "gpu_metrics_labels.gpu: must be text",
        ),
    ],
)
def test_a_wrong_key_is_named(text, words):
    (problem,) = problems(text)
    assert words in problem


@pytest.mark.parametrize("name", ["auto", "none", *(engine.name for engine in ENGINES)])
def test_every_row_of_the_table_is_a_word_of_the_configuration(name):
    text = f"endpoints: [{{name: a, address: 'h:1', engine: {name}}}]"
    assert parse_config(text, "file", {}).endpoints[0].engine == name
