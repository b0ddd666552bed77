"""The simulated engine over real HTTP on loopback: OpenAI shapes, aborts, metrics, and what it says it saw."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.endpoints.telemetry.engines import engines_for
from extproc.endpoints.telemetry.page import read_page
from extproc.endpoints.telemetry.readings import Readings
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.running_engine import CHAT, CHAT_PATH, ENDLESS, FAST, ask, engine, events, play, until


def test_a_chat_answer_has_the_openai_shape() -> None:
    async def scene() -> None:
        async with engine(name="e7") as (_, client), client.post(CHAT_PATH, json=CHAT) as response:
            body = await response.json()
            assert response.headers["x-engine"] == "e7"
            assert body["object"] == "chat.completion"
            assert body["choices"] == [
                {
                    "index": 0,
                    "logprobs": None,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": "wait your turn "},
                }
            ]
            assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}

    play(scene())


def test_a_chat_stream_ends_with_a_reason_then_usage_then_done() -> None:
    async def scene() -> None:
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        async with engine() as (_, client), client.post(CHAT_PATH, json=body) as response:
            assert response.content_type == "text/event-stream"
            *chunks, usage = await events(response)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas) == "wait your turn "
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]
        assert usage["choices"] == []
        assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}

    play(scene())


def test_a_stream_without_include_usage_has_none() -> None:
    async def scene() -> None:
        async with engine() as (_, client), client.post(CHAT_PATH, json=CHAT | {"stream": True}) as response:
            assert not [chunk for chunk in await events(response) if "usage" in chunk]

    play(scene())


@pytest.mark.parametrize("prompt", ["hello there", ["hello there"], [17, 18]])
def test_a_completion_takes_text_or_tokens(prompt: object) -> None:
    async def scene() -> None:
        body = {"prompt": prompt, "max_tokens": 2}
        async with engine() as (_, client):
            _, whole = await ask(client, body, "/v1/completions")
            async with client.post("/v1/completions", json=body | {"stream": True}) as response:
                chunks = await events(response)
        assert whole["object"] == "text_completion"
        assert whole["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks) == "wait your "
        assert whole["usage"]["prompt_tokens"] == 2

    play(scene())


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("hello there", 2), (["hello there", "of an hour"], 4), ([[17, 18], [1]], 3)]
)
def test_each_prompt_gets_n_choices_of_their_own_sequences(prompt: object, tokens: int) -> None:
    async def scene() -> None:
        body = {"prompt": prompt, "max_tokens": 2, "n": 2}
        count = 2 * len(prompt) if isinstance(prompt, list) else 2
        async with engine() as (server, client):
            _, whole = await ask(client, body, "/v1/completions")
            assert server.drive.engine.finished_total == count
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            async with client.post("/v1/completions", json=streamed) as response:
                *chunks, usage = await events(response)
        assert [(one["index"], one["text"]) for one in whole["choices"]] == [(at, "wait your ") for at in range(count)]
        told = [""] * count
        for (choice,) in (chunk["choices"] for chunk in chunks):
            told[choice["index"]] += choice["text"]
        assert told == ["wait your "] * count
        assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == count
        used = {"prompt_tokens": tokens, "completion_tokens": 2 * count, "total_tokens": tokens + 2 * count}
        assert whole["usage"] == usage["usage"] == used

    play(scene())


def test_choices_of_a_chat_are_messages_and_a_client_that_leaves_ends_them_all() -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            _, whole = await ask(client, CHAT | {"n": 3})
            assert [one["message"]["content"] for one in whole["choices"]] == ["wait your turn "] * 3
            leaver = asyncio.create_task(ask(client, ENDLESS | {"n": 3, "stream": True}))
            await until(lambda: server.drive.engine.running + server.drive.engine.waiting == 3)
            leaver.cancel()
            await until(lambda: server.drive.engine.aborted_total == 3)

    play(scene())


def test_a_request_of_which_not_all_choices_are_taken_is_refused_and_leaves_none() -> None:
    async def scene() -> None:
        async with engine(dataclasses.replace(FAST, max_num_queued=2)) as (server, client):
            status, _ = await ask(client, CHAT | {"n": 3})
            assert (status, server.drive.engine.running + server.drive.engine.waiting) == (503, 0)
            assert (await ask(client, CHAT | {"n": 2}))[0] == 200

    play(scene())


def test_no_token_leaves_before_its_step_ends() -> None:
    async def scene() -> None:
        async with engine(dataclasses.replace(FAST, step_base_s=0.02)) as (_, client):
            began = time.monotonic()
            await ask(client)
            assert time.monotonic() - began >= 3 * 0.02

    play(scene())


def test_stream_headers_are_sent_while_the_request_still_waits() -> None:
    async def scene() -> None:
        async with (
            engine() as (server, client),
            client.post(CHAT_PATH, json=ENDLESS | {"stream": True}),
            client.post(CHAT_PATH, json=CHAT | {"stream": True}) as response,
        ):
            assert response.status == 200
            assert (server.drive.engine.running, server.drive.engine.waiting) == (1, 1)

    play(scene())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_client_that_goes_away_frees_its_place_at_once(place: str, stream: bool) -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            model = server.drive.engine
            holder = asyncio.create_task(ask(client, ENDLESS)) if place == "waiting" else None
            await until(lambda: model.running == (holder is not None))
            leaver = asyncio.create_task(ask(client, ENDLESS | {"stream": stream}))
            await until(lambda: getattr(model, place) == 1 and model.running == 1)
            leaver.cancel()
            await until(lambda: model.aborted_total == 1)
            assert getattr(model, place) == 0
            if holder is not None:
                assert model.running == 1
                holder.cancel()

    play(scene())


def test_clients_that_leave_before_the_headers_cause_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    # Found by a load test: the tracebacks filled the pipe that was the engine's stderr, and the engine stood still.
    body = json.dumps(ENDLESS | {"stream": True})
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: e\r\ncontent-length: {len(body)}\r\n\r\n"

    async def scene() -> None:
        async with engine() as (server, _):
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write((head + body).encode())
                writer.transport.abort()
            async with aiohttp.ClientSession(server.url) as client:
                assert (await ask(client))[0] == 200

    play(scene())
    assert not caplog.records


BAD_CHATS: list[tuple[str, Any]] = [
    ("not JSON", "{"),
    ("not JSON", "[" * 100_000),
    ("JSON object", []),
    ("messages", {}),
    ("messages", {"messages": []}),
    ("messages[0]", {"messages": ["hi"]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("max_tokens", CHAT | {"max_tokens": -1}),
    ("max_tokens", CHAT | {"max_tokens": True}),
    ("max_completion_tokens", CHAT | {"max_completion_tokens": "9"}),
    ("stream", CHAT | {"stream": "yes"}),
    ("stream=True", CHAT | {"stream_options": {"include_usage": True}}),
    ("n must be at least 1", CHAT | {"n": 0}),
    ("n must be at most 1024", CHAT | {"n": 100_000}),
    ("priority", CHAT | {"priority": 1.5}),
    ("maximum context length is 8192", CHAT | {"max_tokens": 8191}),
]


@pytest.mark.parametrize(("says", "body"), BAD_CHATS)
def test_bad_input_is_answered_400_with_the_reason(says: str, body: Any) -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            data = body if isinstance(body, str) else json.dumps(body)
            async with client.post(CHAT_PATH, data=data) as response:
                error = (await response.json())["error"]
                assert response.status == error["code"] == 400
                assert says in error["message"]
                assert error["type"] == "BadRequestError"
            assert server.drive.engine.steps_total == 0

    play(scene())


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", CHAT_PATH, 405), ("POST", "/metrics", 405), ("GET", "/v2", 404)]
)
def test_a_wrong_method_or_path_is_an_error_in_json(method: str, path: str, status: int) -> None:
    async def scene() -> None:
        async with engine() as (_, client), client.request(method, path) as response:
            assert response.status == (await response.json())["error"]["code"] == status
            assert ("allow" in response.headers) == (status == 405)

    play(scene())


def test_an_unknown_model_is_404_unless_any_is_accepted() -> None:
    async def scene() -> None:
        body = CHAT | {"model": "other"}
        async with engine() as (_, client):
            status, answer = await ask(client, body)
            assert (status, answer["error"]["type"]) == (404, "NotFoundError")
        async with engine(any_model=True) as (_, client):
            status, answer = await ask(client, body)
            assert (status, answer["model"]) == (200, "other")

    play(scene())


def test_a_full_engine_answers_503_without_retry_after() -> None:
    async def scene() -> None:
        async with (
            engine(dataclasses.replace(FAST, max_num_queued=1)) as (_, client),
            client.post(CHAT_PATH, json=ENDLESS | {"stream": True}),
            client.post(CHAT_PATH, json=CHAT) as response,
        ):
            assert response.status == 503
            assert "retry-after" not in response.headers
            assert (await response.json())["error"]["code"] == 503

    play(scene())


def test_sim_headers_override_the_token_counts() -> None:
    async def scene() -> None:
        async with engine() as (_, client):
            _, answer = await ask(client, CHAT, x_sim_prompt_tokens="100", x_sim_output_tokens="2")
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"] == {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
            status, answer = await ask(client, CHAT, x_sim_output_tokens="0")
            assert (status, "x-sim-output-tokens" in answer["error"]["message"]) == (400, True)

    play(scene())


def test_requests_that_tell_so_share_the_first_tokens_of_their_prompts() -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            told = {"x_sim_prompt_tokens": "100", "x_sim_shared_prompt_tokens": "64"}
            for _ in range(2):
                await ask(client, CHAT, **told)
            await ask(client, CHAT, x_sim_prompt_tokens="100")
            assert server.drive.engine.prefix_hits_total == 64

    play(scene())


@pytest.mark.parametrize("by_header", [True, False])
def test_the_second_turn_of_a_session_hits_the_prefix_cache(by_header: bool) -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            headers = {"x_sim_prompt_tokens": "64"} | ({"x_session_id": "s"} if by_header else {})
            for _ in range(2):
                await ask(client, CHAT | ({} if by_header else {"user": "s"}), **headers)
            assert server.drive.engine.prefix_hits_total == 48

    play(scene())


def test_body_priority_orders_the_engines_queue() -> None:
    async def scene() -> None:
        async with engine(dataclasses.replace(FAST, scheduling_policy="priority")) as (server, client):
            model, ended = server.drive.engine, []

            async def send(name: str, body: Any) -> None:
                await ask(client, body)
                ended.append(name)

            tasks = []
            bodies = {
                "head": ENDLESS,
                "late": CHAT | {"priority": 5},
                "early": CHAT | {"priority": 1},
            }
            for count, (name, body) in enumerate(bodies.items()):
                tasks.append(asyncio.create_task(send(name, body)))
                await until(lambda count=count: model.running + model.waiting == count + 1)
            head, *others = tasks
            head.cancel()  # not before all stand behind it
            await asyncio.gather(*others)
            assert ended == ["early", "late"]

    play(scene())


def test_the_metrics_page_has_vllms_names_and_the_engines_figures() -> None:
    async def scene() -> None:
        async with engine(models=("m1", "m2")) as (_, client):
            await ask(client, CHAT | {"model": "m2"})
            async with (
                client.post(CHAT_PATH, json=CHAT | {"model": "m1", "max_tokens": 4000, "stream": True}),
                client.post(CHAT_PATH, json=CHAT | {"model": "m1", "stream": True}),
                client.get("/metrics") as response,
            ):
                page = await response.text()
        samples = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if not sample.name.startswith("vllm:cache_config"):
                    assert (sample.labels["engine"], sample.labels["model_name"]) == ("0", "m1")
                samples[sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")] = sample
        values = {key[0]: sample.value for key, sample in samples.items() if key[1:] == (None, None)}
        assert values["vllm:num_requests_running"] == 1
        assert values["vllm:num_requests_waiting"] == 1
        assert 0 < values["vllm:kv_cache_usage_perc"] < 0.5
        assert values["vllm:prompt_tokens_total"] >= 2
        assert values["vllm:generation_tokens_total"] >= 3
        assert values["vllm:num_preemptions_total"] == 0
        assert values["vllm:prefix_cache_queries_total"] >= 2
        assert values["vllm:prefix_cache_hits_total"] == 0
        assert values["vllm:time_to_first_token_seconds_count"] >= 1
        assert values["vllm:request_time_per_output_token_seconds_count"] == 1
        assert values["vllm:inter_token_latency_seconds_count"] >= 2
        assert values["vllm:e2e_request_latency_seconds_count"] == 1
        assert 0 <= values["sim_step_lag_seconds"] < PATIENCE_S
        assert samples["vllm:request_success_total", "length", None].value == 1
        config = samples["vllm:cache_config_info", None, None].labels
        assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "512")

    play(scene())


def test_each_model_behind_the_first_is_an_adapter_that_is_loaded_and_that_the_page_names() -> None:
    async def scene() -> None:
        slots = dataclasses.replace(FAST, max_num_seqs=4, max_loras=1, lora_load_s=0.3)
        async with engine(slots, models=("base", "law", "med")) as (server, client):
            await ask(client, CHAT | {"model": "base"})
            assert server.drive.engine.adapters_loaded_total == 0
            began = time.monotonic()
            await ask(client, CHAT | {"model": "law"})
            assert time.monotonic() - began >= 0.3, "it had to be loaded"
            assert server.drive.engine.adapters_loaded_total == 1
            async with (
                client.post(CHAT_PATH, json=ENDLESS | {"model": "law", "stream": True}),
                client.post(CHAT_PATH, json=ENDLESS | {"model": "med", "stream": True}),
            ):
                await until(lambda: server.drive.engine.adapters == (("law",), ("med",)))
                async with client.get("/metrics") as response:
                    load = read_page(await response.read(), engines_for("vllm"))
        assert isinstance(load, Readings)
        assert (load.adapters, load.waiting_adapters, load.adapter_slots) == (("law",), ("med",), 1)

    play(scene())


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "TEXT named_metrics.num_requests_waiting=0.0, named_metrics.kv_cache_usage_perc=0.0"),
        ("JSON", 'JSON {"named_metrics": {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}}'),
        ("BIN", None),
    ],
)
def test_orca_load_is_told_on_request(form: str, expected: str | None) -> None:
    async def scene() -> None:
        headers = {"endpoint-load-metrics-format": form}
        async with engine() as (_, client), client.post(CHAT_PATH, json=CHAT, headers=headers) as response:
            assert response.headers.get("endpoint-load-metrics") == expected

    play(scene())


def test_orca_load_is_never_told_on_a_stream() -> None:
    async def scene() -> None:
        headers = {"endpoint-load-metrics-format": "JSON"}
        async with (
            engine() as (_, client),
            client.post(CHAT_PATH, json=CHAT | {"stream": True}, headers=headers) as response,
        ):
            assert "endpoint-load-metrics" not in response.headers

    play(scene())


def test_models_and_health_answer() -> None:
    async def scene() -> None:
        async with engine(models=("m1", "m2")) as (_, client):
            for path in ("/health", "/ping"):
                async with client.get(path) as response:
                    assert response.status == 200
            async with client.get("/v1/models") as response:
                assert [model["id"] for model in (await response.json())["data"]] == ["m1", "m2"]
            async with client.get("/version") as response:  # routers take who answers this for vLLM
                assert await response.json() == {"version": "0.32.0"}

    play(scene())


def test_what_the_engine_saw_is_told_until_reset() -> None:
    async def scene() -> None:
        async with engine() as (server, client):
            async with client.post(CHAT_PATH, json=ENDLESS | {"stream": True}, headers={"x-request-id": "r1"}):
                await until(lambda: server.drive.engine.running == 1)
                batch = {"x_request_id": "r2", "x_request_class": "batch"}
                waiter = asyncio.create_task(ask(client, CHAT, **batch))
                await until(lambda: server.drive.engine.peak_waiting == 1)
            assert (await waiter)[0] == 200
            async with client.get("/debug/peaks") as response:
                peaks = await response.json()
            assert [(one["id"], one["class"]) for one in peaks["arrivals"]] == [("r1", None), ("r2", "batch")]
            assert peaks["arrivals"][0]["arrived_s"] == pytest.approx(time.time(), abs=10)
            assert (peaks["peak_running"], peaks["peak_waiting"], peaks["requests"]) == (1, 1, 2)
            assert (peaks["finished"], peaks["aborted"]) == (1, 1)
            assert peaks["wasted_tokens"] >= 2
            async with client.post("/debug/reset"), client.get("/debug/peaks") as response:
                peaks = await response.json()
            figures = {name: value for name, value in peaks.items() if name not in {"engine", "arrivals"}}
            assert set(figures.values()) == {0}
            assert peaks["arrivals"] == []

    play(scene())
