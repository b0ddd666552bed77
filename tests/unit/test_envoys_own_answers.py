"""Answers that Envoy itself gives in a server's place: what each says of the server, and what follows for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from extproc.admission.values import Answer, EndpointSpec
from extproc.stream.reception import SAID_AGAIN_S
from tests.unit.gate_room import Room, message

if TYPE_CHECKING:
    from extproc.stream.session import Session

RESET = "upstream_reset_before_response_started"
KINDS = {
    "cluster_not_found": Answer.NO_CLUSTER,
    "no_healthy_upstream": Answer.NO_ADDRESS,
    f"{RESET}{{remote_connection_failure|delayed_connect_error:_Connection_refused}}": Answer.FAILED,
    f"{RESET}{{local_connection_failure|failed_to_bind_to_192.0.2.1:0:_Cannot_assign}}": Answer.FAILED,
    f"{RESET}{{connection_timeout}}": Answer.FAILED,
    f"{RESET}{{connection_termination}}": Answer.BROKE_OFF,
    f"{RESET}{{protocol_error}}": Answer.BROKE_OFF,
    f"{RESET}{{remote_reset}}": Answer.BROKE_OFF,
    f"{RESET}{{overflow}}": Answer.BREAKER,
    "maintenance_mode": Answer.DROPPED,
    "drop_overload": Answer.DROPPED,
    "unconditional_drop_overload": Answer.DROPPED,
    "response_timeout": Answer.TIMEOUT,
    "upstream_per_try_timeout": Answer.TIMEOUT,
    "upstream_per_try_idle_timeout": Answer.TIMEOUT,
    "upstream_max_stream_duration_reached": Answer.TIMEOUT,
    "stream_idle_timeout": Answer.TIMEOUT,
    "max_duration_timeout": Answer.TIMEOUT,
}
GOOD = "via_upstream"
OF_OTHERS = ("direct_response", "fault_filter_abort", "ext_authz_error", "local_rate_limited", "lua_response")


class Two(Room):
    """Endpoint a, whose answers the test says, beside b, which serves."""

    def __init__(self, *, limit: int = 8) -> None:
        super().__init__(*(EndpointSpec(name, f"cluster-{name}", max_running_requests=limit) for name in "ab"))
        for name in "ab":
            self.gate.set_up(name, is_up=True)
        self.serve("a")
        self.serve("b", 20)

    def ask(self, name: str, count: int):
        """Send so many to one endpoint at once; returns the streams that went there."""
        streams = []
        for _ in range(count):
            before = self.in_flight(name)
            session, _ = self.open(x_upstream_cluster=f"cluster-{name}")
            if self.in_flight(name) > before:
                streams.append(session)
            else:
                session.end()
        return streams

    def serve(self, name: str, count: int = 1) -> None:
        for _ in range(count):
            (session,) = self.ask(name, 1)
            session.receive(message("response_headers", {"response.code_details": "via_upstream"}, status="200"))
            session.end()

    def refuse(self, details: str, count: int = 1) -> int:
        """Ask a for so many at once, and have Envoy answer each of them so; returns how many went there."""
        streams = self.ask("a", count)
        for session in streams:
            session.receive(message("response_headers", {"response.code_details": details}, status="503"))
            session.end()
        return len(streams)

    @property
    def health(self):
        return self.gate.controller.endpoints["a"].health


@pytest.mark.parametrize(("details", "kind"), KINDS.items(), ids=str)
def test_what_envoy_says_of_a_server_is_counted_by_its_name(details, kind):
    room = Two()
    assert room.refuse(details) == 1
    counts = {kind: count for kind, count in room.reception.bad_answers["a"].items() if count}
    assert counts == {kind: 1}


@pytest.mark.parametrize("details", OF_OTHERS)
def test_what_a_filter_or_a_route_answers_by_itself_tells_nothing_of_a_server_that_was_not_asked(details):
    room = Two()
    for _ in range(40):
        room.serve("b")
        assert room.refuse(details) == 1
    assert sum(room.reception.bad_answers["a"].values()) == 0
    assert room.health.condition == "up"


@pytest.mark.parametrize("details", ["cluster_not_found", "no_healthy_upstream"])
def test_one_word_of_envoy_that_no_request_gets_there_closes_an_endpoint(details):
    room = Two()
    assert room.refuse(details) == 1
    assert room.health.ejected_until is not None
    assert room.health.refused_by is KINDS[details]
    assert room.refuse(details, 5) == 0


WORDS_OF_ALL = ["cluster_not_found", "no_healthy_upstream", f"{RESET}{{connection_timeout}}"]


class Fleet(Room):
    """Four endpoints that were all up."""

    def __init__(self) -> None:
        super().__init__(*(EndpointSpec(name, f"cluster-{name}", max_running_requests=8) for name in "abcd"))

    def ask(self, details: str) -> str | None:
        """Send one request, and have it answered so; returns where it went."""
        session, _ = self.open()
        ticket = session._ticket
        went = None if ticket is None or ticket.endpoint is None else ticket.endpoint.name
        if went is not None:
            session.receive(
                message(
                    "response_headers", {"response.code_details": details}, status="200" if details == GOOD else "503"
                )
            )
        session.end()
        return went

    @property
    def conditions(self) -> list[str]:
        return [one.health.condition for one in self.gate.controller.endpoints.values()]


@pytest.mark.parametrize("details", WORDS_OF_ALL)
def test_an_outage_that_all_share_is_over_for_all_as_soon_as_it_is_over(details):
    """It put all but one out: they came back up to 60 s later."""
    room = Fleet()
    for _ in range(600):
        room.clock.advance(0.1)
        for _ in range(8):
            room.ask(details)
    assert "ejected after failures" not in room.conditions
    for _ in range(15):
        room.clock.advance(0.1)
        for _ in range(8):
            room.ask(GOOD)
    assert room.conditions == ["up"] * 4


@pytest.mark.parametrize("details", WORDS_OF_ALL)
def test_one_envoy_of_two_that_lacks_all_endpoints_takes_one_at_a_time_from_the_other(details):
    room, out = Fleet(), 0
    for number in range(400):
        room.clock.advance(0.05)
        room.ask(GOOD if number % 2 else details)
        out += room.conditions.count("ejected after failures")
    assert out <= 400, "one of four at a time at the most"


def test_of_two_endpoints_that_envoy_lacks_both_are_closed_after_a_few():
    room, lost = Fleet(), dict.fromkeys("abcd", 0)
    for _ in range(600):
        room.clock.advance(0.1)
        for _ in range(8):
            session, _ = room.open()
            name = session._ticket.endpoint.name
            details = "cluster_not_found" if name in "ab" else GOOD
            lost[name] += details != GOOD
            session.receive(
                message(
                    "response_headers", {"response.code_details": details}, status="200" if details == GOOD else "503"
                )
            )
            session.end()
    assert room.conditions[2:] == ["up", "up"]
    assert max(lost.values()) <= 12, "five each, and their trials"
    assert set(room.conditions[:2]) <= {"ejected after failures", "on trial"}


def test_an_endpoint_that_envoy_lacks_and_that_is_alone_is_tried_a_request_at_a_time():
    room = Two()
    room.gate.set_up("b", is_up=False)
    assert room.refuse("cluster_not_found") == 1
    assert room.health.condition == "failing"
    assert room.refuse("cluster_not_found", 5) == 0
    room.clock.advance(1.5)
    assert room.refuse("cluster_not_found", 5) == 1


def overflow(session: Session) -> None:
    """Have Envoy's circuit breaker let a request not through."""
    session.receive(message("response_headers", {"response.code_details": f"{RESET}{{overflow}}"}, status="503"))
    session.end()


def test_a_breaker_below_our_limit_slows_a_good_server_and_never_puts_it_out():
    """Eight are sent there in one moment, and Envoy lets two of them through, again and again."""
    room = Two()
    for _ in range(20):
        room.clock.advance(1.0)
        streams = room.ask("a", 8)
        for session in streams[2:]:
            overflow(session)
        assert room.refuse(f"{RESET}{{overflow}}") == 0, "left alone for a moment"
        for session in streams[:2]:
            session.receive(message("response_headers", {"response.code_details": "via_upstream"}, status="200"))
            session.end()
        room.serve("b", 8)
        assert room.health.condition == "up"


def test_a_number_that_a_breaker_taught_grows_while_long_answers_run():
    """It waited for one of them to end: one answer of ten minutes, and the engine had one request at a time as long."""
    room = Two()
    streams = room.ask("a", 8)
    for session in streams[1:]:
        overflow(session)
    for _ in range(20):
        room.clock.advance(1.0)
        room.ask("a", 8)
    assert room.in_flight("a") == 8
    assert room.health.breaker is None


def test_a_number_that_a_breaker_taught_in_a_burst_is_forgotten_within_seconds():
    """One more in each eighth of a second: from 32 to 256 that was half a minute, from 1,024 to 2,000 two."""
    room = Two(limit=256)
    for session in room.ask("a", 256)[32:]:
        overflow(session)
    for _ in range(64):
        room.clock.advance(0.125)
        room.ask("a", 256 - room.in_flight("a"))
    assert room.in_flight("a") == 256
    assert room.health.breaker is None


def test_a_number_that_a_breaker_taught_lasts_through_a_quiet_time():
    """Nothing was sent there that would have told whether it is gone."""
    room = Two(limit=64)
    for session in room.ask("a", 64)[32:]:
        overflow(session)
    for _ in range(100):
        room.clock.advance(1.0)
        room.ask("a", 0)
    assert len(room.ask("a", 64 - room.in_flight("a"))) <= 1


def test_a_breaker_that_was_filled_by_others_costs_a_sixteenth_at_the_most_once_it_is_met_again():
    """Twice as many more in each step were up to half of what it lets through, at once."""
    room, most = Two(limit=1000), 400
    for session in room.ask("a", 100)[32:]:
        overflow(session)
    lost = 0
    for _ in range(200):
        room.clock.advance(0.125)
        streams = room.ask("a", 1000 - room.in_flight("a"))
        over = room.in_flight("a") - most
        if over > 0:
            lost = over
            for session in streams[-over:]:
                overflow(session)
            break
    assert 0 < lost <= most // 16


def test_a_breaker_that_stays_costs_less_and_less():
    """One more than it lets through is tried after 1 s, 2 s, 4 s, at most 30: two minutes of that lose few."""
    room, lost = Two(), 0
    for _ in range(120):
        room.clock.advance(1.0)
        streams = room.ask("a", 8)
        for session in streams[2:]:
            overflow(session)
            lost += 1
        for session in streams[:2]:
            session.receive(message("response_headers", {"response.code_details": GOOD}, status="200"))
            session.end()
    assert 6 < lost <= 16, lost


@pytest.mark.parametrize("details", ["maintenance_mode", "drop_overload"])
def test_a_share_that_envoy_drops_teaches_no_number_that_could_run(details):
    """A tenth was dropped of each, and taken for breakers they were lowered to one request at a time."""
    room = Two()
    for number in range(100):
        streams = room.ask("a", 8)
        assert len(streams) == 8
        if number % 2:
            dropped = streams.pop()
            dropped.receive(message("response_headers", {"response.code_details": details}, status="503"))
            dropped.end()
        for session in streams:
            session.receive(message("response_headers", {"response.code_details": GOOD}, status="200"))
            session.end()
    assert room.health.condition == "up"


@pytest.mark.parametrize("details", ["maintenance_mode", "unconditional_drop_overload"])
def test_one_of_which_envoy_drops_all_is_left_out_as_a_dead_one(details):
    room = Two()
    for _ in range(5):
        room.serve("b", 20)
        room.refuse(details)
    assert room.health.condition == "ejected after failures"
    assert room.health.refused_by is Answer.DROPPED


def test_a_breaker_that_lets_nothing_through_is_a_refusal_as_any():
    room = Two()
    for _ in range(40):
        room.clock.advance(1.0)
        room.serve("b")
        room.refuse(f"{RESET}{{overflow}}", 8)
    assert room.health.condition == "ejected after failures"
    assert room.health.refused_by is Answer.BREAKER


def test_a_server_that_is_alone_is_not_held_back_for_envoys_timeouts_and_one_whose_peers_are_in_time_is_left_out():
    room = Two()
    room.gate.set_up("b", is_up=False)
    for _ in range(40):
        assert room.refuse("response_timeout", 8) == 8
    assert room.health.condition == "up"
    room.gate.set_up("b", is_up=True)
    for _ in range(40):
        room.clock.advance(1.0)
        room.serve("b")
        room.refuse("response_timeout")
    assert room.health.condition == "ejected after failures"
    assert room.health.refused_by is Answer.TIMEOUT


@pytest.mark.parametrize("late", [{"status": "408"}, {"status": "200", "grpc_status": "2"}])
@pytest.mark.parametrize("details", ["stream_idle_timeout", "max_duration_timeout"])
def test_a_client_that_is_late_with_its_request_is_no_fault_of_the_server(details, late):
    """Envoy waited for the rest of a body: five such uploads in a row put a good engine out."""
    room = Two()
    for _ in range(10):
        room.serve("b")
        (session,) = room.ask("a", 1)
        session.receive(message("response_headers", {"response.code_details": details}, **late))
        session.end()
    assert sum(room.reception.bad_answers["a"].values()) == 0
    assert room.health.condition == "up"


def test_a_timeout_of_envoys_turns_no_single_model_off():
    room = Two()
    for _ in range(12):
        room.serve("b")
        session, _ = room.open(x_model="m")
        assert room.in_flight("a") == 1 or room.in_flight("b") == 1
        details = "response_timeout" if room.in_flight("a") else "via_upstream"
        session.receive(message("response_headers", {"response.code_details": details}, status="504"))
        session.end()
    assert not room.gate.controller.endpoints["a"].missing.models


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ("cluster_not_found", "endpoint a: no_cluster: Envoy has no cluster cluster-a: add it"),
        ("no_healthy_upstream", "endpoint a: no_server_address: Envoy has no address for cluster cluster-a"),
        (f"{RESET}{{overflow}}", "endpoint a: breaker_open: Envoy lets no more through to cluster cluster-a"),
        ("response_timeout", "endpoint a: timeout: a timeout of Envoy's ended it"),
    ],
)
def test_what_envoys_configuration_is_to_blame_for_is_said_once_a_minute_and_anew_of_one_that_came_again(
    details, says, caplog
):
    room = Two()

    def told() -> int:
        caplog.clear()
        session, _ = room.open(x_upstream_cluster="cluster-a")
        ticket = session._ticket
        room.reception.look_at_failure(ticket, KINDS[details])
        session.end()
        return sum(record.getMessage().startswith(says) for record in caplog.records)

    assert [told(), told()] == [1, 0]
    room.clock.now += SAID_AGAIN_S
    assert told() == 1
    room.reception.drop_cluster("a")
    room.reception.put_cluster("a", "cluster-a")
    assert told() == 1
