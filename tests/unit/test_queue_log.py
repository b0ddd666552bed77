"""What the log says of the queue: refusals, reroutes, endpoints that go and come, and never a flood."""

from __future__ import annotations

import logging

import pytest

from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.observe.log import LINES, QueueLog


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def room(now, caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    controller = Controller(Policy(classes=(RequestClass("default", 0, 0.0),)))
    controller.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    return controller, QueueLog(controller, lambda: now[0])


def test_a_refusal_is_a_line_with_request_class_outcome_and_wait(room, caplog):
    controller, log = room
    for name in ("r-1", "r-2"):
        for decision in controller.offer(Ticket(Request(name, 0.0)), 0.0):
            log.decided(decision)
    assert [record.getMessage() for record in caplog.records] == [
        "budget_expired: request r-2, class default, refused after 0.000 s"
    ]


def test_many_refusals_are_a_few_lines_and_a_count(room, caplog, now):
    controller, log = room
    for number in range(101):
        for decision in controller.offer(Ticket(Request(f"r-{number}", 0.0)), 0.0):
            log.decided(decision)
    assert len(caplog.records) == LINES
    now[0] = 2.0
    for decision in controller.offer(Ticket(Request("late", 0.0)), 0.0):
        log.decided(decision)
    assert f"and {100 - LINES} more such lines" in caplog.records[LINES].getMessage()
    assert len(caplog.records) == LINES + 2


def test_an_endpoint_that_goes_and_comes_is_a_line_each(room, caplog):
    controller, log = room
    log.look()
    controller.set_up("a", 1.0, is_up=False)
    log.look()
    log.look()
    controller.set_up("a", 2.0, is_up=True)
    log.look()
    for _ in range(5):
        ticket = Ticket(Request("r", 2.0))
        controller.offer(ticket, 2.0)
        controller.release(ticket, 2.0, Answer.FAILED)
    log.look()
    assert [record.getMessage() for record in caplog.records] == [
        "endpoint a: down (was up)",
        "endpoint a: up (was down)",
        "endpoint a: ejected after failures (was up)",
    ]
