"""Requests that are no JSON completion, on real Envoy: each does what its users expect (docs/existing-envoy.md).

Two engines, one slot each, `a` with the model llama and `b` with qwen; in the first part both slots are taken, so that
whatever is queued waits, and is refused when its budget of a second is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import aiohttp
import grpc
import pytest

from .kit.awake import lost_s
from .kit.clients import H1Request, complete_many
from .kit.envoy import give_up_soon
from .kit.processes import PATIENCE_S
from .kit.sockets import echo_server
from .kit.upstream import behave

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = {"a": {"models": ["llama"]}, "b": {"models": ["qwen", "org/qwen"]}}
CONFIG: dict[str, Any] = {
    "classes": [{"name": "default", "budget": "1s"}],
    "shed": False,
    "routes": [{"path": "/tokenize", "methods": ["POST"], "action": "pass"}],
}
LLAMA, QWEN = ("x-model", "llama"), ("x-model", "qwen")
TYPE = "content-type"
FORM = (TYPE, "multipart/form-data; boundary=xyz")
FILE = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\xff\r\n\r\n--xy\x00\r\n'


@pytest.fixture(scope="module")
def full(module_stack) -> Iterator[Any]:
    """A stack whose slots are all taken, for as long as the tests of this file last."""
    here = module_stack(upstreams=("a", "b"), endpoints=MODELS, config=CONFIG)
    taken = [(name, dict([("x-model", model), behave(hold="head")])) for name, model in (("a", "llama"), ("b", "qwen"))]
    with ThreadPoolExecutor(2) as pool:
        for name, headers in taken:
            pool.submit(complete_many, here.url, 1, lambda _, h=headers, n=name: {"x-test-id": f"takes-{n}", **h})
            here.wait_in_flight(name, 1)
        try:
            yield here
        finally:
            for name, _ in taken:
                here.upstreams[name].release(f"takes-{name}")


def ask(here: Any, name: str, method: str, path: str, *headers: tuple[str, str], body: bytes = b"") -> H1Request:
    """Send one request and read its whole answer."""
    with H1Request(here.address, path, [("x-test-id", name), *headers], body, method=method) as request:
        request.send().read_all()
        return request


def reached(here: Any, name: str) -> list[str]:
    return [upstream for upstream in here.upstreams if here.upstreams[upstream].seen(name)]


AT_ONCE, HELD = 200, 429
KINDS = [  # what it is, method, path, headers, and whether it goes at once or is held until its budget is over
    ("a completion", "POST", "/v1/completions", [LLAMA], HELD),
    ("any other POST", "POST", "/v1/rerank", [LLAMA], HELD),
    ("a POST without a body", "POST", "/v1/load", [LLAMA], HELD),
    ("any other method", "PATCH", "/v1/responses/7", [LLAMA], HELD),
    ("a preflight", "OPTIONS", "/v1/chat/completions", [], AT_ONCE),
    ("a lookup", "GET", "/version", [], AT_ONCE),
    ("a lookup with a query", "GET", "/version?x=1", [QWEN], AT_ONCE),
    ("a HEAD", "HEAD", "/health", [], AT_ONCE),
    ("a DELETE", "DELETE", "/v1/responses/7", [LLAMA], AT_ONCE),
    ("what the table of the config lets go", "POST", "/tokenize", [LLAMA], AT_ONCE),
    ("the table's path with another method", "PUT", "/tokenize", [LLAMA], HELD),
    ("a longer path than the table's", "POST", "/tokenize/more", [LLAMA], HELD),
]


@pytest.mark.parametrize(("what", "method", "path", "headers", "status"), KINDS, ids=[row[0] for row in KINDS])
def test_while_all_is_full_a_request_goes_at_once_or_waits_by_what_it_is(full, what, method, path, headers, status):
    answer = ask(full, what, method, path, *headers)
    assert answer.status == status
    models = dict(headers).get("x-model")
    where = {"llama": [["a"]], "qwen": [["b"]], None: [["a"], ["b"]]}[models]
    assert reached(full, what) in (where if status == AT_ONCE else [[]])
    assert [full.in_flight(name) for name in ("a", "b")] == [1, 1], "it took no slot"


def test_lookups_that_name_no_model_are_spread_over_the_endpoints(full):
    for number in range(4):
        assert ask(full, f"spread-{number}", "GET", "/version").status == 200
    assert sorted(name for number in range(4) for name in reached(full, f"spread-{number}")) == ["a", "a", "b", "b"]


def test_what_passes_is_counted_as_such(full):
    before = full.outcomes("passed")
    ask(full, "counted", "GET", "/version")
    assert full.outcomes("passed") == before + 1


def test_the_list_of_models_has_those_of_all_endpoints_and_comes_from_us(full):
    answer = ask(full, "list", "GET", "/v1/models?limit=20")
    page = json.loads(answer.received)
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert page["object"] == "list"
    assert [(row["id"], row["object"]) for row in page["data"]] == [
        (name, "model") for name in ("llama", "org/qwen", "qwen")
    ]
    assert all(row["owned_by"] and isinstance(row["created"], int) for row in page["data"])
    assert reached(full, "list") == []
    assert full.sidecar.metrics()["extproc_models_answers_total"] >= 1


@pytest.mark.parametrize(("path", "status"), [("qwen", 200), ("org/qwen", 200), ("org%2Fqwen", 200), ("gpt-9", 404)])
def test_one_model_can_be_looked_up_by_its_name(full, path, status):
    answer = ask(full, f"one-{path}", "GET", f"/v1/models/{path}")
    said = json.loads(answer.received)
    assert answer.status == status
    assert said["error"]["code"] == "unknown_model" if status == 404 else said["id"] == path.replace("%2F", "/")


# ---- errors


def test_a_refusal_has_the_shape_of_openais_errors(full):
    error = json.loads(ask(full, "openai", "POST", "/v1/completions", LLAMA).received)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "budget_expired")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/batches"])
def test_a_refusal_at_anthropics_paths_has_their_outer_type(full, path):
    answer = ask(full, f"anthropic-{path}", "POST", path, LLAMA)
    said = json.loads(answer.received)
    assert (said["type"], said["error"]["type"]) == ("error", "rate_limit_error")
    assert (answer.header("x-extproc-outcome"), answer.header("retry-after")) == ("budget_expired", "1")


@pytest.mark.parametrize(
    ("model", "code", "outcome"),
    [("llama", grpc.StatusCode.RESOURCE_EXHAUSTED, "budget_expired"),
     ("gpt-9", grpc.StatusCode.NOT_FOUND, "unknown_model"),
     (None, grpc.StatusCode.INVALID_ARGUMENT, "model_missing")],
)  # fmt: skip
def test_a_grpc_client_gets_a_grpc_status_with_a_plain_message_and_metadata(full, model, code, outcome):
    with grpc.insecure_channel(full.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/vllm.grpc.engine.VllmEngine/Generate")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\0", metadata=[("x-model", model)] if model else [], timeout=PATIENCE_S)
    assert refused.value.code() is code
    assert not refused.value.details().startswith("{")
    told = dict([*refused.value.trailing_metadata(), *refused.value.initial_metadata()])
    assert told["x-extproc-outcome"] == outcome
    assert ("retry-after" in told) is (outcome == "budget_expired")


# ---- whose model is it?


def form(model: str | None, name: str = "model") -> bytes:
    parts = [
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\xff\r\n\r\n--xy\x00\r\n'
    ]
    if model is not None:
        parts.append(f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{model}\r\n'.encode())
    return b"".join((*parts, b"--xyz--\r\n"))


JSON = json.dumps({"model": "qwen", "messages": []}).encode()
NAMED = [  # what it is, headers, body, status, who gets it
    ("JSON", [], JSON, 200, ["b"]),
    ("JSON of unknown length", [(TYPE, "application/json; charset=utf-8")], JSON, 200, ["b"]),
    ("a form", [FORM], form("qwen"), 200, ["b"]),
    ("a form, the other model", [FORM], form("llama"), 200, ["a"]),
    ("a form whose boundary is quoted", [(TYPE, FORM[1].replace("xyz", '"xyz"'))], form("qwen"), 200, ["b"]),
    ("a form without the field", [FORM], form(None), 400, []),
    ("a form with another field", [FORM], form("qwen", "model_name"), 400, []),
    ("a form that lies about its boundary", [(TYPE, FORM[1].replace("xyz", "abc"))], form("qwen"), 400, []),
    ("compressed JSON", [("content-encoding", "gzip")], gzip.compress(JSON), 400, []),
    ("compressed JSON with a header", [("content-encoding", "gzip"), QWEN], gzip.compress(JSON), 200, ["b"]),
    ("JSON without a model", [], b"{}", 400, []),
    ("a model that is no text", [], b'{"model": 7}', 400, []),
    ("a model that nobody has", [], b'{"model": "gpt-9"}', 404, []),
]  # fmt: skip


@pytest.fixture(scope="module")
def fields(module_stack):
    """The same engines, with room, and an Envoy that looks into bodies."""

    def edit(bootstrap: dict[str, Any]) -> None:
        bootstrap |= json.loads(give_up_soon(json.dumps(bootstrap)))

    return module_stack(upstreams=("a", "b"), endpoints=MODELS, config={"request_fields": True}, edit=edit)


@pytest.mark.parametrize(("what", "headers", "body", "status", "where"), NAMED, ids=[row[0] for row in NAMED])
def test_a_request_reaches_a_server_that_has_its_model_or_none(fields, what, headers, body, status, where):
    with H1Request(fields.address, "/v1/audio/transcriptions", [("x-test-id", what), *headers], body) as request:
        request.send().read_all()
    assert (request.status, reached(fields, what)) == (status, where)
    if status == 400:
        error = json.loads(request.received)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "model_missing")
        assert 'name the one meant in the body\'s "model" (JSON, ' in error["message"]


@pytest.mark.parametrize(
    ("models", "default", "status", "where"),
    [
        ({"a": ["llama"], "b": ["llama"]}, None, 200, "ab"),
        ({"a": [], "b": []}, None, 200, "ab"),
        ({"a": ["llama"], "b": []}, None, 200, "b"),
        ({"a": ["llama"], "b": ["qwen"]}, None, 400, ""),
        ({"a": ["llama"], "b": ["llama", "qwen"]}, None, 400, ""),
        ({"a": ["llama"], "b": ["qwen"]}, "qwen", 200, "b"),
    ],
)
def test_without_a_model_a_request_goes_on_only_where_it_makes_no_difference(stack, models, default, status, where):
    config = {"max_running_requests": 8} | ({"default_model": default} if default else {})
    here = stack(
        upstreams=("a", "b"), endpoints={name: {"models": each} for name, each in models.items()}, config=config
    )
    answers = complete_many(here.url, 4, lambda n: {"x-test-id": f"n-{n}"})
    assert {answer.status for answer in answers} == {status}
    assert {name for n in range(4) for name in reached(here, f"n-{n}")} == set(where)


def test_where_an_endpoint_lists_no_models_it_is_asked_for_them(stack):
    here = stack()
    assert ask(here, "models", "GET", "/v1/models").status == 200
    assert reached(here, "models") == ["a"]


# ---- WebSockets


@pytest.mark.parametrize("request_fields", [False, True], ids=["headers", "request_fields"])
def test_a_websocket_takes_one_slot_for_as_long_as_it_is_open(stack, request_fields):
    with echo_server() as address:
        config = {"upgrades": True, "request_fields": request_fields, "first_byte_probe": True}
        here = stack(upstreams=(), endpoints={"w": {"address": address}}, config=config)

        async def talk() -> None:
            url = f"ws://{here.address}/v1/realtime?model=x"
            async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
                async with session.ws_connect(url) as connection:
                    for text in ("one", "two"):
                        await connection.send_str(text)
                        assert (await connection.receive()).data == text
                    assert await asyncio.to_thread(here.in_flight, "w") == 1
                    waiting = asyncio.create_task(session.post(here.url, json={"model": "x"}))
                    await asyncio.to_thread(here.wait_waiting, 1)
                assert (await waiting).status == 200

        asyncio.run(talk())
        here.wait_idle()


# ---- who answered?


@contextlib.contextmanager
def upgrade(here: Any) -> Iterator[H1Request]:
    headers = [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "x"), LLAMA]
    with H1Request(here.address, "/v1/realtime", headers, method="GET") as request:
        yield request.send()


def test_unsteered_is_said_only_where_no_sidecar_answered(fields):
    with H1Request(fields.address, headers=[LLAMA], body=b"x" * (40 << 20)) as big:
        big.send_head(40 << 20)
        big.upload(34 << 20)
        assert (big.read_head(), big.header("x-extproc-outcome")) == (413, None)
    with upgrade(fields) as refused:
        assert (refused.read_head(), refused.header("x-extproc-outcome")) == (403, None)
    assert (
        ask(fields, "x", "POST", "/v1/completions", ("x-model", "gpt-9")).header("x-extproc-outcome") == "unknown_model"
    )
    fields.sidecar.child.stop()
    try:
        with H1Request(fields.address, headers=[LLAMA], body=b"{}") as lost:
            lost.send()
            assert (lost.read_head(), lost.header("x-extproc-outcome")) == (503, "unsteered")
    finally:
        fields.sidecar.start()


# ---- bodies that do not come


def test_a_body_that_does_not_come_takes_no_slot_and_a_slow_one_is_not_cut(stack):
    here = stack(config={"max_running_requests": 2})
    with contextlib.ExitStack() as clients:
        for number in range(8):
            stalled = clients.enter_context(H1Request(here.address, headers=[("x-test-id", f"stalled-{number}")]))
            stalled.send_head(4_000_000)
            stalled.upload(1000 * number)
        slow = clients.enter_context(H1Request(here.address, headers=[("x-test-id", "slow")]))
        slow.send_head(3)
        honest = complete_many(here.url, 6, lambda n: {"x-test-id": f"honest-{n}"})
        assert {answer.status for answer in honest} == {200}
        here.wait_idle()  # none of the stalled ones waits or holds a slot
        slow.upload(3)
        assert slow.read_head() == 200
    assert not any(here.upstreams["a"].seen(f"stalled-{number}") for number in range(8))


# ---- ids that clients choose


def test_two_requests_with_one_request_id_are_two_to_the_first_byte_probe(stack):
    """By the id, the second's ticket overwrote the first's, whose prompt then counted until its answer ended."""
    config = {"first_byte_probe": True, "max_running_requests": 8, "max_prompt_tokens": 100_000}
    here = stack(config={**config, "scrape_interval": "0s"})
    lost_before_s = lost_s()
    same = {"x-request-id": "7", **dict([behave("sse", wait_s=0.4, hold="body")])}
    with ThreadPoolExecutor(3) as pool:
        prompt = b"x" * 200_000  # 50,000 tokens: two of them at once; taken as computed after 2 s at most
        asked = [
            pool.submit(complete_many, here.url, 1, lambda _, n=n: {"x-test-id": f"same-{n}", **same}, body=prompt)
            for n in range(2)
        ]
        here.wait_in_flight("a", 2)
        (third,) = complete_many(here.url, 1, lambda _: {"x-test-id": "big", "x-request-id": "7"}, body=b"x" * 400_000)
        assert third.status == 200, "both prompts are done, although both answers go on"
        arrived = [here.upstreams["a"].seen(name)[0].arrived_at for name in ("same-0", "same-1", "big")]
        most_s = 1.5 + lost_s() - lost_before_s
        assert 0.4 <= arrived[2] - min(arrived) < most_s, "the first bytes told of both"
        here.wait_in_flight("a", 2)
        for number in range(2):
            here.upstreams["a"].release(f"same-{number}")
        assert {future.result()[0].status for future in asked} == {200}
    here.wait_idle()
