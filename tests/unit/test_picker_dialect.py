"""The endpoint picker's dialect as plays: `>` what a gateway sends, `<` what it must get then, and nothing else.

A real session on a real gate and core; only the clock is the test's. Each gateway's ways are those that PICKER.md and
its sources give: FULL_DUPLEX_STREAMED (Istio, llm-d, agentgateway), BUFFERED (Envoy AI Gateway), no bodies, NGINX's.
"""

from __future__ import annotations

import logging
import tracemalloc

import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.config import parse_config
from extproc.errors import ProtocolError
from extproc.observe.stories import Stories
from extproc.stream import bodies, wire
from extproc.stream.ages import Ages
from extproc.stream.dialect import EndpointPicker
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.session import KEPT_BYTES, Session
from extproc.stream.silence import READING_S
from tests.unit.test_session_and_gate import Clock

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
MODE = pb.ProcessingMode
DUPLEX = (MODE.FULL_DUPLEX_STREAMED, MODE.FULL_DUPLEX_STREAMED)
BUFFERED = (MODE.BUFFERED, MODE.BUFFERED)
LEAN = (MODE.NONE, MODE.NONE)


class Gateway:
    """A pool of endpoints at these addresses, and streams that gateways open to its picker."""

    def __init__(self, *addresses: str, limit: int = 1, models: dict[str, set[str]] | None = None, **how: object):
        self.clock = Clock()
        fallbacks = how.pop("fallbacks", 0)
        classes = (RequestClass("default"), RequestClass("chat", 5))
        policy = how.pop("policy", Policy(classes=classes, next_choices=fallbacks))
        self.gate = Gate(Controller(policy), self.clock)
        names = parse_config("dialect: endpoint-picker", "test", {}).header_names()
        self.reception = Reception(self.gate, names, Ages(30.0), dialect=EndpointPicker(), **how)
        for number, address in enumerate(addresses):
            name = "abc"[number]
            served = frozenset((models or {}).get(name, ()))
            self.reception.put_cluster(name, address)
            self.gate.put_endpoint(EndpointSpec(name, address, models=served, max_running_requests=limit))
            self.gate.set_up(name, is_up=True)

    def stream(self, *, resets: bool = False) -> Stream:
        return Stream(self, resets=resets)

    def in_flight(self) -> dict[str, int]:
        return {name: len(one.leases) for name, one in self.gate.controller.endpoints.items()}


class Stream:
    """One stream: `>` is `hears`, `<` is what it says."""

    def __init__(self, gateway: Gateway, *, resets: bool) -> None:
        self.said: list[pb.ProcessingResponse] = []
        self.session = Session(gateway.reception, lambda data: self.said.append(pb.ProcessingResponse.FromString(data)))
        self.session.resets = resets

    def play(self, *lines: str, **messages: bytes) -> None:
        """`> name` sends that message; the lines `< ...` after it are all that the session says then."""
        script = list(lines)
        for index, line in enumerate(script):
            mark, _, rest = line.partition(" ")
            if mark == ">":
                already = len(self.said)
                self.session.receive(messages.get(rest, b"") or message(rest))
                expected = []
                for later in script[index + 1 :]:
                    if not later.startswith("<"):
                        break
                    expected.append(later.removeprefix("< "))
                assert [spoken(one) for one in self.said[already:]] == expected, line


def message(what: str) -> bytes:
    """`request_body ab|` is a piece with the text ab, and the last one; `response_headers 200` has that status."""
    kind, _, rest = what.partition(" ")
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    if kind.endswith("_body"):
        part.body, part.end_of_stream = rest.removesuffix("|").encode(), rest.endswith("|")
    elif kind == "response_headers":
        part.headers.headers.add(key=":status", raw_value=rest.removesuffix("|").encode())
        part.end_of_stream = rest.endswith("|")
    return request.SerializeToString()


def opening(modes: tuple[int, int] | None, *, body: bool = True, by_value: bool = False, **headers: str) -> bytes:
    """The first message of a stream; `modes` of the bodies of request and answer, as the gateway tells them."""
    request = pb.ProcessingRequest()
    part = request.request_headers
    part.end_of_stream = not body
    for key, value in {":method": "POST", ":path": "/v1/chat/completions", **headers}.items():
        header = part.headers.headers.add(key=key.replace("_", "-"))
        setattr(header, "value" if by_value else "raw_value", value.encode())
    if modes is not None:
        request.protocol_config.SetInParent()
        request.protocol_config.request_body_mode, request.protocol_config.response_body_mode = modes
    return request.SerializeToString()


def spoken(response: pb.ProcessingResponse) -> str:
    """A reply in the words of the plays."""
    kind = response.WhichOneof("response")
    if kind == "immediate_response":
        return f"refuse {response.immediate_response.status.code}"
    if kind == "request_headers" and response.request_headers.HasField("response"):
        mutation = response.request_headers.response.header_mutation
        picked = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
        told = response.dynamic_metadata["envoy.lb"]
        assert picked == dict(told), "header and metadata are equal"
        override = " lean" if response.HasField("mode_override") else ""
        return f"pick {picked[wire.PICK_HEADER]}{override}"
    if kind.endswith("_body"):
        mutation = getattr(response, kind).response.body_mutation
        if mutation.HasField("streamed_response"):
            streamed = mutation.streamed_response
            return f"{kind} {streamed.body.decode()}{'|' if streamed.end_of_stream else ''}"
    return kind


# ---- the ways of telling bodies


def test_full_duplex_every_piece_goes_back_as_it_came_and_the_last_one_of_the_answer_gives_the_lease_back():
    gateway = Gateway(A)
    stream = gateway.stream()
    stream.play(
        "> opening", f"< pick {A}",
        "> request_body ab", "< request_body ab",
        "> request_body cd|", "< request_body cd|",
        "> response_headers 200", "< response_headers",
        "> response_body 1", "< response_body 1",
        "> response_body 2", "< response_body 2",
        opening=opening(DUPLEX),
    )  # fmt: skip
    assert gateway.in_flight() == {"a": 1}
    stream.play("> response_body |", "< response_body |")
    assert gateway.in_flight() == {"a": 0}
    stream.session.end()
    assert gateway.in_flight() == {"a": 0}


def test_full_duplex_trailers_end_an_answer_too_and_so_does_a_head_without_a_body():
    gateway = Gateway(A, limit=2)
    for last in ("response_trailers", "response_headers 204|"):
        stream = gateway.stream()
        stream.play("> opening", f"< pick {A}", opening=opening(DUPLEX, body=False))
        if last == "response_trailers":
            stream.play("> response_headers 200", "< response_headers", "> response_body 1", "< response_body 1")
        assert gateway.in_flight() == {"a": 1}
        stream.play(f"> {last}", f"< {last.partition(' ')[0]}")
        assert gateway.in_flight() == {"a": 0}


def test_a_held_requests_body_is_answered_after_its_headers_in_order_and_its_trailers_last():
    gateway = Gateway(A)
    first, held = gateway.stream(), gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held.play("> opening", "> request_body ab", "> request_body cd", "> request_trailers", opening=opening(DUPLEX))
    first.session.end()
    assert list(map(spoken, held.said)) == [f"pick {A}", "request_body ab", "request_body cd", "request_trailers"]


def test_a_held_body_beyond_the_window_is_left_unread_until_its_request_is_picked_where_resets_tell_of_the_end():
    gateway = Gateway(A)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    for resets in (True, False):
        held = gateway.stream(resets=resets)
        held.play("> opening", f"> request_body {'x' * KEPT_BYTES}", opening=opening(DUPLEX))
        assert held.session.paused is resets
        held.session.end()
    held = gateway.stream(resets=True)
    held.play("> opening", f"> request_body {'x' * KEPT_BYTES}", opening=opening(DUPLEX))
    first.session.end()
    assert not held.session.paused


def test_of_a_body_that_is_longer_than_what_is_kept_nothing_is_taken_before_its_request_is_picked():
    """Envoy sends up to 1 MiB of a body as one piece: whoever reads one has it all."""
    gateway = Gateway(A)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = []
    for length, paused in ((KEPT_BYTES + 1, True), (KEPT_BYTES, False)):
        held.append(gateway.stream(resets=True))
        held[-1].play("> opening", opening=opening(DUPLEX, content_length=str(length)))
        assert held[-1].session.paused is paused
    first.session.end()
    assert not held[0].session.paused
    held[0].play("> request_body ab|", "< request_body ab|")


def test_what_a_client_sent_that_left_while_it_waited_is_not_remembered_with_its_request():
    gateway = Gateway(A)
    stories = Stories(gateway.gate.controller, gateway.clock.time)
    gateway.gate._observers = (stories,)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    piece = message(f"request_body {'x' * (1 << 20)}")
    tracemalloc.start()
    try:
        for _ in range(20):
            held = gateway.stream()
            held.play("> opening", "> piece", opening=opening(DUPLEX), piece=piece)
            held.session.end()
        del held
        assert tracemalloc.get_traced_memory()[0] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(gateway.gate.controller.endpoints["a"].leases) == 1


def test_what_all_held_requests_keep_together_is_bounded_and_comes_free_with_each_end():
    gateway = Gateway(A)
    gateway.reception.kept = bodies.Allowance(3 * KEPT_BYTES)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    piece = f"> request_body {'x' * KEPT_BYTES}"
    held = [gateway.stream() for _ in range(3)]
    for stream in held:
        stream.play("> opening", piece, opening=opening(DUPLEX))
    assert held[2].session.paused
    held[0].session.end()
    assert not held[2].session.paused
    first.session.end()
    assert len(held[1].said) == 2
    held[2].session.receive(message("response_headers 504"))
    assert gateway.reception.kept.used_bytes == 0


def test_a_refused_request_keeps_nothing_of_its_body():
    gateway = Gateway(A, policy=Policy(classes=(RequestClass("default", 0, 2.0),)))
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", "> request_body ab", opening=opening(DUPLEX))
    gateway.clock.advance(2.1)
    assert spoken(held.said[0]) == "refuse 429"
    assert gateway.reception.kept.used_bytes == 0


def test_a_body_that_is_here_whole_is_no_reason_not_to_listen():
    gateway = Gateway(A)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream(resets=True)
    held.play("> opening", f"> request_body {'x' * KEPT_BYTES}|", opening=opening(DUPLEX))
    assert not held.session.paused


def test_buffered_a_pick_asks_for_no_bodies_and_where_they_come_all_the_same_they_just_go_on():
    stream = Gateway(A).stream()
    stream.play(
        "> opening", f"< pick {A} lean",
        "> request_body abcd|", "< request_body",
        "> response_headers 200", "< response_headers",
        "> response_body 1234|", "< response_body",
        opening=opening(BUFFERED),
    )  # fmt: skip


def test_buffered_the_whole_answer_in_one_piece_gives_the_lease_back():
    gateway = Gateway(A)
    gateway.stream().play(
        *("> opening", f"< pick {A} lean", "> response_headers 200", "< response_headers"),
        *("> response_body 1234|", "< response_body"),
        opening=opening(BUFFERED, body=False),
    )
    assert gateway.in_flight() == {"a": 0}


@pytest.mark.parametrize(
    ("modes", "echoes"),
    [((MODE.NONE, MODE.FULL_DUPLEX_STREAMED), "response"), ((MODE.FULL_DUPLEX_STREAMED, MODE.NONE), "request")],
)
def test_one_body_alone_may_be_full_duplex_and_then_no_other_mode_is_asked_for(modes, echoes):
    stream = Gateway(A).stream()
    stream.play("> opening", f"< pick {A}", opening=opening(modes))
    stream.play(f"> {echoes}_body x", f"< {echoes}_body x")


def test_without_bodies_two_messages_are_all():
    gateway = Gateway(A)
    stream = gateway.stream()
    stream.play("> opening", f"< pick {A}", "> response_headers 200", "< response_headers", opening=opening(LEAN))
    assert gateway.in_flight() == {"a": 1}
    stream.session.end()
    assert gateway.in_flight() == {"a": 0}


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


def test_the_model_is_read_from_a_body_if_asked_and_a_header_wins_without_a_look():
    gateway = Gateway(A, B, models={"a": {"m1"}, "b": {"m2"}}, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", '> request_body {"stream": true, "mod', opening=opening(DUPLEX))
    stream.play('> request_body el": "m2", "x', f"< pick {B}",
                '< request_body {"stream": true, "mod', '< request_body el": "m2", "x')  # fmt: skip
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX, x_model="m1"))


def test_a_body_that_names_no_model_is_offered_when_it_ends_or_is_too_long_to_look_on():
    gateway = Gateway(A, limit=3, read_model=True)
    gateway.stream().play("> opening", "> request_body {}|", f"< pick {A}", "< request_body {}|",
                          opening=opening(DUPLEX))  # fmt: skip
    long = '{"messages": "' + "x" * bodies.MODEL_WITHIN
    gateway.stream().play("> opening", f"> request_body {long}", f"< pick {A}", f"< request_body {long}",
                          opening=opening(DUPLEX))  # fmt: skip


def test_a_body_that_does_not_come_is_waited_for_only_so_long():
    gateway = Gateway(A, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", "> request_body {", opening=opening(DUPLEX))
    gateway.clock.advance(READING_S - 0.1)
    assert stream.said == []
    gateway.clock.advance(0.2)
    assert list(map(spoken, stream.said)) == [f"pick {A}", "request_body {"]
    stream.play('> request_body "model": "m"}|', '< request_body "model": "m"}|')


def test_of_too_many_bodies_that_do_not_come_the_oldest_has_had_its_time(monkeypatch):
    gateway = Gateway(A, read_model=True)
    gateway.reception.reading._most = 2
    streams = [gateway.stream() for _ in range(3)]
    for stream in streams:
        stream.session.receive(opening(DUPLEX))
    assert [list(map(spoken, stream.said)) for stream in streams] == [[f"pick {A}"], [], []]
    for stream in streams:
        stream.session.end()
    assert not gateway.reception.reading._began


def test_a_drain_waits_for_no_body():
    gateway = Gateway(A, read_model=True)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX, x_model="m"))
    before = gateway.stream()
    before.play("> opening", opening=opening(DUPLEX))
    gateway.reception.drain()
    assert list(map(spoken, before.said)) == ["refuse 503"]
    gateway.stream().play("> opening", "< refuse 503", opening=opening(DUPLEX))


def test_a_body_in_one_byte_pieces_is_looked_at_a_few_times_and_never_beyond_where_a_model_may_stand(monkeypatch):
    looked = []
    monkeypatch.setattr(bodies, "model_in", lambda text: looked.append(len(text)))
    stream = Gateway(A, read_model=True).stream()
    stream.session.receive(opening(DUPLEX))
    piece = message("request_body x")
    for _ in range(bodies.MODEL_WITHIN - 1):
        stream.session.receive(piece)
    assert not stream.said
    stream.session.receive(message(f"request_body {'x' * (1 << 20)}"))
    assert spoken(stream.said[0]) == f"pick {A}"
    assert max(looked) == bodies.MODEL_WITHIN
    assert sum(looked) < 8 * bodies.MODEL_WITHIN


def test_a_text_that_never_ends_is_looked_at_once():
    """By the regular expression's own steps: it gets no second try from inside of an open text."""
    assert len(bodies._TOKEN.findall(b'{"' + b'\\"' * 1000)) == 2
    assert len(bodies._TOKEN.findall(b'{"' + b'\\"' * 1000 + b"\\")) == 2


def test_a_model_that_is_no_text_in_utf_8_becomes_one():
    for text in (b'{"model": "a\\ud800b"}', b'{"model": "a\xed\xa0\x80b"}'):
        (bodies.model_in(text) or "no model").encode()


@pytest.mark.parametrize(
    ("text", "model"),
    [('{"model": "m"}', "m"), ('{"messages": [{"model": "no"}], "model" :"a\\/b", "x', "a/b"), ('{"model": "cut', None),
     ('{"a": "model", "model"', None), ("[]", None), ('{"model": 5, "model": "later"}', None), ("", None),
     ('{"q": "\\"model\\": 1", "model": "m"}', "m"), ("not json", None), ("}}}{{{", None),
     ('{"a": ' + "[" * 5000, None), ('"' + "\\" * 60_001, None)],
)  # fmt: skip
def test_only_a_top_level_model_counts_and_strange_bodies_have_none(text, model):
    assert bodies.model_in(text.encode()) == model


# ---- what the gateway says beside headers


def told(data: bytes, namespace: str, key: str, *values: str, as_list: bool = True) -> bytes:
    """The message `data` with this in its metadata, as a list or as one text."""
    request = pb.ProcessingRequest.FromString(data)
    value = request.metadata_context.filter_metadata[namespace].fields[key]
    if as_list:
        for text in values:
            value.list_value.values.add(string_value=text.encode())
        value.list_value.SetInParent()
    else:
        value.string_value = ", ".join(values).encode()
    return request.SerializeToString()


def subset(*addresses: str, as_list: bool = True) -> bytes:
    return told(opening(DUPLEX), wire.SUBSET_NAMESPACE, wire.PICK_HEADER + "-subset", *addresses, as_list=as_list)


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


def served_by(address: str) -> bytes:
    return told(message("response_headers 200"), "envoy.lb", wire.PICK_HEADER + "-served", address, as_list=False)


def reserved(gateway: Gateway) -> dict[str, int]:
    return {name: one.reserved for name, one in gateway.gate.controller.endpoints.items()}
