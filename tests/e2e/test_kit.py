"""The kit does what it says: proved with the real Envoy as a plain proxy, without ext_proc."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import socket
import ssl
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trustme

from .kit.clients import H1Request, H2Client, complete_many
from .kit.envoy import Envoy, plain_bootstrap, validate
from .kit.loops import run
from .kit.processes import free_port, http_get, wait_until
from .kit.upstream import SSE_DONE, Upstream, behave, sse_event

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_numbers = iter(range(1, 10_000))


class Plain(NamedTuple):
    """One Envoy with one upstream behind it, reached over HTTP/1.1 (cluster h1) and HTTP/2 (cluster h2)."""

    address: str
    envoy: Envoy
    upstream: Upstream

    def headers(self, cluster: str, kind: str = "ok", **how: float | str) -> tuple[str, list[tuple[str, str]]]:
        request_id = f"k{next(_numbers)}"
        return request_id, [("x-test-id", request_id), ("x-cluster", cluster), behave(kind, **how)]

    def flags(self, request_id: str) -> str:
        """The response flags in Envoy's access log."""
        return str(self.envoy.wait_access_log(lambda entry: entry["id"] == request_id)["flags"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    directory = tmp_path_factory.mktemp("plain")
    with Upstream() as upstream:
        address = f"127.0.0.1:{free_port()}"
        clusters = {"h1": (upstream.address, "h1"), "h2": (upstream.address, "h2")}
        clusters["dead"] = (f"127.0.0.1:{free_port()}", "h1")
        bootstrap = plain_bootstrap(address, f"127.0.0.1:{free_port()}", clusters, directory / "access.log")
        with Envoy(bootstrap, directory) as envoy:
            yield Plain(address, envoy, upstream)


@pytest.fixture(params=["h1", "h2"])
def cluster(request: pytest.FixtureRequest) -> str:
    """The protocol between Envoy and the upstream."""
    return str(request.param)


EVENTS = b"".join(sse_event(number) for number in range(3))


# Envoy


def test_a_bootstrap_is_validated_by_the_real_binary(plain: Plain, tmp_path: Path) -> None:
    assert validate(plain.envoy.bootstrap, tmp_path)[0]
    good, said = validate(plain.envoy.bootstrap.replace("connect_timeout: 1s", "connect_timeot: 1s"), tmp_path)
    assert not good
    assert "connect_timeot" in said


def test_envoy_that_refuses_its_bootstrap_fails_with_its_reason(plain: Plain, tmp_path: Path) -> None:
    bad = plain.envoy.bootstrap.replace("codec_type: AUTO", "codec_type: MAGIC")
    with pytest.raises(AssertionError, match=r"(?s)ended with 1 before admin.*MAGIC"), Envoy(bad, tmp_path):
        pass


def test_stats_count_what_passes(plain: Plain, cluster: str) -> None:
    before = plain.envoy.stats(f"cluster.{cluster}.")[f"cluster.{cluster}.upstream_rq_total"]
    _, headers = plain.headers(cluster)
    with H1Request(plain.address, headers=headers) as client:
        client.send().read_all()
    assert plain.envoy.stats(f"cluster.{cluster}.")[f"cluster.{cluster}.upstream_rq_total"] == before + 1


# Behaviours, seen by an HTTP/1.1 client


def test_ok_is_answered_with_a_content_length_and_the_request_is_recorded(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster, size=300_000)
    body = bytes(range(256)) * 1000
    with H1Request(plain.address, "/v1/x", headers=[*headers, ("x-a", "1"), ("x-a", "2")], body=body) as client:
        client.send()
        assert client.read_head() == 200
        assert client.header("content-length") == "300000"
        assert client.read_all() == b"x" * 300_000
        assert client.complete
        # With the whole content-length read, the end of an HTTP/2 upstream's stream may still be on its way to Envoy.
        assert plain.flags(request_id) == "-"
    seen = plain.upstream.wait_ended(request_id)
    assert (seen.protocol, seen.method, seen.path, seen.attempt) == (cluster, "POST", "/v1/x", 1)
    assert [value for name, value in seen.headers if name == "x-a"] == ["1", "2"]
    assert (seen.body_bytes, seen.body_sha1) == (len(body), hashlib.sha1(body, usedforsecurity=False).hexdigest())
    assert (seen.finished, seen.cut, seen.aborted) == (True, False, False)


def test_sse_comes_event_by_event(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster, "sse", events=3, hold="body")
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_chunk() == sse_event(0)
        assert client.header("transfer-encoding") == "chunked"
        with pytest.raises(AssertionError, match="no more of the body in time"):
            client.read_chunk(0.05)
        assert plain.upstream.wait_for(request_id).open
        plain.upstream.release(request_id)
        assert client.read_all() == EVENTS + SSE_DONE
        assert client.complete
    assert plain.upstream.wait_ended(request_id).finished


def test_events_keep_their_gap(plain: Plain, cluster: str) -> None:
    _, headers = plain.headers(cluster, "sse", events=3, gap_s=0.05)
    with H1Request(plain.address, headers=headers) as client:
        started = time.monotonic()
        client.send().read_all()
        assert time.monotonic() - started >= 0.1


def test_204_has_no_body(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster, "empty")
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_head() == 204
        assert client.complete
    assert plain.upstream.wait_ended(request_id).finished


@pytest.mark.parametrize("status", [500, 503])
def test_a_status_is_as_ordered(plain: Plain, cluster: str, status: int) -> None:
    _, headers = plain.headers(cluster, status=status)
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_head() == status


def test_a_slow_head_comes_late(plain: Plain, cluster: str) -> None:
    _, headers = plain.headers(cluster, wait_s=0.2)
    with H1Request(plain.address, headers=headers) as client:
        started = time.monotonic()
        assert client.send().read_head() == 200
        assert time.monotonic() - started >= 0.2


def test_a_held_head_comes_when_it_is_released_also_beforehand(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster, hold="head")
    with H1Request(plain.address, headers=headers) as client:
        client.send()
        with pytest.raises(AssertionError, match="no response head in time"):
            client.read_head(0.05)
        plain.upstream.release(request_id)
        assert client.read_head() == 200
    request_id, headers = plain.headers(cluster, hold="head")
    plain.upstream.release(request_id)
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_head() == 200


@pytest.mark.parametrize(("kind", "flags"), [("rst", {"h1": "UPE", "h2": "UR"}), ("fin", {"h1": "UPE", "h2": "UC"})])
def test_a_cut_mid_stream_cuts_the_client(plain: Plain, cluster: str, kind: str, flags: dict[str, str]) -> None:
    request_id, headers = plain.headers(cluster, kind, events=2, hold="body")
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_chunk() == sse_event(0)
        plain.upstream.release(request_id)
        client.read_all()
        assert (client.status, client.complete, client.ended) == (200, False, "fin")
    record = plain.upstream.wait_ended(request_id)
    assert (record.finished, record.cut, record.aborted) == (False, True, False)
    assert plain.flags(request_id) == flags[cluster]


@pytest.mark.parametrize("kind", ["rst", "fin"])
def test_a_cut_before_the_head_is_a_503(plain: Plain, cluster: str, kind: str) -> None:
    request_id, headers = plain.headers(cluster, kind, events=0)
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_head() == 503
        client.read_all()
    assert plain.upstream.wait_ended(request_id).cut
    assert plain.flags(request_id) == ("UR" if (cluster, kind) == ("h2", "rst") else "UC")


def test_failing_attempts_are_counted_per_request(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster, fail=1)
    for status in (503, 200):
        with H1Request(plain.address, headers=headers) as client:
            assert client.send().read_head() == status
    assert [(seen.attempt, seen.cut) for seen in plain.upstream.seen(request_id)] == [(1, True), (2, False)]


def test_nobody_listens_while_an_upstream_is_down(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster)
    plain.upstream.down()
    try:
        with H1Request(plain.address, headers=headers) as client:
            assert client.send().read_head() == 503
        assert plain.flags(request_id) == "UF"
        assert plain.upstream.seen(request_id) == []
    finally:
        plain.upstream.up()
    with H1Request(plain.address, headers=headers) as client:
        assert client.send().read_head() == 200


def test_the_metrics_page_tells_the_truth_and_is_not_recorded(plain: Plain) -> None:
    plain.upstream.clear()
    assert b'vllm:num_requests_running{engine="0",model_name="upstream"} 0' in _metrics(plain)
    request_id, headers = plain.headers("h1", hold="head")
    with H1Request(plain.address, headers=headers) as client:
        client.send()
        plain.upstream.wait_for(request_id)
        assert b'vllm:num_requests_running{engine="0",model_name="upstream"} 1' in _metrics(plain)
        plain.upstream.release(request_id)
        client.read_all()
    assert [record.path for record in plain.upstream.records()] == ["/v1/chat/completions"]
    assert plain.upstream.peak == 1


def _metrics(plain: Plain) -> bytes:
    status, page = http_get(plain.upstream.address, "/metrics")
    assert status == 200
    return page


# Clients that leave


@pytest.mark.parametrize("leave", ["fin", "rst", "half_close"])
@pytest.mark.parametrize("hold", ["head", "body"])
def test_an_http1_client_that_leaves_is_noticed(plain: Plain, cluster: str, leave: str, hold: str) -> None:
    request_id, headers = plain.headers(cluster, "sse", hold=hold)
    with H1Request(plain.address, headers=headers) as client:
        client.send()
        if hold == "body":
            assert client.read_chunk() == sse_event(0)
        plain.upstream.wait_for(request_id)
        getattr(client, leave)()
        record = plain.upstream.wait_ended(request_id)
    assert (record.finished, record.aborted) == (False, True)
    assert plain.flags(request_id) == "DC"


@pytest.mark.parametrize(("leave", "flags"), [("stream", "DR"), ("fin", "DC"), ("rst", "DC")])
@pytest.mark.parametrize("hold", ["head", "body"])
def test_an_http2_client_that_leaves_is_noticed(plain: Plain, cluster: str, leave: str, flags: str, hold: str) -> None:
    request_id, headers = plain.headers(cluster, "sse", hold=hold)
    with H2Client(plain.address) as client:
        stream = client.request(headers=headers, body=b"{}")
        if hold == "body":
            assert stream.read_chunk() == sse_event(0)
        plain.upstream.wait_for(request_id)
        if leave == "stream":
            stream.rst()
        else:
            getattr(client, leave)()
        assert plain.upstream.wait_ended(request_id).aborted
    assert plain.flags(request_id) == flags


def test_an_http2_client_that_resets_one_stream_keeps_the_others(plain: Plain) -> None:
    first, first_headers = plain.headers("h2", "sse", hold="body")
    second, second_headers = plain.headers("h2", "sse", hold="body")
    with H2Client(plain.address) as client:
        streams = [client.request(headers=headers) for headers in (first_headers, second_headers)]
        for stream in streams:
            assert stream.read_chunk() == sse_event(0)
        streams[0].rst()
        assert plain.upstream.wait_ended(first).aborted
        plain.upstream.release(second)
        assert streams[1].read_all() == EVENTS + SSE_DONE
        assert streams[1].complete
    assert plain.upstream.wait_ended(second).finished


# HTTP/2 answers


def test_an_http2_client_reads_every_kind_of_answer(plain: Plain, cluster: str) -> None:
    expected = {"ok": b"x" * 100, "sse": EVENTS + SSE_DONE, "empty": b""}
    with H2Client(plain.address) as client:
        for kind, body in expected.items():
            _, headers = plain.headers(cluster, kind)
            stream = client.request(headers=headers)
            assert stream.read_head() == (204 if kind == "empty" else 200)
            assert stream.read_all() == body
            assert stream.complete
            assert stream.trailers == []


def test_trailers_of_an_http2_upstream_reach_an_http2_client(plain: Plain) -> None:
    request_id, headers = plain.headers("h2", "trailers")
    with H2Client(plain.address) as client:
        stream = client.request(headers=headers)
        assert stream.read_all() == EVENTS + SSE_DONE
        assert ("x-trailer", "here") in stream.trailers
    assert plain.envoy.wait_access_log(lambda entry: entry["id"] == request_id)["trailer"] == "here"


@pytest.mark.parametrize("kind", ["rst", "fin"])
def test_a_cut_mid_stream_resets_the_http2_stream(plain: Plain, cluster: str, kind: str) -> None:
    request_id, headers = plain.headers(cluster, kind, events=2, hold="body")
    with H2Client(plain.address) as client:
        stream = client.request(headers=headers)
        assert stream.read_chunk() == sse_event(0)
        plain.upstream.release(request_id)
        stream.read_all()
        assert (stream.status, stream.complete, client.closed) == (200, False, "")
        assert stream.reset_code is not None


# Sizes and speeds


def test_a_large_upload_arrives_whole(plain: Plain, cluster: str) -> None:
    size = 5_000_000
    digest = hashlib.sha1(b"u" * size, usedforsecurity=False).hexdigest()
    request_id, headers = plain.headers(cluster)
    with H1Request(plain.address, headers=headers) as client:
        assert client.send_head(size).upload(size) == size
        assert client.read_head() == 200
    record = plain.upstream.wait_ended(request_id)
    assert (record.body_bytes, record.body_sha1, record.body_complete) == (size, digest, True)
    request_id, headers = plain.headers(cluster)
    with H2Client(plain.address) as h2_client:
        stream = h2_client.request(headers=headers, end=False)
        assert stream.upload(size) == size
        assert stream.read_head() == 200
    assert plain.upstream.wait_ended(request_id).body_sha1 == digest


def test_an_upload_that_stops_half_way_is_recorded_as_such(plain: Plain, cluster: str) -> None:
    request_id, headers = plain.headers(cluster)
    with H1Request(plain.address, headers=headers) as client:
        client.send_head(1000).upload(400)
        wait_until(lambda: plain.upstream.wait_for(request_id).body_bytes == 400, message="400 bytes arrive")
        client.fin()
    record = plain.upstream.wait_ended(request_id)
    assert (record.body_complete, record.aborted) == (False, True)


def test_a_client_that_does_not_read_slows_the_upstream_down(plain: Plain, cluster: str) -> None:
    size = 40_000_000
    paused = f"cluster.{cluster}.upstream_flow_control_paused_reading_total"
    before = plain.envoy.stats(paused)[paused]
    request_id, headers = plain.headers(cluster, size=size)
    with H1Request(plain.address, headers=headers, receive_buffer_bytes=32 * 1024) as client:
        assert client.send().read_head() == 200
        wait_until(lambda: plain.envoy.stats(paused)[paused] > before, message="Envoy stops reading the upstream")
        assert plain.upstream.wait_for(request_id).open
        assert len(client.read_all()) == size
        assert client.complete
    assert plain.upstream.wait_ended(request_id).finished


def test_many_polite_clients_are_served_at_once(plain: Plain, cluster: str) -> None:
    ids = [f"many-{cluster}-{number}" for number in range(50)]

    def headers(number: int) -> dict[str, str]:
        name, value = behave("sse", events=4, gap_s=0.05, wait_s=0.1, hold="body")
        return {"x-test-id": ids[number], "x-cluster": cluster, name: value}

    plain.upstream.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete_many, f"http://{plain.address}/v1/chat/completions", 50, headers)
        wait_until(lambda: plain.upstream.open_requests() == 50, message="all are under way")
        for one in ids:
            plain.upstream.release(one)
        completions = asked.result()
    assert {(one.status, one.error, one.body) for one in completions} == {
        (200, "", b"".join(map(sse_event, range(4))) + SSE_DONE)
    }
    for number, one in enumerate(completions):
        assert one.number == number
        assert one.head_s is not None
        assert one.first_chunk_s is not None
        assert 0.1 <= one.head_s <= one.first_chunk_s <= one.end_s
        assert len(plain.upstream.seen(ids[number])) == 1
    gaps_s = [one.end_s - (one.first_chunk_s or one.end_s) for one in completions]
    assert max(gaps_s) >= 0.1, "a busy client may be late for some, not for all"
    assert plain.upstream.peak == 50


def test_a_polite_client_reports_an_answer_that_was_cut(plain: Plain) -> None:
    name, value = behave("rst", events=2, gap_s=0.05)
    (one,) = complete_many(f"http://{plain.address}/", 1, lambda _: {"x-cluster": "h1", name: value})
    assert one.status == 200
    assert one.body.startswith(sse_event(0))
    assert one.error


# loops


def test_clients_whose_time_is_over_leave_no_connection_behind_to_a_server_that_reads_no_more():
    with socket.create_server(("127.0.0.1", 0)) as listener, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        url = "http://{}:{}/".format(*listener.getsockname())
        (answer,) = complete_many(url, 1, lambda _: {}, body=bytes(30_000_000), timeout_s=0.5)
        gc.collect()
    assert "TimeoutError" in answer.error
    assert not warned


def test_a_loop_does_not_end_before_a_tls_connection_that_it_closed():
    ca = trustme.CA()
    here = ca.issue_cert("127.0.0.1")
    there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    here.configure_cert(there)
    mine = ssl.create_default_context()
    ca.configure_trust(mine)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take_leave_slowly() -> None:
            with there.wrap_socket(listener.accept()[0], server_side=True) as connection:
                time.sleep(0.1)  # what is tested: it takes until then
                connection.recv(1)

        server = threading.Thread(target=take_leave_slowly)
        server.start()

        async def hang_up() -> None:
            _, writer = await asyncio.open_connection(*listener.getsockname(), ssl=mine)
            writer.close()

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ResourceWarning)
            run(hang_up())
            gc.collect()
        server.join()
    assert not warned
