"""The ext_proc endpoint itself, spoken to without Envoy: garbage, wrong order, floods, health, reflection."""

from __future__ import annotations

import random

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from extproc._pb import ext_proc_pb2 as pb
from extproc.stream.wire import SERVICE

from .kit.extproc_raw import RawChannel, StreamEnd
from .kit.processes import PATIENCE_S, wait_until
from .kit.stack import Sidecar

ENDPOINTS = [{"name": "a", "address": "127.0.0.1:9", "max_running_requests": 2, "models": ["sim"]}]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    config = {"enable_queue": True, "endpoints": ENDPOINTS, "drain_timeout": "200ms", "reflection": True}
    with Sidecar(config, tmp_path_factory.mktemp("protocol")) as running:
        yield running


@pytest.fixture
def channel(sidecar):
    with RawChannel(sidecar.listen) as opened:
        yield opened
    wait_until(lambda: sidecar.metrics()["extproc_streams"] == 0, message="all streams gone")
    assert sidecar.queues()["endpoints"][0]["in_flight"] == 0
    assert sidecar.queues()["waiting_total"] == 0


def request_headers(*headers: tuple[str, bytes]) -> bytes:
    values = [pb.HeaderValue(key=key, raw_value=value) for key, value in headers]
    return pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=values))
    ).SerializeToString()


def response_headers(status: bytes) -> bytes:
    values = [pb.HeaderValue(key=":status", raw_value=status)]
    return pb.ProcessingRequest(
        response_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=values))
    ).SerializeToString()


SIM = request_headers(("x-model", b"sim"))


def steered_to(answer: bytes) -> str:
    (option,) = pb.ProcessingResponse.FromString(answer).request_headers.response.header_mutation.set_headers
    return option.header.raw_value.decode()


def test_a_free_slot_is_answered_at_once_and_the_third_request_is_held_silently(channel):
    with channel.open() as first, channel.open() as second, channel.open() as third:
        first.send(SIM)
        assert steered_to(first.read()) == "a"
        second.send(SIM)
        assert steered_to(second.read()) == "a"
        third.send(SIM)
        assert third.silent(0.3)
        first.cancel()
        assert steered_to(third.read()) == "a"


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("bytes that are no message", [b"\xff\xff\xff\xff"]),
        ("an empty message", [b""]),
        ("headers twice", [SIM, SIM]),
        ("garbage after a good start", [SIM, b"\x01"]),
    ],
)
def test_what_has_no_place_ends_the_stream_with_invalid_argument(channel, what, messages):
    with channel.open() as stream:
        for message in messages[:-1]:
            stream.send(message)
            stream.read()
        stream.send(messages[-1])
        end = stream.wait_end()
        assert end.code is grpc.StatusCode.INVALID_ARGUMENT, what
        assert end.details


def test_a_stream_that_says_nothing_and_closes_is_no_error(channel):
    with channel.open() as stream:
        stream.half_close()
        assert stream.wait_end().code is grpc.StatusCode.OK


def test_a_stream_that_begins_with_response_headers_is_answered_and_holds_nothing(channel):
    """Envoy does so when it answers by itself before it asked us, as for a body over its buffer (413)."""
    with channel.open() as stream:
        stream.send(response_headers(b"413"))
        assert pb.ProcessingResponse.FromString(stream.read()).WhichOneof("response") == "response_headers"
        stream.half_close()
        assert stream.wait_end().code is grpc.StatusCode.OK


def test_bodies_and_trailers_that_a_wrong_config_sends_are_waved_through(channel):
    with channel.open() as stream:
        stream.send(SIM)
        stream.read()
        for name in ("request_body", "response_headers", "response_body", "response_trailers"):
            message = pb.ProcessingRequest()
            getattr(message, name).SetInParent()
            stream.send(message.SerializeToString())
            assert pb.ProcessingResponse.FromString(stream.read()).WhichOneof("response") == name


def test_hostile_headers_are_read_or_ignored_and_never_choose_a_cluster(channel):
    many = [(f"x-{index}", b"v" * 20) for index in range(1000)]
    for headers in (
        [("x-model", b"sim"), ("x-tenant-id", b"\xff\xfe" * 40), ("x-request-class", b"\x00\x01")],
        [("x-model", b"sim"), ("x-session-id", b"s" * 65536)],
        [("x-model", b"sim"), *many],
        [("x-model", b"sim"), ("x-upstream-cluster", b"evil"), ("x-queue-budget", b"NaN")],
        [("x-model", b"sim"), ("content-length", b"99999999999999999999999"), ("x-queue-budget", b"-5")],
        [("x-model", b"sim"), ("x-model", b"other"), ("x-queue-budget", b"1e999")],
    ):
        with channel.open() as stream:
            stream.send(request_headers(*headers))
            assert steered_to(stream.read()) == "a"


def test_an_unknown_model_is_a_404_that_names_the_reason(channel):
    with channel.open() as stream:
        stream.send(request_headers(("x-model", b"nobody's")))
        refusal = pb.ProcessingResponse.FromString(stream.read()).immediate_response
        assert refusal.status.code == 404
        assert refusal.details == "extproc_unknown_model"


def test_random_messages_in_any_order_leave_nothing_behind(channel):
    """Seeded: mutated real messages. The fixture checks that no lease and no place in the queue is left."""
    dice = random.Random(7)
    corpus = [SIM, response_headers(b"200"), request_headers(("x-model", b"x" * 300)), b"", b"\x12\x00", b"\x2a\x00"]
    for _ in range(150):
        with channel.open() as stream:
            for _ in range(dice.randint(1, 4)):
                message = bytearray(dice.choice(corpus))
                for _ in range(dice.randint(0, 3)):
                    if message:
                        message[dice.randrange(len(message))] = dice.randrange(256)
                stream.send(bytes(message))
            if dice.random() < 0.5:
                stream.half_close()
            else:
                stream.cancel()


def test_a_message_over_the_limit_ends_only_its_own_stream(channel):
    with channel.open() as big, channel.open() as small:
        big.send(request_headers(("x-model", b"m" * (5 << 20))))
        assert big.wait_end().code is grpc.StatusCode.RESOURCE_EXHAUSTED
        small.send(SIM)
        assert steered_to(small.read()) == "a"


@pytest.mark.parametrize("service", ["", "liveness", "readiness", SERVICE])
def test_health_is_serving_under_all_four_names_by_check_and_watch(sidecar, service):
    with grpc.insecure_channel(sidecar.listen) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=PATIENCE_S).status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(request, timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_health_of_an_unknown_service_is_not_found(sidecar):
    with grpc.insecure_channel(sidecar.listen) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_when_it_is_switched_on(sidecar):
    with grpc.insecure_channel(sidecar.listen) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=PATIENCE_S
        )
    assert {SERVICE, "grpc.health.v1.Health"} <= {one.name for one in answer.list_services_response.service}


def test_readiness_goes_off_and_liveness_stays_while_it_drains(tmp_path):
    config = {"enable_queue": True, "endpoints": ENDPOINTS, "hand_over": False, "drain_timeout": "30s"}
    with Sidecar(config, tmp_path) as running, RawChannel(running.listen) as raw, raw.open() as stream:
        stream.send(SIM)
        stream.read()
        with grpc.insecure_channel(running.listen) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=PATIENCE_S)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            running.child.signal(15)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            alive = stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=PATIENCE_S)
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        stream.half_close()
        assert stream.wait_end().code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        assert running.child.wait_exit() == 0
        assert "Traceback" not in running.child.output()


def test_the_raw_client_reports_the_end_of_a_stream_as_such(channel):
    with channel.open() as stream:
        stream.half_close()
        with pytest.raises(StreamEnd):
            stream.read()
