"""A request whose server takes no connection comes back: one lease is given back, once, and the wait goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.outcome import Outcome
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.config import parse_config
from extproc.errors import ConfigError
from extproc.stream.again import MOST, PAUSE_S
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session
from extproc.stream.wire import AGAIN
from tests.unit.gate_room import Clock, message

if TYPE_CHECKING:
    from collections.abc import Iterable

ENVOY = "127.0.0.1:8080"


class Room:
    """A reception before endpoints of one slot each, or so many, and what each stream was answered."""

    def __init__(
        self, *names: str, address: str = ENVOY, slots: int = 1, observers: Iterable[Any] = (), **policy
    ) -> None:
        self.clock = Clock()
        classes = (RequestClass("default", 0, 10.0),)
        self.core = Controller(Policy(classes=classes, **policy))
        self.gate = Gate(self.core, self.clock, observers)
        self.reception = Reception(self.gate, Headers(again=bool(address)), Ages(60.0), second_try=address)
        for name in names:
            self.gate.put_endpoint(EndpointSpec(name, max_running_requests=slots))
            self.gate.set_up(name, is_up=True)
            self.reception.put_cluster(name, name)

    def open(self, key: str = "", **asks: str) -> tuple[Session, list[pb.ProcessingResponse]]:
        replies: list[pb.ProcessingResponse] = []
        session = Session(self.reception, lambda data: replies.append(pb.ProcessingResponse.FromString(data)))
        session.receive(message("request_headers", **({AGAIN: key} if key else {}), **asks))
        return session, replies

    def leases(self) -> dict[str, int]:
        return {name: len(endpoint.leases) for name, endpoint in self.core.endpoints.items()}


def headers(replies: list[pb.ProcessingResponse]) -> dict[str, str]:
    """What the last answer sets."""
    part = replies[-1].request_headers.response.header_mutation
    return {option.header.key: option.header.raw_value.decode() for option in part.set_headers}


def test_what_comes_back_goes_to_another_server_and_its_first_lease_is_given_back_once():
    room = Room("a", "b")
    first, replies = room.open()
    chosen = headers(replies)["x-upstream-cluster"]
    second, again = room.open(headers(replies)[AGAIN])
    other = headers(again)["x-upstream-cluster"]
    assert {chosen, other} == {"a", "b"}
    assert room.leases() == {chosen: 0, other: 1}
    for session in (first, second):
        session.receive(message("response_headers", status="200"))
        session.end()
    assert room.leases() == {"a": 0, "b": 0}
    assert (len(room.reception.again), room.reception.again.count, room.reception.streams) == (0, 1, 0)


@pytest.mark.parametrize("way", ["emptiest", "home", "session"])
def test_what_comes_back_is_not_sent_again_to_who_refused_it_while_another_can_take_it(way):
    room = Room("a", "b", slots=8)
    asks = {"session": {"x-session-id": "s"}, "home": {"x-upstream-cluster": "b"}}.get(way, {})
    if way == "session":
        opener, _ = room.open(**{"x-upstream-cluster": "b"}, **asks)
        opener.receive(message("response_headers", {"response.code_details": "via_upstream"}, status="200"))
        opener.end()
    for _ in range(3):
        room.open(**{"x-upstream-cluster": "a"})
    _, replies = room.open(**asks)
    assert headers(replies)["x-upstream-cluster"] == "b"
    _, replies = room.open(headers(replies)[AGAIN], **{**asks, "x-upstream-cluster": "b"})
    assert headers(replies)["x-upstream-cluster"] == "a"
    assert room.leases() == {"a": 4, "b": 0}


def test_what_comes_back_waits_for_another_that_is_full_and_goes_anywhere_where_there_is_no_other():
    room = Room("a", "b", "c")
    room.gate.set_up("c", is_up=False)
    holder, replies = room.open()
    other, chosen = room.open()
    full = headers(replies)["x-upstream-cluster"]
    _, again = room.open(headers(chosen)[AGAIN])
    assert again == []
    holder.end()
    assert headers(again)["x-upstream-cluster"] == full
    _, again = room.open(headers(again)[AGAIN])
    room.clock.advance(PAUSE_S)
    assert headers(again)["x-upstream-cluster"] in {"a", "b"}  # both refused it, the third is down
    assert other is not None


def test_the_server_that_takes_no_connections_is_left_out_though_its_requests_are_answered_by_another():
    room = Room("a", "b")
    failed = 0
    for _ in range(30):
        first, replies = room.open()
        sessions = [first]
        if headers(replies)["x-upstream-cluster"] == "a":
            failed += 1
            sessions.insert(0, room.open(headers(replies)[AGAIN])[0])
        for session in sessions:
            session.receive(message("response_headers", {"response.code_details": "via_upstream"}, status="200"))
            session.end()
        room.clock.advance(0.1)
    assert failed <= 6
    assert room.core.endpoints["a"].health.ejected_until is not None


def test_it_waits_on_with_its_age_and_what_connecting_took_is_not_counted():
    room = Room("a")
    holder, _ = room.open()
    waiting, replies = room.open()
    room.clock.advance(4.0)
    holder.end()
    key = headers(replies)[AGAIN]
    room.clock.advance(30.0)  # Envoy tries to connect
    room.core.set_quota("a", 0, room.clock.now)
    _, again = room.open(key)
    assert again == []
    room.clock.advance(5.9)
    assert again == []
    room.clock.advance(0.2)
    assert again[0].immediate_response.status.code == 429
    assert waiting is not None


@pytest.mark.parametrize("moment", ["answered", "ended", "unknown", "used"])
def test_a_key_that_is_not_good_any_more_takes_nobodys_lease(moment):
    room = Room("a", "b", "c")
    first, replies = room.open()
    key = headers(replies)[AGAIN]
    match moment:
        case "answered":
            first.receive(message("response_headers", status="200"))
        case "ended":
            first.end()
        case "unknown":
            key = "0" * 32
        case "used":
            room.open(key)
    before = sum(room.leases().values())
    room.open(key)
    assert sum(room.leases().values()) == before + 1


def test_what_came_back_too_often_is_refused_and_leaves_nothing_behind():
    room = Room("a")
    session, replies = room.open()
    for _ in range(MOST):
        session, replies = room.open(headers(replies)[AGAIN])
        room.clock.advance(PAUSE_S)
    _, replies = room.open(headers(replies)[AGAIN])
    assert replies[0].immediate_response.status.code == 503
    assert room.leases() == {"a": 0}
    assert session is not None


def test_what_comes_back_from_all_that_are_up_waits_for_one_that_is_found_up_again():
    """It was refused after 60 ms, with a budget of 10 s: it had been to each of them before anybody knew."""
    room = Room("a", "b")
    _, replies = room.open()
    _, replies = room.open(headers(replies)[AGAIN])
    last, replies = room.open(headers(replies)[AGAIN])
    assert replies == []
    for name in "ab":  # meanwhile their pages could not be connected to
        room.gate.set_up(name, is_up=False)
    room.clock.advance(5.0)
    assert replies == []
    room.gate.set_up("b", is_up=True)
    room.clock.advance(1.0)
    assert headers(replies)["x-upstream-cluster"] == "b"
    assert last is not None


@pytest.mark.parametrize("enable_queue", [False, True])
def test_who_took_no_connection_is_waited_for_where_there_is_a_queue(enable_queue):
    room = Room("a", enable_queue=enable_queue)
    assert not room.gate.is_unreached("a")
    for details in ("upstream_reset_before_response_started{connection_failure}", "via_upstream"):
        session, _ = room.open()
        status = "200" if details == "via_upstream" else "503"
        session.receive(message("response_headers", {"response.code_details": details}, status=status))
        session.end()
        assert room.gate.is_unreached("a") is (enable_queue and status == "503")
    assert not room.gate.is_unreached("nobody")


@pytest.mark.parametrize("how", ["its client says so", "the queue is off"])
def test_what_comes_back_and_may_not_wait_goes_on_at_once(how):
    room = Room("a", enable_queue=how != "the queue is off")
    asks = {"x-queue-budget": "0.5"} if how == "its client says so" else {}
    _, replies = room.open(**asks)
    _, replies = room.open(headers(replies)[AGAIN], **asks)
    assert headers(replies)["x-upstream-cluster"] == "a"


def test_who_leaves_while_it_waits_to_ask_again_asks_no_more():
    room = Room("a")
    _, replies = room.open()
    session, replies = room.open(headers(replies)[AGAIN])
    session.end()
    room.clock.advance(2 * PAUSE_S)
    assert (replies, room.leases(), room.reception.streams) == ([], {"a": 0}, 1)


@pytest.mark.parametrize("elsewhere", ["", "elsewhere"])
def test_the_refusal_of_what_came_back_too_often_is_told_like_any_other(elsewhere):
    told = []
    room = Room("a", observers=(SimpleNamespace(decided=told.append),))
    room.reception.set_overflow({"default": elsewhere} if elsewhere else {})
    _, replies = room.open()
    for _ in range(MOST + 1):
        _, replies = room.open(headers(replies)[AGAIN])
        room.clock.advance(PAUSE_S)
    assert told[-1].outcome is Outcome.NO_ENDPOINT
    assert replies[0].dynamic_metadata.fields["extproc"].struct_value.fields["outcome"].string_value == "no_endpoint"
    assert headers(replies).get("x-upstream-cluster", "") == elsewhere


def test_sidecars_that_do_not_know_each_others_keys_go_on_counting_how_often_one_came_back():
    sidecars = [Room("a"), Room("a")]
    key = ""
    for sent in range(2 * MOST):
        room = sidecars[sent % 2]
        _, replies = room.open(key)
        room.clock.advance(PAUSE_S)
        if replies[0].HasField("immediate_response"):
            break
        key = headers(replies)[AGAIN]
        room.gate.put_endpoint(EndpointSpec("a", max_running_requests=sent + 2))
    assert sent == MOST + 1
    assert replies[0].immediate_response.status.code == 503


def test_where_another_sidecar_sent_it_is_no_wish_of_what_comes_back():
    _, replies = Room("a", "b").open()
    sent = headers(replies)
    first = sent["x-upstream-cluster"]
    room = Room("a", "b", slots=8)
    room.open(**{"x-upstream-cluster": first})
    _, again = room.open(sent[AGAIN], **{"x-upstream-cluster": first})
    assert headers(again)["x-upstream-cluster"] != first


@pytest.mark.parametrize(
    "made_up", ["9", f"99.{'0' * 32}", f"-1.{'0' * 32}", f"\u0663.{'0' * 32}", f"9.{'0' * 31}", "9" * 9999]
)
def test_what_is_no_key_is_a_new_request(made_up):
    room = Room("a")
    _, replies = room.open(made_up)
    assert headers(replies)["x-upstream-cluster"] == "a"
    assert headers(replies)[AGAIN].startswith("1.")


def test_a_second_try_that_another_sidecar_took_gives_the_lease_back_and_is_a_failure_of_ours():
    room = Room("a", "b")
    by_another = {"response.code_details": "via_upstream", "upstream.address": ENVOY}
    for _ in range(30):
        first, replies = room.open()
        chosen = headers(replies)["x-upstream-cluster"]
        attributes = by_another if chosen == "a" else {"response.code_details": "via_upstream"}
        first.receive(message("response_headers", attributes, status="200"))
        assert room.leases()[chosen] == (chosen == "b")
        first.end()
        room.clock.advance(0.1)
    assert room.core.endpoints["a"].health.ejected_until is not None


def test_without_the_key_nothing_is_said_of_second_tries():
    room = Room("a", address="")
    _, replies = room.open()
    assert AGAIN not in headers(replies)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("second_try: localhost:8080", "second_try: must have an IP address"),
        ("{second_try: '127.0.0.1:1', dialect: endpoint-picker}", "second_try: is for our own Envoy configuration"),
    ],
)
def test_an_address_that_can_not_work_is_named(text, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_config(text, "file", {})
