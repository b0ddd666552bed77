"""Bytes to values: whatever arrives is a message or one named error."""

from __future__ import annotations

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from extproc import wire
from extproc._pb import ext_proc_pb2 as pb
from extproc.errors import ProtocolError


def headers_message(*headers: tuple[str, bytes], **fields) -> bytes:
    part = pb.HttpHeaders(headers=pb.HeaderMap(headers=[pb.HeaderValue(key=k, raw_value=v) for k, v in headers]))
    return pb.ProcessingRequest(request_headers=part, **fields).SerializeToString()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    try:
        wire.Reader({"x-model"}, "llm").read(data)
    except ProtocolError:
        pass


def test_a_message_that_carries_nothing_is_an_error_that_says_what_is_wanted():
    with pytest.raises(ProtocolError, match="must carry headers, a body or trailers"):
        wire.Reader(()).read(b"")


def test_bytes_that_are_no_message_are_an_error():
    with pytest.raises(ProtocolError, match="not a ProcessingRequest"):
        wire.Reader(()).read(b"\xff\xff\xff")


def test_only_wanted_headers_are_kept_and_of_a_repeated_one_the_first():
    data = headers_message(("x-model", b"a"), ("cookie", b"secret"), ("x-model", b"b"))
    assert wire.Reader({"x-model"}).read(data).headers == {"x-model": "a"}


def test_header_values_that_are_no_utf8_become_replacement_characters():
    assert wire.Reader({"x-model"}).read(headers_message(("x-model", b"a\xff\xfeb"))).headers == {"x-model": "a��b"}


def test_a_thousand_headers_and_one_of_64_kib_are_read():
    many = [(f"x-{index}", b"v") for index in range(1000)]
    data = headers_message(*many, ("x-model", b"m" * 65536))
    assert len(wire.Reader({"x-model"}).read(data).headers["x-model"]) == 65536


def test_request_fields_keep_scalars_and_drop_everything_else():
    """Written with the official well-known types, read with ours."""
    struct = struct_pb2.Struct()
    struct.update({"model": "llama", "stream": True, "max_tokens": 3, "user": None, "list": ["x"], "deep": {"a": 1}})
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.metadata_context.filter_metadata["llm"].MergeFromString(struct.SerializeToString())
    incoming = wire.Reader((), "llm").read(message.SerializeToString())
    assert incoming.fields == {"model": "llama", "stream": True, "max_tokens": 3.0}
    assert wire.Reader(()).read(message.SerializeToString()).fields == {}


def test_attributes_and_fields_that_are_no_utf8_are_values_and_not_parse_errors():
    """A client's x-request-id is the attribute request.id: a parse error would let its request past the queue."""
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.attributes["envoy.filters.http.ext_proc"].fields["request.id"].string_value = b"\xff\xfe"
    message.metadata_context.filter_metadata["llm"].fields["model"].string_value = b"\xff"
    incoming = wire.Reader((), "llm").read(message.SerializeToString())
    assert incoming.attributes == {"request.id": "\ufffd\ufffd"}
    assert incoming.fields == {"model": "\ufffd"}
