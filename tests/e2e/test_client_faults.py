"""Clients that leave, dawdle, or come by the thousand: leases return, memory returns, nobody is run for nobody."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .kit.clients import H1Request, H2Client, complete_many
from .kit.load import KEPT_BYTES, SAW_BYTES, Blocker, Growth, descriptors, memory_bytes
from .kit.processes import wait_until
from .kit.upstream import behave, sse_event

if TYPE_CHECKING:
    from .kit.clients import H2Stream

LONG = os.environ.get("EXTPROC_LONG") == "1"


def test_clients_that_leave_while_they_wait_never_reach_an_engine(stack):
    here = stack()
    with ThreadPoolExecutor(1) as pool:
        blocker = Blocker(pool, here)
        waiting = [H1Request(here.address, headers=[("x-test-id", f"gone-{n}")], body=b"{}") for n in range(20)]
        for request in waiting:
            request.__enter__().send()
        here.wait_waiting(20)
        for index, request in enumerate(waiting):
            (request.fin, request.half_close, request.rst)[index % 3]()
        here.wait_waiting(0)
        for request in waiting:
            request.__exit__()
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert not [record for record in here.upstreams["a"].records() if record.request_id.startswith("gone-")]
    assert here.outcomes("cancelled") == 20


@pytest.mark.parametrize("leave", ["fin", "rst"])
@pytest.mark.parametrize("size", [6 << 20, 24 << 20] if LONG else [6 << 20])
def test_an_abandoned_big_upload_is_noticed_while_it_is_held_and_is_not_run_for_nobody(stack, leave, size):
    """With Envoy's default buffer of 1 MiB the disconnect goes unnoticed over HTTP/1.1, and a ghost is dispatched."""
    here = stack()
    with ThreadPoolExecutor(1) as pool:
        blocker = Blocker(pool, here)
        with H1Request(here.address, headers=[("x-test-id", "ghost")], body=b"x" * size) as upload:
            upload.send()
            here.wait_waiting(1)
            getattr(upload, leave)()
            here.wait_waiting(0)
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert not here.upstreams["a"].seen("ghost")


def test_an_upload_that_is_abandoned_half_way_is_not_run_for_nobody(stack):
    here = stack()
    with ThreadPoolExecutor(1) as pool:
        blocker = Blocker(pool, here)
        with H1Request(here.address, headers=[("x-test-id", "half")]) as upload:
            upload.send_head(8 << 20)
            assert upload.upload(4 << 20) == 4 << 20
            assert here.waiting() == [], "it takes its place when all of it is here"
            upload.rst()
        blocker.free()
        assert blocker.statuses() == {200}
    here.wait_idle()
    assert not here.upstreams["a"].seen("half")


def test_twenty_clients_that_abort_mid_stream_in_every_way_give_their_slots_back_at_once(stack):
    here = stack(config={"max_running_requests": 20})
    asked = {"x-test-id": "", **dict([behave("sse", hold="body")])}
    with contextlib.ExitStack() as clients:
        requests: list[H1Request | H2Stream] = []
        for number in range(20):
            headers = [*{**asked, "x-test-id": f"abort-{number}"}.items()]
            if number % 2:
                requests.append(clients.enter_context(H1Request(here.address, headers=headers, body=b"{}")).send())
            else:
                connection = clients.enter_context(H2Client(here.address))
                requests.append(connection.request(headers=headers, body=b"{}"))
        for request in requests:
            assert request.read_chunk() == sse_event(0)
        here.wait_in_flight("a", 20)
        for number, request in enumerate(requests):
            if isinstance(request, H1Request):
                (request.fin, request.half_close, request.rst)[number % 3]()
            else:
                (request.rst, request.client.fin, request.client.rst)[number % 3]()
        here.wait_idle()
        for number in range(20):
            assert here.upstreams["a"].wait_ended(f"abort-{number}").aborted
    assert {one.status for one in complete_many(here.url, 20, lambda n: {"x-test-id": f"late-{n}"})} == {200}


def test_slow_readers_hold_only_their_own_slots_and_give_them_back_when_they_leave(stack):
    """Answers too big for any buffer, and nobody reads: the rest of the traffic goes on in the slots that are left."""
    here = stack(config={"max_running_requests": 8})
    with contextlib.ExitStack() as clients:
        for number in range(6):
            headers = [("x-test-id", f"slow-{number}"), behave(size=16_000_000)]
            request = H1Request(here.address, headers=headers, body=b"{}", receive_buffer_bytes=4096)
            clients.enter_context(request).send()
        here.wait_in_flight("a", 6)
        others = complete_many(here.url, 40, lambda n: {"x-test-id": f"quick-{n}"})
        assert {one.status for one in others} == {200}
        here.wait_in_flight("a", 6)  # a client has its answer a moment before we hear of its end
        assert here.upstreams["a"].peak <= 8
    here.wait_idle()


def test_opens_and_cancels_by_the_thousand_leave_nothing_behind(stack):
    """500 at once, all abandoned while they wait; 10,000 and more in `make faults`."""
    rounds = 21 if LONG else 4
    here = stack(config={"max_running_requests": 2})
    sidecar = here.sidecar.child

    def one_round(number: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            blocker = Blocker(pool, here, 2)
            answers = complete_many(here.url, 500, lambda n: {"x-test-id": f"c-{number}-{n}"}, timeout_s=0.6)
            assert {answer.status for answer in answers} == {0}
            blocker.free()
            assert blocker.statuses() == {200}
        here.wait_idle()

    one_round(0)
    before = descriptors(sidecar.pid)
    for number in range(1, rounds):
        here.upstreams["a"].clear()
        one_round(number)
    wait_until(lambda: descriptors(sidecar.pid) <= before + 2, message="descriptors return")
    wait_until(lambda: here.sidecar.metrics()["extproc_streams"] == 0)
    assert not [one for one in here.upstreams["a"].records() if one.request_id.startswith("c-")]


@pytest.mark.skipif(not LONG, reason="minutes: make faults")
@pytest.mark.parametrize("kind", ["served", "abandoned"])
def test_memory_of_30_000_streams_returns(stack, kind):
    """Over 100,000, since an allocator's saw is a mebibyte high: what is kept must show against that."""
    here = stack(config={"max_running_requests": 64 if kind == "served" else 1})
    growth, per_round = Growth(), 10_000
    with ThreadPoolExecutor(1) as pool:
        for number in range(13):
            blocker = Blocker(pool, here) if kind == "abandoned" else None
            timeout_s = 30.0 if blocker is None else 0.1
            for _ in range(per_round // 1000):
                answers = complete_many(here.url, 1000, lambda _: {"x-test-id": "m"}, gap_s=0.0005, timeout_s=timeout_s)
                assert {one.status for one in answers} == {200 if blocker is None else 0}
            if blocker is not None:
                blocker.free()
                assert blocker.statuses() == {200}
            wait_until(lambda: here.sidecar.metrics()["extproc_streams"] == 0)
            here.upstreams["a"].clear()
            if number >= 3:  # allocators' pools are filled by then
                growth.add((number + 1) * per_round, memory_bytes(here.sidecar.child.pid))
    print(f"{kind}: {growth}")
    assert growth.kept * growth.units <= KEPT_BYTES * growth.units + SAW_BYTES, growth
