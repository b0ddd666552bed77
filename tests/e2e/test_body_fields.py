"""What Envoy can tell without a body crossing to us: fields of the request's JSON, and the first byte of the answer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from .kit.awake import lost_s
from .kit.clients import H1Request, complete_many
from .kit.processes import wait_until
from .kit.upstream import behave

BIG = json.dumps({"model": "llama", "padding": "x" * (3 << 20)}).encode()
MODELS = {
    "a": {"models": ["llama"]},
    "b": {"models": ["qwen"]},
    "c": {"models": ["mistral"]},
    "d": {"models": ["mistral"]},
}


@pytest.fixture(scope="module")
def fields(module_stack):
    """Two pools by model, and an Envoy that reads the body and takes 64 KiB of it at the most."""

    def small_bodies(bootstrap) -> None:
        listener = bootstrap["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        buffer = next(one for one in manager["http_filters"] if one["name"] == "envoy.filters.http.buffer")
        buffer["typed_config"]["max_request_bytes"] = 65536

    classes = [{"name": "default"}, {"name": "flex", "priority": -5}, {"name": "fast", "priority": 7}]
    config = {"request_fields": True, "max_running_requests": 4, "classes": classes}
    return module_stack(upstreams=("a", "b", "c", "d"), endpoints=MODELS, config=config, edit=small_bodies)


def send(here, name: str, body: object, **headers: str):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    (answer,) = complete_many(here.url, 1, lambda _: {"x-test-id": name, **headers}, body=data)
    reached = [upstream for upstream in here.upstreams if here.upstreams[upstream].seen(name)]
    return answer.status, reached


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_an_unchanged_openai_client_that_names_its_model_in_the_body_reaches_its_pool(fields, content_type):
    for model, endpoint in (("llama", "a"), ("qwen", "b")):
        name = f"{model}-{content_type}"
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        assert send(fields, name, body, **{"content-type": content_type}) == (200, [endpoint])


def test_a_header_wins_over_the_body(fields):
    assert send(fields, "wins", {"model": "llama"}, **{"x-model": "qwen"}) == (200, ["b"])


def test_a_model_that_nobody_serves_is_a_404_from_us(fields):
    assert send(fields, "nobody", {"model": "gpt-9"}) == (404, [])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"0", b'{"model": null}', b'{"model": {"a": 1}}', b'{"model": 7, "max_tokens": "12"}',
     b"\xff\xfe", b'{"messages": [{"model": "llama"}]}', b"[" * 3000],
)  # fmt: skip
def test_a_body_without_a_usable_model_is_sent_to_no_server_of_another_model(fields, body):
    assert send(fields, f"odd-{body[:20]!r}-{len(body)}", body) == (400, [])


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"service_tier": "flex"}, "flex"), ({"priority": -7}, "fast"), ({"priority": 3}, "default"),
     ({"priority": "high"}, "default"), ({"service_tier": "nope"}, "default"), ({"priority": 1e300}, "default")],
)  # fmt: skip
def test_a_body_may_ask_for_a_class_that_the_config_has(fields, body, expected):
    before = class_counts(fields)
    assert send(fields, f"class-{body}", {"model": "llama", **body})[0] == 200
    after = class_counts(fields)
    assert {name for name in after if after[name] != before.get(name, 0)} == {expected}


@pytest.mark.parametrize(("field", "headers"), [("prompt_cache_key", {}), (None, {"x-session-affinity": "agent-7"})])
def test_what_clients_send_for_their_cache_keeps_a_conversation_at_one_server(fields, field, headers):
    def servers(body: dict[str, str], **more: str) -> set[str]:
        turns = range(6)
        return {server for n in turns for server in send(fields, f"{field}-{body}-{more}-{n}", body, **more)[1]}

    assert servers({"model": "mistral"}) == {"c", "d"}, "else they take turns"
    body = {"model": "mistral", **({field: "agent-7"} if field else {})}
    assert len(servers(body, **headers)) == 1


def class_counts(here) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name, value in here.sidecar.metrics().items():
        if name.startswith("extproc_requests_total"):
            request_class = name.split('class="')[1].split('"')[0]
            counts[request_class] = counts.get(request_class, 0) + value
    return counts


@pytest.mark.parametrize(
    ("path", "body", "places"),
    [("/v1/completions", {"prompt": ["one", 'two "[,]" {\\', "three\\"]}, 3),
     ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
     ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
     ("/v1/completions", {"deep": {"prompt": ["a", "b"]}, "stop": ["a", "b"], "prompt": "[\"a\", \"b\"]"}, 1),
     ("/v1/embeddings", {"input": ["a", "b"]}, 2),
     ("/v1/completions?of=/chat/", {"prompt": ["a", "b"]}, 2),
     ("/v1/completions", {"prompt": ["x"] * 10_000}, 4),
     ("/v1/completions", b'{"prompt": [' + b"[{" * 5000, 1),
     ("/v1/completions", b'{"prompt": ["' + b'\\\\"' * 10_000, 4),
     ("/v1/chat/completions", {"prompt": ["a", "b"]}, 1),
     ("/v1/completions", {"n": 2, "prompt": [[1, 2], [3]]}, 4),
     ("/v1/chat/completions", {"n": 3}, 3),
     ("/v1/chat/completions", {"n": 2.0, "best_of": 3}, 3),
     ("/v1/chat/completions", {"n": "4"}, 1)],
    ids=["strings", "lists of tokens", "tokens", "other fields", "embeddings", "a query", "long", "deep", "cut off",
         "chat", "answers to each of two", "answers", "more answers tried than given", "no number"],
)  # fmt: skip
def test_a_request_takes_as_many_places_as_it_has_prompts_and_answers_to_each(fields, path, body, places):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with ExitStack() as open_requests:

        def begin(name: str, path: str, data: bytes) -> None:
            headers = [("x-test-id", name), ("x-model", "llama"), ("content-type", "Application/JSON")]  # no case
            request = H1Request(fields.address, path=path, headers=[*headers, *[behave("sse", hold="body")]], body=data)
            open_requests.enter_context(request).send()

        begin(f"list-{path}-{len(data)}", path, data)
        fields.wait_in_flight("a", 1)
        (shown,) = [one for one in fields.sidecar.queues()["endpoints"] if one["name"] == "a"]
        assert (shown["in_flight"], min(shown.get("sequences", 1), 4)) == (1, places)
        for number in range(4 - places):
            begin(f"beside-{number}", "/v1/completions", b"{}")
        fields.wait_in_flight("a", 1 + 4 - places)
        begin("late", "/v1/completions", b"{}")
        fields.wait_waiting(1)
        assert fields.in_flight("a") == 1 + 4 - places
    fields.wait_idle()


def test_a_body_over_the_limit_is_413_and_holds_nothing(fields):
    with H1Request(fields.address, headers=[("x-test-id", "big")], body=BIG) as request:
        request.send()
        assert request.read_head() == 413
        error = json.loads(request.read_all())["error"]
        assert (error["code"], error["type"]) == ("body_too_large", "invalid_request_error")
    fields.wait_idle()
    assert "Traceback" not in fields.sidecar.child.output()
    assert send(fields, "after-big", {"model": "llama"}) == (200, ["a"])


def test_the_first_byte_of_an_answer_makes_room_for_the_next_prompt_while_the_answer_goes_on(stack):
    config = {"first_byte_probe": True, "max_running_requests": 8, "max_prompt_tokens": 1000, "scrape_interval": "0s"}
    here = stack(config=config)
    prompt = b"x" * 200_000  # 50,000 tokens: one such prompt at a time, which is taken as computed after 2 s at most
    lost_before_s = lost_s()
    with ThreadPoolExecutor(1) as pool:
        slow = dict([behave("sse", wait_s=0.6, hold="body")])
        first = pool.submit(complete_many, here.url, 1, lambda _: {"x-test-id": "first", **slow}, body=prompt)
        here.wait_in_flight("a", 1)
        (second,) = complete_many(here.url, 1, lambda _: {"x-test-id": "second"}, body=prompt)
        assert second.status == 200
        arrived = [here.upstreams["a"].seen(name)[0].arrived_at for name in ("first", "second")]
        most_s = 1.5 + lost_s() - lost_before_s
        assert 0.6 <= arrived[1] - arrived[0] < most_s, "it waited for the first byte, and for no more"
        here.wait_in_flight("a", 1)  # and the first answer still runs
        here.upstreams["a"].release("first")
        (answer,) = first.result()
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")
    here.wait_idle()
    wait_until(lambda: here.sidecar.metrics()["extproc_streams"] == 0)


def test_answers_are_whole_and_keep_their_length_with_the_probe_on(stack):
    here = stack(config={"first_byte_probe": True, "max_running_requests": 8})
    answers = complete_many(here.url, 12, lambda n: {"x-test-id": f"p-{n}", **dict([behave("ok", size=300_000)])})
    assert {answer.status for answer in answers} == {200}
    assert {len(answer.body) for answer in answers} == {300_000}
    assert {answer.headers["content-length"] for answer in answers} == {"300000"}
    here.wait_idle()
