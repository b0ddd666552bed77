"""The endpoint picker's dialect as plays (picker_stage.py): what requests, refusals and picks say."""

from __future__ import annotations

import logging

import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.values import Policy, RequestClass
from extproc.errors import ProtocolError
from extproc.stream import wire
from tests.unit.picker_stage import (
    BUFFERED,
    DUPLEX,
    A,
    B,
    C,
    Gateway,
    message,
    opening,
    reserved,
    served_by,
    spoken,
    subset,
    told,
)

# ---- refusals, and what has no place


def test_a_refusal_says_llm_ds_reason_and_what_was_on_its_way_of_the_body_goes_nowhere():
    gateway = Gateway(A, policy=Policy(classes=(RequestClass("default", 0, 2.0),)))
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", opening=opening(DUPLEX))
    gateway.clock.advance(2.1)
    refusal = held.said[0].immediate_response
    headers = {option.header.key: option.header.raw_value for option in refusal.headers.set_headers}
    assert (refusal.status.code, headers["x-llm-d-request-dropped-reason"]) == (429, b"rejected-ttl-expired")
    assert headers["x-extproc-outcome"] == b"budget_expired"
    held.play("> request_body ab", "> request_body |")


def test_an_answers_body_before_a_pick_is_a_protocol_error_and_the_place_in_the_line_is_left():
    gateway = Gateway(A)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", opening=opening(DUPLEX))
    with pytest.raises(ProtocolError, match="a body has no place here: the stream is held"):
        held.session.receive(message("response_body x"))
    held.session.end()
    assert gateway.gate.controller.waiting == 0


@pytest.mark.parametrize("data", [b"\x22", b"\x22\x05ab", b"\x22\xff\xff\xff\xff\xff\x01", b"\x2a\x80"])
def test_a_body_that_does_not_parse_is_a_protocol_error_and_nothing_else(data):
    stream = Gateway(A).stream()
    stream.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    with pytest.raises(ProtocolError):
        stream.session.receive(data)


def test_a_local_answer_of_the_gateway_while_held_takes_the_request_out_of_the_line():
    gateway = Gateway(A)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", "> response_headers 504", "< response_headers", opening=opening(DUPLEX))
    assert gateway.gate.controller.waiting == 0


@pytest.mark.parametrize(
    ("modes", "expected"), [(DUPLEX, "< response_body no|"), (BUFFERED, "< response_body"), (None, "< response_body")]
)
def test_a_local_answer_before_the_gateway_asked_us_goes_back_as_its_modes_have_it(modes, expected):
    head = pb.ProcessingRequest.FromString(message("response_headers 403"))
    if modes is not None:
        head.protocol_config.request_body_mode, head.protocol_config.response_body_mode = modes
    gateway = Gateway(A)
    stream = gateway.stream()
    stream.play(
        "> head", "< response_headers", "> response_body no|", expected, "> response_trailers", "< response_trailers",
        head=head.SerializeToString(),
    )  # fmt: skip
    stream.session.end()
    assert (gateway.reception.streams, gateway.in_flight()) == (0, {"a": 0})


# ---- what a request says


def test_llm_ds_control_headers_are_class_tenant_and_budget_and_no_engine_sees_them():
    gateway = Gateway(A)
    headers = {"x-llm-d-inference-objective": "chat", "x-llm-d-inference-fairness-id": "acme"}
    stream = gateway.stream()
    stream.play("> opening", f"< pick {A}", opening=opening(DUPLEX, **headers, **{"x-llm-d-inference-ttl": "1500"}))
    (ticket,) = gateway.gate.controller.endpoints["a"].leases
    request = ticket.request
    assert (ticket.request_class.name, request.tenant, request.budget_s) == ("chat", "acme", 1.5)
    assert {*headers, "x-llm-d-inference-ttl"} <= set(
        stream.said[0].request_headers.response.header_mutation.remove_headers
    )


@pytest.mark.parametrize("by_value", [True, False])
def test_the_model_is_read_from_the_first_of_several_headers_as_value_or_as_raw_value(by_value):
    gateway = Gateway(A, B, models={"a": {"m1"}, "b": {"m2"}})
    gateway.stream().play("> opening", f"< pick {B}", opening=opening(DUPLEX, by_value=by_value, x_ai_eg_model="m2"))


def test_a_clients_own_destination_is_nothing_to_us():
    gateway = Gateway(A, B)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    spoofed = opening(DUPLEX, **{wire.PICK_HEADER: A})
    gateway.stream().play("> opening", f"< pick {B}", opening=spoofed)
    assert gateway.reception.requests.ignored["cluster"] == 0


# ---- what the gateway says beside headers


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("addresses", [(B,), ("10.0.0.2",), ("10.0.0.9:8000", f" {B} "), (f"10.9.9.9:1,{B}",)])
def test_a_subset_is_honoured_as_a_list_as_one_text_mixed_and_by_a_host_for_all_its_ports(addresses, as_list):
    for _ in range(2):
        gateway = Gateway(A, B)
        gateway.stream().play("> opening", f"< pick {B}", opening=subset(*addresses, as_list=as_list))


@pytest.mark.parametrize("addresses", [(), ("10.0.0.9:8000",), ("10.0.0.2:9000",), ("",), ("nonsense",)])
def test_a_subset_that_matches_nobody_is_503_at_once_and_nobody_else_is_asked(addresses):
    gateway = Gateway(A, B)
    stream = gateway.stream()
    stream.play("> opening", "< refuse 503", opening=subset(*addresses))
    assert gateway.in_flight() == {"a": 0, "b": 0}
    said = {one.header.key: one.header.raw_value for one in stream.said[0].immediate_response.headers.set_headers}
    assert said["x-llm-d-request-dropped-reason"] == b"rejected-no-endpoints"


def test_a_request_that_takes_no_slot_keeps_to_its_subset_too():
    light = pb.ProcessingRequest.FromString(subset(B))
    light.request_headers.headers.headers[0].raw_value = b"GET"
    gateway = Gateway(A, B)
    for _ in range(3):
        gateway.stream().play("> opening", f"< pick {B}", opening=light.SerializeToString())


def test_the_lease_moves_to_who_served_and_an_unknown_one_ends_it():
    for served, in_flight in ((A, {"a": 1, "b": 0}), (B, {"a": 0, "b": 1}), ("10.0.0.9:1", {"a": 0, "b": 0})):
        gateway = Gateway(A, B)
        stream = gateway.stream()
        head = told(message("response_headers 200"), "envoy.lb", wire.PICK_HEADER + "-served", served, as_list=False)
        stream.play("> opening", f"< pick {A}", "> head", "< response_headers", opening=opening(DUPLEX), head=head)
        assert gateway.in_flight() == in_flight
        stream.play("> response_body |", "< response_body |")
        assert gateway.in_flight() == {"a": 0, "b": 0}


# ---- gateways that never tell of the end


def test_a_gateway_that_never_tells_of_the_end_is_refused_and_the_log_says_so_once(caplog):
    gateway = Gateway(A)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            stream = gateway.stream()
            stream.play("> opening", "< refuse 503", "> request_body ab|", opening=opening(None, by_value=True))
            assert not stream.session.half_closed()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "a gateway asks for endpoints and never tells when an answer ends (no protocol_config, as NGINX's)"
    ]


def test_such_a_gateway_gets_each_endpoint_in_turn_and_nothing_is_counted_where_the_config_says_so():
    gateway = Gateway(A, B, picks_without_end=True)
    picked = []
    for _ in range(4):
        stream = gateway.stream()
        stream.play("> opening", f"< {'pick ' + (B if len(picked) % 2 == 0 else A)}", "> request_body ab|",
                    "< request_body", opening=opening(None))  # fmt: skip
        assert not stream.session.half_closed()
        picked.append(stream)
    assert gateway.in_flight() == {"a": 0, "b": 0}


def test_a_gateway_that_half_closes_while_its_model_is_read_still_hears_the_pick_and_then_the_end():
    gateway = Gateway(A, picks_without_end=True, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", '> request_body {"model', opening=opening(None))
    assert not stream.session.half_closed()
    assert spoken(stream.said[0]) == f"pick {A}"
    assert stream.session.over


def test_where_the_end_is_told_a_half_close_is_the_end():
    gateway = Gateway(A)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", opening=opening(DUPLEX))
    assert not held.session.half_closed()


# ---- lists of next choices


def test_a_pick_lists_next_choices_and_a_slot_is_kept_there_until_the_answer_tells_who_served():
    gateway = Gateway(A, B, C, fallbacks=2, limit=8)
    first = gateway.stream()
    first.play("> opening", f"< pick {A},{B},{C}", opening=opening(DUPLEX))
    assert gateway.in_flight() == {"a": 1, "b": 0, "c": 0}
    gateway.stream().play("> opening", f"< pick {B},{A}", opening=opening(DUPLEX))  # one of eight, not more, is kept
    assert reserved(gateway) == {"a": 1, "b": 1, "c": 1}
    first.play("> head", "< response_headers", head=served_by(A))
    assert reserved(gateway) == {"a": 1, "b": 0, "c": 0}
    gateway.stream().play("> opening", f"< pick {C},{B}", opening=opening(DUPLEX))


def test_what_is_reserved_where_the_gateway_never_tells_who_served_comes_free_with_the_end():
    gateway = Gateway(A, B, fallbacks=1, limit=8)
    stream = gateway.stream()
    stream.play("> opening", f"< pick {A},{B}", "> response_headers 200", "< response_headers", opening=opening(DUPLEX))
    assert reserved(gateway) == {"a": 0, "b": 1}
    stream.session.end()
    assert reserved(gateway) == {"a": 0, "b": 0}


def test_next_choices_keep_to_what_the_gateway_allows_and_to_who_serves_the_model():
    gateway = Gateway(A, B, C, fallbacks=3, limit=16, models={"a": {"m"}, "b": {"m"}, "c": {"n"}})
    gateway.stream().play("> opening", f"< pick {A},{B}", opening=opening(DUPLEX, x_model="m"))
    data = told(opening(DUPLEX, x_model="m"), wire.SUBSET_NAMESPACE, wire.PICK_HEADER + "-subset", B, C)
    gateway.stream().play("> opening", f"< pick {B}", opening=data)


def test_the_lease_moves_along_the_list_to_who_served_and_no_other_got_that_slot_meanwhile():
    gateway = Gateway(A, B, fallbacks=1, limit=8)
    stream = gateway.stream()
    stream.play("> opening", f"< pick {A},{B}", opening=opening(DUPLEX))
    others = [gateway.stream() for _ in range(16)]
    for other in others:
        other.session.receive(opening(DUPLEX))
    assert gateway.in_flight() == {"a": 7, "b": 7}
    stream.play("> head", "< response_headers", head=served_by(B))
    assert gateway.in_flight() == {"a": 7, "b": 8}, "who waits has the slot at the one that was picked"
    assert reserved(gateway) == {"a": 1, "b": 0}
