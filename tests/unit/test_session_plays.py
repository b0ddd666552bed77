"""Sessions as plays: what Envoy says goes in, `>>`, what we answer comes out, `<<`; the actors are streams, by name.

A play that goes otherwise shows both columns. Time passes by `-- 2 s`.
"""

from __future__ import annotations

from textwrap import dedent

import pytest
from test_session_and_gate import Room, cluster, message

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.values import EndpointSpec, RequestClass
from extproc.errors import ProtocolError
from extproc.stream.session import Session

TWO = EndpointSpec("a", cluster="cluster-a", max_running_requests=2)
CLASSES = (RequestClass("std", 0, 5.0), RequestClass("high", 9, 5.0))


class Stage:
    """A room where a play is acted, line by line."""

    def __init__(self) -> None:
        self.room = Room(TWO, classes=CLASSES, shed=False)
        self.sessions: dict[str, Session] = {}
        self.said: list[str] = []

    def act(self, line: str) -> None:
        """Do one line: `>> WHO WHAT [KEY=VALUE ...]`, or `-- N s`."""
        mark, who, *words = line.split()
        if mark == "--":
            self.room.clock.advance(float(who))
            return
        what, *pairs = words
        facts = dict(pair.split("=") for pair in pairs)
        if what == "comes":
            self.sessions[who] = Session(self.room.reception, lambda data: self.hear(who, data))
            self._receive(who, "request_headers", facts)
        elif what == "answers":
            self._receive(who, "response_headers", facts)
        elif what == "again":
            self._receive(who, "request_headers", facts)
        elif what == "ends":
            self.sessions[who].end()
        else:
            raise AssertionError(f"nobody can do {what!r}")

    def _receive(self, who: str, kind: str, facts: dict[str, str]) -> None:
        try:
            self.sessions[who].receive(message(kind, **{key.replace("-", "_"): value for key, value in facts.items()}))
        except ProtocolError:
            self.said.append(f"<< {who} is told that this has no place here")

    def hear(self, who: str, data: bytes) -> None:
        reply = pb.ProcessingResponse.FromString(data)
        match reply.WhichOneof("response"):
            case "immediate_response":
                self.said.append(f"<< {who} is refused with {reply.immediate_response.status.code}")
            case "request_headers":
                self.said.append(f"<< {who} goes to {cluster(reply)}")
            case other:
                self.said.append(f"<< {who} goes on ({other})")


def play(script: str) -> str:
    """Act `script`; return how it really went, in the same words."""
    stage, went = Stage(), []
    for line in dedent(script).strip().splitlines():
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


PLAYS = {
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
}


@pytest.mark.parametrize("name", PLAYS)
def test_a_play_goes_as_written(name: str) -> None:
    check(PLAYS[name])


def test_a_play_that_goes_otherwise_shows_both_columns() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        check(PLAYS["a higher class goes first"].replace("<< low goes", "<< low is refused with 429, or goes"))
    assert "as written" in str(caught.value)
    assert "! << low is refused with 429, or goes to cluster-a   << low goes to cluster-a" in str(caught.value)
