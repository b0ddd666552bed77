"""`extproc top` and the state in a log: what is wrong first, in as much room as there is, harmless to a terminal."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from uuid import UUID

import pytest

from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Request
from extproc.commands.top import line, lines, plain, top
from extproc.errors import StartError
from tests.unit.admin_room import Room


def test_top_puts_what_is_wrong_first_and_keeps_to_its_terminal():
    room = Room(endpoints=200)
    room.gate.set_up("vllm-150", is_up=False)
    room.offer(230)
    drawn = lines(room.view(), 80, 23)
    assert len(drawn) <= 23
    assert max(map(len, drawn)) <= 80
    assert drawn[2].startswith("vllm-150  DOWN")
    assert any(line.startswith("and 1") and line.endswith(" more") for line in drawn)
    assert any(line.startswith("OUTCOMES  dispatched 199") for line in drawn)


def test_top_and_the_view_say_which_limit_holds_each_endpoint_and_each_request():
    room = Room(endpoints=2)
    room.gate.put_endpoint(EndpointSpec("vllm-1", max_running_requests=9))
    room.offer(5)
    assert [one["held_by"] for one in room.view()["endpoints"]] == ["limit", None]
    room.gate.set_up("vllm-1", is_up=False)
    room.offer(1)
    view = room.view()
    assert [one["held_by"] for one in view["endpoints"]] == ["limit", "down"]
    assert [one.get("held_for_s") for one in view["endpoints"]] == [0.0, 0.0]
    assert [one["held_by"] for one in view["waiting"]] == ["limit"]
    assert set(view["limits"]) >= {"limit", "down", "prompts", "kv"}
    drawn = lines(view, 200, 40)
    assert drawn[1].split()[:4] == ["ENDPOINT", "STATE", "HELD", "BY"]
    assert drawn[2].split()[:5] == ["vllm-0", "up", "limit", "<1", "ms"]
    assert room.queues()["endpoints"] == [{**one, "models": one["models"]} for one in view["endpoints"]]
    assert room.queues()["waiting"] == view["waiting"]


def test_requests_of_several_sequences_fill_the_places_that_the_limit_counts_wherever_it_is_shown():
    room = Room(limit=4)
    room.offer(3, sequences=3)
    view = room.view()
    for shown in (view["endpoints"][0], room.queues()["endpoints"][0]):
        told = [shown[key] for key in ("in_flight", "sequences", "limit", "held_by")]
        assert told == [1, 3, 4, "limit"]
    drawn = "\n".join(lines(view, 80, 24))
    assert "3/4 (1 request)" in drawn
    assert "[###.]" in drawn
    assert "running   3/4" in line(view)
    plain_room = Room(limit=4)
    plain_room.offer(3)
    assert "sequences" not in plain_room.view()["endpoints"][0], "where they are as many, one number says it"


def test_a_request_whose_model_a_few_serve_says_so_beside_idle_others_in_top_and_queues():
    room = Room(endpoints=3)
    for name, models in (("vllm-0", ["small"]), ("vllm-1", ["small"]), ("vllm-2", ["qwen-32b"])):
        room.gate.put_endpoint(EndpointSpec(name, max_running_requests=1, models=frozenset(models)))
    room.offer(2, model="qwen-32b")
    room.offer(4, model="small")
    view = room.view()
    told = ["1 of 3 with qwen-32b: vllm-2", "2 of 3 with small: vllm-0, vllm-1"]
    assert sorted(one["may_go_to"] for one in view["waiting"]) == [told[0], told[1], told[1]]
    assert sorted(one["may_go_to"] for one in room.queues()["waiting"]) == [told[0], told[1], told[1]]
    assert told[0] in "\n".join(lines(view, 80, 24))
    assert "1 of 3 with" in "\n".join(lines(view, 60, 24)), "a narrow screen keeps what tells most"


@pytest.mark.parametrize(
    ("who", "to"),
    [
        ({}, "any"),
        ({"model": "made-up"}, "any"),
        ({"allowed": frozenset({"vllm-1"})}, "1 of 4 that its gateway allows: vllm-1"),
        ({"allowed": frozenset({"vllm-0", "vllm-1", "vllm-2"})}, "3 of 4 that its gateway allows"),
    ],
)
def test_where_a_request_may_go_is_told_by_what_narrows_it(who, to):
    room = Room(endpoints=4)
    room.offer(4)
    room.offer(1, **who)
    assert [one["may_go_to"] for one in room.view()["waiting"]] == [to]


def test_a_request_that_waits_at_home_says_where_it_goes_later():
    room = Room(endpoints=2)
    room.offer(2)
    room.offer(1, home="vllm-1")
    assert [one["may_go_to"] for one in room.view()["waiting"]] == ["first vllm-1, later any"]


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_narrow_terminal_top_leaves_columns_out_and_cuts_none(width):
    room = Room(endpoints=3, limit=8)
    room.offer(30)
    drawn = lines(room.view(), width, 24)
    assert not [row for row in drawn if row.endswith("~")]
    head = drawn[1].split()
    assert head[:4] == ["ENDPOINT", "STATE", "HELD", "BY"]
    assert "SENT" in head
    assert any(row.startswith("LONGEST WAITING") for row in drawn)


@pytest.mark.parametrize(
    ("who", "columns"),
    [
        ({}, ["REQUEST"]),
        ({"tenant": "acme"}, ["TENANT"]),
        ({"allowed": frozenset({"vllm-0"})}, ["MAY", "GO", "TO"]),
    ],
)
def test_a_narrow_terminal_shows_the_ids_that_why_asks_for_unless_other_columns_tell_something(who, columns):
    """Found on a walk: 80 characters had a column of `any` and one of `-`, and no id."""
    room = Room(endpoints=2)
    room.offer(2)
    room.offer(1, id=str(UUID(int=0)), **who)
    (heading,) = [row for row in lines(room.view(), 80, 24) if row.startswith("LONGEST WAITING")]
    assert heading.split()[-len(columns) :] == columns


def test_endpoints_that_only_refused_clients_mistakes_are_told_apart_from_those_that_are_down():
    """404 for a model that nobody has, from live engines, right after the start, is no outage."""
    room = Room(endpoints=5, limit=9)
    for name in ("vllm-1", "vllm-2", "vllm-3"):
        room.gate.set_up(name, is_up=None)
    for name in ("vllm-1", "vllm-3"):
        (ticket,) = room.offer(1, model="typo", home=name)
        room.gate.close(ticket, Answer.REFUSED)
    view = room.view()
    assert "5 endpoints: 2 up, 3 unknown" in lines(view)[0]
    assert line(view) == "   0s  running  0/45  waiting   0"
    room.gate.set_up("vllm-4", is_up=False)
    drawn = lines(room.view(), 80, 9)
    assert "5 endpoints: 1 up, 3 unknown, 1 out of use" in drawn[0]
    assert [row.split()[:2] for row in drawn[2:4]] == [["vllm-4", "DOWN"], ["vllm-1", "unknown"]]
    assert line(room.view()).endswith("5 endpoints: 1 up, 3 unknown, 1 out of use")


def test_top_and_the_view_tell_how_long_an_endpoint_has_held_its_oldest_request():
    room = Room(endpoints=2)
    room.offer(1, arrived=0.0)  # as one that was held: what counts is since when it runs
    room.clock.now += 75.0
    room.offer(1)
    view = room.view()
    assert [one.get("oldest_s") for one in view["endpoints"]] == [75.0, 0.0]
    head, first, second = lines(view, 200, 40)[1:4]
    where = head.index("OLDEST") + len("OLDEST")
    assert (first[:where].split()[-2:], second[:where].split()[-2:]) == (["75.0", "s"], ["<1", "ms"])
    room.gate.controller.adopt(Ticket(Request("of another sidecar", 0.0)), "vllm-1", room.clock.now, held_s=90.0)
    assert room.view()["endpoints"][1]["oldest_s"] == 90.0, "though it came last"
    assert "oldest_s" not in Room().view()["endpoints"][0]


def test_figures_of_an_engine_whose_page_cannot_be_had_bear_a_question_mark_and_the_reason():
    room = Room()
    view = room.view()
    view["endpoints"][0] |= {"load": {"running": 4.0, "kv_usage": 0.78}, "telemetry_age_s": 6.2}
    assert lines(view, 200, 40)[2].split()[-7:] == ["4", "-", "78%", "6.2", "s", "-", "0"]
    view["endpoints"][0] |= {"telemetry_silent": "connect"}
    drawn = lines(view, 200, 40)[2].split()
    assert drawn[drawn.index("4?") :] == ["4?", "-", "78%?", "6.2", "s", "connect", "-", "0"]


def test_top_makes_what_clients_sent_harmless():
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\u200b界e\u0301"
    room = Room()
    room.offer(2, id=evil, tenant=evil, model=evil)
    text = "\n".join(lines(room.view(), 200, 40))
    assert all(one == "\n" or one.isprintable() for one in text)
    assert "?]0;owned??[2J" in text
    assert plain(evil) == "?]0;owned??[2J?????e?"


def test_in_a_log_the_state_is_one_short_line_that_names_what_is_wrong():
    room = Room(endpoints=3, limit=4)
    room.offer(15)
    assert line(room.view()) == "   0s  running 12/12  waiting   3"
    room.gate.set_up("vllm-1", is_up=False)
    assert line(room.view()) == "   0s  running  12/8  waiting   3  2 of 3 endpoints up"
    room.gate.controller._books.policy = replace(room.gate.controller.policy, enable_queue=False)
    assert line(room.view()).startswith("   0s  running  12/8  waiting   3  queue off  2 of 3")


@pytest.mark.parametrize(
    ("quiet_s", "end"), [(None, ", no request yet"), (2.0, " up"), (14.0, ", last request 14.0 s ago")]
)
def test_top_tells_that_no_requests_come(quiet_s, end):
    room = Room()
    assert lines(room.view() | {"quiet_s": quiet_s}, 100, 24)[0].endswith(end)


def test_a_sidecar_that_hangs_is_not_told_as_none(monkeypatch):
    """The kernel takes the connection, and nobody answers."""
    monkeypatch.setattr("extproc.commands.top.SILENT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        admin = f"127.0.0.1:{hung.getsockname()[1]}"
        with pytest.raises(StartError, match=f"^{admin} takes connections and does not answer within .*kill -9"):
            asyncio.run(top(admin, once=True))
