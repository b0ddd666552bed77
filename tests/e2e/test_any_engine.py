"""Defaults that are right on any engine and any traffic: real Envoy, simulated engines that no number was told of.

Each row is an engine or a traffic on which a guess of the sidecar is wrong: its target per token, the engine's batch
size, a prompt's tokens, the length of an answer. Nothing is configured but how often the engines are read. A steady
crowd of clients keeps the engines wanted, and what must come is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
import sys
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from extproc.simulate.studies.matrix.traffic import AZURE_CODE

from .kit.awake import lost_s
from .kit.clients import Completion, complete, complete_many
from .kit.processes import Child, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from extproc.simulate.workload import Demand

    from .conftest import StackFactory
    from .kit.stack import Stack

NAMES = ("engine-a", "engine-b")
ROOMY = ("--max-num-seqs", "256", "--num-gpu-blocks", "26875", "--decode-seq-s", "2e-5")
"""A batch and a KV cache that nothing here fills."""
IMAGE = "data:image/png;base64," + "iVBORw0K" * 50_000  # 400 KB
READ_OFTEN = {"max_running_requests": "adaptive", "scrape_interval": "250ms"}
PATIENT = [{"name": "default", "budget": "30s"}]


def chat(text: Any = "hi", **more: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "sim", "stream": True, "messages": messages, **more}).encode()


class Crowd:
    """So many clients that each send one request after the other, from `with` to its end; `answers` has all of them."""

    def __init__(self, url: str, clients: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.answers: list[Completion] = []
        self._what = (url, clients, body, {"content-type": "application/json", **headers})
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    async def _send(self) -> None:
        url, clients, body, headers = self._what

        async def one(session: aiohttp.ClientSession, number: int) -> None:
            while not self._over.is_set():
                self.answers.append(await complete(session, url, number, headers, body))

        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(one(session, number) for number in range(clients)))

    def statuses(self) -> set[int]:
        return {answer.status for answer in self.answers}


@contextlib.contextmanager
def engines(directory: Path, *flags: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Two simulated engines with these flags, as `endpoints` of a stack."""
    with contextlib.ExitStack() as running:
        children = {}
        for name in NAMES:
            argv = [sys.executable, "-m", "extproc", "engine", "--name", name, "--port", "0", "--any-model", *flags]
            children[name] = running.enter_context(Child(argv, directory / f"{name}.log"))
        yield {
            name: {"address": child.wait_line(r"listening on http://(\S+)").group(1)}
            for name, child in children.items()
        }


def rows(here: Stack) -> list[dict[str, Any]]:
    return [here.endpoint(name) for name in NAMES]


@dataclass(frozen=True)
class Unlike:
    """Requests that cost the engines much less than a first guess says; `running` must come to run at once."""

    body: bytes
    headers: Mapping[str, str]
    running: int
    flags: tuple[str, ...] = ROOMY
    config: Mapping[str, Any] = field(default_factory=dict)
    clients: int = 40
    beside: int = 0
    """Clients that send a few words of plain text meanwhile."""


SMALL = ("--max-num-seqs", "256", "--num-gpu-blocks", "1500", "--decode-seq-s", "2e-5", "--step-base-s", "0.03")
"""A KV cache of 24,000 tokens."""
UNLIKE = {
    "a system prompt of 3,000 tokens that all share, on a KV cache of 24,000": Unlike(
        chat("You are a kind machine. " * 510),
        {"x-sim-output-tokens": "40", "x-sim-shared-prompt-tokens": "3000"},
        running=24,  # 14 if each is counted with a prompt of its own
        flags=SMALL,
    ),
    "images of 400 KB that are 500 tokens, beside text, on a KV cache of 24,000": Unlike(
        chat([{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]),
        {"x-sim-output-tokens": "20", "x-sim-prompt-tokens": "500"},
        running=10,  # 1 at each, or 1 and the text, if bytes are tokens
        flags=SMALL,
        clients=16,
        beside=4,
    ),
    "answers that do not stream, where first bytes are looked at": Unlike(
        chat("a word or two " * 290, stream=False),
        {"x-sim-output-tokens": "40"},
        running=24,  # 8 if a prompt counts until the first byte, which comes with the last one
        flags=(*ROOMY, "--step-base-s", "0.03", "--prefill-token-s", "2e-5"),
        config={"first_byte_probe": True},
    ),
}


@pytest.mark.parametrize("case", UNLIKE.values(), ids=UNLIKE.keys())
def test_engines_get_as_many_as_they_can_run_once_they_have_shown_what_requests_cost(
    tmp_path: Path, stack: StackFactory, case: Unlike
) -> None:
    with engines(tmp_path, *case.flags) as endpoints:
        config = {**READ_OFTEN, "classes": PATIENT, **case.config}
        here = stack(upstreams=(), endpoints=endpoints, config=config)
        text = {"x-sim-output-tokens": "20"}
        with (
            Crowd(here.url, case.clients, case.body, case.headers) as crowd,
            Crowd(here.url, case.beside, chat(), text) as others,
        ):

            def enough_run() -> bool:
                return sum(row["load"].get("running", 0) for row in rows(here)) >= case.running

            try:
                wait_until(enough_run, 25.0)
            except AssertionError:
                pytest.fail(f"not {case.running} running within 25 s: {rows(here)}")
        assert crowd.statuses() | others.statuses() == {200}


def test_an_engine_whose_steps_take_90_ms_keeps_its_limit_and_refuses_nobody_whom_it_could_serve(
    tmp_path: Path, stack: StackFactory
) -> None:
    with engines(tmp_path, *ROOMY, "--step-base-s", "0.09") as endpoints:
        # At a limit that stays where it starts they wait for up to 16 s; a stall of the machine is made up for sooner.
        config = {**READ_OFTEN, "classes": [{"name": "default", "budget": "8s"}]}
        here = stack(upstreams=(), endpoints=endpoints, config=config)
        # 20 a second, of 1.8 s each: 18 at each engine.
        answers = complete_many(here.url, 260, lambda _: {"x-sim-output-tokens": "20"}, body=chat(), gap_s=0.05)
        assert [answer.status for answer in answers].count(200) == len(answers)
        assert min(row["limit"] for row in rows(here)) > 8


def test_an_engine_of_four_slots_is_given_four_and_an_urgent_request_does_not_wait_for_a_line_inside(
    tmp_path: Path, stack: StackFactory
) -> None:
    with engines(tmp_path, "--max-num-seqs", "4") as endpoints:
        config = {**READ_OFTEN, "classes": [*PATIENT, {"name": "urgent", "priority": 10}]}
        here = stack(upstreams=(), endpoints=endpoints, config=config)
        with Crowd(here.url, 80, chat(), {"x-sim-output-tokens": "25"}) as crowd:  # half a second each

            def found() -> bool:
                return all(row["limit"] == 4 and row["load"].get("waiting", 9) <= 1 for row in rows(here))

            try:
                wait_until(found, 15.0)
            except AssertionError:
                pytest.fail(f"not a limit of 4 and no line within 15 s: {rows(here)}")
            urgent = {"x-request-class": "urgent", "x-sim-output-tokens": "5"}
            answers = complete_many(here.url, 4, lambda _: urgent, body=chat(), gap_s=0.3)
        assert crowd.statuses() | {answer.status for answer in answers} == {200}
        # A slot comes free every 60 ms; the line of 80 takes 5 s. All of them see the same machine.
        of_others = statistics.median(answer.first_chunk_s or 0.0 for answer in crowd.answers[-40:])
        assert max(answer.first_chunk_s or math.inf for answer in answers) < of_others / 3


def test_a_model_with_short_answers_is_not_charged_for_the_long_ones_of_another(
    tmp_path: Path, stack: StackFactory
) -> None:
    models = dict(zip(NAMES, ("chat", "reasoning"), strict=True))
    with engines(tmp_path, *ROOMY, "--step-base-s", "0.005") as endpoints:
        keys = {name: {**endpoints[name], "models": [model]} for name, model in models.items()}
        here = stack(upstreams=(), endpoints=keys, config={**READ_OFTEN, "classes": PATIENT})

        def estimated(name: str) -> float:
            row = here.endpoint(name)
            return float(row["kv_tokens"] / row["in_flight"]) if row["in_flight"] else 0.0

        with (
            Crowd(here.url, 6, chat(model="chat"), {"x-model": "chat", "x-sim-output-tokens": "20"}) as short,
            Crowd(here.url, 6, chat(model="reasoning"), {"x-model": "reasoning", "x-sim-output-tokens": "400"}) as long,
        ):
            try:
                wait_until(lambda: 0 < estimated("engine-a") < 60 and estimated("engine-b") > 250, 15.0)
            except AssertionError:
                pytest.fail(f"answers of 20 and 400 tokens are estimated alike after 15 s: {rows(here)}")
        assert short.statuses() | long.statuses() == {200}


# ---- Azure's code trace: long prompts, short answers, bursts

TIMES = 2.0
"""So many times as fast as users, and engines, really are."""
A100 = ("--preset", "a100-8b", "--speed", str(TIMES))
FIRST_TOKEN_S, TOKEN_S = 2.0 / TIMES, 0.1 / TIMES
STALL_S = 0.3
"""Less time lost than that spoils no burst."""
RATE, DRAWN_S, SEED, BEGINS_S, LASTS_S = 9.0, 300.0, 1, 53.0, 6.0
"""Six seconds with 110 requests, 205,000 tokens of prompts: a fifth more than two engines can compute meanwhile."""


def slice_of_code() -> list[Demand]:
    """Cut a burst out of traffic like that of Azure's hour of code (studies/matrix/traffic.py), times from 0."""
    drawn = AZURE_CODE.demands(RATE, DRAWN_S, SEED)
    return [replace(one, at=(one.at - BEGINS_S) / TIMES) for one in drawn if 0 <= one.at - BEGINS_S < LASTS_S]


async def in_time(url: str, demands: Sequence[Demand]) -> float:
    """Send requests as they came; return the share whose first token, and those after it, came in time."""

    async def one(session: aiohttp.ClientSession, number: int, demand: Demand) -> bool:
        await asyncio.sleep(demand.at)
        lengths = {"x-sim-prompt-tokens": str(demand.prompt), "x-sim-output-tokens": str(demand.output)}
        headers, body = {"content-type": "application/json", **lengths}, chat("code" * demand.estimate)
        answer = await complete(session, url, number, headers, body)
        first_s = answer.first_chunk_s
        if answer.status != 200 or answer.error or first_s is None or first_s > FIRST_TOKEN_S:
            return False
        return answer.end_s - first_s <= TOKEN_S * max(demand.output - 1, 1)

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        met = await asyncio.gather(*(one(session, *numbered) for numbered in enumerate(demands)))
    return sum(met) / len(met)


def test_of_a_burst_of_azures_code_completions_several_times_as_many_come_in_time_as_with_least_request(
    tmp_path: Path, stack: StackFactory
) -> None:
    config = {**READ_OFTEN, "classes": [{"name": "code", "budget": "800ms"}]}
    for turn in range(5):  # a stall of a second makes half of the burst late, whoever serves it
        directory = tmp_path / str(turn)
        with engines(directory / "ours", *A100) as ours, engines(directory / "others", *A100) as others:
            here = stack(upstreams=(), endpoints=ours, config=config)
            there = stack(upstreams=(), endpoints=others, config={**config, "enable_queue": False})  # to who has fewest

            async def both(here: Stack = here, there: Stack = there) -> list[float]:
                return await asyncio.gather(in_time(here.url, slice_of_code()), in_time(there.url, slice_of_code()))

            before_s = lost_s()
            queue, least_request = asyncio.run(both())
        if lost_s() - before_s < STALL_S:
            break
    assert queue > max(0.4, 3 * least_request), (queue, least_request)
