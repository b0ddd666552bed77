"""Sessions as plays: what Envoy says goes in, `>>`, what we answer comes out, `<<`; the actors are streams, by name.

A play that goes otherwise shows both columns. Time passes by `-- 2 s`; `?? a` asks how endpoint a is, `?? dry` what the
queue would have done. A first line `..` sets the stage: `endpoints=a,b slots=1 dialect=picker second-try dry-run
overflow`; `probe`: first bytes may be shown, `probe=there`: some were before; `judged`: each request that was sent
somewhere ends with what its answer counts as; `head=200`: when the play begins, ann was sent to the first endpoint and
its answer's head, with that status, has gone by.
"""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import Answer, EndpointSpec, Policy, RequestClass
from extproc.errors import ProtocolError
from extproc.stream import wire
from extproc.stream.again import UPSTREAM
from extproc.stream.ages import Ages
from extproc.stream.dialect import EndpointPicker
from extproc.stream.dry_run import DryRun
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.request import Headers
from extproc.stream.session import Session
from tests.unit.gate_room import Clock

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

CLASSES = (RequestClass("std", 0, 5.0), RequestClass("high", 9, 5.0), RequestClass("soft", -1, 1.0))
ENVOY = "127.0.0.1:8080"
DUPLEX = (pb.ProcessingMode.FULL_DUPLEX_STREAMED,) * 2


class Stage:
    """A gate, a core and a reception where a play is acted, line by line."""

    def __init__(self, how: str = "") -> None:
        facts = {key: value for key, _, value in (word.partition("=") for word in how.split())}
        self.names = facts.get("endpoints", "a").split(",")
        self.clock = Clock()
        self.picks = facts.get("dialect") == "picker"
        self.addresses = {name: f"{name}:80" if self.picks else f"cluster-{name}" for name in self.names}
        policy = Policy(
            classes=CLASSES, shed=False, first_byte_probe="probe" in facts, enable_queue="dry-run" not in facts
        )
        core = Controller(policy)
        self.dry = DryRun(replace(policy, enable_queue=True), core.endpoints)
        core.watch(self.dry.happened)
        self.gate = Gate(core, self.clock)
        again = ENVOY if "second-try" in facts else ""
        self.reception = Reception(
            self.gate,
            Headers(again=bool(again)),
            Ages(30.0),
            dialect=EndpointPicker() if self.picks else None,
            second_try=again,
            finished=self.judged if "judged" in facts else None,
        )
        for name in self.names:
            self.reception.put_cluster(name, self.addresses[name])
            self.gate.put_endpoint(EndpointSpec(name, max_running_requests=int(facts.get("slots", "2"))))
            self.gate.set_up(name, is_up=True)
        self.reception.has_shown = facts.get("probe") == "there"
        if "overflow" in facts:
            self.reception.set_overflow({"soft": "elsewhere"})
        self.sessions: dict[str, Session] = {}
        self.numbers: dict[str, int] = {}  # of the requests, to the first-byte probe
        self.keys: dict[str, str] = {}  # by which requests come back
        self.said: list[str] = []
        if "head" in facts:
            self.act(">> ann comes")
            self.act(f">> ann answers status={facts['head']} by=via_upstream")
            sent_to = self.addresses[self.names[0]]
            assert self.said == [f"<< ann goes to {sent_to}", "<< ann goes on (response_headers)"]
            self.said.clear()

    def act(self, line: str) -> None:
        """Do one line: `>> WHO WHAT [KEY=VALUE ...]`, `-- N s` or `?? ENDPOINT`."""
        mark, who, *words = line.split()
        if mark == "--":
            self.clock.advance(float(who))
        elif mark == "??" and who == "dry":
            counts = sorted((what, count) for (what, _), count in self.dry.counts.items())
            self.said.append(f"<< dry: {', '.join(f'{count} {what}' for what, count in counts)}")
        elif mark == "??":
            endpoint = self.gate.controller.endpoints[who]
            self.said.append(f"<< {who} runs {len(endpoint.leases)}, {endpoint.health.condition}")
        else:
            self._do(who, *words)

    def _do(self, who: str, what: str, *words: str) -> None:
        plain = [word for word in words if "=" not in word]
        facts = {key: value for key, _, value in (word.partition("=") for word in words if "=" in word)}
        match what:
            case "comes":
                self.sessions[who] = Session(self.reception, lambda data: self.hear(who, data))
                self._say(who, self._opening(who, plain, facts))
            case "returns":  # Envoy tries a request again that it could not connect: through the front door
                self.sessions[f"{who}'"] = Session(self.reception, lambda data: self.hear(f"{who}'", data))
                self._say(f"{who}'", self._opening(who, plain, {wire.AGAIN: self.keys[who], **facts}))
            case "again":
                self._say(who, self._opening(who, plain, facts))
            case "answers" | "trails" | "sends" | "gets":
                self._say(who, _message(what, plain, facts))
            case "shows":
                probe = Session(self.reception, lambda data: self.hear("the probe", data))
                probe.receive(self._shown(who, words[0]))
                self.said += ["<< the probe is over"] * probe.over
                probe.end()
            case "half-closes":
                if not self.sessions[who].half_closed():
                    self.sessions[who].end()
            case "ends":
                self.sessions[who].end()
            case _:
                raise AssertionError(f"nobody can do {what!r}")

    def _say(self, who: str, request: pb.ProcessingRequest) -> None:
        try:
            self.sessions[who].receive(request.SerializeToString())
        except ProtocolError:
            self.said.append(f"<< {who} is told that this has no place here")

    def _opening(self, who: str, plain: list[str], facts: dict[str, str]) -> pb.ProcessingRequest:
        told = {":method": plain[0] if plain else "POST", ":path": "/v1/chat/completions", "x-request-id": who, **facts}
        request = _headers("request_headers", told)
        request.request_headers.end_of_stream = "bodiless" in plain
        if self.picks:
            request.protocol_config.SetInParent()
            request.protocol_config.request_body_mode, request.protocol_config.response_body_mode = DUPLEX
        return request

    def _shown(self, who: str, piece: str) -> bytes:
        request = _piece("response_body", piece)
        request.observability_mode = True
        spaces = request.metadata_context.filter_metadata
        spaces[wire.NUMBER_NAMESPACE].fields["n"].number_value = self.numbers[who]
        return request.SerializeToString()

    def hear(self, who: str, data: bytes) -> None:
        reply = pb.ProcessingResponse.FromString(data)
        match reply.WhichOneof("response"):
            case "immediate_response":
                self.said.append(f"<< {who} is refused with {reply.immediate_response.status.code}")
            case "request_headers" if reply.request_headers.HasField("response"):
                mutation = reply.request_headers.response.header_mutation
                told = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
                self.keys[who] = told.get(wire.AGAIN, "")
                if wire.NUMBER_NAMESPACE in reply.dynamic_metadata.fields:
                    numbers = reply.dynamic_metadata.fields[wire.NUMBER_NAMESPACE].struct_value.fields
                    self.numbers[who] = int(numbers["n"].number_value)
                self.said.append(f"<< {who} goes to {told[wire.PICK_HEADER if self.picks else 'x-upstream-cluster']}")
            case ("request_body" | "response_body") as kind if getattr(reply, kind).response.body_mutation.HasField(
                "streamed_response"
            ):
                piece = getattr(reply, kind).response.body_mutation.streamed_response
                end = "|" if piece.end_of_stream else ""
                self.said.append(f"<< {who} {kind.split('_')[0]} {piece.body.decode()}{end}")
            case other:
                self.said.append(f"<< {who} goes on ({other})")

    def judged(self, ticket: Ticket, answer: Answer) -> None:
        began = ", though it began well" if ticket.is_answered and answer is not Answer.OK else ""
        self.said.append(f"<< {ticket.request.id} counts as {answer.value}{began}")


def _message(what: str, plain: list[str], facts: dict[str, str]) -> pb.ProcessingRequest:
    """What Envoy says of a request that goes on."""
    if what == "answers":
        return _answer(plain, facts)
    if what == "trails":
        return _headers("response_trailers", facts)
    return _piece("request_body" if what == "sends" else "response_body", plain[0])


def _headers(kind: str, facts: dict[str, str]) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    fields = part.trailers if kind == "response_trailers" else part.headers
    for key, value in facts.items():
        fields.headers.add(key=":status" if key == "status" else key, raw_value=value.encode())
    return request


def _answer(plain: list[str], facts: dict[str, str]) -> pb.ProcessingRequest:
    """The head of an answer; `bodiless`: it is all there is.

    `by=`, `upstream=`: Envoy's words for who gave it, and that one's address; `served=`: the same for a picker.
    """
    by, upstream, served = (facts.pop(key, None) for key in ("by", "upstream", "served"))
    request = _headers("response_headers", facts)
    request.response_headers.end_of_stream = "bodiless" in plain
    if served is not None:
        fields = request.metadata_context.filter_metadata[wire.PICK_NAMESPACE].fields
        fields[f"{wire.PICK_HEADER}-served"].string_value = served.encode()
    for key, value in {"response.code_details": by, UPSTREAM: upstream}.items():
        if value is not None:
            request.attributes["envoy.filters.http.ext_proc"].fields[key].string_value = value.encode()
    return request


def _piece(kind: str, text: str) -> pb.ProcessingRequest:
    """A piece of a body: `ab`, the last one `ab|`, an empty last one `|`, an empty one `-`."""
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    part.body, part.end_of_stream = text.removesuffix("|").removesuffix("-").encode(), text.endswith("|")
    return request


def play(script: str) -> str:
    """Act `script`; return how it really went, in the same words."""
    lines = dedent(script).strip().splitlines()
    how = lines[0].removeprefix("..") if lines[0].startswith("..") else ""
    stage, went = Stage(how), lines[:1] if how else []
    for line in lines[len(went) :]:
        if line.startswith("<<"):
            continue
        went.append(line)
        stage.act(line)
        went += stage.said
        stage.said.clear()
    return "\n".join(went)


def check(script: str) -> None:
    """Act `script`, and show both columns unless it goes as written."""
    wanted, went = dedent(script).strip().splitlines(), play(script).splitlines()
    if wanted != went:
        width = max(map(len, wanted))
        rows = max(len(wanted), len(went))
        columns = [
            (left, right)
            for left, right in zip(wanted + [""] * (rows - len(wanted)), went + [""] * (rows - len(went)), strict=True)
        ]
        text = "\n".join(f"{'  ' if left == right else '! '}{left:{width}}   {right}" for left, right in columns)
        pytest.fail(f"the play went otherwise:\n  {'as written':{width}}   as it went\n{text}", pytrace=False)
