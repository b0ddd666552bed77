"""Sessions on a real gate and a real core; only the loop's clock is the test's."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from functools import partial

import pytest
from google.protobuf import struct_pb2

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.values import Dispatch, EndpointSpec, Policy, RequestClass
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.endpoints.telemetry.target import Target
from extproc.errors import ProtocolError
from extproc.stream.ages import Ages
from extproc.stream.gate import BURST, Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session
from extproc.stream.silence import CROWDED_S, MOST, SILENT_S


class Clock:
    """A loop whose time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns: list[Callable[[], None]] = []
        self._timers: list[tuple[float, int, Timer]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.turns.append(callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (when, id(timer), timer))
        return timer

    def turn(self) -> None:
        turns, self.turns = self.turns, []
        for callback in turns:
            callback()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now = end


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Room:
    """A reception with endpoints, and the replies of each session opened at it."""

    def __init__(self, *endpoints: EndpointSpec, fields: str = "", **policy: object) -> None:
        self.clock = Clock()
        self.decisions: list[object] = []
        self.cancels = 0
        self.gate = Gate(Controller(Policy(**policy)), self.clock, [self])
        self.reception = Reception(self.gate, Headers(), Ages(30.0), fields)
        for spec in endpoints:
            self.reception.put_cluster(spec.name, spec.cluster or spec.name)
            self.gate.put_endpoint(spec)
            self.gate.set_up(spec.name, is_up=True)

    def decided(self, decision) -> None:
        self.decisions.append(decision)

    def cancelled(self, ticket, wait_s) -> None:
        self.cancels += 1

    def open(self, **headers: str) -> tuple[Session, list[pb.ProcessingResponse]]:
        replies: list[pb.ProcessingResponse] = []
        session = Session(self.reception, lambda data: replies.append(pb.ProcessingResponse.FromString(data)))
        session.receive(message("request_headers", **headers))
        return session, replies

    def in_flight(self, name: str) -> int:
        return len(self.gate.controller.endpoints[name].leases)


def message(kind: str, attributes: dict[str, str] | None = None, fields: dict | None = None, **headers: str) -> bytes:
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    fields_of = part.trailers if kind == "response_trailers" else part.headers
    for key, value in headers.items():
        fields_of.headers.add(key=":status" if key == "status" else key.replace("_", "-"), raw_value=value.encode())
    for key, value in (attributes or {}).items():
        request.attributes["envoy.filters.http.ext_proc"].fields[key].string_value = value.encode()
    if fields:
        struct = struct_pb2.Struct()
        struct.update(fields)
        request.metadata_context.filter_metadata["llm"].MergeFromString(struct.SerializeToString())
    return request.SerializeToString()


def cluster(reply: pb.ProcessingResponse) -> str:
    (option,) = reply.request_headers.response.header_mutation.set_headers
    return option.header.raw_value.decode()


ONE = EndpointSpec("a", cluster="cluster-a", max_running_requests=1)


def test_a_request_with_room_is_steered_to_the_endpoints_cluster_and_its_end_gives_the_lease_back():
    room = Room(ONE)
    session, (reply,) = room.open()
    assert cluster(reply) == "cluster-a"
    assert room.in_flight("a") == 1
    session.end()
    assert room.in_flight("a") == 0


def test_a_held_request_gets_nothing_until_the_lease_before_it_is_back():
    room = Room(ONE)
    first, _ = room.open()
    _, replies = room.open()
    assert replies == []
    first.end()
    assert cluster(replies[0]) == "cluster-a"
    assert len(replies) == 1


def test_a_session_that_ends_while_held_leaves_the_queue_and_is_never_answered():
    room = Room(ONE)
    first, _ = room.open()
    second, replies = room.open()
    second.end()
    first.end()
    assert replies == []
    assert room.cancels == 1
    assert room.in_flight("a") == 0


def test_ending_twice_is_ending_once():
    room = Room(ONE)
    session, _ = room.open()
    session.end()
    session.end()
    assert room.reception.streams == 0
    assert room.in_flight("a") == 0


def test_a_budget_ends_by_the_gates_one_timer():
    room = Room(ONE, classes=(RequestClass("default", 0, 2.0),))
    room.open()
    _, replies = room.open()
    room.clock.advance(1.9)
    assert replies == []
    room.clock.advance(0.2)
    assert replies[0].immediate_response.status.code == 429


def test_a_local_answer_by_envoy_while_held_takes_the_request_out_of_the_queue():
    room = Room(ONE)
    room.open()
    held, replies = room.open()
    held.receive(message("response_headers", status="504"))
    assert replies[0].WhichOneof("response") == "response_headers"
    assert room.gate.controller.waiting == 0
    held.end()
    assert room.cancels == 1


def test_a_second_request_headers_is_a_protocol_error_and_the_lease_still_comes_back():
    room = Room(ONE)
    session, _ = room.open()
    with pytest.raises(ProtocolError, match="request_headers has no place here"):
        session.receive(message("request_headers"))
    session.end()
    assert room.in_flight("a") == 0


def test_more_decisions_than_a_burst_are_delivered_over_several_turns_of_the_loop():
    """Envoy's HTTP/2 flood guard closes the connection when too many streams end in one moment."""
    room = Room(EndpointSpec("a", max_running_requests=1))
    blocker, _ = room.open()
    answered = [room.open()[1] for _ in range(3 * BURST)]
    room.gate.put_endpoint(EndpointSpec("a", max_running_requests=10_000))
    room.gate.set_up("a", is_up=True)
    assert sum(map(len, answered)) == BURST
    room.clock.turn()
    assert sum(map(len, answered)) == 2 * BURST
    room.clock.turn()
    assert sum(map(len, answered)) == 3 * BURST
    assert not room.clock.turns
    blocker.end()


def test_of_many_refused_at_once_each_is_told_once_though_telling_one_refuses_another():
    room = Room(ONE)
    room.open()
    late: list[list[pb.ProcessingResponse]] = []
    first = Session(room.reception, lambda _: late.append(room.open()[1]))
    first.receive(message("request_headers"))
    told = [room.open()[1] for _ in range(2)]
    room.gate.drain()
    assert [len(replies) for replies in (*late, *told)] == [1, 1, 1]
    assert not room.clock.turns


def test_a_drain_refuses_no_more_in_a_turn_of_the_loop_than_are_told_in_it():
    room = Room(ONE)
    room.open()
    told = [room.open()[1] for _ in range(3 * BURST)]
    room.gate.drain()
    for turn in range(1, 4):
        assert sum(map(len, told)) == turn * BURST
        assert room.gate.controller.waiting == room.gate.undelivered == (3 - turn) * BURST
        room.clock.turn()
    assert not room.clock.turns


def test_a_request_dispatched_in_a_burst_that_ends_before_its_turn_gives_its_lease_back_and_is_not_answered():
    room = Room(EndpointSpec("a", max_running_requests=1))
    room.open()
    waiting = [room.open() for _ in range(BURST + 1)]
    room.gate.put_endpoint(EndpointSpec("a", max_running_requests=10_000))
    room.gate.set_up("a", is_up=True)
    late, replies = waiting[-1]
    assert replies == []
    late.end()
    room.clock.turn()
    assert replies == []
    assert room.in_flight("a") == 1 + BURST


@pytest.mark.parametrize(
    ("status", "details", "failures"),
    [("500", "via_upstream", 1), ("504", "response_timeout", 1),
     ("503", "upstream_reset_before_response_started{connection_failure}", 1),
     ("503", "via_upstream", 1), ("429", "via_upstream", 1), ("200", "via_upstream", 0), ("404", "via_upstream", 1),
     ("400", "http1.codec_error", 0), ("429", "local_rate_limited", 0), ("503", None, 0)],
)  # fmt: skip
def test_what_an_endpoint_refuses_counts_against_it_and_what_envoy_refuses_by_itself_does_not(
    status, details, failures
):
    room = Room(EndpointSpec("a", max_running_requests=1), EndpointSpec("b", max_running_requests=100))
    attributes = {"response.code_details": details} if details else {}
    for _ in range(100):
        room.clock.advance(0.3)
        session, _ = room.open()
        at_a = room.in_flight("a") == 1
        answer = (
            ("response_headers", attributes)
            if at_a
            else ("response_headers", {"response.code_details": "via_upstream"})
        )
        session.receive(message(*answer, status=status if at_a else "200"))
        session.end()
    assert (room.gate.controller.endpoints["a"].health.ejected_until is not None) is bool(failures)


@pytest.mark.parametrize(
    ("grpc_status", "ejects"),
    [("0", False), ("14", True), ("13", True), ("8", True), ("3", True), ("77", True), (None, False)],
)
def test_a_grpc_answer_is_judged_by_its_trailers_and_not_by_the_head_before_them(grpc_status, ejects):
    room = Room(EndpointSpec("a", max_running_requests=1), EndpointSpec("b", max_running_requests=100))
    told = {"response.code_details": "via_upstream"}
    for _ in range(100):
        room.clock.advance(0.3)
        session, _ = room.open(content_type="application/grpc")
        status = grpc_status if room.in_flight("a") == 1 else "0"
        session.receive(message("response_headers", told, status="200", content_type="application/grpc+proto"))
        if status is not None:
            session.receive(message("response_trailers", grpc_status=status))
        session.end()
    assert (room.gate.controller.endpoints["a"].health.ejected_until is not None) is ejects


def test_headers_win_over_fields_of_the_body_and_wrong_types_are_ignored():
    room = Room(EndpointSpec("a", models=frozenset({"m1"})), EndpointSpec("b", models=frozenset({"m2"})), fields="llm")
    replies: list[bytes] = []
    for fields, headers, expected in (
        ({"model": "m2"}, {}, "b"),
        ({"model": "m2"}, {"x_model": "m1"}, "a"),
        ({"model": "m2", "max_tokens": "12", "user": 5}, {}, "b"),
    ):
        session = Session(room.reception, replies.append)
        session.receive(message("request_headers", fields=fields, **headers))
        assert cluster(pb.ProcessingResponse.FromString(replies.pop())) == expected
    assert all(isinstance(decision, Dispatch) for decision in room.decisions)


def test_the_answer_carries_why_as_dynamic_metadata():
    room = Room(ONE)
    first, _ = room.open()
    _, replies = room.open()
    room.clock.advance(0.25)
    first.end()
    details = replies[0].dynamic_metadata["extproc"]
    assert details["outcome"] == "dispatched"
    assert details["endpoint"] == "a"
    assert details["class"] == "default"
    assert details["wait_ms"] == pytest.approx(250)
    assert details["position"] == 0


# ---- load reports in response headers

FULL = "TEXT named_metrics.kv_cache_usage_perc=0.97"


def reporting_room(**limits: int) -> tuple[Room, Scraper]:
    """A room with these endpoints, whose reports are read as a sidecar reads them."""
    specs = [EndpointSpec(name, max_running_requests=limit) for name, limit in limits.items()]
    room = Room(*specs)
    scraper = Scraper(interval_s=0, timeout_s=1, stale_after_s=10, loop=room.clock)
    room.reception = Reception(room.gate, Headers(), Ages(30.0), read_report=scraper.read_report)
    for spec in specs:
        scraper.put(Target(spec.name, "http://127.0.0.1:1/metrics", "none"))
        room.reception.put_cluster(spec.name, spec.name)
    return room, scraper


@pytest.mark.parametrize(
    "header",
    [{"endpoint_load_metrics": FULL},
     {"endpoint_load_metrics_bin": "Qh4KE2t2X2NhY2hlX3VzYWdlX3BlcmMRCtejcD0K7z8="}],
)  # fmt: skip
def test_the_load_in_an_answers_header_is_that_of_the_endpoint_that_gave_the_answer(header):
    room, scraper = reporting_room(a=10, b=1)
    sessions = {}
    for _ in range(2):
        session, (reply,) = room.open()
        sessions[cluster(reply)] = session
    sessions["a"].receive(message("response_headers", status="200", **header))
    endpoints = room.gate.controller.endpoints
    assert endpoints["a"].known == Load(kv_usage=0.97)
    assert endpoints["b"].known is None
    assert (scraper.age_s("a"), scraper.age_s("b")) == (0.0, None)
    _, waiting = room.open()
    assert waiting == []
    sessions["b"].end()
    assert cluster(waiting[0]) == "b"


def test_a_report_that_cant_be_read_is_one_counted_error_and_the_answer_goes_on():
    room, scraper = reporting_room(a=1)
    for value in ("TEXT lots", "JSON " + json.dumps({"named_metrics": {"kv_cache_usage_perc": 10**400}}), "x" * 9000):
        session, replies = room.open()
        session.receive(message("response_headers", status="200", endpoint_load_metrics=value))
        assert [reply.WhichOneof("response") for reply in replies] == ["request_headers", "response_headers"]
        session.end()
    assert list(scraper.errors()) == [("a", "orca", 3)]
    assert room.gate.controller.endpoints["a"].known is None
    assert scraper.age_s("a") is None
    scraper.remove("a")
    assert list(scraper.errors()) == []
    assert scraper.read_report("a", "TEXT lots") is None
    assert list(scraper.errors()) == []


def test_neither_a_request_nor_an_answer_that_is_envoys_own_can_report_a_load():
    room, _ = reporting_room(a=1)
    room.open(endpoint_load_metrics=FULL)
    held, _ = room.open()
    held.receive(message("response_headers", status="504", endpoint_load_metrics=FULL))
    room.gate.drain()
    refused, _ = room.open()
    refused.receive(message("response_headers", status="503", endpoint_load_metrics=FULL))
    assert room.gate.controller.endpoints["a"].known is None


def test_a_page_that_was_read_has_the_say_on_how_old_telemetry_is():
    """Reports don't replace a page: its counters are what the limits follow."""
    room, scraper = reporting_room(a=1)
    scraper._succeeded(scraper._watches["a"], Load(running=1))
    room.clock.advance(5.0)
    assert scraper.read_report("a", FULL) == Load(kv_usage=0.97)
    assert scraper.age_s("a") == 5.0


def silent(room: Room, count: int) -> list[int]:
    """Open streams that say nothing; a list that gets their numbers as they are hung up."""
    ended: list[int] = []
    for number in range(count):
        session = Session(room.reception, lambda _: None)
        session.hang_up = lambda session=session, number=number: (ended.append(number), session.end())
    return ended


def test_a_refusal_says_the_wait_that_was_predicted_and_its_budget_alike_in_body_and_metadata():
    room = Room(ONE, classes=(RequestClass("default", 0, 4.0),))
    running, _ = room.open()
    for _ in range(12):
        waiting, _ = room.open()
        room.clock.advance(1.0)
        running.end()
        running = waiting
    held = [room.open() for _ in range(20)]
    replies = next(replies for _, replies in held if replies)
    told = json.loads(replies[0].immediate_response.body)["error"]
    metadata = replies[0].dynamic_metadata.fields["extproc"].struct_value.fields
    assert told["code"] == metadata["outcome"].string_value == "budget_predicted"
    assert told["predicted_wait_s"] == metadata["predicted_wait_s"].number_value == pytest.approx(8.0, rel=0.3)
    assert told["budget_s"] == metadata["budget_s"].number_value == 4.0
    assert told["waited_for"] == metadata["waited_for"].string_value == "limit"


def test_a_stream_that_says_nothing_is_ended_after_a_while_and_one_that_spoke_is_not():
    room = Room(EndpointSpec("a", max_running_requests=1))
    ended = silent(room, 3)
    room.open()
    room.open()
    room.clock.advance(SILENT_S - 0.1)
    assert ended == []
    room.clock.advance(0.2)
    assert (ended, room.reception.streams) == ([0, 1, 2], 2)


def test_of_too_many_streams_that_say_nothing_the_oldest_are_ended_after_a_second():
    room = Room()
    ended = silent(room, MOST)
    room.clock.advance(CROWDED_S / 2)
    silent(room, 10)
    assert ended == []
    room.clock.advance(CROWDED_S / 2)
    silent(room, 1)
    assert ended == list(range(11))
    assert room.reception.streams == MOST


def test_a_burst_of_streams_that_say_nothing_is_thinned_out_after_a_second_though_no_more_come():
    room = Room()
    ended = silent(room, MOST)
    more = silent(room, 10 * MOST)
    room.clock.advance(0.9 * CROWDED_S)
    assert ended == more == []
    room.clock.advance(0.2 * CROWDED_S)
    assert (len(ended), len(more), room.reception.streams) == (MOST, 9 * MOST, MOST)
    room.clock.advance(SILENT_S)
    assert room.reception.streams == 0


def test_of_a_flood_nobody_is_ended_because_we_read_him_late():
    """Thousands open their streams in one moment; the last of them is heard seconds later, each in his turn."""
    room = Room()
    ended: list[int] = []
    sessions = [Session(room.reception, lambda _: None) for _ in range(3 * MOST)]
    for number, session in enumerate(sessions):
        session.hang_up = partial(ended.append, number)
    for session in sessions:
        room.clock.advance(4 * CROWDED_S / len(sessions))
        session.receive(message("request_headers"))
    assert ended == []


def test_who_says_nothing_among_many_that_speak_is_thinned_out_all_the_same():
    room = Room()
    ended = silent(room, 3 * MOST)
    for _ in range(30):
        room.clock.advance(CROWDED_S / 10)
        room.open()
    assert len(ended) >= 2 * MOST


def test_decisions_for_higher_classes_are_told_first():
    classes = (RequestClass("low", 0, 1.0), RequestClass("high", 5, 60.0))
    room = Room(EndpointSpec("a", max_running_requests=1), classes=classes, shed=False)
    first, _ = room.open()
    low = [room.open(x_request_class="low")[1] for _ in range(3 * BURST)]
    _, high = room.open(x_request_class="high")
    room.clock.advance(1.0)  # all of the low class expire in one moment: most of them wait for their turn to be told
    assert sum(map(len, low)) == BURST
    first.end()
    room.clock.turn()
    assert cluster(high[0]) == "a"
