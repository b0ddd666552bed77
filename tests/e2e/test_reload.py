"""The config file changes while requests wait and run: what is taken over, what is refused, and that nobody suffers."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

from .kit.clients import complete_many
from .kit.processes import wait_until
from .kit.stack import local
from .kit.traffic import Traffic, header, hold, listed, names, reload, reloads
from .kit.upstream import behave


def test_a_raised_limit_lets_waiting_requests_go_at_once(stack):
    here = stack(config={"max_running_requests": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 6, hold("r"))
        here.wait_waiting(5)
        reload(here, max_running_requests=4)
        here.wait_in_flight("a", 4)
        reload(here, endpoints=listed(here, "a", max_running_requests=6))
        here.wait_in_flight("a", 6)
        reload(here, max_running_requests=2)  # the endpoint's own limit stays
        assert here.endpoint("a")["limit"] == 6
        for number in range(6):
            here.upstreams["a"].release(f"r-{number}")
        assert [answer.status for answer in running.result()] == [200] * 6


def test_a_changed_file_is_seen_without_a_signal(stack):
    here = stack(config={"classes": [{"name": "default", "budget": "20s"}]})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 3, hold("r"))
        here.wait_waiting(2)
        here.sidecar.write_config(max_running_requests=3)
        here.wait_in_flight("a", 3)
        for number in range(3):
            here.upstreams["a"].release(f"r-{number}")
        assert [answer.status for answer in running.result()] == [200] * 3
    assert (reloads(here, "success"), reloads(here, "failure")) == (1, 0)


def test_a_removed_endpoints_waiting_requests_move_and_its_running_ones_end_well(stack):
    here = stack(upstreams=("a", "b"), config={"max_queue_wait_time": "20s"})
    session = {"x-session-id": "s"}
    complete_many(here.url, 1, header("first", **session))
    (home,) = (name for name in here.upstreams if here.upstreams[name].seen("first-0"))
    other = {"a": "b", "b": "a"}[home]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            complete_many, here.url, 1, header("run", **session, **dict([behave("sse", hold="body")]))
        )
        here.upstreams[home].wait_for("run-0")
        waiting = pool.submit(complete_many, here.url, 4, header("wait", **session))
        here.wait_waiting(4)
        reload(here, endpoints=listed(here, other))
        assert [answer.status for answer in waiting.result()] == [200] * 4
        assert here.in_flight(home) == 1
        here.upstreams[home].release("run-0")
        (answer,) = running.result()
    assert (answer.status, answer.error) == (200, "")
    assert all(here.upstreams[other].seen(f"wait-{number}") for number in range(4))
    wait_until(lambda: names(here) == {other})


def test_a_bad_file_changes_nothing_and_every_problem_is_logged(stack):
    here = stack()
    with Traffic(here, 2) as traffic:
        here.sidecar.path.write_text("endpoints: [{name: a}]\nmax_running_requests: 0\nlistn: x\n")
        here.sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: reloads(here, "failure") == 1)
        traffic.more(10)
        said = here.sidecar.child.output()
        for problem in ("endpoints[0].address: is required", "max_running_requests: must be", "listn: unknown key"):
            assert problem in said
        assert here.endpoint("a")["limit"] == 1
        here.sidecar.write_config()
        here.sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: reloads(here, "success") == 1)
        traffic.more(10)
    traffic.check()


def test_changed_rules_hold_for_requests_from_then_on(stack):
    here = stack(config={"enable_queue": False})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 2, hold("run"))
        here.wait_in_flight("a", 2)
        reload(here, enable_queue=True, classes=[{"name": "hasty", "budget": "200ms"}])
        (answer,) = complete_many(here.url, 1, header("late"))
        assert (answer.status, answer.headers["x-extproc-outcome"]) == (429, "budget_expired")
        for number in range(2):
            here.upstreams["a"].release(f"run-{number}")
        assert [answer.status for answer in running.result()] == [200] * 2


def test_a_key_that_cannot_change_keeps_its_value_and_is_named(stack):
    here = stack()
    admin = here.sidecar.admin
    reload(here, admin=local(), dry_run=True, max_running_requests=7)
    assert here.endpoint("a")["limit"] == 7
    reload(here, max_running_requests=8)
    assert here.sidecar.child.output().count("admin, dry_run: can't change while running") == 2  # still so
    here.sidecar.config["admin"] = admin
