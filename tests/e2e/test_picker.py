"""The sidecar as an endpoint picker behind real Envoys, set up as the control planes of Inference Gateways do.

One sidecar, two inference servers that take one request each, and an Envoy of each kind. `make test-picker` runs all of
it, also on older Envoys; here is a slice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .kit.clients import Completion, H1Request, complete_many
from .kit.envoy import Envoy
from .kit.gateways import HEADER, KINDS, bootstrap, two_pools
from .kit.picking import Picking
from .kit.pool import Store
from .kit.processes import wait_until
from .kit.stack import local
from .kit.upstream import SSE_DONE, behave, sse_event

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = bool(os.environ.get("EXTPROC_LONG"))
BACK_S = 0.05
"""How soon after an answer's last byte its lease is back, at its best: a machine may be busy with others."""
SIZES = (0, 1000, 1_000_000, *((30_000_000,) if LONG else ()))
BUFFERED_BYTES = 30_000
"""The largest body in a gateway that buffers it all as it comes: Envoy Gateway's listener takes 32 KiB."""


VERSIONS = ("", *(("1.36.4", "1.38.3") if LONG else ()))


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version or "supported")
def here(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Picking]:
    with Picking(tmp_path_factory.mktemp("picking"), version=request.param) as picking:
        yield picking


@pytest.fixture(autouse=True)
def bounded(request) -> Iterator[None]:
    """Behind the stack that a module shares no server ever has more than its limit, whatever a test does."""
    shared = [request.getfixturevalue(name) for name in ("here", "reading") if name in request.fixturenames]
    with contextlib.ExitStack() as watching:
        for one in shared:
            watching.enter_context(one.bounded())
        yield


def taking(kind: str, size: int) -> dict[str, int]:
    """How a gateway is set up that takes bodies of this size: Envoy Gateway's `bufferLimit`, if it must be raised."""
    return {"buffer_bytes": 2 * size} if kind == "ai-gateway-buffered" and size > BUFFERED_BYTES else {}


def much(kind: str, size: int = 30_000_000) -> int:
    """What a row sends: a little; but so much where a gateway buffers it all, in the long run."""
    return size if LONG and kind == "ai-gateway-buffered" else 3000


def body_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@contextlib.contextmanager
def blocked(here: Picking, gateway: str, name: str) -> Iterator[None]:
    """All slots are taken by requests that answer when this ends."""
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            complete_many, f"http://{gateway}/v1/chat/completions", 2,
            lambda n: {"x-test-id": f"{name}-{n}", **dict([behave("sse", hold="body")])},
        )  # fmt: skip
        try:
            here.wait_in_flight(2)
            yield
        finally:
            for upstream in here.upstreams.values():
                for number in range(2):
                    upstream.release(f"{name}-{number}")
            assert {one.status for one in running.result()} == {200}


def leave_while_held(here: Picking, gateway: str, kind: str, size: int, name: str) -> None:
    """Have a client hang up that is held with a body of this size under way: it leaves the line, and is never run."""
    with blocked(here, gateway, f"before-{name}"), H1Request(gateway, headers=[("x-test-id", name)]) as ghost:
        ghost.send_head(size)
        if kind != "istio-lean" or size < 1_000_000:  # it has no buffer filter, and stops to read at its limit
            ghost.upload(size)
        here.wait_waiting(1)
        ghost.rst()
        here.wait_waiting(0)
    here.wait_idle()
    assert here.seen(name) == []


def assert_back_at_once(here: Picking, gateway: str, took_s: list[float], body: bytes = b"{}") -> None:
    """At its best a lease is back in BACK_S: on a busy machine a few more requests may be needed to see it."""
    for number in range(30):
        if min(took_s) < BACK_S:
            return
        complete_many(f"http://{gateway}/", 1, lambda _, n=number: {"x-test-id": f"back-{n}"}, body=body)
        took_s.append(here.wait_back())
    raise AssertionError(f"no lease was back within {BACK_S} s: {took_s}")


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_of_any_size_arrive_as_they_were_sent_both_ways_and_the_lease_is_back_at_once(here, kind):
    took_s = []
    for size in SIZES:
        how = taking(kind, size)
        gateway = here.gateway(kind, **how)
        body, name = body_of(size), f"bytes-{kind}-{size}"
        headers = [("x-test-id", name), behave("sse", events=20)]
        with H1Request(gateway, headers=headers, body=body, timeout_s=60) as one:
            assert one.send().read_all() == b"".join(map(sse_event, range(20))) + SSE_DONE
        took_s.append(here.wait_back())
        (record,) = [one for upstream in here.upstreams.values() for one in upstream.seen(name)]
        assert (record.body_bytes, record.body_sha1) == (size, hashlib.sha1(body, usedforsecurity=False).hexdigest())
        assert here.seen_where_picked(kind, name, **how)
    assert_back_at_once(here, gateway, took_s)


READERS = ("ai-gateway-buffered", "own", *(("ai-gateway-strict", "istio-reading", "istio") if LONG else ()))
"""Which read a body's model: BUFFERED with override, without, for requests alone; full duplex; Envoy itself."""


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version or "supported")
def reading(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Picking]:
    config = {"picker": {"read_model": True}, "request_fields": True}  # this for our own Envoy
    models = {"a": ["m1"], "b": ["m2"]}
    with Picking(tmp_path_factory.mktemp("reading"), version=request.param, config=config, models=models) as picking:
        yield picking


def reader(here: Picking, kind: str, size: int = 0) -> str:
    if kind == "own":
        return here.own_envoy()
    strict = {"may_override": False} if kind == "ai-gateway-strict" else {}
    kind = "ai-gateway-buffered" if strict else kind
    more = {"buffer_bytes": 2 * size} if kind == "istio-reading" and size > BUFFERED_BYTES else taking(kind, size)
    return here.gateway(kind, **strict, **more)


def naming(model: str, size: int = 0) -> bytes:
    """A body of about this size that names its model last of what is looked at."""
    head = b'{"messages": "' + b"x" * min(size, 50_000) + f'", "model": "{model}", "rest": "'.encode()
    return head + body_of(max(size - 50_000, 0)).hex()[: max(size - 50_000, 0)].encode() + b'"}'


@pytest.mark.parametrize("kind", READERS)
def test_the_model_is_read_from_a_body_of_any_size_that_comes_whole_and_goes_on_as_it_was_sent(reading, kind):
    if kind == "own" and reading.version:
        pytest.skip("its bootstrap is for the Envoy that is supported")
    took_s = []
    for size in SIZES[1:]:
        gateway, a = reader(reading, kind, size), reading.upstreams["a"]
        for number, (model, where) in enumerate([("m2", "b"), ("m1", "a"), ("m2", "b")]):
            body, name = naming(model, size), f"reads-{kind}-{size}-{number}"
            headers = [("x-test-id", name), (HEADER, a.address), behave("sse", events=20)]
            with H1Request(gateway, headers=headers, body=body, timeout_s=60) as one:
                assert one.send().read_all() == b"".join(map(sse_event, range(20))) + SSE_DONE
            took_s.append(reading.wait_back())
            assert reading.seen(name) == [where]
            (record,) = reading.upstreams[where].seen(name)
            assert record.body_sha1 == hashlib.sha1(body, usedforsecurity=False).hexdigest()
    assert_back_at_once(reading, gateway, took_s, body=naming("m1"))
    (unknown,) = complete_many(f"http://{gateway}/v1/chat/completions", 1, lambda _: {}, body=naming("m3"))
    assert (unknown.status, unknown.headers["x-extproc-outcome"]) == (404, "unknown_model")
    if kind.startswith("ai-gateway"):  # more than it buffers, 32 KiB: its own answer, and no slot was taken
        (long,) = complete_many(f"http://{reader(reading, kind)}/", 1, lambda _: {}, body=naming("m1", 1_000_000))
        assert long.status == 413
        reading.wait_idle()


def test_our_own_envoy_tells_a_picker_for_how_many_sequences_a_request_asks(tmp_path):
    config = {"max_running_requests": 4, "request_fields": True}
    with Picking(tmp_path, upstreams=("a",), config=config) as here, contextlib.ExitStack() as open_requests:
        gateway = here.own_envoy()
        for number, body in enumerate(({"n": 2, "prompt": "x"}, {"prompt": ["x", "y"]}, {"prompt": "x"})):
            headers = [("x-test-id", f"sequences-{number}"), behave("sse", hold="body")]
            one = H1Request(gateway, path="/v1/completions", headers=headers, body=json.dumps(body).encode())
            open_requests.enter_context(one).send()
            here.wait_in_flight(min(number + 1, 2))
        here.wait_waiting(1)
        assert here.in_flight() == {"a": 2}


@pytest.mark.parametrize("kind", READERS)
def test_a_request_whose_model_was_read_waits_for_who_serves_it_and_leaves_the_line_with_its_client(reading, kind):
    if kind == "own" and reading.version:
        pytest.skip("its bootstrap is for the Envoy that is supported")
    gateway, name = reader(reading, kind), f"reads-held-{kind}"
    runs = [("x-test-id", f"{name}-runs"), behave("sse", hold="body")]
    with ThreadPoolExecutor(1) as pool, H1Request(gateway, headers=runs, body=naming("m2")) as running:
        running.send()  # where no mode may be overridden, its answer comes in one piece
        reading.wait_in_flight(1)
        held = pool.submit(
            complete_many, f"http://{gateway}/", 1, lambda _: {"x-test-id": f"{name}-held"}, body=naming("m2", 9000)
        )
        reading.wait_waiting(1)
        with H1Request(gateway, headers=[("x-test-id", f"{name}-gone")], body=naming("m2")) as gone:
            gone.send()
            reading.wait_waiting(2)
            gone.rst()
            reading.wait_waiting(1)
        assert reading.in_flight() == {"a": 0, "b": 1}
        reading.upstreams["b"].release(f"{name}-runs")
        running.read_all()
        (waited,) = held.result()
    assert waited.status == 200
    assert [reading.seen(f"{name}-{what}") for what in ("held", "gone")] == [["b"], []]
    reading.wait_idle()


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_all_are_served_and_no_server_ever_gets_more_than_its_limit(here, kind):
    headers, size = dict([behave("sse", events=3, gap_s=0.002)]), much(kind, 1_000_000)
    answers = complete_many(
        f"http://{here.gateway(kind, **taking(kind, size))}/v1/chat/completions", 30,
        lambda n: {"x-test-id": f"many-{kind}-{n}", **headers}, body=body_of(size),
    )  # fmt: skip
    assert {one.status for one in answers} == {200}
    assert [upstream.peak for upstream in here.upstreams.values()] == [1, 1]
    here.wait_idle()


@pytest.mark.parametrize("kind", ["istio", "istio-lean", "ai-gateway"])
@pytest.mark.parametrize("size", [0, 1000, 3_000_000])
def test_a_client_that_leaves_while_it_is_held_leaves_the_line_and_is_never_run(here, kind, size):
    leave_while_held(here, here.gateway(kind), kind, size, f"ghost-{kind}-{size}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_leaves_while_it_runs_gives_its_slot_back_at_once(here, kind):
    size, took_s = much(kind), []
    for n in range(3 if LONG else 1):
        name = f"left-{kind}-{n}"
        headers = [("x-test-id", name), behave("sse", hold="body")]
        with H1Request(here.gateway(kind, **taking(kind, size)), headers=headers, body=body_of(size)) as leaver:
            assert leaver.send().read_chunk() == sse_event(0)
            assert sum(here.in_flight().values()) == 1
            leaver.rst()
            took_s.append(here.wait_back())
        (where,) = here.seen(name)
        assert here.upstreams[where].wait_ended(name).aborted
    assert not LONG or min(took_s) < BACK_S


def test_a_body_above_what_a_gateway_buffers_is_413_while_it_is_held_and_the_place_in_the_line_is_free(here):
    """Envoy Gateway's listener takes 32 KiB, unless a ClientTrafficPolicy raises it (docs)."""
    gateway = here.gateway("ai-gateway-buffered")
    with blocked(here, gateway, "before-413"), ThreadPoolExecutor(1) as pool:
        held = pool.submit(
            complete_many, f"http://{gateway}/", 1, lambda _: {"x-test-id": "is-413"}, body=body_of(1_000_000)
        )
        assert [one.status for one in held.result()] == [413]
        here.wait_waiting(0)
    assert here.seen("is-413") == []
    here.wait_idle()


def test_a_held_request_is_not_given_up_by_a_message_timeout_where_bodies_are_full_duplex(here):
    """message_timeout is armed outside FULL_DUPLEX_STREAMED alone: so a wait may last as long as a budget."""
    gateway = here.gateway("llm-d", message_timeout="0.3s")
    with ThreadPoolExecutor(1) as pool, blocked(here, gateway, "before-wait"):
        held = pool.submit(complete_many, f"http://{gateway}/", 1, lambda _: {"x-test-id": "waits"}, body=b"x" * 5000)
        here.wait_waiting(1)
        wait_until(lambda: here.sidecar.queues()["waiting"][0]["age_s"] > 0.8, message="it waited")
    assert [one.status for one in held.result()] == [200]


def test_what_nobody_will_serve_in_time_is_refused_with_the_gateways_words(here):
    gateway = here.gateway("istio")
    with blocked(here, gateway, "before-refusal"):
        (late,) = complete_many(f"http://{gateway}/", 1, lambda _: {"x-llm-d-inference-ttl": "1"}, body=b"{}")
    assert late.status == 429
    assert late.headers["x-llm-d-request-dropped-reason"] in ("rejected-ttl-expired", "rejected-saturated")


@pytest.mark.parametrize("kind", ["istio", "llm-d"])
def test_what_a_gateway_refuses_before_it_asks_reaches_the_client_as_it_is(here, kind):
    """The answer that another filter gave comes to us, and in full duplex only what we send back goes on."""
    gateway = here.gateway(kind, refuses=True)
    for _ in range(2):
        (refused,) = complete_many(f"http://{gateway}/", 1, lambda _: {}, body=body_of(1000))
        assert (refused.status, refused.body) == (403, b"fault filter abort")
    here.wait_idle()


@pytest.mark.parametrize(("kind", "survives"), [("istio", False), ("istio-lean", True)])
def test_a_picker_that_dies_cuts_what_runs_in_full_duplex_and_not_where_bodies_pass_it_by(tmp_path, kind, survives):
    """FailOpen says that requests go on without a picker: true where no body depends on it (docs)."""
    with Picking(tmp_path) as here:
        headers = [("x-test-id", "runs"), behave("sse", hold="body")]
        with H1Request(here.gateway(kind, fail_open=True), headers=headers, body=b"{}") as running:
            assert running.send().read_chunk() == sse_event(0)
            here.sidecar.child.signal(signal.SIGKILL)
            for upstream in here.upstreams.values():
                upstream.release("runs")
            running.read_all()
            assert running.complete is survives
        (after,) = complete_many(f"http://{here.gateway(kind, fail_open=True)}/", 1, lambda _: {}, body=b"{}")
        assert after.status == (200 if survives else 500)


def test_the_bootstrap_that_envoy_config_prints_is_lean_strict_and_hears_no_clients_destination(here):
    """One cluster of all endpoints; only the picked one is used, and with nobody picked there is none."""
    gateway = here.own_envoy()
    a, b = here.upstreams.values()
    for upstream in (a, b):
        upstream.clear()
    spoofed = {"x-gateway-destination-endpoint": a.address}
    answers = complete_many(
        f"http://{gateway}/", 20, lambda n: {"x-test-id": f"own-{n}", **spoofed, **dict([behave("sse", gap_s=0.002)])}
    )
    assert {one.status for one in answers} == {200}
    assert (a.peak, b.peak) == (1, 1)
    assert not [name for one in a.records() for name, _ in one.headers if name.startswith("x-gateway-")]
    here.wait_idle()


@pytest.mark.parametrize("kind", ["istio", "own"])
def test_a_list_of_next_choices_is_followed_to_the_first_that_lives_and_the_lease_is_there(tmp_path, kind):
    """Of three the first one, two or three choices live: the gateway goes along the list, and tells who served."""
    config = {"max_running_requests": 8, "picker": {"fallbacks": 2}}
    with Picking(tmp_path, upstreams=("a", "b", "c"), config=config) as here:
        gateway = here.own_envoy() if kind == "own" else here.gateway("istio", retries=2)
        for dead in ("", "a", "b"):
            if dead:
                here.upstreams[dead].down()
            for number in range(4):
                name = f"list-{dead}-{number}"
                headers = [("x-test-id", name), behave("sse", hold="body")]
                with H1Request(gateway, headers=headers, body=b"{}") as one:
                    assert one.send().read_chunk() == sse_event(0)
                    (served,) = here.seen(name)
                    assert {endpoint for endpoint, count in here.in_flight().items() if count} == {served}
                    here.upstreams[served].release(name)
                    one.read_all()
                    assert one.complete
                here.wait_idle()
                if kind == "istio":
                    line = here.envoy("istio", retries=2).wait_access_log(lambda entry, name=name: entry["id"] == name)
                    alive = [address for address in line["picked"].split(",") if address in here.alive()]
                    assert line["upstream"] == alive[0], "the first of the list that lives, and no other by chance"


def test_endpoints_that_dns_finds_are_gone_to_by_their_address_and_nobody_is_gone_to_without_a_pick(tmp_path):
    """The printed bootstrap does not list them; a client names a destination of its own, heard neither way."""
    with Picking(tmp_path, found_by_dns=True) as here:
        gateway = here.own_envoy()
        spoofed = {"x-gateway-destination-endpoint": here.upstreams["a"].address}
        answers = complete_many(
            f"http://{gateway}/",
            20,
            lambda n: {"x-test-id": f"dns-{n}", **spoofed, **dict([behave("sse", gap_s=0.002)])},
        )
        assert {one.status for one in answers} == {200}
        assert [upstream.peak for upstream in here.upstreams.values()] == [1, 1]
        here.sidecar.child.signal(signal.SIGKILL)
        (after,) = complete_many(f"http://{gateway}/", 1, lambda _: {"x-test-id": "nobody", **spoofed}, timeout_s=30)
        assert after.status == 503
        assert here.seen("nobody") == []


def test_two_weighted_pools_each_have_their_own_picker_and_no_request_goes_to_the_others_pool(tmp_path):
    """Our pick has the gateway choose its route anew: it must be the same pool's."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    with Picking(tmp_path / "x") as x, Picking(tmp_path / "y", upstreams=("c", "d")) as y:
        http, log = local(), tmp_path / "two.access"
        count = 120  # of 40 the smaller pool gets half once in 2,000 times: Envoy draws for each
        pools = [
            bootstrap("istio", http, here.sidecar.listen, [one.address for one in here.upstreams.values()], log)
            for here in (x, y)
        ]
        with Envoy(json.dumps(two_pools(*pools, (3, 1))), tmp_path, name="two"):
            answers = complete_many(
                f"http://{http}/", count, lambda n: {"x-test-id": f"two-{n}", **dict([behave("sse", gap_s=0.002)])},
                body=body_of(3000),
            )  # fmt: skip
        assert {one.status for one in answers} == {200}
        served = [[upstream.peak for upstream in here.upstreams.values()] for here in (x, y)]
        assert served == [[1, 1], [1, 1]]
        counts = [sum(len(here.seen(f"two-{n}")) for n in range(count)) for here in (x, y)]
        assert sum(counts) == count
        assert counts[0] > counts[1] > 0
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(lines) == count
        assert all(line["upstream"] == line["picked"] for line in lines)
        for here in (x, y):
            here.wait_idle()
            assert sum(dispatched(here).values()) == counts[(x, y).index(here)]


def dispatched(here: Picking) -> dict[str, float]:
    return {name: n for name, n in here.sidecar.metrics().items() if name.startswith("extproc_dispatched_total")}


def test_a_dead_pick_is_retried_elsewhere_by_istio_and_the_lease_moves_to_who_served(tmp_path):
    with Picking(tmp_path, config={"max_running_requests": 2}) as here:
        gateway = here.gateway("istio", retries=2)
        here.upstreams["a"].down()
        for number in range(8):
            headers = [("x-test-id", f"dead-{number}"), behave("sse", hold="body")]
            with H1Request(gateway, headers=headers, body=b"{}") as one:
                assert one.send().read_chunk() == sse_event(0)
                assert here.in_flight() == {"a": 0, "b": 1}
                here.upstreams["b"].release(f"dead-{number}")
                one.read_all()
                assert one.complete
            here.wait_idle()


def test_a_gateways_subset_is_kept_to_and_one_that_matches_nobody_is_503(here):
    for only, upstream in here.upstreams.items():
        gateway = here.gateway("istio", subset=(upstream.address,))
        answers = complete_many(f"http://{gateway}/", 6, lambda n, only=only: {"x-test-id": f"subset-{only}-{n}"})
        assert {one.status for one in answers} == {200}
        assert {name for n in range(6) for name in here.seen(f"subset-{only}-{n}")} == {only}
    (refused,) = complete_many(f"http://{here.gateway('istio', subset=('127.0.0.9:1',))}/", 1, lambda _: {})
    assert (refused.status, refused.headers["x-extproc-outcome"]) == (503, "none_allowed")


def test_two_pickers_that_share_their_limits_each_behind_a_gateway_never_pass_one_together(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as ending:
        store = ending.enter_context(Store(tmp_path))

        def config() -> dict[str, object]:
            return {"replicas": {"listen": local(), "valkey": {"url": store.url}}}

        x = ending.enter_context(Picking(tmp_path / "x", config=config()))
        y = ending.enter_context(Picking(tmp_path / "y", config=config(), beside=x))
        both = (x, y)
        wait_until(
            lambda: all((one := here.sidecar.queues()["replicas"])["group"] == one["members"] == 2 for here in both),
            20, "one group",
        )  # fmt: skip
        gateways = [here.gateway(kind) for here, kind in zip(both, ("istio", "istio-lean"), strict=True)]
        pool = ending.enter_context(ThreadPoolExecutor(4))

        def ask(gateway: str, count: int, *, hold: bool) -> Future[list[Completion]]:
            how = dict([behave("sse", hold="body") if hold else behave("sse", gap_s=0.002)])
            return pool.submit(
                complete_many, f"http://{gateway}/", count,
                lambda n: {"x-test-id": f"{gateway}-{hold}-{n}", **how}, body=body_of(3000),
            )  # fmt: skip

        held = [ask(gateway, 1, hold=True) for gateway in gateways]
        try:  # a group that has just formed uses no server before its page was read again
            wait_until(
                lambda: [one.open_requests() for one in x.upstreams.values()] == [1, 1], 15, "one at each server"
            )
            late = [ask(gateway, 20, hold=False) for gateway in gateways]
            wait_until(
                lambda: max(here.sidecar.queues()["waiting_total"] for here in both) == 40, message="one line of 40"
            )
        finally:
            for upstream in x.upstreams.values():
                for gateway in gateways:
                    upstream.release(f"{gateway}-True-0")
        assert {one.status for answers in (*held, *late) for one in answers.result()} == {200}
        assert [upstream.peak for upstream in x.upstreams.values()] == [1, 1]
        for here in both:
            here.wait_idle()
