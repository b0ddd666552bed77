"""Our figures under llm-d's names, as its dashboards and autoscalers ask for them: read off a page, on a real core."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from extproc.admission.load import Load
from extproc.admission.values import EndpointSpec, RequestClass
from extproc.config import parse_config
from extproc.observe.aliases import OUTCOMES, Aliases
from tests.unit.test_metrics import Metered


@pytest.fixture
def desk() -> Metered:
    desk = Metered()
    desk.metrics.add(Aliases(desk.controller, desk.metrics, "llama"))
    return desk


def value(desk: Metered, metric: str, /, **labels: str) -> float:
    """The sum of what a query would find."""
    found = [line for line in desk.page().items() if line[0].partition("{")[0] == metric]
    return sum(count for series, count in found if all(f'{key}="{text}"' in series for key, text in labels.items()))


@pytest.mark.parametrize("prefix", ["llm_d_epp", "inference_extension"])
def test_what_waits_is_told_by_priority_and_pool_and_a_priority_that_nobody_waits_with_is_0(desk, prefix):
    for number in range(5):
        desk.offer(f"r{number}", "high" if number == 4 else "low")
    name = f"{prefix}_flow_control_queue_size"
    assert value(desk, name, inference_pool="llama") == 3
    assert value(desk, name, priority="1", fairness_id="default-flow") == 1


def test_requests_are_told_by_how_they_left_in_llm_ds_words(desk):
    tickets = [desk.offer(f"r{number}") for number in range(3)]
    desk.controller.cancel(tickets[2], desk.now)
    desk.metrics.cancelled(tickets[2], 0.0)
    name = "llm_d_epp_flow_control_requests_total"
    assert value(desk, name, outcome="Dispatched", priority="0", inference_pool="llama") == 2
    assert value(desk, name, outcome="EvictedContextCancelled") == 1
    assert value(desk, "llm_d_epp_request_total") == value(desk, "inference_objective_request_total") == 3
    assert set(OUTCOMES.values()) == {"Dispatched", "RejectedCapacity", "EvictedTTL", "EvictedContextCancelled"}


def test_what_runs_and_how_full_the_pool_is_and_an_endpoint_that_is_down_is_not_ready(desk):
    desk.offer("one")
    assert value(desk, "llm_d_epp_request_running") == value(desk, "inference_objective_running_requests") == 1
    assert value(desk, "llm_d_epp_flow_control_pool_saturation", inference_pool="llama") == 0.5
    desk.controller.set_up("b", desk.now, is_up=False)
    assert value(desk, "llm_d_epp_ready_endpoints", name="llama") == value(desk, "inference_pool_ready_pods") == 1
    desk.controller.set_up("a", desk.now, is_up=False)
    assert value(desk, "llm_d_epp_flow_control_pool_saturation") == 1, "a pool of none is full, for who scales it"


def test_engines_gauges_are_averages_of_those_that_tell_and_absent_while_none_does(desk):
    assert "llm_d_epp_average_queue_size" not in "".join(desk.page())
    desk.controller.observe("a", Load(waiting=4, running=2, kv_usage=0.5), desk.now)
    desk.controller.observe("b", Load(waiting=2), desk.now)
    assert value(desk, "llm_d_epp_average_queue_size") == value(desk, "inference_pool_average_queue_size") == 3
    assert value(desk, "llm_d_epp_average_running_requests") == 2
    assert value(desk, "inference_pool_average_kv_cache_utilization", name="llama") == 0.5


def test_waits_are_a_histogram_of_what_was_dispatched(desk):
    desk.offer("at once")
    name = "llm_d_epp_flow_control_request_queue_duration_seconds"
    assert value(desk, f"{name}_bucket", le="+Inf", outcome="Dispatched", priority="0") == 1
    assert value(desk, f"{name}_count", inference_pool="llama") == 1


def test_no_series_is_there_twice_where_classes_share_a_priority_or_a_reload_took_one_away(desk):
    """Prometheus refuses a page that tells one twice, and all the rest of it with it."""
    three = tuple(RequestClass(name, priority, 30.0) for name, priority in (("low", 0), ("same", 0), ("gone", 7)))
    desk.controller.set_policy(replace(desk.controller.policy, classes=three), desk.now)
    for name, request_class in (("1", "low"), ("2", "same"), ("3", "gone")):
        desk.controller.put_endpoint(EndpointSpec(name, max_running_requests=1), desk.now)
        desk.controller.set_up(name, desk.now, is_up=True)
        desk.offer(name, request_class)
    desk.controller.set_policy(replace(desk.controller.policy, classes=three[:2]), desk.now)
    written = [line for line in b"".join(desk.metrics.pieces()).decode().splitlines() if not line.startswith("#")]
    series = Counter(line.rpartition(" ")[0] for line in written)
    assert [name for name, times in series.items() if times > 1] == []
    name = "llm_d_epp_flow_control_request_queue_duration_seconds"
    assert value(desk, f"{name}_count", priority="0") == value(desk, f"{name}_bucket", le="+Inf", priority="0") == 3


def test_the_model_is_named_where_all_endpoints_serve_one_and_the_same(desk):
    name = "llm_d_epp_request_running"
    for endpoint, models, expected in (
        ("a", {"m"}, ""),
        ("b", {"m"}, "m"),
        ("b", {"m", "n"}, ""),
        ("a", {"m", "n"}, ""),
    ):
        spec = EndpointSpec(endpoint, models=frozenset(models), max_running_requests=1)
        desk.controller.put_endpoint(spec, desk.now)
        (series, *_) = [series for series in desk.page() if series.startswith(name)]
        assert f'model_name="{expected}"' in series


def test_none_of_it_is_there_unless_asked_for():
    assert not parse_config("{}", "test", {}).metrics_aliases
    assert not [name for name in Metered().page() if name.startswith(("llm_d", "inference_"))]
