"""Gateways that can't be had here, as gRPC clients that speak as the sources of agentgateway and NGINX do.

agentgateway (crates/agentgateway/src/http/ext_proc.rs): TLS that looks at no certificate, all in full duplex, the
body at once, and a half-close without a reset when its client has left. NGINX Gateway Fabric (cmd/gateway/
endpoint_picker.go): headers in `value`, the whole body as one message, a half-close, and then it reads to the end.
"""

from __future__ import annotations

import contextlib
import queue
import ssl
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc._pb import ext_proc_pb2 as pb
from extproc.stream import wire

from .kit.processes import PATIENCE_S, wait_until
from .kit.stack import DEFAULTS, Sidecar, local

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "127.0.0.1:65001"  # nobody is there: these clients follow no pick
METHOD = f"/{wire.SERVICE}/{wire.METHOD}"
DUPLEX = pb.ProcessingMode.FULL_DUPLEX_STREAMED


@pytest.fixture(scope="module", params=["completion_queue", "asyncio"])
def sidecar(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    config = {
        "dialect": "endpoint-picker",
        "transport": request.param,
        "endpoints": [{"name": "a", "address": ADDRESS}],
        "scrape_interval": 0,
        "tls": {"self_signed": True},
        "health_listen": local(),
    }
    with Sidecar({**DEFAULTS, **config}, tmp_path_factory.mktemp("picker")) as running:
        yield running


@contextlib.contextmanager
def channel_to(sidecar: Sidecar) -> Iterator[grpc.Channel]:
    """As gateways connect that look at no certificate; Python's gRPC wants one, so it is asked for first."""
    host, _, port = sidecar.listen.rpartition(":")
    shown = ssl.get_server_certificate((host, int(port))).encode()
    credentials = grpc.ssl_channel_credentials(shown)
    with grpc.secure_channel(
        sidecar.listen, credentials, options=[("grpc.ssl_target_name_override", "extproc")]
    ) as channel:
        yield channel


class Talk:
    """A gateway's side of one stream."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self._heard: list[pb.ProcessingResponse] = []
        self.ended = threading.Event()
        self.call = channel.stream_stream(METHOD)(iter(self._out.get, None))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for data in self.call:
                self._heard.append(pb.ProcessingResponse.FromString(data))
        except grpc.RpcError:
            pass
        self.ended.set()

    def say(self, **message: Any) -> Talk:
        self._out.put(pb.ProcessingRequest(**message).SerializeToString())
        return self

    def half_close(self) -> None:
        self._out.put(None)

    def hear(self, count: int) -> list[pb.ProcessingResponse]:
        """The first `count` replies, once they are here."""
        wait_until(lambda: len(self._heard) >= count, message=f"{count} replies")
        return self._heard[:count]

    @property
    def heard(self) -> int:
        return len(self._heard)


def headers(*, by_value: bool = False, body: bool = True, **more: str) -> pb.HttpHeaders:
    found = pb.HttpHeaders(end_of_stream=not body)
    for key, value in {":method": "POST", ":path": "/v1/chat/completions", **more}.items():
        found.headers.headers.add(key=key, **{"value" if by_value else "raw_value": value.encode()})
    return found


def agentgateway(channel: grpc.Channel, body: bytes = b"{}") -> Talk:
    """One request, its body sent at once in pieces of 8 KiB."""
    config = pb.ProtocolConfiguration(request_body_mode=DUPLEX, response_body_mode=DUPLEX)
    talk = Talk(channel).say(request_headers=headers(), protocol_config=config)
    pieces = [body[at : at + 8192] for at in range(0, len(body), 8192)]
    for number, piece in enumerate(pieces):
        talk.say(request_body=pb.HttpBody(body=piece, end_of_stream=number == len(pieces) - 1))
    return talk


def picked(reply: pb.ProcessingResponse) -> str:
    (option,) = reply.request_headers.response.header_mutation.set_headers
    assert option.header.value == b"", "NGINX reads raw_value alone, and Envoy 1.40 writes an empty header for both"
    return str(option.header.raw_value.decode())


def in_flight(sidecar: Sidecar) -> int:
    return int(sidecar.queues()["endpoints"][0]["in_flight"])


def wait_idle(sidecar: Sidecar) -> None:
    wait_until(lambda: in_flight(sidecar) == 0 and sidecar.queues()["waiting_total"] == 0, message="idle")


def test_agentgateway_gets_one_address_and_its_body_back_and_its_half_close_after_the_answer_is_the_end(sidecar):
    body = bytes(range(256)) * 400
    with channel_to(sidecar) as channel:
        talk = agentgateway(channel, body)
        head, *pieces = talk.hear(1 + (len(body) + 8191) // 8192)
        assert picked(head) == ADDRESS
        streamed = [piece.request_body.response.body_mutation.streamed_response for piece in pieces]
        assert b"".join(one.body for one in streamed) == body
        assert [one.end_of_stream for one in streamed] == [False] * (len(streamed) - 1) + [True]
        answer = pb.HttpHeaders()
        answer.headers.headers.add(key=":status", raw_value=b"200")
        talk.say(response_headers=answer).say(response_body=pb.HttpBody(body=b"1"))
        talk.hear(talk.heard)
        assert in_flight(sidecar) == 1
        talk.say(response_body=pb.HttpBody(end_of_stream=True))
        wait_idle(sidecar)
        assert not talk.ended.is_set()
        talk.half_close()
        assert talk.ended.wait(PATIENCE_S)
        assert talk.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("size", [2, 1_000_000])
def test_a_client_of_agentgateway_that_leaves_while_held_is_told_by_a_half_close_alone_and_leaves_the_line(
    sidecar, size
):
    with channel_to(sidecar) as channel:
        running = agentgateway(channel)
        running.hear(1)
        held = agentgateway(channel, b"x" * size)
        wait_until(lambda: sidecar.queues()["waiting_total"] == 1)
        held.half_close()
        wait_until(lambda: sidecar.queues()["waiting_total"] == 0, message="it left")
        running.half_close()
        wait_idle(sidecar)
        assert held.heard == 0


def test_a_refused_request_of_agentgateway_is_one_immediate_answer(sidecar):
    config = pb.ProtocolConfiguration(request_body_mode=DUPLEX, response_body_mode=DUPLEX)
    with channel_to(sidecar) as channel:
        running = agentgateway(channel)
        running.hear(1)
        talk = Talk(channel).say(request_headers=headers(**{"x-llm-d-inference-ttl": "50"}), protocol_config=config)
        talk.say(request_body=pb.HttpBody(body=b"{}", end_of_stream=True))
        (reply,) = talk.hear(1)
        assert reply.immediate_response.status.code == 429
        talk.half_close()
        running.half_close()
        wait_idle(sidecar)


def nginx(channel: grpc.Channel) -> Talk:
    talk = Talk(channel).say(request_headers=headers(by_value=True, **{"x-epp-host": "picker", "x-epp-port": "9002"}))
    talk.say(request_body=pb.HttpBody(body=b'{"model": "m"}', end_of_stream=True))
    talk.half_close()
    return talk


def test_nginx_never_tells_of_the_end_and_is_refused_with_a_line_in_the_log(sidecar):
    with channel_to(sidecar) as channel:
        for _ in range(2):
            talk = nginx(channel)
            assert talk.ended.wait(PATIENCE_S)
            (reply,) = talk.hear(1)
            assert reply.immediate_response.status.code == 503
    assert in_flight(sidecar) == 0
    assert sidecar.child.output().count("never tells when an answer ends") == 1


def test_nginx_gets_a_pick_that_nobody_counts_where_the_config_says_so(tmp_path):
    config = {
        "dialect": "endpoint-picker",
        "picker": {"without_end": "pick", "read_model": True},
        "endpoints": [{"name": "a", "address": ADDRESS}],
        "scrape_interval": 0,
    }
    with Sidecar({**DEFAULTS, **config}, tmp_path) as sidecar, grpc.insecure_channel(sidecar.listen) as channel:
        for _ in range(3):
            talk = nginx(channel)
            assert talk.ended.wait(PATIENCE_S)
            assert talk.call.code() is grpc.StatusCode.OK
            assert picked(talk.hear(1)[0]) == ADDRESS
        assert in_flight(sidecar) == 0


def test_probes_get_health_in_plain_text_at_a_port_of_its_own_and_nothing_else_is_there(sidecar):
    with grpc.insecure_channel(sidecar.config["health_listen"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "readiness", wire.SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
        talk = Talk(channel).say(request_headers=headers())
        assert talk.ended.wait(PATIENCE_S)
        assert talk.call.code() is grpc.StatusCode.UNIMPLEMENTED
