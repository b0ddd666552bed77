"""How much one core carries: `python -m bench.engine model` and `... http`. Prints CPU seconds, not promises.

`model` plays requests on four engines and a virtual clock; `http` loads one server process from this one and reads
the CPU time of the server's process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import multiprocessing
import os
import random
import sys
import time
from typing import TYPE_CHECKING

import aiohttp

from extproc.engine.model import Engine
from extproc.engine.params import PRESETS, EngineParams
from extproc.engine.sequence import Finished
from extproc.engine.server import EngineServer, EngineServerConfig

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def measure_model(preset: str, requests: int, per_second: float, limit: int) -> str:
    """Poisson arrivals, lognormal lengths (prompt ~1300, output ~155 tokens), to the engine with fewest in flight."""
    draw = random.Random(1)  # a workload, not a secret
    engines = [Engine(PRESETS[preset]) for _ in range(4)]
    in_flight, versions, queue = [0] * 4, [0] * 4, list[tuple[int, int, int]]()
    due: list[tuple[float, int, int]] = []
    polls = arrived = ended = 0
    now = next_arrival = 0.0
    began = time.process_time()
    while ended < requests:
        if due and (arrived >= requests or due[0][0] <= next_arrival):
            now, at, version = heapq.heappop(due)
            if version != versions[at]:
                continue
            polls += 1
            done = sum(isinstance(event, Finished) for event in engines[at].advance(now))
            in_flight[at] -= done
            ended += done
            touched = [at]
        else:
            now, next_arrival = next_arrival, next_arrival + draw.expovariate(per_second)
            prompt = min(8000, max(8, int(draw.lognormvariate(6.9, 0.75))))
            queue.append((arrived, prompt, min(1500, max(1, int(draw.lognormvariate(4.86, 0.6))))))
            arrived += 1
            touched = []
        while queue and min(in_flight) < limit:
            at = in_flight.index(min(in_flight))
            number, prompt, output = queue.pop(0)
            engines[at].submit(number, prompt, output, now)
            in_flight[at] += 1
            touched.append(at)
        for at in touched:
            versions[at] += 1
            when = engines[at].next_event()
            if when is not None:
                heapq.heappush(due, (when, at, versions[at]))
    cpu_s = time.process_time() - began
    steps = sum(engine.steps_total for engine in engines)
    tokens = sum(engine.generation_tokens_total for engine in engines)
    preemptions = sum(engine.preemptions_total for engine in engines)
    return (
        f"{preset}: {requests} requests, {tokens} tokens, {steps} steps, {polls} polls, {preemptions} preemptions, "
        f"{now:.0f} s simulated in {cpu_s:.2f} s of CPU"
    )


def _serve(pipe: Connection, params: EngineParams) -> None:
    async def serve() -> None:
        async with EngineServer(EngineServerConfig(params=params)) as server:
            pipe.send(server.url)
            idle_s = time.process_time()
            await asyncio.to_thread(pipe.recv)
            pipe.send((time.process_time() - idle_s, server.drive.lag_max_s))

    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


async def _client(url: str, streams: int, tokens: int, until_s: float) -> int:
    done = 0
    body = {"prompt": "x" * 400, "max_tokens": tokens, "stream": True}

    async def one(client: aiohttp.ClientSession) -> None:
        nonlocal done
        while time.monotonic() < until_s:
            async with client.post("/v1/completions", json=body) as response:
                async for _ in response.content.iter_any():
                    pass
            done += 1

    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as client:
        await asyncio.gather(*(one(client) for _ in range(streams)))
    return done


def measure_http(streams: int, tokens: int, step_s: float, seconds: float) -> str:
    """Closed loop: `streams` clients, each asks again when its `tokens` have come."""
    params = EngineParams(
        step_base_s=step_s, prefill_token_s=0, decode_seq_s=0, num_gpu_blocks=100_000, max_num_seqs=1024
    )
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, params))
    process.start()
    url = here.recv()
    began = time.monotonic()
    requests = asyncio.run(_client(url, streams, tokens, began + seconds))
    wall_s = time.monotonic() - began
    here.send("stop")
    cpu_s, lag_s = here.recv()
    process.join()
    figures = {
        "streams": streams,
        "req/s": round(requests / wall_s, 1),
        "tok/s": round(requests * tokens / wall_s),
        "server CPU share": round(cpu_s / wall_s, 3),
        "CPU us/token": round(cpu_s / requests / tokens * 1e6, 1),
        "CPU us/request": round(cpu_s / requests * 1e6),
        "worst step lag ms": round(lag_s * 1e3, 1),
        "cores": os.cpu_count(),
    }
    return json.dumps(figures)


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model")
    model.add_argument("--preset", choices=sorted(PRESETS), default="a100-8b")
    model.add_argument("--requests", type=int, default=100_000)
    model.add_argument("--per-second", type=float, default=24.0)
    model.add_argument("--limit", type=int, default=96, help="in flight per engine")
    http = kinds.add_parser("http")
    http.add_argument("--streams", type=int, default=100)
    http.add_argument("--tokens", type=int, default=100)
    http.add_argument("--step-s", type=float, default=0.02)
    http.add_argument("--seconds", type=float, default=6.0)
    flags = parser.parse_args()
    if flags.kind == "model":
        line = measure_model(flags.preset, flags.requests, flags.per_second, flags.limit)
    else:
        line = measure_http(flags.streams, flags.tokens, flags.step_s, flags.seconds)
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
