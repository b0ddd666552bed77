"""What the log says of the queue: refusals, reroutes, endpoints that go and come, and never a flood."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from extproc.admission.controller import Controller
from extproc.admission.servers import MOST
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.observe.log import LINES, MOST_STREAKS, SAID_AGAIN_S, JsonLines, QueueLog


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def room(now, caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    controller = Controller(Policy(classes=(RequestClass("default", 0, 0.0),)))
    controller.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    return controller, QueueLog(controller, lambda: now[0])


def test_a_refusal_is_a_line_with_request_class_outcome_wait_budget_and_what_held_it(room, caplog):
    controller, log = room
    for name in ("r-1", "r-2"):
        for decision in controller.offer(Ticket(Request(name, 0.0)), 0.0):
            log.decided(decision)
    assert [record.getMessage() for record in caplog.records] == [
        "budget_expired: request r-2, class default, refused after 0.000 s of a budget of 0 s, held by limit"
    ]


def test_one_that_came_back_too_late_is_not_said_to_have_been_held_by_anything_here(caplog):
    """It read `refused after 13.000 s of a budget of 10 s, held by limit`, half a second after a restart."""
    caplog.set_level(logging.INFO, "extproc.queue")
    controller = Controller(Policy(classes=(RequestClass("default", 0, 10.0),)))
    controller.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    log = QueueLog(controller, lambda: 0.0)
    for name, arrived in (("r-1", 0.0), ("r-2", -13.0)):
        for decision in controller.offer(Ticket(Request(name, arrived)), 0.0):
            log.decided(decision)
    (record,) = caplog.records
    assert record.getMessage() == (
        "budget_expired: request r-2, class default, refused after 13.000 s of a budget of 10 s, over before "
        "anybody could decide: a sidecar that held it, or was to decide, is gone or was stopped"
    )
    assert "waited_for" not in record.about


@pytest.mark.parametrize(
    ("apart", "words"),
    [(True, "it has 2 of 2 in flight"), (False, "with all tenants that are not named it has 2 of 2 in flight")],
)
def test_a_refusal_names_the_tenant_and_at_its_cap_how_many_it_has_of_how_many(caplog, apart, words):
    caplog.set_level(logging.INFO, "extproc.queue")
    rules = TenantRules({"acme": TenantRule()}, TenantRule(max_in_flight=2), apart=apart)
    controller = Controller(Policy(tenants=rules))
    controller.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    log = QueueLog(controller, lambda: 0.0)
    for name in ("r-1", "r-2", "r-3"):
        for decision in controller.offer(Ticket(Request(name, 0.0, tenant="evil\n")), 0.0):
            log.decided(decision)
    (record,) = caplog.records
    line = f"tenant_limit: request r-3, class default, tenant evil\\n, refused after 0.000 s: {words}"
    assert record.getMessage() == line
    about = {"tenant": "evil\\n", "in_flight": 2, "max_in_flight": 2}
    assert {key: record.about[key] for key in about} == about


def test_many_refusals_are_a_few_lines_and_a_count(room, caplog, now):
    controller, log = room
    for number in range(101):
        for decision in controller.offer(Ticket(Request(f"r-{number}", 0.0)), 0.0):
            log.decided(decision)
    assert len(caplog.records) == LINES
    now[0] = 2.0
    for decision in controller.offer(Ticket(Request("late", 0.0)), 0.0):
        log.decided(decision)
    assert caplog.records[LINES].getMessage() == f"budget_expired: and {100 - LINES} more such lines in the last 2 s"
    assert len(caplog.records) == LINES + 2


def test_a_flood_that_ends_is_summed_up_by_the_next_look(room, caplog, now):
    controller, log = room
    for number in range(LINES + 8):
        for decision in controller.offer(Ticket(Request(f"r-{number}", 0.0)), 0.0):
            log.decided(decision)
    now[0] = 1.0
    log.look()
    log.look()
    assert [record.getMessage() for record in caplog.records[LINES:]] == [
        "budget_expired: and 7 more such lines in the last 1 s"
    ]


def test_a_flood_of_one_outcome_hides_no_line_of_another(room, caplog):
    controller, log = room
    for number in range(LINES + 8):
        for decision in controller.offer(Ticket(Request(f"r-{number}", 0.0)), 0.0):
            log.decided(decision)
    controller.remove_endpoints(["a"], 0.0)
    controller.put_endpoint(EndpointSpec("b", models=frozenset({"m"})), 0.0)
    for decision in controller.offer(Ticket(Request("other", 0.0, model="none")), 0.0):
        log.decided(decision)
    assert caplog.records[-1].getMessage().startswith("unknown_model: request other")


def test_many_that_are_given_up_after_the_same_wait_are_one_line_and_clients_that_leave_are_none(room, caplog):
    _, log = room
    ticket = Ticket(Request("r", 0.0))
    for wait_s in (*10 * [0.01], *(0.1 * number for number in range(40)), *9 * [0.2]):  # at once; any time; a few
        log.cancelled(ticket, wait_s)
    assert not caplog.records
    for wait_s in (5.001, 5.004) * 20:
        log.cancelled(ticket, wait_s)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "10 waiting requests in a row were given up 5.00 s after they came: by one client that closed them together, "
    )
    assert record.levelno == logging.WARNING


def test_tens_of_one_wait_after_tens_of_another_are_no_flood_and_are_named_again_later(caplog):
    now = [0.0]
    log = QueueLog(Controller(Policy()), lambda: now[0])
    ticket = Ticket(Request("r", 0.0))
    for now[0] in (1.0, 1.0 + SAID_AGAIN_S):
        for number in range(100):
            for _ in range(10):
                log.cancelled(ticket, 1.0 + number % 2)
    assert len(caplog.records) == 2


def test_a_timeout_that_goes_on_is_named_though_it_began_in_the_shadow_of_another_line(caplog):
    now = [0.0]
    log = QueueLog(Controller(Policy()), lambda: now[0])
    ticket = Ticket(Request("r", 0.0))
    for wait_s in (*10 * [1.0], *15 * [2.0]):
        log.cancelled(ticket, wait_s)
    now[0] = SAID_AGAIN_S
    for _ in range(30):
        log.cancelled(ticket, 2.0)
    first, second = (record.getMessage() for record in caplog.records)
    assert "given up 1.00 s" in first
    assert "given up 2.00 s" in second


def test_a_streak_that_goes_on_is_said_each_minute_and_once_that_it_is_over(caplog):
    now = [0.0]
    log = QueueLog(Controller(Policy()), lambda: now[0])
    ticket = Ticket(Request("r", 0.0))
    for _ in range(10):
        log.cancelled(ticket, 0.2)
    for second in range(1, 300):
        now[0] = float(second)
        if second < 130:
            log.cancelled(ticket, 1.0 + 0.1 * (second % 7))  # others leave at any time
            log.cancelled(ticket, 0.21)
        log.look()
    first, *others = (record.getMessage() for record in caplog.records)
    assert first.startswith("10 waiting requests in a row were given up 0.20 s after they came")
    still = "waiting requests are given up 0.20 s after they came still: 60 more in 60 s"
    assert others == [
        *2 * [still],
        "no more waiting requests are given up 0.20 s after they came: 139 were, within 129 s",
    ]


def test_clients_that_give_up_in_streaks_of_their_own_have_only_so_many_followed(caplog):
    now = [0.0]
    log = QueueLog(Controller(Policy()), lambda: now[0])
    ticket = Ticket(Request("r", 0.0))
    for number in range(MOST_STREAKS + 5):
        now[0] += SAID_AGAIN_S
        for wait_s in (*10 * [1.0 + number], *(1.0 + before for before in range(number))):  # none is over meanwhile
            log.cancelled(ticket, wait_s)
        log.look()
    began = [record for record in caplog.records if "in a row were given up" in record.getMessage()]
    assert len(began) == MOST_STREAKS


HOSTILE = "id\r\nERROR forged line \x1b[2J\u202e\\" + "x" * 500


def test_a_clients_text_stays_on_its_line_is_short_and_steers_no_terminal(room, caplog):
    controller, log = room
    for name in ("first", HOSTILE):
        for decision in controller.offer(Ticket(Request(name, 0.0)), 0.0):
            log.decided(decision)
    text = caplog.records[0].getMessage()
    assert text.isprintable()
    assert "\\r\\nERROR forged" in text
    assert len(text) < 250


def test_a_json_line_is_one_object_in_ascii_with_the_fields_of_the_refusal(room, caplog):
    controller, log = room
    for name in ("first", HOSTILE):
        for decision in controller.offer(Ticket(Request(name, 0.0)), 0.0):
            log.decided(decision)
    line = JsonLines().format(caplog.records[0])
    assert line.isascii()
    assert "\n" not in line
    entry = json.loads(line)
    assert {key: entry[key] for key in ("level", "logger", "outcome", "class", "wait_s", "position")} == {
        "level": "info",
        "logger": "extproc.queue",
        "outcome": "budget_expired",
        "class": "default",
        "wait_s": 0.0,
        "position": 0,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    assert "endpoint" not in entry


def test_a_json_line_carries_an_exceptions_trace():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed: %s", ("a\nb",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: a\nb"
    assert "ValueError: two" in json.loads(line)["exception"]


def test_one_that_waits_for_its_first_check_did_not_go_down(room, caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    controller, log = room
    controller.set_up("a", 0.0, is_up=True)
    log.look()
    del caplog.records[:]
    controller.put_endpoint(EndpointSpec("new", awaits_check=True), 0.0)
    assert controller.endpoints["new"].health.is_up is False
    log.look()
    assert not caplog.records
    controller.set_up("new", 1.0, is_up=True)
    log.look()
    assert [(one.getMessage(), one.levelno) for one in caplog.records] == [
        ("endpoint new: up (was unknown)", logging.INFO)
    ]


def test_an_endpoint_that_goes_and_comes_is_a_line_each(room, caplog):
    controller, log = room
    controller.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    controller.set_up("b", 0.0, is_up=True)
    log.look()
    controller.set_up("a", 1.0, is_up=False)
    log.look()
    log.look()
    controller.set_up("a", 2.0, is_up=True)
    log.look()
    for name in ("ok", "a", *12 * "b", *4 * "a"):
        ticket = Ticket(Request("r", 2.0, home="a" if name == "ok" else name))
        controller.offer(ticket, 2.0)
        controller.release(ticket, 2.0, Answer.FAILED if name == "a" else Answer.OK)
    log.look()
    first, *rest = caplog.records
    how = "its latest bad answer (failed): no connection, or cut before an answer began"
    assert (first.getMessage(), first.levelno) == ("endpoint b: up (was unknown)", logging.INFO), "between two looks"
    assert [record.getMessage() for record in rest] == [
        "endpoint a: down (was unknown)",
        "endpoint a: up (was down)",
        "endpoint a: ejected for 5s after 5 requests in a row failed there, which its peers serve; "
        + how
        + " (was up)",
    ]
    assert {record.levelno for record in rest} == {logging.WARNING}
    controller.tick(8.0)
    log.look()
    trial = Ticket(Request("trial", 8.0, home="a"))
    controller.offer(trial, 8.0)
    controller.release(trial, 8.0, Answer.FAILED)
    log.look()
    assert [record.getMessage() for record in caplog.records[4:]] == [
        "endpoint a: on trial (was ejected after failures)",
        "endpoint a: ejected for 10s after a failed trial; " + how + " (was on trial)",
    ]


def test_hundreds_of_endpoints_that_go_between_two_looks_are_one_line(room, caplog):
    """A reload that took 495 of 500 away wrote so many lines in one turn of the loop: seven milliseconds."""
    controller, log = room
    names = [f"e{number}" for number in range(300)]
    controller.put_endpoints(map(EndpointSpec, names), 0.0)
    for name in names:
        controller.set_up(name, 0.0, is_up=True)
    log.look()
    for name in names[1:]:
        controller.set_up(name, 1.0, is_up=False)
    log.look()
    first, second = (record for record in caplog.records if record.levelno > logging.DEBUG)
    some = ", ".join(names[1:11])
    assert first.getMessage().startswith("300 endpoints: up (were unknown): e0, e1")
    assert (second.levelno, second.getMessage()) == (
        logging.WARNING,
        f"299 endpoints: down (were up): {some} and 289 more",
    )


@pytest.mark.parametrize(("servers", "words"), [(2, "to stand for 2 servers"), (MOST, "is not believed")])
def test_an_address_that_stands_for_several_servers_is_told_once(room, caplog, servers, words):
    controller, log = room
    controller.endpoints["a"].servers.count = servers
    log.look()
    log.look()
    assert [words in record.getMessage() for record in caplog.records if "servers" in record.about] == [True]
