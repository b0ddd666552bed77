"""A simulated engine that really listens, and how to ask it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from extproc.engine.params import EngineParams
from extproc.engine.server import EngineServer, EngineServerConfig
from tests.e2e.kit.processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

FAST = EngineParams(step_base_s=0.002, prefill_token_s=0.0, decode_seq_s=0.0, max_num_seqs=1)
CHAT: dict[str, Any] = {"model": "sim", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}
ENDLESS = CHAT | {"max_tokens": 5000}
CHAT_PATH = "/v1/chat/completions"


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 2 * PATIENCE_S))


@asynccontextmanager
async def engine(
    params: EngineParams = FAST, **config: Any
) -> AsyncIterator[tuple[EngineServer, aiohttp.ClientSession]]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with (
        EngineServer(EngineServerConfig(params=params, **config)) as server,
        aiohttp.ClientSession(server.url, timeout=timeout) as client,
    ):
        yield server, client


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition of the server in this process; `play` bounds it."""
    while not holds():  # noqa: ASYNC110  # the model has no events, on purpose
        await asyncio.sleep(0.001)


async def ask(
    client: aiohttp.ClientSession, body: Any = CHAT, path: str = CHAT_PATH, **headers: str
) -> tuple[int, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.post(path, json=body, headers=named) as response:
        return response.status, await response.json()


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    lines = (await response.text()).split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
