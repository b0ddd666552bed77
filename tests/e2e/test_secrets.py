"""What must not leave Envoy does not: credentials are neither sent to the sidecar nor found in anything it writes."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from extproc._pb import ext_proc_pb2 as pb

from .kit.clients import complete_many
from .kit.envoy import Envoy
from .kit.processes import http_get
from .kit.recorder import Recorder
from .kit.stack import Sidecar, Stack, local
from .kit.upstream import Upstream, behave

NAMES = ("authorization", "cookie", "proxy-authorization", "x-api-key", "api-key", "x-auth-token")
ASKED = {
    ":method",
    ":path",
    "content-type",
    "upgrade",
    "grpc-status",
}  # which requests are queued, what shape errors have
READ = ASKED | {
    "x-model",
    "x-request-class",
    "x-tenant-id",
    "x-session-id",
    "x-queue-budget",
    "x-request-id",
    "content-length",
}


@pytest.fixture
def tokens():
    return {name: f"secret-{secrets.token_hex(8)}" for name in (*NAMES, "set-cookie", "path", "body")}


def request_with(tokens):
    order = dict([behave(reply=f"set-cookie: id={tokens['set-cookie']}")])
    return {
        **{name: tokens[name] for name in NAMES},
        "x-test-id": "r",
        "x-tenant-id": "team-a",
        "x-session-id": "chat-7",
        **order,
    }


@pytest.mark.parametrize("more", [{}, {"request_fields": True, "first_byte_probe": True}])
def test_credentials_of_requests_and_answers_are_never_sent_to_the_sidecar(tmp_path, tokens, more):
    with Recorder() as recorder, Upstream("a") as upstream:
        endpoint = {"name": "a", "address": upstream.address}
        told = Sidecar({"endpoints": [endpoint], "listen": recorder.address, **more}, tmp_path)
        told.write_config()
        http = local()
        with Envoy(told.envoy_config(http, local(), tmp_path / "access", "h1"), tmp_path):
            url = f"http://{http}/v1/chat/completions?key={tokens['path']}"
            body = b'{"model": "m", "messages": [{"content": "%s"}]}' % tokens["body"].encode()
            (answer,) = complete_many(url, 1, lambda _: request_with(tokens), body=body)
        assert answer.status == 200
        assert tokens["set-cookie"] in answer.headers["set-cookie"]
        (received,) = upstream.seen("r")
        assert {name for name, _ in received.headers} >= set(NAMES), "the engine gets them all"
        sent = b"".join(recorder.messages) + repr(recorder.metadata).encode()
        assert b"team-a" in sent, "what the sidecar reads is sent"
        # The path tells what is queued, and comes with its query: SECURITY.md says so.
        assert [name for name, token in tokens.items() if token.encode() in sent] == ["path"]
        seen = [pb.ProcessingRequest.FromString(message) for message in recorder.messages]
        keys = {
            header.key
            for message in seen
            for part in (message.request_headers, message.response_headers)
            for header in part.headers.headers
        }
        assert keys <= READ | {":status", "endpoint-load-metrics", "endpoint-load-metrics-bin"}
        opened = {name for name, _ in recorder.metadata}
        assert not opened & {"x-envoy-internal", "x-forwarded-for"}, "Envoy's own, which nobody reads"


@pytest.fixture
def running(tmp_path):
    """A stack whose sidecar says all it can say."""
    stack = Stack(tmp_path, config={"max_queued_requests": 1})
    stack.sidecar.child.argv += ["--log-level", "debug"]
    with stack:
        yield stack


def test_credentials_are_in_no_log_and_on_no_page(running, tokens):
    sidecar = running.sidecar

    def send(count: int, **how: str) -> list[int]:
        order = dict([behave(**how)]) if how else {}
        answers = complete_many(running.url, count, lambda _: {**request_with(tokens), **order})
        return [answer.status for answer in answers]

    def page(*paths: str) -> str:
        return "".join(http_get(sidecar.admin, path)[1].decode() for path in paths)

    with ThreadPoolExecutor(2) as pool:
        runs = pool.submit(send, 1, hold="head")
        running.wait_in_flight("a", 1)
        waits = pool.submit(send, 1)
        running.wait_waiting(1)
        shown = page("/queues")  # with a row for one that waits
        assert send(2) == [429, 429]
        running.upstreams["a"].release("r")
        assert runs.result() + waits.result() == [200, 200]
    open_to_many = page("/metrics", "/")
    written = open_to_many + sidecar.child.output() + running.envoy.child.output()
    written += repr(running.envoy.access_log_lines())
    assert "serving ext_proc" in written
    assert [name for name, token in tokens.items() if token in written + shown] == []
    assert "chat-7" not in written + shown, "nor is a session's name"
    assert "team-a" not in open_to_many, "a tenant's name makes no metrics"
    assert all("team-a" not in line for line in sidecar.child.output().splitlines() if "refused" not in line)
