"""Sessions as plays: what Envoy says goes in, `>>`, what we answer comes out, `<<`; the actors are streams, by name.

A play that goes otherwise shows both columns. Time passes by `-- 2 s`; `?? a` asks how endpoint a is, `?? dry` what the
queue would have done. A first line `..` sets the stage: `endpoints=a,b slots=1 dialect=picker second-try dry-run
overflow`; `probe`: first bytes may be shown, `probe=there`: some were before; `judged`: each request that was sent
somewhere ends with what its answer counts as.
"""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from test_session_and_gate import Clock

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
        self.dry = DryRun(replace(policy, enable_queue=True))
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
        self.tickets: dict[str, str] = {}  # by which requests come back
        self.said: list[str] = []

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
                self._say(f"{who}'", self._opening(who, plain, {wire.AGAIN: self.tickets[who], **facts}))
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
        spaces[wire.TICKETS_NAMESPACE].fields["n"].number_value = self.numbers[who]
        return request.SerializeToString()

    def hear(self, who: str, data: bytes) -> None:
        reply = pb.ProcessingResponse.FromString(data)
        match reply.WhichOneof("response"):
            case "immediate_response":
                self.said.append(f"<< {who} is refused with {reply.immediate_response.status.code}")
            case "request_headers" if reply.request_headers.HasField("response"):
                mutation = reply.request_headers.response.header_mutation
                told = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
                self.tickets[who] = told.get(wire.AGAIN, "")
                if wire.TICKETS_NAMESPACE in reply.dynamic_metadata.fields:
                    numbers = reply.dynamic_metadata.fields[wire.TICKETS_NAMESPACE].struct_value.fields
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


WAITING = {
    "who comes while there is room goes at once, who comes later when somebody ends": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes
        >> ann ends
        << cid goes to cluster-a
        """,
    "a higher class goes first": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> low comes
        >> top comes x-request-class=high
        >> ann ends
        << top goes to cluster-a
        >> bob ends
        << low goes to cluster-a
        """,
    "a budget that ends is a refusal, and the end after it changes nothing": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes
        -- 4.9 s
        -- 0.2 s
        << cid is refused with 429
        >> cid ends
        >> ann ends
        """,
    "a client's own budget is the shorter one": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes x-queue-budget=0s
        << cid is refused with 429
        """,
    "who leaves while it waits is never answered, and the next one goes": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes
        >> dan comes
        >> cid ends
        >> bob ends
        << dan goes to cluster-a
        """,
    "who leaves while it runs makes room at once, and blames nobody": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann ends
        << bob goes to cluster-a
        << ann counts as ok
        >> bob ends
        << bob counts as unknown
        ?? a
        << a runs 0, up
        """,
    "an answer of Envoy's own while it waits takes a request out of the queue": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes
        >> cid answers status=504
        << cid goes on (response_headers)
        >> ann ends
        """,
    "a second head has no place, and the lease comes back all the same": """
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        >> cid comes
        >> ann again
        << ann is told that this has no place here
        >> ann ends
        << cid goes to cluster-a
        """,
    "who is refused may still send its body and see our answer's head pass by": """
        .. slots=1
        >> ann comes
        << ann goes to cluster-a
        >> bob comes x-queue-budget=0s
        << bob is refused with 429
        >> bob answers status=429 by=extproc_budget_expired
        << bob goes on (response_headers)
        >> bob ends
        ?? a
        << a runs 1, up
        """,
    "who asks for no tokens goes at once though all is full, and takes no slot": """
        .. slots=1
        >> ann comes
        << ann goes to cluster-a
        >> bob comes GET
        << bob goes to cluster-a
        ?? a
        << a runs 1, up
        >> bob answers status=404 by=via_upstream
        << bob goes on (response_headers)
        >> bob ends
        ?? a
        << a runs 1, up
        """,
    "a class with an overflow cluster goes there instead of a refusal": """
        .. slots=1 overflow
        >> ann comes
        << ann goes to cluster-a
        >> bob comes x-request-class=soft
        -- 1.1 s
        << bob goes to elsewhere
        >> bob answers status=200
        << bob goes on (response_headers)
        >> ann ends
        ?? a
        << a runs 0, up
        """,
    "with the queue off all go at once, however many run": """
        .. slots=1 dry-run
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        << bob goes to cluster-a
        ?? a
        << a runs 2, up
        >> bob ends
        >> ann ends
        ?? a
        << a runs 0, up
        ?? dry
        << dry: 1 dispatched, 1 held
        """,
    "who would like a full endpoint waits a moment for it, and then goes to another one": """
        .. endpoints=a,b slots=1
        >> ann comes x-upstream-cluster=cluster-a
        << ann goes to cluster-a
        >> bob comes x-upstream-cluster=cluster-a
        -- 0.9 s
        -- 0.2 s
        << bob goes to cluster-b
        """,
}

ENDING = {
    "a head that is all there is gives the lease back, and is no service": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        >> ann answers bodiless status=200 by=via_upstream
        << ann goes on (response_headers)
        << bob goes to cluster-a
        << ann counts as empty
        """,
    "an answer's trailers are its end, before the stream's": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann trails
        << ann goes on (response_trailers)
        << bob goes to cluster-a
        << ann counts as ok
        >> ann ends
        """,
    "a full engine's refusal is its word, and the next one waits a moment": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> bob comes
        >> ann answers bodiless status=503 by=via_upstream
        << ann goes on (response_headers)
        << ann counts as saturated
        -- 0.3 s
        << bob goes to cluster-a
        """,
    "Envoy could not connect, and says so itself: a failure of the endpoint": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=503 by=upstream_reset_before_response_started{connection_failure}
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as failed
        """,
    "a mistake of the client's that Envoy answers says nothing of the endpoint": """
        .. slots=1 judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=413 by=request_payload_too_large
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as unknown
        """,
    "a gRPC answer that fails behind a fine head is judged by its trailers": """
        .. judged
        >> ann comes content-type=application/grpc
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream content-type=application/grpc
        << ann goes on (response_headers)
        >> ann trails grpc-status=13
        << ann goes on (response_trailers)
        << ann counts as error
        """,
    "a gRPC answer that is trailers alone and says that all is well has no message": """
        .. judged
        >> ann comes content-type=application/grpc
        << ann goes to cluster-a
        >> ann answers bodiless status=200 by=via_upstream content-type=application/grpc grpc-status=0
        << ann goes on (response_headers)
        << ann counts as empty
        >> bob comes content-type=application/grpc
        << bob goes to cluster-a
        >> bob answers bodiless status=200 by=via_upstream content-type=application/grpc grpc-status=5
        << bob goes on (response_headers)
        << bob counts as refused
        """,
    "HEAD has no body by right, 204 to a completion is none, 304 tells nothing": """
        .. judged endpoints=a
        >> ann comes HEAD
        << ann goes to cluster-a
        >> ann answers bodiless status=200 by=via_upstream
        << ann goes on (response_headers)
        << ann counts as unknown
        >> bob comes
        << bob goes to cluster-a
        >> bob answers bodiless status=204 by=via_upstream
        << bob goes on (response_headers)
        << bob counts as empty
        >> cid comes
        << cid goes to cluster-a
        >> cid answers bodiless status=304 by=via_upstream
        << cid goes on (response_headers)
        << cid counts as unknown
        """,
}

SHOWN = {
    "who asks without a body asks for no completion: nothing is an answer to that": """
        .. probe=there judged
        >> ann comes POST bodiless
        << ann goes to cluster-a
        >> ann answers bodiless status=204 by=via_upstream
        << ann goes on (response_headers)
        << ann counts as unknown
        >> bob comes POST bodiless
        << bob goes to cluster-a
        >> bob answers status=200 by=via_upstream
        << bob goes on (response_headers)
        >> bob shows |
        << the probe is over
        >> bob ends
        << bob counts as ok
        >> cid comes HEAD content-type=application/grpc
        << cid goes to cluster-a
        >> cid answers bodiless status=200 by=via_upstream content-type=application/grpc grpc-status=0
        << cid goes on (response_headers)
        << cid counts as unknown
        """,
    "a first byte that the probe shows ends the probe": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows x
        << the probe is over
        >> ann ends
        << ann counts as ok
        """,
    "a chunked answer that ends without a byte is none": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows |
        << the probe is over
        >> ann ends
        << ann counts as empty
        """,
    "the same where the probe is sooner than the head": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann shows |
        << the probe is over
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as empty
        """,
    "where the probe shows others, an answer that ends unseen counts as without it: the probe may come later": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows x
        << the probe is over
        >> ann ends
        << ann counts as ok
        >> bob comes
        << bob goes to cluster-a
        >> bob answers status=200 by=via_upstream
        << bob goes on (response_headers)
        >> bob ends
        << bob counts as ok
        >> bob shows x|
        << the probe is over
        """,
    "an error that ends unseen stays one": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=500 by=via_upstream
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as error
        """,
    "where no probe shows anything, heads are believed": """
        .. probe judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as ok
        """,
    "an empty piece is no byte, and no end": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows -
        >> ann shows x|
        << the probe is over
        >> ann ends
        << ann counts as ok
        """,
    "the body of a refusal makes it no service": """
        .. probe=there judged
        >> ann comes
        << ann goes to cluster-a
        >> ann answers status=500 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows x
        << the probe is over
        >> ann ends
        << ann counts as error
        """,
    "a WebSocket on which the server says nothing is the client's affair": """
        .. probe=there judged
        >> ann comes GET upgrade=websocket
        << ann goes to cluster-a
        >> ann answers status=101 by=via_upstream
        << ann goes on (response_headers)
        >> ann shows |
        << the probe is over
        >> ann ends
        << ann counts as ok
        """,
}

PICKING = {
    "the picker: pieces go on as they come, and the last one gives the lease back": """
        .. dialect=picker slots=1 judged
        >> ann comes
        << ann goes to a:80
        >> bob comes
        >> ann sends hi|
        << ann request hi|
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann gets to
        << ann response to
        >> ann gets |
        << ann response |
        << bob goes to a:80
        << ann counts as ok
        """,
    "the picker: what a held request sends goes on behind the pick": """
        .. dialect=picker slots=1
        >> ann comes
        << ann goes to a:80
        >> bob comes
        >> bob sends hi|
        >> ann ends
        << bob goes to a:80
        << bob request hi|
        """,
    "the picker: an answer of one empty piece is none": """
        .. dialect=picker judged
        >> ann comes
        << ann goes to a:80
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann gets |
        << ann response |
        << ann counts as empty
        """,
    "the picker: an answer of trailers behind a head is none": """
        .. dialect=picker judged
        >> ann comes
        << ann goes to a:80
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann trails
        << ann goes on (response_trailers)
        << ann counts as empty
        """,
    "the picker: an answer that is cut behind its head tells nothing: a client left, or its server died": """
        .. dialect=picker judged
        >> ann comes
        << ann goes to a:80
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as unknown
        """,
    "the picker: where the gateway went elsewhere, the lease is where the answer came from": """
        .. dialect=picker endpoints=a,b slots=1
        >> ann comes x-upstream-cluster=a:80
        << ann goes to a:80
        >> ann answers status=200 by=via_upstream served=b:80
        << ann goes on (response_headers)
        ?? a
        << a runs 0, up
        ?? b
        << b runs 1, up
        >> ann gets x|
        << ann response x|
        ?? b
        << b runs 0, up
        """,
    "the picker: who is refused gets no answer to its body": """
        .. dialect=picker slots=1
        >> ann comes
        << ann goes to a:80
        >> bob comes x-queue-budget=0s
        << bob is refused with 429
        >> bob sends hi|
        """,
}

RETURNING = {
    "second try: who comes back goes to another one, and its first lease is back": """
        .. endpoints=a,b slots=1 second-try
        >> ann comes x-upstream-cluster=cluster-a
        << ann goes to cluster-a
        ?? a
        << a runs 1, up
        >> ann returns
        << ann' goes to cluster-b
        ?? a
        << a runs 0, up
        ?? b
        << b runs 1, up
        >> ann' answers status=200 by=via_upstream
        << ann' goes on (response_headers)
        >> ann answers status=200 by=via_upstream
        << ann goes on (response_headers)
        >> ann' ends
        >> ann ends
        ?? b
        << b runs 0, up
        """,
    "second try: who comes back while all others are full waits for them": """
        .. endpoints=a,b slots=1 second-try
        >> bob comes x-upstream-cluster=cluster-b
        << bob goes to cluster-b
        >> ann comes
        << ann goes to cluster-a
        >> ann returns
        >> bob ends
        << ann' goes to cluster-b
        """,
    "second try: an answer that another sidecar's try brought is a failure of ours": """
        .. endpoints=a,b second-try judged
        >> ann comes x-upstream-cluster=cluster-a
        << ann goes to cluster-a
        >> ann answers status=200 by=via_upstream upstream=127.0.0.1:8080
        << ann counts as failed
        << ann goes on (response_headers)
        """,
}

PLAYS = {**WAITING, **ENDING, **SHOWN, **PICKING, **RETURNING}


@pytest.mark.parametrize("name", PLAYS)
def test_a_play_goes_as_written(name: str) -> None:
    check(PLAYS[name])


def test_a_play_that_goes_otherwise_shows_both_columns() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        check(PLAYS["a higher class goes first"].replace("<< low goes", "<< low is refused with 429, or goes"))
    assert "as written" in str(caught.value)
    assert "! << low is refused with 429, or goes to cluster-a   << low goes to cluster-a" in str(caught.value)
