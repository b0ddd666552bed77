"""The simulated engine when it is told to fail, and the life of its process: a taken port, a signal."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import aiohttp
import pytest

from extproc.engine.server import EngineServer, EngineServerConfig
from extproc.errors import StartError
from tests.e2e.kit.awake import awake
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.running_engine import CHAT_PATH, ENDLESS, ask, engine, play


async def fail(client: aiohttp.ClientSession, mode: str, **more: float) -> int:
    async with client.post("/debug/fail", json={"mode": mode} | more) as response:
        return response.status


@pytest.mark.parametrize("mode", ["503", "500"])
def test_a_told_failure_lasts_until_told_otherwise(mode: str) -> None:
    async def scene() -> None:
        async with engine() as (_, client):
            assert await fail(client, mode) == 200
            for _ in range(2):
                status, answer = await ask(client)
                assert status == answer["error"]["code"] == int(mode)
            await fail(client, "ok")
            assert (await ask(client))[0] == 200

    play(scene())


def test_a_hanging_engine_accepts_and_never_answers() -> None:
    async def scene() -> None:
        async with engine() as (_, client):
            await fail(client, "hang")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(client), 0.1)

    play(scene())


def test_a_refusing_engine_closes_the_connection_without_an_answer() -> None:
    async def scene() -> None:
        async with engine() as (_, client):
            await fail(client, "refuse")
            with pytest.raises(aiohttp.ClientConnectionError):
                await ask(client)

    play(scene())


def test_slow_headers_come_late_and_then_the_answer_is_normal() -> None:
    async def scene() -> None:
        async with engine() as (_, client):
            await fail(client, "slow_headers", delay_s=0.1)
            began = time.monotonic()
            status, _ = await ask(client)
            assert (status, time.monotonic() - began >= 0.1) == (200, True)

    play(scene())


@pytest.mark.parametrize("body", ["{", "[]", "{}", '{"mode": "explode"}', '{"mode": "hang", "delay_s": -1}'])
def test_an_unknown_fault_is_refused(body: str) -> None:
    async def scene() -> None:
        async with engine() as (_, client), client.post("/debug/fail", data=body) as response:
            assert response.status == 400

    play(scene())


def test_a_taken_port_is_a_start_error_that_names_it() -> None:
    async def scene() -> None:
        async with engine() as (server, _):
            with pytest.raises(StartError, match=f"127.0.0.1:{server.port}"):
                await EngineServer(EngineServerConfig(port=server.port)).__aenter__()

    play(scene())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_where_it_listens_and_exits_0_on_a_signal_even_while_streaming(number: signal.Signals) -> None:
    main = "from extproc.engine.server import main; main()"
    command = [sys.executable, "-W", "error", "-c", main, "--port", "0", "--name", "e1", "--num-gpu-blocks", "9999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words[:4] == ["engine", "e1", "listening", "on"]

            async def scene() -> None:
                async with (
                    aiohttp.ClientSession(words[4]) as client,
                    client.post(CHAT_PATH, json=ENDLESS | {"stream": True}) as response,
                ):
                    await response.content.readany()
                    process.send_signal(number)
                    began = awake()
                    code = await asyncio.to_thread(process.wait, PATIENCE_S)
                    assert (code, awake() - began < 5) == (0, True), "the answer would have lasted for ten seconds"

            play(scene())
            assert process.communicate() == ("", "")
        finally:
            process.kill()
