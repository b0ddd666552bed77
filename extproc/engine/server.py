"""An OpenAI-compatible HTTP server around one simulated engine, with what tests want to know and to break.

Here: routes, faults, the record of arrivals, the life of the process, the command line. Scheduling is in model.py,
time in realtime.py, shapes in openai.py, metrics in exposition.py. A client that goes away aborts its sequence at
once, queued or running, streaming or not.

Measured by `python -m bench.engine http` (uvloop, 2 shared cores, the client on the other): 13-16 us of CPU
a streamed token, 0.13-0.15 ms a one-token request. 14,000 tok/s in 300 streams took 0.19 of a core, steps 2-12 ms
late at worst; 23,000-26,000 in 600 took 0.29-0.38, 10-72 ms late; above, the client was the bottleneck. 4,000 one-token
requests a second took 0.5-0.6 of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import signal
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from extproc.engine.exposition import CONTENT_TYPE, MetricsPage, orca_header
from extproc.engine.openai import Answer, BadRequest, Kind, error_body, read_ask
from extproc.engine.params import DEMO, PRESETS, EngineParams
from extproc.engine.realtime import Drive, Generation
from extproc.engine.sequence import Refusal
from extproc.errors import ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

BODY_LIMIT_BYTES: Final = 64 * 1024 * 1024
ARRIVALS_KEPT: Final = 10_000
VERSION: Final = "0.32.0"
"""The vLLM that the names of its metrics are of."""
FAULTS: Final = ("ok", "503", "500", "hang", "slow_headers", "refuse")
_SHUTDOWN_S: Final = 0.2
_HELP: Final = {
    "step_base_s": "seconds of every step",
    "prefill_token_s": "seconds per prompt token computed in a step",
    "decode_seq_s": "seconds per decoding sequence in a step",
    "context_token_s": "seconds per context token of the decoding sequences in a step",
    "prefill_context_s": "seconds per prompt token computed in a step and token of context before it",
    "num_gpu_blocks": "KV blocks",
    "block_size": "tokens per KV block",
    "max_num_seqs": "sequences running at once",
    "max_num_batched_tokens": "token budget of a step",
    "max_model_len": "prompt + output tokens of a request, at most",
    "max_num_queued": "503 above so many requests, waiting and running together",
    "scheduling_policy": "order of the engine's own queue",
    "prefix_caching": "reuse the KV blocks of a session's last turn",
    "speed": "0.5 is an engine at half speed",
    "cold_requests": "a new engine is slow until it has computed so many prompts",
    "cold_times": "how many times as long its steps take until then",
    "max_loras": "LoRA adapters loaded, and in one batch, at most: the models behind the first; 0: all are one model",
    "lora_load_s": "seconds that a step is longer for each adapter that it loads",
}


@dataclasses.dataclass(frozen=True, slots=True)
class EngineServerConfig:
    """One engine server. `max_num_queued` and all that shapes the engine is in `params`."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    name: str = "sim-engine"
    models: tuple[str, ...] = ("sim",)
    """Served names, the first one the default of requests that name none; the others are LoRA adapters to an engine
    that knows any (`max_loras`)."""
    any_model: bool = False
    """Accept names that are not served, too."""
    params: EngineParams = DEMO


@dataclasses.dataclass(slots=True)
class _Fault:
    mode: str = "ok"
    delay_s: float = 0.0  # of slow_headers


class EngineServer:
    """The server as an async context: listening inside, gone after. Raises StartError when it cannot listen."""

    def __init__(self, config: EngineServerConfig) -> None:
        self.config = config
        self.drive = Drive(config.params)
        self.port = config.port
        self._metrics = MetricsPage(self.drive, config.models[0])
        self._fault = _Fault()
        self._ids = itertools.count(1)
        self._arrivals: deque[dict[str, Any]] = deque(maxlen=ARRIVALS_KEPT)
        self._requests = 0
        self._since = self._counters()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """http://HOST:PORT."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    async def __aenter__(self) -> EngineServer:
        app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[_errors_as_json])
        app.on_response_prepare.append(self._sign)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/health", self._healthy)
        app.router.add_get("/ping", self._healthy)
        app.router.add_post("/ping", self._healthy)
        app.router.add_get("/metrics", self._metrics_page)
        app.router.add_get("/debug/peaks", self._peaks)
        app.router.add_post("/debug/reset", self._reset)
        app.router.add_post("/debug/fail", self._fail)
        # handler_cancellation: a client that disconnects cancels its handler, whose `finally` aborts the sequence.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        site = web.TCPSite(runner, self.config.host, self.config.port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            address = f"{self.config.host}:{self.config.port}"
            raise StartError(f"engine {self.config.name} cannot listen on {address}: {error.strerror}") from error
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drive.stop()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _sign(self, _request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-engine"] = self.config.name

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "chat")

    async def _text(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "text")

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        if self._fault.mode != "ok" and (answer := await self._break(request)) is not None:
            return answer
        config = self.config
        ask = read_ask(
            kind,
            await request.read(),
            request.headers,
            config.models,
            config.params.longest,
            any_model=config.any_model,
        )
        request_id = request.headers.get("x-request-id") or f"{config.name}-{next(self._ids)}"
        self._requests += 1
        arrival = {"id": request_id, "class": request.headers.get("x-request-class"), "arrived_s": time.time()}
        self._arrivals.append(arrival)
        generations = self.drive.submit(ask)
        if isinstance(generations, Refusal):  # read_ask has refused what is too long
            raise BadRequest("The engine's queue is full: max_num_queued reached.", 503)
        try:
            if ask.stream:
                return await self._stream(request, Answer(ask, request_id), generations)
            return await self._whole(request, Answer(ask, request_id), generations)
        finally:
            for generation in generations:
                self.drive.abort(generation)
            arrival["ended_s"] = time.time()

    async def _whole(self, request: web.Request, answer: Answer, generations: list[Generation]) -> web.Response:
        for generation in generations:
            while not generation.tokens:
                await generation.waits.more()
        response = web.json_response(answer.whole())
        load = orca_header(self.drive, request.headers.get("endpoint-load-metrics-format", ""))
        if load is not None:
            response.headers["endpoint-load-metrics"] = load
        return response

    async def _stream(self, request: web.Request, answer: Answer, generations: list[Generation]) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        await response.prepare(request)  # sends the headers now, as vLLM does, long before the first token
        sent = [0] * len(generations)
        left = len(generations) * generations[0].ask.output_tokens
        while left:
            chunks = []
            for index, generation in enumerate(generations):
                if (tokens := generation.tokens) > sent[index]:
                    chunks.append(answer.chunk(sent[index], tokens, index))
                    left -= tokens - sent[index]
                    sent[index] = tokens
            if chunks:
                await response.write(b"".join(chunks))
            else:
                await generations[0].waits.more()
        return response

    async def _break(self, request: web.Request) -> web.StreamResponse | None:
        """Misbehave as told; None means: after all, answer."""
        match self._fault.mode:
            case "503":
                raise BadRequest("The engine was told to fail.", 503)
            case "500":
                raise BadRequest("The engine was told to fail.", 500)
            case "hang":
                await asyncio.Event().wait()
            case "slow_headers":
                await asyncio.sleep(self._fault.delay_s)
            case "refuse" if request.transport is not None:
                request.transport.abort()
                return web.Response()
        return None

    async def _models(self, _request: web.Request) -> web.Response:
        longest = self.config.params.longest
        models = [
            {"id": name, "object": "model", "owned_by": "extproc", "root": name, "max_model_len": longest}
            for name in self.config.models
        ]
        return web.json_response({"object": "list", "data": models})

    async def _version(self, _request: web.Request) -> web.Response:
        """As vLLM's: routers take an engine that has it for vLLM, and read its metrics."""
        return web.json_response({"version": VERSION})

    async def _healthy(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics_page(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    def _counters(self) -> dict[str, int]:
        engine = self.drive.engine
        return {
            "finished": engine.finished_total,
            "aborted": engine.aborted_total,
            "refused": engine.refused_total,
            "preemptions": engine.preemptions_total,
            "wasted_tokens": engine.wasted_tokens_total,
        }

    async def _peaks(self, _request: web.Request) -> web.Response:
        """What the engine saw since the last reset."""
        engine = self.drive.engine
        return web.json_response(
            {name: count - self._since[name] for name, count in self._counters().items()}
            | {
                "engine": self.config.name,
                "running": engine.running,
                "waiting": engine.waiting,
                "peak_running": engine.peak_running,
                "peak_waiting": engine.peak_waiting,
                "requests": self._requests,
                "step_lag_max_s": self.drive.lag_max_s,
                "arrivals": list(self._arrivals),
            }
        )

    async def _reset(self, _request: web.Request) -> web.Response:
        self.drive.engine.reset_peaks()
        self.drive.lag_max_s = 0.0
        self._since = self._counters()
        self._requests = 0
        self._arrivals.clear()
        return web.json_response({"reset": True})

    async def _fail(self, request: web.Request) -> web.Response:
        """Break the generation routes: {"mode": one of FAULTS, "delay_s": of slow_headers}."""
        try:
            wish = json.loads(await request.read())
            fault = _Fault(str(wish["mode"]), float(wish.get("delay_s", 2.0)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadRequest('the body must be {"mode": ..., "delay_s": seconds}') from None
        if fault.mode not in FAULTS or not 0 <= fault.delay_s <= 600:
            raise BadRequest(f"mode must be one of {', '.join(FAULTS)}; delay_s 0 to 600", param="mode")
        self._fault = fault
        return web.json_response({"mode": fault.mode})


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadRequest as error:
        body = error_body(error.status, str(error), error.param)
        return web.json_response(body, status=error.status)
    except ConnectionResetError:
        return web.Response()  # the client has left, and nobody reads this; raised on, aiohttp would log a traceback
    except web.HTTPException as error:
        headers = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        return web.json_response(error_body(error.status, error.reason), status=error.status, headers=headers)


async def run(config: EngineServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; one line on stdout says when and where. Raises StartError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with EngineServer(config) as server:
        sys.stdout.write(f"engine {config.name} listening on {server.url}\n")
        sys.stdout.flush()
        await stop.wait()


def serve(config: EngineServerConfig) -> None:
    """Run until told to stop, on uvloop when it is installed. Raises StartError."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(config))
    else:
        uvloop.run(run(config))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine's flags, for `from_arguments` to read."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one (default: %(default)s)")
    parser.add_argument("--name", default="sim-engine", help="sent as x-engine (default: %(default)s)")
    parser.add_argument("--model", action="append", help="a served model name; repeatable (default: sim)")
    parser.add_argument("--any-model", action="store_true", help="accept any model name")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="(default: %(default)s)")
    constants = parser.add_argument_group("constants of the engine", "each defaults to the preset's")
    for field in dataclasses.fields(EngineParams):
        options: dict[str, Any] = {"default": None, "help": _HELP[field.name]}
        match field.type:
            case "bool":
                options["action"] = argparse.BooleanOptionalAction
            case "SchedulingPolicy":
                options["choices"] = ("fcfs", "priority")
            case "float":
                options |= {"type": float, "metavar": "X"}
            case _:
                options |= {"type": int, "metavar": "N"}
        constants.add_argument("--" + field.name.replace("_", "-"), **options)


def from_arguments(arguments: argparse.Namespace) -> EngineServerConfig:
    """The config that the flags of `add_arguments` mean. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(EngineParams)]
    changes = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        params = dataclasses.replace(PRESETS[arguments.preset], **changes)
    except ValueError as error:
        raise ConfigError("command line", [str(error)]) from None
    if not 0 <= arguments.port <= 65535:
        raise ConfigError("command line", [f"port must be 0 to 65535; got {arguments.port}"])
    return EngineServerConfig(
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        models=tuple(arguments.model or ("sim",)),
        any_model=arguments.any_model,
        params=params,
    )


def main(argv: list[str] | None = None) -> None:
    """`extproc engine`, until the command line of the package mounts it."""
    parser = argparse.ArgumentParser(prog="extproc engine", description="A simulated inference engine.")
    add_arguments(parser)
    serve(from_arguments(parser.parse_args(argv)))
