"""The main job: hold many, release in order, never more at an engine than its limit. Real Envoy, real engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from .kit.clients import H1Request, complete_many
from .kit.processes import Child, http_get, wait_until
from .kit.upstream import Upstream, behave

SLOTS = 4


@pytest.fixture
def engines(tmp_path):
    """Two simulated engines of four slots, and their addresses."""
    children = []
    try:
        for name in ("engine-a", "engine-b"):
            command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--name", name, "--port", "0"]
            child = Child([*command, "--max-num-seqs", str(SLOTS)], tmp_path / f"{name}.log")
            child.start()
            children.append((name, child))
        yield {name: child.wait_line(r"listening on http://(\S+)").group(1) for name, child in children}
    finally:
        for _, child in children:
            child.stop()


def peaks(address: str) -> dict:
    status, body = http_get(address, "/debug/peaks")
    assert status == 200
    return json.loads(body)


def test_a_burst_of_60_fills_both_engines_evenly_never_over_their_slots_and_high_class_first(stack, engines):
    classes = [{"name": "batch"}, {"name": "interactive", "priority": 10}]
    here = stack(
        upstreams=(),
        endpoints={name: {"address": address} for name, address in engines.items()},
        config={"max_running_requests": SLOTS, "classes": classes},
    )
    body = json.dumps(
        {"model": "sim", "stream": True, "max_tokens": 12, "messages": [{"role": "user", "content": "hi"}]}
    )

    def headers(number: int) -> dict[str, str]:
        return {"x-test-id": f"r-{number}", "x-request-class": "interactive" if number >= 54 else "batch"}

    answers = complete_many(here.url, 60, headers, body=body.encode(), gap_s=0.002)
    assert {answer.status for answer in answers} == {200}
    assert all(answer.body.rstrip().endswith(b"data: [DONE]") and not answer.error for answer in answers)
    seen = {name: peaks(address) for name, address in engines.items()}
    for name, peak in seen.items():
        assert peak["peak_running"] <= SLOTS, (name, peak)
        assert peak["peak_waiting"] == 0, (name, peak)
        assert 26 <= peak["requests"] <= 34, (name, peak)
    arrivals = sorted((one["arrived_s"], one["class"]) for peak in seen.values() for one in peak["arrivals"])
    waited = [request_class for _, request_class in arrivals[2 * SLOTS :]]
    # The interactive ones came last, and went before all that waited, but for what a slot that became free while they
    # were still being sent was given to.
    first_high = waited.index("interactive")
    last_high = max(index for index, name in enumerate(waited) if name == "interactive")
    assert waited[first_high : last_high + 1].count("batch") <= 2, waited
    assert waited[last_high + 1 :].count("batch") >= 20, waited


def test_1200_requests_held_at_once_all_finish(stack):
    here = stack(config={"max_running_requests": 64})
    upstream = here.upstreams["a"]
    with ThreadPoolExecutor(2) as pool:
        blockers = pool.submit(
            complete_many, here.url, 64, lambda n: {"x-test-id": f"b-{n}", **dict([behave("ok", hold="head")])}
        )
        here.wait_in_flight("a", 64)
        held = pool.submit(complete_many, here.url, 1200, lambda n: {"x-test-id": f"h-{n}"}, timeout_s=60)
        here.wait_waiting(1200)
        assert here.in_flight("a") == 64
        for number in range(64):
            upstream.release(f"b-{number}")
        statuses = [answer.status for answer in held.result() + blockers.result()]
    assert statuses == [200] * 1264
    here.wait_idle()
    assert here.outcomes("dispatched") == 1264


def test_a_tenant_over_its_cap_is_refused_and_others_are_held_and_served(stack):
    tenants = {"named": [{"name": "acme", "max_in_flight": 2}], "others": {"max_in_flight": 3}}
    here = stack(config={"tenants": tenants})

    def of(tenant: str, number: int) -> dict[str, str]:
        return {"x-test-id": f"{tenant}-{number}", "x-tenant-id": tenant, **dict([behave("ok", hold="head")])}

    def told(name: str) -> dict[str, float]:
        page = here.sidecar.metrics().items()
        return {key.split('"')[1]: value for key, value in page if key.startswith(f"{name}{{")}

    with ThreadPoolExecutor(2) as pool:
        of_acme = pool.submit(complete_many, here.url, 2, lambda n: of("acme", n))
        wait_until(lambda: told("extproc_tenant_inflight_requests") == {"acme": 2, "*": 0})
        (third,) = complete_many(here.url, 1, lambda _: of("acme", 2))
        error = json.loads(third.body)["error"]
        assert [error[key] for key in ("tenant", "in_flight", "max_in_flight")] == ["acme", 2, 2]
        made_up = pool.submit(complete_many, here.url, 5, lambda n: of(f"made-up-{n}", n))
        wait_until(lambda: told("extproc_tenant_limited_total") == {"acme": 1, "*": 2})
        rows = json.loads(http_get(here.sidecar.admin, "/queues")[1])["tenants"]
        assert {key: rows[0][key] for key in ("tenant", "in_flight", "max_in_flight", "refused")} == {
            "tenant": "acme", "in_flight": 2, "max_in_flight": 2, "refused": 1,
        }  # fmt: skip
        for number in range(5):
            here.upstreams["a"].release(f"acme-{number}")
            here.upstreams["a"].release(f"made-up-{number}-{number}")
        assert [answer.status for answer in of_acme.result()] == [200, 200]
        assert sorted(answer.status for answer in made_up.result()) == [200, 200, 200, 429, 429]
    assert (third.status, third.headers["x-extproc-outcome"], third.headers["retry-after"]) == (
        429,
        "tenant_limit",
        "1",
    )
    lines = here.envoy.access_log_lines

    def told_refused() -> list[str]:
        return sorted(line["queue"]["tenant"].partition("-")[0] for line in lines() if line["code"] == 429)

    wait_until(lambda: told_refused() == ["acme", "made", "made"])
    here.wait_idle()
    assert told("extproc_tenant_inflight_requests") == {"acme": 0, "*": 0}
    assert "made-up" not in http_get(here.sidecar.admin, "/metrics")[1].decode()


def test_with_the_queue_off_nothing_is_held_and_the_least_busy_endpoint_is_chosen(stack):
    here = stack(upstreams=("a", "b"), config={"enable_queue": False, "max_running_requests": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            complete_many, here.url, 20, lambda n: {"x-test-id": f"o-{n}", **dict([behave("ok", hold="head")])}
        )
        here.wait_in_flight("a", 10)
        here.wait_in_flight("b", 10)
        assert here.waiting() == []
        for number in range(20):
            for upstream in here.upstreams.values():
                upstream.release(f"o-{number}")
        assert {answer.status for answer in running.result()} == {200}
    here.wait_idle()


def test_when_nothing_frees_up_the_budget_ends_the_wait_with_a_429_that_openai_clients_understand(stack):
    here = stack(config={"max_running_requests": 1, "classes": [{"name": "default", "budget": "300ms"}]})
    with ThreadPoolExecutor(1) as pool:
        blocker = pool.submit(
            complete_many, here.url, 1, lambda _: {"x-test-id": "b", **dict([behave("ok", hold="head")])}
        )
        here.wait_in_flight("a", 1)
        (refused,) = complete_many(here.url, 1, lambda _: {"x-test-id": "late"})
        here.upstreams["a"].release("b")
        assert blocker.result()[0].status == 200
    assert refused.status == 429
    assert refused.headers["x-extproc-outcome"] == "budget_expired"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert json.loads(refused.body)["error"]["code"] == "budget_expired"
    assert not here.upstreams["a"].seen("late")
    entry = here.envoy.wait_access_log(lambda line: line["code"] == 429)
    assert entry["details"] == "extproc_budget_expired"
    assert entry["queue"]["outcome"] == "budget_expired"


def test_a_request_for_a_named_home_waits_its_patience_and_is_then_rerouted(stack):
    """The client can't name a cluster (Envoy strips the header), so its session makes the home."""
    here = stack(upstreams=("a", "b"), config={"max_running_requests": 1, "max_queue_wait_time": "300ms"})
    session = {"x-session-id": "s-1"}
    complete_many(here.url, 1, lambda _: {"x-test-id": "first", **session})
    (home,) = [name for name, upstream in here.upstreams.items() if upstream.seen("first")]
    other = {"a": "b", "b": "a"}[home]
    with ThreadPoolExecutor(1) as pool:
        blocker = pool.submit(
            complete_many,
            here.url,
            1,
            lambda _: {"x-test-id": "block", **session, **dict([behave("ok", hold="head")])},
        )
        here.wait_in_flight(home, 1)
        (moved,) = complete_many(here.url, 1, lambda _: {"x-test-id": "moved", **session})
        assert moved.status == 200
        assert here.upstreams[other].seen("moved")
        assert moved.head_s >= 0.3
        here.upstreams[home].release("block")
        blocker.result()
    assert here.outcomes("rerouted") == 1


def test_a_client_cannot_choose_its_cluster(stack):
    here = stack(upstreams=("a", "b"), endpoints={"b": {"models": ["other"]}, "a": {"models": ["sim"]}})
    spoof = {"x-upstream-cluster": "b", "X-Upstream-Cluster": "b", "x-model": "sim"}
    (answer,) = complete_many(here.url, 1, lambda _: {"x-test-id": "spoof", **spoof})
    assert answer.status == 200
    assert here.upstreams["a"].seen("spoof")
    assert not here.upstreams["b"].seen("spoof")
    names = {name.lower() for name, _ in here.upstreams["a"].seen("spoof")[0].headers}
    assert "x-upstream-cluster" not in names


def test_a_dry_run_holds_nothing_and_counts_what_it_would_have_held(stack):
    here = stack(config={"enable_queue": False, "dry_run": True, "max_running_requests": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            complete_many, here.url, 5, lambda n: {"x-test-id": f"d-{n}", **dict([behave("ok", hold="head")])}
        )
        here.wait_in_flight("a", 5)
        for number in range(5):
            here.upstreams["a"].release(f"d-{number}")
        assert {answer.status for answer in running.result()} == {200}
    here.wait_idle()

    def would_be() -> dict[str, float]:
        metrics = here.sidecar.metrics().items()
        would = {name: count for name, count in metrics if name.startswith("extproc_dry_run_requests_total")}
        return {re.search(r'outcome="(\w+)"', name)[1]: count for name, count in would.items()}

    # One slot, and five that ran at once: one after the other each would have taken as long.
    wait_until(lambda: would_be() == {"dispatched": 1, "held": 4})


def test_what_happened_is_a_file_that_runs_again_to_the_same_decisions_and_a_story_of_each_request(stack, tmp_path):
    here = stack(config={"max_running_requests": 1})
    with ThreadPoolExecutor(1) as pool:
        held = {"x-request-class": "default", **dict([behave("ok", hold="head")])}
        running = pool.submit(complete_many, here.url, 5, lambda n: {"x-test-id": f"w-{n}", **held})
        here.wait_waiting(4)
        waits = here.waiting()[0]["id"]
        recording = H1Request(here.sidecar.admin, "/debug/recording?seconds=3", method="GET").send()
        here.waiting()  # asked for behind it: so it has begun
        released: set[str] = set()
        while len(released) < 5 and not running.done():
            for name in {f"w-{number}" for number in range(5)} - released:
                if here.upstreams["a"].seen(name):
                    here.upstreams["a"].release(name)
                    released.add(name)
        assert {answer.status for answer in running.result()} == {200}
    with recording:
        assert recording.read_head() == 200
        body = recording.read_all()
    events = [json.loads(line).get("event") for line in body.splitlines()[1:]]
    assert events.count("Released") >= 4
    file = tmp_path / "bug.jsonl"
    file.write_bytes(body)
    extproc = [sys.executable, "-m", "extproc"]
    again = subprocess.run(
        [*extproc, "simulate", "--replay", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same decisions as recorded" in again.stdout
    why = subprocess.run(
        [*extproc, "why", waits, "--admin", here.sidecar.admin], capture_output=True, text=True, check=True
    )
    assert "waits because as many requests as its limit allows are in flight" in why.stdout
    assert "dispatched to a, which held 1 with it" in why.stdout
    assert "gave its slot back after" in why.stdout


def test_a_class_with_a_cluster_of_last_resort_overflows_there_and_another_is_refused(stack):
    with Upstream("spare") as spare:
        here = stack(
            config={
                "overflow_clusters": [{"name": "elsewhere", "address": spare.address}],
                "classes": [
                    {"name": "soft", "budget": "100ms", "on_refusal": {"cluster": "elsewhere"}},
                    {"name": "firm", "budget": "100ms"},
                ],
            }
        )
        held = dict([behave("ok", hold="head")])
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(complete_many, here.url, 1, lambda _: {"x-test-id": "run", **held})
            here.wait_in_flight("a", 1)
            (soft,) = complete_many(here.url, 1, lambda _: {"x-test-id": "soft"})
            (firm,) = complete_many(here.url, 1, lambda _: {"x-test-id": "firm", "x-request-class": "firm"})
            assert (soft.status, firm.status) == (200, 429)
            assert [one.request_id for one in spare.records() if one.request_id] == ["soft"]
            here.upstreams["a"].release("run")
            (answer,) = running.result()
        (guest,) = complete_many(here.url, 1, lambda _: {"x-test-id": "guest", "x-upstream-cluster": "elsewhere"})
        assert (answer.status, guest.status) == (200, 200)
        assert len(spare.seen("guest")) == 0, "no client can choose it"
        assert here.sidecar.metrics()['extproc_overflowed_total{class="soft"}'] == 1.0
