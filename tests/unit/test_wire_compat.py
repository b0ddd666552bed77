"""Our wire subset against Envoy's official messages, which live outside site-packages (see the Makefile)."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from extproc._pb import ext_proc_pb2 as pb
from extproc.stream import wire

XDS = Path(sys.prefix) / "xds-protos"
DUMP = """
import base64, sys
from envoy.service.ext_proc.v3 import external_processor_pb2
from google.protobuf import descriptor_pb2
found = {}
def walk(file):
    if file.name in found:
        return
    for dependency in file.dependencies:
        walk(dependency)
    found[file.name] = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(found[file.name])
walk(external_processor_pb2.DESCRIPTOR)
print(base64.b64encode(descriptor_pb2.FileDescriptorSet(file=found.values()).SerializeToString()).decode())
"""


DISPATCHED = ("dispatched", "default", "vllm-a", "", "", "")
"""What the access log is told of a decision: see `wire.TOLD`."""


@pytest.fixture(scope="module")
def official() -> Any:
    """Return a function from message name to class, made of the official descriptors in a pool of their own."""
    if not XDS.exists():
        pytest.skip("no official messages: `make test` installs them")
    environment = {**os.environ, "PYTHONPATH": str(XDS)}
    done = subprocess.run([sys.executable, "-c", DUMP], env=environment, capture_output=True, check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(done.stdout))
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"envoy.service.ext_proc.v3.{name}"))


def test_official_request_headers_are_read_with_values_attributes_and_metadata(official):
    request = official("ProcessingRequest")()
    header = request.request_headers.headers.headers.add()
    header.key, header.raw_value = "x-model", b"llama"
    header = request.request_headers.headers.headers.add()
    header.key, header.value = "x-tenant-id", "acme"
    request.request_headers.end_of_stream = True
    request.attributes["envoy.filters.http.ext_proc"].fields["request.id"].string_value = "r-1"
    request.metadata_context.filter_metadata["llm"].fields["max_tokens"].number_value = 7
    request.observability_mode = True
    incoming = wire.Reader({"x-model", "x-tenant-id"}, "llm").read(request.SerializeToString())
    assert incoming.kind is wire.Kind.REQUEST_HEADERS
    assert incoming.headers == {"x-model": "llama", "x-tenant-id": "acme"}
    assert incoming.attributes == {"request.id": "r-1"}
    assert incoming.fields == {"max_tokens": 7.0}
    assert incoming.observed
    assert not incoming.has_body


def test_an_answers_official_trailers_are_read(official):
    request = official("ProcessingRequest")()
    header = request.response_trailers.trailers.headers.add()
    header.key, header.raw_value = "grpc-status", b"8"
    assert wire.Reader({"grpc-status"}).read(request.SerializeToString()).headers == {"grpc-status": "8"}


@pytest.mark.parametrize("kind", list(wire.Kind), ids=lambda kind: kind.value)
def test_every_kind_of_official_message_is_told_apart(official, kind):
    request = official("ProcessingRequest")()
    getattr(request, kind.value).SetInParent()
    assert wire.Reader(()).read(request.SerializeToString()).kind is kind


@pytest.mark.parametrize("kind", list(wire.Kind), ids=lambda kind: kind.value)
def test_an_empty_answer_is_the_official_answer_to_the_same_kind(official, kind):
    response = official("ProcessingResponse").FromString(wire.go_on(kind))
    assert response.WhichOneof("response") == kind.value


def test_a_steering_answer_reads_officially_as_an_overwritten_header_and_a_cleared_route(official):
    data = wire.steer("x-upstream-cluster", "vllm-a") + wire.decision_metadata(DISPATCHED, 2.5, 3)
    response = official("ProcessingResponse").FromString(data)
    common = response.request_headers.response
    (option,) = common.header_mutation.set_headers
    assert common.clear_route_cache
    assert (option.header.key, option.header.raw_value, option.header.value) == ("x-upstream-cluster", b"vllm-a", "")
    assert option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD
    fields = response.dynamic_metadata["extproc"]
    assert dict(fields) == {
        "outcome": "dispatched",
        "class": "default",
        "endpoint": "vllm-a",
        "wait_ms": 2.5,
        "position": 3,
    }


def test_a_refusal_reads_officially_as_status_headers_body_and_details(official):
    response = official("ProcessingResponse").FromString(wire.refuse(429, "queue_full", b"{}", 7)).immediate_response
    headers = {option.header.key: option.header.raw_value for option in response.headers.set_headers}
    assert response.status.code == 429
    assert headers["retry-after"] == b"7"
    assert headers["x-extproc-outcome"] == b"queue_full"
    assert headers["content-type"] == b"application/json"
    assert response.details == "extproc_queue_full"
    assert response.body == b"{}"
    assert not response.HasField("grpc_status")


def test_a_refusal_of_a_grpc_request_reads_officially_as_a_grpc_status(official):
    data = wire.refuse(429, "queue_full", b"Full.", 7, grpc_status=8)
    response = official("ProcessingResponse").FromString(data).immediate_response
    headers = {option.header.key: option.header.raw_value for option in response.headers.set_headers}
    assert (response.grpc_status.status, response.body) == (8, b"Full.")
    assert headers == {"retry-after": b"7", "x-extproc-outcome": b"queue_full"}


def test_our_number_of_a_request_reads_officially_beside_the_decisions_metadata(official):
    data = wire.decision_metadata(DISPATCHED, 2.5, 3) + wire.number_metadata(12345)
    found = official("ProcessingResponse").FromString(data).dynamic_metadata
    assert found["extproc_ticket"]["n"] == 12345
    assert found["extproc"]["position"] == 3


def test_every_field_we_name_has_the_official_number_and_a_wire_compatible_type(official):
    same_wire = {"string": "bytes", "bytes": "bytes", "enum": "int32", "int32": "int32"}
    official_request, official_response = official("ProcessingRequest"), official("ProcessingResponse")
    pairs = [(pb.ProcessingRequest.DESCRIPTOR, official_request.DESCRIPTOR)]
    pairs.append((pb.ProcessingResponse.DESCRIPTOR, official_response.DESCRIPTOR))
    names = {
        getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{n.upper()}"): n
        for n in ("string", "bytes", "enum", "int32")
    }
    seen = set()
    while pairs:
        ours, theirs = pairs.pop()
        if ours.full_name in seen:
            continue
        seen.add(ours.full_name)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert other.number == field.number, field.full_name
            our_type, their_type = names.get(field.type, field.type), names.get(other.type, other.type)
            assert same_wire.get(our_type, our_type) == same_wire.get(their_type, their_type), field.full_name
            if field.message_type is not None and not field.message_type.full_name.startswith("google."):
                pairs.append((field.message_type, other.message_type))
    assert len(seen) >= 15
