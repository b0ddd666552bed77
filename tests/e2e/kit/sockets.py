"""A server that speaks WebSocket, as engines do at `/v1/realtime`: it sends back what it gets."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from aiohttp import WSMsgType, web

from .processes import PATIENCE_S, end_server

if TYPE_CHECKING:
    from collections.abc import Iterator

import contextlib


async def _echo(request: web.Request) -> web.StreamResponse:
    if request.headers.get("upgrade", "").lower() != "websocket":
        return web.json_response({})
    connection = web.WebSocketResponse()
    await connection.prepare(request)
    async for message in connection:
        if message.type is WSMsgType.TEXT:
            await connection.send_str(message.data)
    return connection


@contextlib.contextmanager
def echo_server() -> Iterator[str]:
    """Run the server in a thread of its own; its `host:port`."""
    loop = asyncio.new_event_loop()
    ready: Future[str] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", _echo)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        ready.set_result(f"{host}:{port}")
        await stop.wait()
        await end_server(runner)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield ready.result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
