"""Endpoints that are found dead: who waits, who is told, and how they come back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from .kit.clients import complete_many
from .kit.processes import wait_until
from .kit.traffic import Traffic, header, names, reached, reload

CHECK = {"interval": "50ms", "timeout": "500ms", "unhealthy_threshold": 2}


def test_when_all_endpoints_are_down_requests_wait_for_one_to_come_back(stack):
    here = stack(upstreams=("a", "b"), config={"health_check": CHECK})
    for upstream in here.upstreams.values():
        upstream.down()
    wait_until(lambda: names(here, up=True) == set())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete_many, here.url, 6, header("wait"))
        here.wait_waiting(6)
        here.upstreams["b"].up()
        assert [answer.status for answer in waiting.result()] == [200] * 6
    wait_until(lambda: names(here, up=True) == {"b"})


def test_when_none_comes_back_within_the_budget_the_answer_is_503_with_retry_after(stack):
    here = stack(config={"health_check": CHECK, "classes": [{"name": "default", "budget": "300ms"}]})
    here.upstreams["a"].down()
    wait_until(lambda: names(here, up=True) == set())
    (answer,) = complete_many(here.url, 1, header("late"))
    assert (answer.status, answer.headers["x-extproc-outcome"]) == (503, "no_endpoint")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.head_s >= 0.3


def test_an_endpoint_found_dead_costs_nobody_an_error_and_is_used_again_when_it_is_back(stack):
    here = stack(upstreams=("a", "b"), config={"health_check": CHECK, "max_running_requests": 4})
    here.upstreams["b"].down()
    wait_until(lambda: names(here, up=True) == {"a"})
    with Traffic(here) as traffic:
        here.upstreams["b"].up()
        reached(here, "b", 20)
        wait_until(lambda: here.endpoint("b")["dispatched"] > 5)
        reload(here, health_check=None)
        traffic.more()
    traffic.check()
