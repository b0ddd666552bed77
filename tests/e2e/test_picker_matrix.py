"""The rest of the endpoint picker's rows behind each kind of gateway: `make test-picker`, on three Envoys.

{full duplex as Istio and llm-d's chart, AI Gateway's buffered mode, lean} x {bodies to 30 MB, answers to 10,000 tokens,
a hold of 70 s, clients that leave, dead servers, a picker that is killed}. A slice of it is in test_picker.py and here.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .kit.clients import H1Request, complete_many
from .kit.gateways import KINDS
from .kit.picking import Picking
from .kit.processes import wait_until
from .kit.upstream import SSE_DONE, behave, sse_event
from .test_picker import BACK_S, VERSIONS, blocked, body_of, bounded, leave_while_held, much, taking

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("EXTPROC_LONG"))
long = pytest.mark.skipif(not LONG, reason="minutes: `make test-picker`")
HELD_S = 70.0
TOKENS = (1, 100, 10_000)
__all__ = ["bounded"]  # for each test here, too


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version or "supported")
def here(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Picking]:
    config = {"classes": [{"name": "default", "budget": "5m"}]}
    with Picking(tmp_path_factory.mktemp("picking"), version=request.param, config=config) as picking:
        yield picking


@long
@pytest.mark.parametrize("size", [1000, 1_000_000, 30_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_1_100_and_10_000_tokens_come_whole_whatever_was_sent_and_leave_no_lease(here, kind, size):
    body, gateway, took_s = body_of(size), here.gateway(kind, **taking(kind, size)), []
    for tokens in TOKENS:
        name = f"tokens-{kind}-{size}-{tokens}"
        headers = [("x-test-id", name), behave("sse", events=tokens)]
        with H1Request(gateway, headers=headers, body=body, timeout_s=90) as one:
            assert one.send().read_all() == b"".join(map(sse_event, range(tokens))) + SSE_DONE
        took_s.append(here.wait_back())
        (record,) = [one for upstream in here.upstreams.values() for one in upstream.seen(name)]
        assert record.body_sha1 == hashlib.sha1(body, usedforsecurity=False).hexdigest()
    assert min(took_s) < BACK_S


@long
def test_a_request_may_be_held_for_70_s_behind_every_kind_of_gateway(here):
    gateways = {kind: here.gateway(kind, **taking(kind, much(kind))) for kind in KINDS}
    busy = dict([behave("sse", events=int(HELD_S) + 5, gap_s=1.0)])
    with ThreadPoolExecutor(len(KINDS) + 1) as pool:
        running = pool.submit(complete_many, f"http://{gateways['istio']}/", 2, lambda _: busy, timeout_s=120)
        here.wait_in_flight(2)
        held = [
            pool.submit(
                complete_many, f"http://{gateway}/", 1, lambda _, kind=kind: {"x-test-id": f"70-s-{kind}"},
                body=body_of(much(kind)), timeout_s=120,
            )
            for kind, gateway in gateways.items()
        ]  # fmt: skip
        here.wait_waiting(len(KINDS))
        began = time.monotonic()
        assert [one.status for one in running.result()] == [200, 200]
        assert [one.status for answers in held for one in answers.result()] == [200] * len(KINDS)
        assert here.wait_back() < BACK_S
    for kind in KINDS:
        (record,) = [one for upstream in here.upstreams.values() for one in upstream.seen(f"70-s-{kind}")]
        assert record.body_sha1 == hashlib.sha1(body_of(much(kind)), usedforsecurity=False).hexdigest()
        assert record.arrived_at - began > HELD_S
    here.wait_idle()


@long
@pytest.mark.parametrize(
    ("kind", "size"),
    [*itertools.product(KINDS, (0, 1000, 1_000_000, 10_000_000)), ("ai-gateway-buffered", 30_000_000)],
)
def test_a_client_that_leaves_while_it_is_held_is_never_run_whatever_it_had_sent(here, kind, size):
    leave_while_held(here, here.gateway(kind, **taking(kind, size)), kind, size, f"gone-{kind}-{size}")


@long
@pytest.mark.parametrize("kind", ["istio", "llm-d", "ai-gateway"])
def test_a_client_that_leaves_with_more_sent_than_envoy_passes_on_is_seen_when_it_is_picked_and_costs_no_slot(
    here, kind
):
    """Envoy reads on until tens of MB are on their way to us; then it may hear nothing of its client."""
    gateway, name = here.gateway(kind), f"gone-{kind}-much"
    with blocked(here, gateway, f"before-{name}"), H1Request(gateway, headers=[("x-test-id", name)]) as ghost:
        ghost.send_head(30_000_000)
        assert ghost.upload(30_000_000) > 10_000_000
        here.wait_waiting(1)
        ghost.rst()
    here.wait_idle()
    assert not [one for upstream in here.upstreams.values() for one in upstream.seen(name) if one.body_complete]


@long
@pytest.mark.parametrize(
    ("kind", "fail_open", "survives"),
    [(kind, True, kind == "istio-lean") for kind in KINDS if not kind.startswith("ai-gateway")]
    + [("istio-lean", False, False), ("ai-gateway", False, False), ("ai-gateway-buffered", False, False)],
)
def test_a_picker_that_is_killed_what_becomes_of_what_runs_is_held_and_is_new(
    tmp_path, here, kind, fail_open, survives
):
    """Only where no body passes the picker, and the pool fails open, does it go on; AI Gateway never fails open."""
    with contextlib.ExitStack() as ending, ThreadPoolExecutor(1) as pool:
        own = ending.enter_context(Picking(tmp_path, version=here.version))
        body = body_of(much(kind))
        gateway, running = own.gateway(kind, fail_open=fail_open, **taking(kind, len(body))), []
        for n in range(2):
            headers = [("x-test-id", f"runs-{n}"), behave("sse", hold="body")]
            running.append(ending.enter_context(H1Request(gateway, headers=headers, body=body)))
            assert running[n].send().read_chunk() == sse_event(0)
        held = pool.submit(complete_many, f"http://{gateway}/", 1, lambda _: {"x-test-id": "held"}, body=body)
        own.wait_waiting(1)
        own.sidecar.child.signal(signal.SIGKILL)
        (waited,) = held.result()
        for upstream in own.upstreams.values():
            for n in range(2):
                upstream.release(f"runs-{n}")
        for one in running:
            one.read_all()
        (after,) = complete_many(f"http://{gateway}/", 1, lambda _: {"x-test-id": "new"}, body=body)
        assert [one.complete for one in running] == [survives, survives]
        assert [waited.status, after.status] == ([200, 200] if survives else [500, 500])
        assert [len(own.seen(name)) for name in ("held", "new")] == [int(survives)] * 2


@long
@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_pick_costs_at_most_503_and_no_lease_until_a_health_check_finds_it_and_then_nobody_is_sent_there(
    tmp_path, here, kind
):
    """Without retries a gateway has no next choice; and by its 503 alone a dead server looks like a full one."""
    checks = {"health_check": {"interval": "300ms", "timeout": "200ms"}}
    with Picking(tmp_path, version=here.version, config=checks) as own:
        body = body_of(much(kind))
        gateway, statuses, took_s = own.gateway(kind, **taking(kind, len(body))), [], []
        own.upstreams["a"].down()
        for n in range(4):
            with H1Request(gateway, headers=[("x-test-id", f"dead-{n}")], body=body) as one:
                with contextlib.suppress(ConnectionError):  # the answer came early, and nobody takes the rest
                    one.send()
                one.read_all()
                statuses.append(one.status)
            took_s.append(own.wait_back())
        assert min(took_s) < BACK_S
        assert set(statuses) <= {200, 503}
        wait_until(lambda: own.sidecar.metrics()['extproc_endpoint_up{endpoint="a"}'] == 0, message="it was found")
        answers = complete_many(f"http://{gateway}/", 10, lambda n: {"x-test-id": f"later-{n}"}, body=body_of(3000))
        assert {one.status for one in answers} == {200}
        assert {where for n in range(10) for where in own.seen(f"later-{n}")} == {"b"}
        assert own.upstreams["b"].peak == 1


@pytest.mark.parametrize("kind", ["ai-gateway-buffered", *(["ai-gateway"] if LONG else [])])
def test_envoy_ai_gateway_comes_by_tls_and_the_certificate_that_we_made_ourselves_will_do(tmp_path, kind):
    with Picking(tmp_path, config={"tls": {"self_signed": True}}) as here:
        gateway, name = here.gateway(kind, tls=True), f"tls-{kind}"
        answers = complete_many(
            f"http://{gateway}/", 20, lambda n: {"x-test-id": f"{name}-{n}", **dict([behave("sse", gap_s=0.002)])},
            body=body_of(3000),
        )  # fmt: skip
        assert {one.status for one in answers} == {200}
        assert [upstream.peak for upstream in here.upstreams.values()] == [1, 1]
        assert all(here.seen_where_picked(kind, f"{name}-{n}", tls=True) for n in range(20))
        with blocked(here, gateway, "before-tls"), H1Request(gateway, headers=[("x-test-id", "leaver")]) as leaver:
            leaver.send_head(3000)
            leaver.upload(3000)
            here.wait_waiting(1)
            leaver.rst()
            here.wait_waiting(0)
        here.wait_idle()
        assert here.seen("leaver") == []
