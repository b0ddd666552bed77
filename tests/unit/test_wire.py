"""Bytes to values: whatever arrives is a message or one named error."""

from __future__ import annotations

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from extproc._pb import ext_proc_pb2 as pb
from extproc.errors import ProtocolError
from extproc.stream import wire


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


def answer_message(status: bytes, *more: tuple[str, bytes]) -> bytes:
    part = pb.HttpHeaders(headers=pb.HeaderMap(headers=[pb.HeaderValue(key=":status", raw_value=status)]))
    part.headers.headers.extend(pb.HeaderValue(key=key, raw_value=value) for key, value in more)
    return pb.ProcessingRequest(response_headers=part).SerializeToString()


def test_answers_that_begin_alike_are_parsed_once_and_others_each_for_itself():
    reader = wire.Reader({":status"})
    fine = reader.read(answer_message(b"200"))
    assert reader.read(answer_message(b"200")) is fine
    assert reader.read(answer_message(b"503")).headers == {":status": "503"}
    assert reader.read(answer_message(b"200")).headers == {":status": "200"}


def test_a_client_or_an_engine_cannot_make_the_memory_of_answers_grow():
    reader = wire.Reader({":status"})
    for number in range(3 * wire.REPEATED):
        reader.read(answer_message(b"200", ("x-unique", str(number).encode())))
        reader.read(headers_message(("x-unique", str(number).encode())))
        assert len(reader._repeated) <= wire.REPEATED
    reader = wire.Reader({":status"})
    reader.read(answer_message(b"200", ("x-long", b"x" * wire.SHORT)))
    assert not reader._repeated


@pytest.mark.parametrize("kind", ["request_headers", "response_headers", "response_trailers"])
@pytest.mark.parametrize("values", [("", "b", "c"), ("a", "", "c"), ("a", "b", ""), ("", "", "")])
@pytest.mark.parametrize("field", ["raw_value", "value"])
def test_an_empty_value_is_that_of_its_own_header(kind, values, field):
    named = dict(zip(("x-a", "x-b", "x-c"), values, strict=True))
    found = pb.HeaderMap(headers=[pb.HeaderValue(key=key, **{field: value.encode()}) for key, value in named.items()])
    part = pb.HttpTrailers(trailers=found) if kind == "response_trailers" else pb.HttpHeaders(headers=found)
    assert wire.Reader(named).read(pb.ProcessingRequest(**{kind: part}).SerializeToString()).headers == named


@given(
    st.lists(
        st.builds(
            pb.HeaderValue,
            key=st.sampled_from(("x-a", "x-b", "x-c", "x-d")),
            value=st.binary(max_size=2),
            raw_value=st.binary(max_size=2),
        )
    )
)
def test_headers_that_are_read_at_once_say_what_each_says_by_itself(headers):
    told: dict[str, str] = {}
    for header in headers:
        if header.key != "x-d":
            told.setdefault(header.key, (header.raw_value or header.value).decode("utf-8", "replace"))
    part = pb.HttpHeaders(headers=pb.HeaderMap(headers=headers))
    data = pb.ProcessingRequest(request_headers=part).SerializeToString()
    assert wire.Reader({"x-a", "x-b", "x-c"}).read(data).headers == told


def test_attributes_that_do_not_parse_say_nothing_and_hide_no_others():
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.attributes["envoy.filters.http.ext_proc"].fields["request.id"].string_value = b"1"
    message.attributes["another.filter"].fields["request.id"].string_value = b"2"
    data = pb.Received(attributes=[b"\xff"]).SerializeToString() + message.SerializeToString()
    incoming = wire.Reader(()).read(data)
    assert incoming.attributes == incoming.attributes == {"request.id": "1"}


@given(
    st.dictionaries(st.sampled_from(wire.TOLD), st.text(min_size=1, max_size=20)),
    st.floats(0, 1e9),
    st.integers(0, 10**6),
    st.dictionaries(st.sampled_from(("budget_s", "predicted_wait_s")), st.floats(0, 1e9)),
)
def test_a_decision_is_told_as_it_is(texts, wait_ms, position, numbers):
    data = wire.decision_metadata(tuple(texts.get(name, "") for name in wire.TOLD), wait_ms, position, numbers)
    fields = pb.ProcessingResponse.FromString(data).dynamic_metadata.fields[wire.NAMESPACE].struct_value.fields
    told = {
        key: value.string_value if value.HasField("string_value") else value.number_value
        for key, value in fields.items()
    }
    assert told == {**texts, **numbers, "wait_ms": wait_ms, "position": position}
