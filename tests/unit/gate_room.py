"""A reception on a real gate and a real core, with a clock that stands still until a test moves it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from google.protobuf import struct_pb2

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy
from extproc.stream.ages import Ages
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session


class Clock:
    """A loop whose time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns: list[Callable[[], None]] = []
        self._timers: list[tuple[float, int, Timer]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.turns.append(callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (when, id(timer), timer))
        return timer

    def turn(self) -> None:
        turns, self.turns = self.turns, []
        for callback in turns:
            callback()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)  # a test that sets `now` has stopped us: what was due comes late
            if timer.callback is not None:
                timer.callback()
        self.now = end


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Room:
    """A reception with endpoints, and the replies of each session opened at it."""

    def __init__(self, *endpoints: EndpointSpec, fields: str = "", **policy: object) -> None:
        self.clock = Clock()
        self.decisions: list[object] = []
        self.cancels = 0
        self.gate = Gate(Controller(Policy(**policy)), self.clock, [self])
        self.reception = Reception(self.gate, Headers(), Ages(30.0), fields)
        for spec in endpoints:
            self.reception.put_cluster(spec.name, spec.cluster or spec.name)
            self.gate.put_endpoint(spec)
            self.gate.set_up(spec.name, is_up=True)

    def decided(self, decision) -> None:
        self.decisions.append(decision)

    def cancelled(self, ticket, wait_s) -> None:
        self.cancels += 1

    def open(self, **headers: str) -> tuple[Session, list[pb.ProcessingResponse]]:
        replies: list[pb.ProcessingResponse] = []
        session = Session(self.reception, lambda data: replies.append(pb.ProcessingResponse.FromString(data)))
        session.receive(message("request_headers", **headers))
        return session, replies

    def in_flight(self, name: str) -> int:
        return len(self.gate.controller.endpoints[name].leases)


def message(kind: str, attributes: dict[str, str] | None = None, fields: dict | None = None, **headers: str) -> bytes:
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    fields_of = part.trailers if kind == "response_trailers" else part.headers
    for key, value in headers.items():
        fields_of.headers.add(key=":status" if key == "status" else key.replace("_", "-"), raw_value=value.encode())
    for key, value in (attributes or {}).items():
        request.attributes["envoy.filters.http.ext_proc"].fields[key].string_value = value.encode()
    if fields:
        struct = struct_pb2.Struct()
        struct.update(fields)
        request.metadata_context.filter_metadata["llm"].MergeFromString(struct.SerializeToString())
    return request.SerializeToString()


def cluster(reply: pb.ProcessingResponse) -> str:
    (option,) = reply.request_headers.response.header_mutation.set_headers
    return option.header.raw_value.decode()


ONE = EndpointSpec("a", cluster="cluster-a", max_running_requests=1)
