"""The simulated engines of one stack in one process: what `extproc engine` serves, several times over.

    python -m bench.proof.engines '[{"name": "a", "port": 12345, "params": {"preset": "h100-32b", "speed": 0.5}}]'

One process for a stack's engines costs a quarter of the memory and wake-ups of four. Says "ready" when all listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from typing import Any

import uvloop

from extproc.engine.params import PRESETS
from extproc.engine.server import EngineServer, EngineServerConfig


def config(spec: dict[str, Any]) -> EngineServerConfig:
    """Return the engine that a spec means. Raises ValueError or TypeError for parameters that can't be."""
    params = dict(spec["params"])
    preset = PRESETS[params.pop("preset")]
    return EngineServerConfig(
        name=spec["name"], port=spec["port"], any_model=True, params=dataclasses.replace(preset, **params)
    )


async def run(specs: list[dict[str, Any]]) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with contextlib.AsyncExitStack() as running:
        for spec in specs:
            await running.enter_async_context(EngineServer(config(spec)))
        print("ready", flush=True)
        await stop.wait()


if __name__ == "__main__":
    uvloop.run(run(json.loads(sys.argv[1])))
