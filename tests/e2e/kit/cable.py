"""A TCP connection in the middle that can be cut like a cable: nothing gets through, and neither side is told."""

from __future__ import annotations

import asyncio
import threading

from extproc.config import split_address

from .loops import close, sever
from .processes import PATIENCE_S, free_port


class Cable:
    """Forwards from `address` to `target` while `with` lasts, in a thread of its own."""

    def __init__(self, target: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._target = split_address(target)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._whole: asyncio.Event
        self._stop: asyncio.Event
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Cable:
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop.set)
        self._thread.join(PATIENCE_S)

    def cut(self) -> None:
        """Let nothing through, in either direction, on connections old and new."""
        self._call(self._whole.clear)

    def mend(self) -> None:
        """Let through what was held back, and all that comes."""
        self._call(self._whole.set)

    def _call(self, what) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._whole, self._stop = asyncio.Event(), asyncio.Event()
        self._whole.set()
        host, port = split_address(self.address)
        server = await asyncio.start_server(self._connect, host, port)
        self._started.set()
        await self._stop.wait()
        await close(server)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await sever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        await self._whole.wait()
        writer.close()
