"""A minimal engine: OpenAI's completions over a model, with continuous batching and vLLM's metrics.

    python -m bench.gpu.server --port 8000 --slots 64 --device cuda

First come, first served, as vLLM is by default: a waiting request takes the first free slot; a step computes at most
`STEP_TOKENS` prompt tokens, a whole prompt at a time, then one token for all that run. It knows what
`bench/proof/load.py` sends: lengths in headers, answers streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from aiohttp import web

from bench.gpu.model import TINY, Model, Size

STEP_TOKENS = 4096
CHUNK = b'data: {"object": "text_completion", "choices": [{"index": 0, "text": "a "}]}\n\n'


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine."""

    prompt: int
    output: int
    news: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    slot: int = -1
    made: int = 0
    last: int = 0
    left: bool = False


class Engine:
    """The model, who waits and who runs; a thread of its own computes."""

    def __init__(self, model: Model, slots: int) -> None:
        """Serve `slots` at once."""
        self.model = model
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompt_tokens = self.output_tokens = self.first_tokens = self.wasted_tokens = self.peak_waiting = 0
        self.first_token_s = self.step_s = 0.0
        self._free = list(range(slots))
        self._wake = threading.Condition()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="steps", daemon=True).start()

    def submit(self, sequence: Sequence) -> None:
        """Take a request."""
        with self._wake:
            self.waiting.append(sequence)
            self._wake.notify()

    @property
    def kv_use(self) -> float:
        """Return the share of the cache that is in use, 0..1."""
        slots = len(self.running) + len(self._free)
        used = sum(one.prompt + one.made for one in self.running)
        return used / max(slots * self.model.size.longest, 1)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.waiting or self.running)
                new = self._admit()
            began = time.monotonic()
            for one in new:
                one.last = self.model.prefill(one.slot, one.prompt)
                one.made = 1
                self.prompt_tokens += one.prompt
                self.first_tokens += 1
            old = [one for one in self.running if one not in new]
            if old:
                lengths = [one.prompt + one.made - 1 for one in old]
                tokens = self.model.decode([one.slot for one in old], [one.last for one in old], lengths)
                for one, token in zip(old, tokens, strict=True):
                    one.last = token
                    one.made += 1
            self.step_s = time.monotonic() - began
            self.output_tokens += len(self.running)
            told = list(self.running)
            self._loop.call_soon_threadsafe(lambda told=told: [one.news.put_nowait(one.made) for one in told])  # type: ignore[misc]
            for one in told:
                if one.made >= one.output or one.left:
                    self.running.remove(one)
                    self._free.append(one.slot)
                    if one.left:
                        self.wasted_tokens += one.prompt + one.made

    def _admit(self) -> list[Sequence]:
        new: list[Sequence] = []
        room = STEP_TOKENS
        while self.waiting and self._free and (not new or self.waiting[0].prompt <= room):
            one = self.waiting.popleft()
            if one.left:
                continue
            one.slot = self._free.pop()
            room -= one.prompt
            self.running.append(one)
            new.append(one)
        self.peak_waiting = max(self.peak_waiting, len(self.waiting))
        return new


class Server:
    """The engine's HTTP side."""

    def __init__(self, engine: Engine) -> None:
        """Serve `engine`."""
        self.engine = engine

    def app(self) -> web.Application:
        """Return what is served."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/completions", self.complete)
        for path, answer in (("/metrics", self.metrics), ("/health", self.health), ("/debug/peaks", self.peaks)):
            app.router.add_get(path, answer)
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Stream a completion."""
        body = await request.json()
        longest = self.engine.model.size.longest
        prompt = int(request.headers.get("x-sim-prompt-tokens") or len(body.get("prompt", "")) // 4 or 1)
        output = int(request.headers.get("x-sim-output-tokens") or body.get("max_tokens", 16))
        prompt = max(min(prompt, longest - 2), 1)
        sequence = Sequence(prompt, max(min(output, longest - prompt - 1), 1))
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.engine.submit(sequence)
        made = 0
        try:
            while made < sequence.output:
                made = await sequence.news.get()
                if not answer.prepared:
                    await answer.prepare(request)
                await answer.write(CHUNK)
            await answer.write(b"data: [DONE]\n\n")
        finally:
            sequence.left = made < sequence.output
        return answer

    async def metrics(self, _request: web.Request) -> web.Response:
        """Say what vLLM's page says, of what the sidecar reads."""
        engine = self.engine
        values = {
            "vllm:num_requests_running": ("gauge", len(engine.running)),
            "vllm:num_requests_waiting": ("gauge", len(engine.waiting)),
            "vllm:kv_cache_usage_perc": ("gauge", engine.kv_use),
            "vllm:prompt_tokens_total": ("counter", engine.prompt_tokens),
            "vllm:generation_tokens_total": ("counter", engine.output_tokens),
            "vllm:time_to_first_token_seconds_count": ("counter", engine.first_tokens),
        }
        lines = [
            f'# TYPE {name} {kind}\n{name}{{model_name="sim"}} {value}\n' for name, (kind, value) in values.items()
        ]
        return web.Response(text="".join(lines))

    async def health(self, _request: web.Request) -> web.Response:
        """Say that it serves."""
        return web.Response(text="ok")

    async def peaks(self, _request: web.Request) -> web.Response:
        """Say what `bench/proof` reads after a run."""
        engine = self.engine
        counts = {"wasted_tokens": engine.wasted_tokens, "preemptions": 0, "peak_waiting": engine.peak_waiting}
        return web.Response(text=json.dumps(counts | {"step_lag_max_s": 0.0}))


async def serve(port: int, slots: int, device: str) -> None:
    """Serve until the process is ended."""
    model = Model(Size() if device == "cuda" else TINY, slots, device)
    runner = web.AppRunner(Server(Engine(model, slots)).app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Run what the flags say."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    flags = parser.parse_args()
    asyncio.run(serve(flags.port, flags.slots, flags.device))


if __name__ == "__main__":
    main()
