"""What an answer's head says of the load of the endpoint that gave it."""

from __future__ import annotations

import json

import pytest

from extproc.admission.load import Load
from extproc.admission.values import EndpointSpec
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.endpoints.telemetry.target import Target
from extproc.stream.ages import Ages
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from tests.unit.gate_room import Room, cluster, message

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
