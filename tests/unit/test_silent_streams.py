"""Streams that say nothing are ended: after a while, or soon where there are many; nobody else is."""

from __future__ import annotations

from functools import partial

from extproc.admission.values import EndpointSpec
from extproc.stream.session import Session
from extproc.stream.silence import CROWDED_S, MOST, SILENT_S
from tests.unit.gate_room import Room, message


def silent(room: Room, count: int) -> list[int]:
    """Open streams that say nothing; a list that gets their numbers as they are hung up."""
    ended: list[int] = []
    for number in range(count):
        session = Session(room.reception, lambda _: None)
        session.hang_up = lambda session=session, number=number: (ended.append(number), session.end())
    return ended


def test_a_stream_that_says_nothing_is_ended_after_a_while_and_one_that_spoke_is_not():
    room = Room(EndpointSpec("a", max_running_requests=1))
    ended = silent(room, 3)
    room.open()
    room.open()
    room.clock.advance(SILENT_S - 0.1)
    assert ended == []
    room.clock.advance(0.2)
    assert (ended, room.reception.streams) == ([0, 1, 2], 2)


def test_of_too_many_streams_that_say_nothing_the_oldest_are_ended_after_a_moment():
    room = Room()
    ended = silent(room, MOST)
    room.clock.advance(CROWDED_S / 2)
    silent(room, 10)
    room.clock.advance(CROWDED_S / 2)
    silent(room, 1)
    assert ended == []
    room.clock.advance(CROWDED_S / 2)
    assert ended == list(range(11))
    assert room.reception.streams == MOST


def test_a_burst_of_streams_that_say_nothing_is_thinned_out_after_a_moment_though_no_more_come():
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


def test_of_a_flood_nobody_is_ended_because_those_behind_him_are_heard_first():
    """Thousands have opened their streams and are read at last; meanwhile as many come again, and are read at once."""
    room = Room()
    ended: list[int] = []
    first = [Session(room.reception, lambda _: None) for _ in range(MOST + MOST // 10)]
    for number, session in enumerate(first):
        session.hang_up = partial(ended.append, number)
    for _ in range(3 * MOST):
        room.clock.advance(2.5 * CROWDED_S / (3 * MOST))
        room.open()
    for session in reversed(first):
        session.receive(message("request_headers"))
    assert ended == []


def test_nobody_is_ended_for_what_he_said_while_we_were_stopped():
    room = Room()
    ended = silent(room, MOST + 1)
    room.clock.now += SILENT_S + 1.0
    room.clock.advance(0.0)
    assert ended == []
    room.clock.advance(SILENT_S)
    assert len(ended) == MOST + 1


def test_who_says_nothing_among_many_that_speak_is_thinned_out_all_the_same():
    room = Room()
    ended = silent(room, 3 * MOST)
    for _ in range(30):
        room.clock.advance(CROWDED_S / 10)
        room.open()
    assert len(ended) >= 2 * MOST
