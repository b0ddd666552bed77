"""How streams go, as plays: what Envoy says, `>>`, and what we answer, `<<`. `stage.py` has the words of a play."""

from __future__ import annotations

import pytest
from stage import check

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
        << ann counts as unasked
        """,
    "what a filter of Envoy's says to a gRPC client is no good answer of the endpoint": """
        .. slots=1 judged
        >> ann comes content-type=application/grpc
        << ann goes to cluster-a
        >> ann answers status=200 by=ext_authz_denied grpc-status=7
        << ann goes on (response_headers)
        >> ann ends
        << ann counts as unasked
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
        .. probe=there judged head=200
        >> ann shows x
        << the probe is over
        >> ann ends
        << ann counts as ok
        """,
    "a chunked answer that ends without a byte is none": """
        .. probe=there judged head=200
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
        .. probe=there judged head=200
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
        .. probe=there judged head=500
        >> ann ends
        << ann counts as error
        """,
    "where no probe shows anything, heads are believed": """
        .. probe judged head=200
        >> ann ends
        << ann counts as ok
        """,
    "an empty piece is no byte, and no end": """
        .. probe=there judged head=200
        >> ann shows -
        >> ann shows x|
        << the probe is over
        >> ann ends
        << ann counts as ok
        """,
    "the body of a refusal makes it no service": """
        .. probe=there judged head=500
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
        .. dialect=picker judged head=200
        >> ann gets |
        << ann response |
        << ann counts as empty
        """,
    "the picker: an answer of trailers behind a head is none": """
        .. dialect=picker judged head=200
        >> ann trails
        << ann goes on (response_trailers)
        << ann counts as empty
        """,
    "the picker: an answer that is cut behind its head tells nothing: a client left, or its server died": """
        .. dialect=picker judged head=200
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
