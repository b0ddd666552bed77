"""Sessions on a real gate and a real core; only the loop's clock is the test's."""

from __future__ import annotations

import json

import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.placing import DUE_AT_ONCE
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.values import Answer, Dispatch, EndpointSpec, RequestClass
from extproc.errors import ProtocolError
from extproc.stream.gate import BURST, BURST_S
from extproc.stream.session import Session
from tests.unit.gate_room import ONE, Room, cluster, message


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


def test_more_decisions_than_a_burst_are_delivered_in_several_with_a_pause_after_each():
    """Envoy connects to servers for all that it hears of at once, and does nothing else meanwhile."""
    room = Room(EndpointSpec("a", max_running_requests=1))
    blocker, _ = room.open()
    answered = [room.open()[1] for _ in range(3 * BURST)]
    room.gate.put_endpoint(EndpointSpec("a", max_running_requests=10_000))
    for bursts in (1, 2, 3):
        room.clock.turn()
        assert sum(map(len, answered)) == bursts * BURST
        room.clock.advance(BURST_S)
    room.gate.set_up("a", is_up=True)
    assert not room.clock.turns
    blocker.end()


def test_a_page_that_shows_none_of_those_who_are_not_told_yet_is_no_page_of_one_of_several_servers():
    """Of 12,000 that were let go at once a page showed 4,000: two servers were seen, with twice the cache."""
    room = Room(EndpointSpec("a", max_running_requests=20))
    ended = [room.open()[0] for _ in range(20)]
    for session in ended:
        session.receive(message("response_headers", status="200"))
        session.end()
    for _ in range(20 + 200 * BURST):
        room.open()
    room.gate.put_endpoint(EndpointSpec("a", max_running_requests=10_000))
    for _ in range(80):
        room.clock.turn()
        room.clock.advance(BURST_S)
    endpoint = room.gate.controller.endpoints["a"]
    assert room.gate.undelivered > 100 * BURST
    room.gate.observe("a", Load(running=endpoint.sequences - room.gate.undelivered, waiting=0.0))
    assert endpoint.servers.count == 1


def test_who_goes_where_there_is_room_waits_for_no_decision_about_others():
    room = Room(EndpointSpec("a", "", frozenset("m"), 1), EndpointSpec("b", "", frozenset("o"), 9))
    for _ in range(1 + 3 * BURST):
        room.open(x_model="m")
    room.gate.put_endpoint(EndpointSpec("a", "", frozenset("m"), 10_000))
    assert room.gate.undelivered
    _, replies = room.open(x_model="o")
    assert [cluster(reply) for reply in replies] == ["b"]


def test_of_many_whose_budgets_end_none_is_forgotten_though_an_answer_begins_amid_their_refusals():
    """The answer's event went on with the pass, and nobody was told what came of that."""
    room = Room(EndpointSpec("a", max_running_requests=2))
    (over, _), (other, _) = room.open(), room.open()
    late = [room.open()[1] for _ in range(2 * DUE_AT_ONCE)]
    room.clock.now += 60.0  # the loop was elsewhere: no alarm came
    over.end()
    other.receive(message("response_headers", status="200"))
    room.clock.advance(1.0)
    assert [len(replies) for replies in late] == [1] * len(late)


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
    ("grpc_status", "details", "ejects"),
    [("14", "upstream_reset_before_response_started{connection_failure}", True), ("14", "cluster_not_found", True),
     ("14", "local_rate_limited", False), ("14", "request_rate_limited", False), ("7", "rbac_access_denied", False),
     ("13", "http2.invalid.header.field", False)],
)  # fmt: skip
def test_a_dead_engine_is_left_out_though_envoys_error_for_a_grpc_client_has_status_200(grpc_status, details, ejects):
    room = Room(EndpointSpec("a", max_running_requests=1), EndpointSpec("b", max_running_requests=100))
    for _ in range(100):
        room.clock.advance(0.3)
        session, _ = room.open(content_type="application/grpc")
        at_a = room.in_flight("a") == 1
        told = {"response.code_details": details if at_a else "via_upstream"}
        head = {"status": "200", "content_type": "application/grpc", "grpc_status": grpc_status if at_a else "0"}
        session.receive(message("response_headers", told, **head))
        session.end()
    assert (room.gate.controller.endpoints["a"].health.ejected_until is not None) is ejects


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


def test_no_good_answer_is_counted_by_endpoint_and_kind_for_as_long_as_the_endpoint_is_there():
    room = Room(ONE)
    assert room.reception.bad_answers == {"a": {Answer.FAILED: 0, Answer.BROKE_OFF: 0, Answer.ERROR: 0}}, (
        "Prometheus sees the first one come"
    )
    its_own, envoys = "via_upstream", "upstream_reset"
    heads = [("503", envoys), *2 * [("500", its_own)], ("404", its_own), ("200", its_own), ("400", "http1.codec_error")]
    for status, details in heads:
        session, _ = room.open()
        session.receive(message("response_headers", {"response.code_details": details}, status=status))
        session.end()
    left_early, _ = room.open()
    left_early.end()
    told = {"a": {Answer.FAILED: 1, Answer.BROKE_OFF: 0, Answer.ERROR: 2, Answer.REFUSED: 1}}
    assert room.reception.bad_answers == told, "good ones, who left and what Envoy refuses by itself are none"
    late, _ = room.open()
    room.reception.drop_cluster("a")
    late.receive(message("response_headers", {"response.code_details": "via_upstream"}, status="500"))
    late.end()
    assert room.reception.bad_answers == {}


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


def test_one_over_its_tenants_cap_is_told_its_own_name_and_the_cap_and_the_access_log_gets_the_name():
    room = Room(ONE, tenants=TenantRules({"acme": TenantRule(max_in_flight=1)}))
    room.open(x_tenant_id="acme")
    _, replies = room.open(x_tenant_id="acme")
    told = json.loads(replies[0].immediate_response.body)["error"]
    metadata = replies[0].dynamic_metadata.fields["extproc"].struct_value.fields
    assert (told["code"], told["tenant"], told["in_flight"], told["max_in_flight"]) == ("tenant_limit", "acme", 1, 1)
    assert metadata["tenant"].string_value == "acme"


@pytest.mark.parametrize("apart", [True, False])
def test_a_refusal_tells_no_client_how_many_requests_others_have_that_share_its_account(apart):
    room = Room(ONE, tenants=TenantRules({}, TenantRule(max_in_flight=1), apart=apart))
    room.open(x_tenant_id="stranger" if apart else "other")
    _, replies = room.open(x_tenant_id="stranger")
    told = json.loads(replies[0].immediate_response.body)["error"]
    assert (told["code"], told["tenant"]) == ("tenant_limit", "stranger")
    assert {"in_flight", "max_in_flight"} & told.keys() == ({"in_flight", "max_in_flight"} if apart else set())


@pytest.mark.parametrize("request_id", ["5c1f-7", "x" * 128, "", "x" * 129, "two words", "\u00e9", "a\r\nb: c"])
def test_a_refusal_repeats_the_id_to_ask_for_where_it_is_a_token(request_id):
    room = Room(ONE, classes=(RequestClass("default", 0, 0.0),))
    room.open()
    _, replies = room.open(x_request_id=request_id)
    error = json.loads(replies[0].immediate_response.body)["error"]
    assert error.get("request_id") == (request_id if request_id in ("5c1f-7", "x" * 128) else None)


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


def test_the_reference_says_what_a_client_reads_that_names_no_model():
    """It had another text, of its own."""
    assert Room().reception.how_to_name_a_model == Outcome.MODEL_MISSING.message
    in_body = Room(fields="extproc_request").reception.how_to_name_a_model
    body = 'in the body\'s "model" (JSON, by its content-type, not compressed), or in a header'
    assert in_body == Outcome.MODEL_MISSING.message.replace("in a header", body)
