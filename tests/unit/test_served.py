"""Models that have a server, and those that have none left, wherever a person on call looks: each for itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from extproc.admin.http import Admin
from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request
from extproc.commands.top import lines
from extproc.observe.log import QueueLog
from extproc.observe.served import Served
from tests.unit.admin_room import Room

if TYPE_CHECKING:
    import pytest


def controller(**models: str) -> Controller:
    core = Controller(Policy())
    core.put_endpoints(
        [EndpointSpec(name, models=frozenset(its.split()), max_running_requests=1) for name, its in models.items()], 0.0
    )
    return core


def told(served: Served) -> dict[str, float]:
    (family,) = served.collect()
    return {sample.labels["pool"]: sample.value for sample in family.samples}


def test_of_models_that_share_endpoints_the_one_without_a_server_is_told() -> None:
    """An alert asked whether all endpoints were down: one model had no server for an hour, and nobody was called."""
    core = controller(a="llama", b="llama qwen", c="llama qwen")
    served = Served(core)
    assert told(served) == {"llama": 1, "qwen": 1}
    core.set_up("b", 1.0, is_up=False)
    assert told(served) == {"llama": 1, "qwen": 1}
    core.set_up("c", 1.0, is_up=False)
    assert told(served) == {"llama": 1, "qwen": 0}
    core.set_up("c", 2.0, is_up=True)
    assert told(served) == {"llama": 1, "qwen": 1}
    core.remove_endpoints(["b", "c"], 3.0)
    assert told(served) == {"llama": 1}, "at zero by intent is no fault"


def test_endpoints_that_list_no_models_serve_all_and_what_a_follower_sees_it_does_not_tell() -> None:
    core = controller(a="m5 m4 m3 m2 m1", b="")
    decides = True
    served = Served(core, lambda: decides)
    assert told(served) == {"m1,m2,m3,+2": 1, "*": 1}
    core.set_up("a", 1.0, is_up=False)
    assert told(served) == {"m1,m2,m3,+2": 1, "*": 1}
    core.set_up("b", 1.0, is_up=False)
    assert told(served) == {"m1,m2,m3,+2": 0, "*": 0}
    decides = False
    assert told(served) == {}


def test_the_log_says_once_that_a_model_has_no_endpoint_left_and_once_that_it_has_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "extproc.queue")
    core = controller(a="qwen", b="llama", c="llama qwen")
    log = QueueLog(core, lambda: 0.0)
    log.follow(Served(core))

    def said() -> list[tuple[int, str]]:
        caplog.clear()
        for _ in range(3):
            log.look()
        return [(one.levelno, one.getMessage()) for one in caplog.records if "model" in one.getMessage()]

    assert said() == []
    for name in ("a", "c"):
        core.set_up(name, 1.0, is_up=False)
    for number in range(12):
        core.offer(Ticket(Request(f"r{number}", 1.0, model="qwen")), 1.0)
    assert said() == [(logging.WARNING, "no endpoint left for model qwen, of 2: 12 wait")]
    core.set_up("a", 2.0, is_up=True)
    assert said() == [(logging.INFO, "an endpoint for model qwen is up again, of 2: 11 wait")]


def test_a_refused_requests_line_names_its_model_and_says_that_nobody_is_up_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It read `no_endpoint: ... held by limit`, without a model, of requests for one whose server was killed."""
    caplog.set_level(logging.INFO, "extproc.queue")
    core = controller(a="qwen", b="llama")
    log = QueueLog(core, lambda: 0.0)
    for name in ("runs", "waits"):
        core.offer(Ticket(Request(name, 0.0, model="qwen")), 0.0)
    core.set_up("a", 1.0, is_up=False)
    refused = core.tick(31.0)
    for decision in [*refused, *core.offer(Ticket(Request("typo", 31.0, model="gpt-9\n")), 31.0)]:
        log.decided(decision)
    first, second = caplog.records
    assert first.getMessage() == (
        "no_endpoint: request waits, class default, model qwen, refused after 31.000 s of a budget of 30 s, held by "
        "limit when it came, and no endpoint for it is up now"
    )
    assert first.about["model"] == "qwen"
    assert second.getMessage().startswith("unknown_model: request typo, class default, model gpt-9\\n, refused")


def room_of(**models: str) -> Room:
    room = Room(endpoints=0)
    for name, its in models.items():
        room.gate.put_endpoint(EndpointSpec(name, models=frozenset(its.split()), max_running_requests=1))
        room.gate.set_up(name, is_up=True)
    room.admin = Admin("127.0.0.1:0", room.gate, room.metrics)
    return room


def test_top_and_the_queues_say_which_pool_nobody_serves_and_which_model_each_request_is_of() -> None:
    room = room_of(a="qwen", b="llama")
    room.offer(1, model="llama")
    assert room.queues()["pools_down"] == []
    room.gate.set_up("a", is_up=False)
    room.offer(3, model="qwen")
    view = room.view()
    assert lines(view, 80, 24)[1] == "qwen: NO ENDPOINT UP, of 1; 3 wait"
    queues = room.queues()
    assert queues["pools_down"] == view["pools_down"] == [{"pool": "qwen", "endpoints": 1, "waiting": 3}]
    assert [one["model"] for one in queues["running"]] == ["llama"]
    assert {one["model"] for one in queues["waiting"]} == {"qwen"}


def test_where_there_are_several_pools_a_line_of_capacity_says_whose_it_is() -> None:
    """Only one pool's engines told what they can do, so its line stood there without a name."""
    one = {"pool": "qwen", "load": 0.5, "words": "traffic needs 0.5 engines, has 1"}
    view = room_of(a="qwen", b="llama").view() | {"capacity": [one]}
    assert lines(view, 80, 24)[1] == "qwen: traffic needs 0.5 engines, has 1"
    view = room_of(a="qwen").view() | {"capacity": [one]}
    assert lines(view, 80, 24)[1] == "traffic needs 0.5 engines, has 1"
