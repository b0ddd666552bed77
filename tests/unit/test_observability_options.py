"""What is off by default, and what Envoy must be told when it is switched on."""

from __future__ import annotations

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.config import parse_config
from extproc.envoy.bootstrap import render
from extproc.envoy.check import check_envoy
from extproc.envoy.skeleton import EnvoyOptions
from extproc.observe.metrics import Metrics
from extproc.stream import wire
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session
from tests.unit.gate_room import Clock, message

ENDPOINTS = "endpoints: [{name: a, address: '127.0.0.1:8001'}]\n"
OPTIONS = {"server_timing": "server-timing", "tracing": "traceparent"}


class Room:
    """A reception with one endpoint of one slot; the second request is refused at once."""

    def __init__(self, headers: Headers, *, server_timing: bool) -> None:
        self.clock = Clock()
        self.gate = Gate(Controller(Policy(classes=(RequestClass("default", 0, 0.0),))), self.clock)
        self.reception = Reception(self.gate, headers, Ages(30.0), server_timing=server_timing)
        self.reception.put_cluster("a", "a")
        self.gate.put_endpoint(EndpointSpec("a", max_running_requests=1))

    def open(self, **headers: str) -> tuple[Session, list[pb.ProcessingResponse]]:
        replies: list[pb.ProcessingResponse] = []
        session = Session(self.reception, lambda data: replies.append(pb.ProcessingResponse.FromString(data)))
        session.receive(message("request_headers", **headers))
        return session, replies


def told(mutation: pb.HeaderMutation) -> dict[str, str]:
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


@pytest.mark.parametrize("on", [False, True])
def test_clients_are_told_how_long_they_waited_only_if_that_is_wanted(on):
    room = Room(Headers(), server_timing=on)
    session, replies = room.open()
    _, refusal = room.open()
    session.receive(message("response_headers", status="200"))
    answer = told(replies[1].response_headers.response.header_mutation)
    assert answer == ({"server-timing": "queue;dur=0.0"} if on else {})
    assert ("server-timing" in told(refusal[0].immediate_response.headers)) is on
    assert wire.queue_time(0.12345) == "queue;dur=123.5"


def test_an_answer_that_nobody_waited_for_is_told_no_time():
    """Envoy answered by itself while the request was held: there was no decision whose wait could be told."""
    room = Room(Headers(), server_timing=True)
    replies: list[pb.ProcessingResponse] = []
    session = Session(room.reception, lambda data: replies.append(pb.ProcessingResponse.FromString(data)))
    session.receive(message("response_headers", status="413"))
    assert told(replies[0].response_headers.response.header_mutation) == {}


def test_trace_context_is_read_only_if_tracing_is_on_and_is_cut_short():
    seen = []
    for headers in (Headers(), Headers(trace="traceparent")):
        room = Room(headers, server_timing=False)
        room.open(traceparent="0" * 1000)
        (ticket,) = room.gate.controller.endpoints["a"].leases
        seen.append(len(ticket.request.trace))
    assert seen == [0, 256]


def test_what_a_client_wrote_for_nothing_is_counted_by_header():
    room = Room(Headers(), server_timing=False)
    for budget, cluster in (("5s", "a"), ("soon", "b"), ("-1s", "")):
        room.open(x_queue_budget=budget, x_upstream_cluster=cluster)
    metrics = Metrics(room.gate.controller, lambda: 0, ignored=lambda: room.reception.requests.ignored)
    text = b"".join(metrics.pieces()).decode()
    samples = {
        sample.labels["header"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "extproc_ignored_values_total"
    }
    assert samples == {"class": 0, "budget": 2, "cluster": 1}


@pytest.mark.parametrize("key", OPTIONS)
def test_envoy_is_told_of_an_option_when_it_is_on_and_check_finds_an_envoy_that_was_not(key, tmp_path):
    off = parse_config(ENDPOINTS, "test", {})
    on = parse_config(ENDPOINTS + f"{key}: true\n", "test", {})
    assert OPTIONS[key] not in render(off, EnvoyOptions())
    assert OPTIONS[key] in render(on, EnvoyOptions())
    path = tmp_path / "envoy.yaml"
    path.write_text(render(on, EnvoyOptions()))
    assert check_envoy(on, path) == []
    path.write_text(render(off, EnvoyOptions()))
    (problem,) = check_envoy(on, path)
    assert OPTIONS[key] in problem


def test_the_rendered_access_log_says_which_request_it_was_and_why_it_waited():
    envoys = yaml.safe_load(render(parse_config(ENDPOINTS, "file", {}), EnvoyOptions(access_log="/dev/stdout")))
    (listener,) = envoys["static_resources"]["listeners"]
    (log,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["access_log"]
    fields = log["typed_config"]["log_format"]["json_format"]
    assert {fields[name] for name in ("method", "model", "request_id", "queue")} == {
        "%REQ(:METHOD)%",
        "%REQ(x-model)%",
        "%REQ(X-REQUEST-ID)%",
        f"%DYNAMIC_METADATA({wire.NAMESPACE})%",
    }
    assert fields["path"] == "%PATH(NQ:ORIG_OR_PATH)%", "without its query, which may be secret"
