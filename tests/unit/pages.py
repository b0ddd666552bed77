"""Servers whose pages a scraper is to read: good ones, slow ones, and every bad one we could think of."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.scraper import Scraper
from tests.e2e.kit.processes import PATIENCE_S

if TYPE_CHECKING:
    import trustme

    from extproc.admission.load import Load

GOOD = b'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 1\n'
GPUS = b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 80\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 20\n'


class Pages:
    """A server that answers each path in its own bad way, and counts what it did."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.hits: dict[str, int] = {}
        self.heads: list[str] = []
        self.sent_bytes = 0
        self.page = GOOD
        self.token = ""
        self.opened = 0
        self.closes_old_ones = False
        self.forged = b""  # said behind each good page, when nobody asks
        self.behind = b""  # said with each good page, in one piece
        self.models: bytes | None = b'{"data": [{"max_model_len": 4096}]}'  # None: it hangs
        self.address = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Pages:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def url(self, path: str) -> str:
        return f"http://{self.address}/{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.opened += 1
        is_old = False
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                path = head.split(" ")[1].removeprefix("/")
                if is_old and self.closes_old_ones:
                    break
                self.hits[path] = self.hits.get(path, 0) + 1
                answer: Callable[[asyncio.StreamWriter], Awaitable[None]] = getattr(self, f"_{path.replace('/', '_')}")
                await answer(writer)
                if path != "good":
                    break
                is_old = True
                if self.forged:
                    await asyncio.sleep(0.005)  # what is tested: it comes when nobody waits
                    writer.write(self.forged)
        writer.close()
        self._connections.discard(task)

    async def _send(self, writer: asyncio.StreamWriter, body: bytes, *lines: str, status: str = "200 OK") -> None:
        fields = "".join(f"{line}\r\n" for line in (*lines, f"content-length: {len(body)}"))
        await self._write(writer, f"HTTP/1.1 {status}\r\n{fields}\r\n".encode() + body)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.sent_bytes += len(data)

    async def _endless(self, writer: asyncio.StreamWriter, piece: bytes, *, pause_s: float = 0.0) -> None:
        """Send without a length, until the peer goes away."""
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        while not writer.is_closing():
            await self._write(writer, piece)
            await asyncio.sleep(pause_s)

    async def _good(self, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: {len(self.page)}\r\n\r\n"
        await self._write(writer, head.encode() + self.page + self.behind)

    async def _gpus(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GPUS)

    async def _v1_models(self, writer: asyncio.StreamWriter) -> None:
        if self.models is None:
            await asyncio.sleep(60)
        else:
            await self._send(writer, self.models)

    async def _crlf(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD.replace(b"\n", b"\r\n"))

    async def _interim(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 103 Early Hints\r\nlocation: /x\r\ncontent-length: 9\r\n\r\n")
        await self._send(writer, GOOD)

    async def _chunked(self, writer: asyncio.StreamWriter) -> None:
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in GOOD.splitlines(keepends=True))
        await self._write(writer, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")

    async def _until_closed(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.0 200 OK\r\n\r\n" + GOOD)

    async def _two_lengths(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD, "content-length: 3")

    async def _smuggled(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD, "transfer-encoding: chunked")

    async def _upgrade(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")

    async def _many_interim(self, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await self._write(writer, b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * 100)

    async def _head(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            await self._write(writer, b"x: " + b"y" * 60_000 + b"\r\n")

    async def _chunk_lines(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            await self._write(writer, b"1\r\nv\r\n" * 1000)

    async def _hang(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def _drip(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"v", pause_s=0.01)

    async def _drip_head(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            await self._write(writer, b"x: y\r\n")
            await asyncio.sleep(0.02)

    async def _loop(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"", "location: /loop", status="302 Found")

    async def _away(self, writer: asyncio.StreamWriter) -> None:
        there = self.address.replace("127.0.0.1", "localhost")
        await self._send(writer, b"", f"location: http://{there}/good", status="307 Temporary Redirect")

    async def _moved(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"", "location: /good", status="307 Temporary Redirect")

    async def _locked(self, writer: asyncio.StreamWriter) -> None:
        known = {f"authorization: bearer {self.token}", "x-key: s3cret"}
        if known <= {line.lower() for line in self.heads[-1].split("\r\n")}:
            await self._send(writer, self.page)
        else:
            await self._send(writer, b"", status="401 Unauthorized")

    async def _bomb(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, gzip.compress(bytes(5 * 1024 * 1024)), "content-encoding: gzip")

    async def _line(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"x" * 65_536)

    async def _announced(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n")
        await asyncio.sleep(60)

    async def _series(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"".join(b'vllm:num_requests_running{r="%d"} 1\n' % n for n in range(2000)))

    async def _many(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"".join(b'vllm:num_requests_running{r="%d"} 1\n' % n for n in range(2000)))

    async def _html(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"<!doctype html><title>Sign in</title>", "content-type: text/html")

    async def _binary(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, bytes(range(256)) * 100)

    async def _malformed(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"vllm:num_requests_running{ 3\n")

    async def _broken(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"oops", status="500 Internal Server Error")

    async def _cut(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + GOOD)

    async def _noise(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    async def _gone(self, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()


HOSTILE = {
    "hang": "timeout",
    "drip": "timeout",
    "drip_head": "timeout",
    "loop": "redirect",
    "away": "redirect",
    "bomb": "encoding",
    "line": "too_big",
    "announced": "too_big",
    "series": "too_big",
    "many": "too_many_series",
    "html": "no_metrics",
    "binary": "no_metrics",
    "malformed": "malformed",
    "broken": "status",
    "cut": "protocol",
    "noise": "protocol",
    "gone": "protocol",
    "two_lengths": "protocol",
    "smuggled": "protocol",
    "upgrade": "protocol",
    "many_interim": "protocol",
    "head": "protocol",
    "chunk_lines": "too_big",
    "refused": "connect",
}


class Wire:
    """A scraper under test, and what it told."""

    def __init__(self, *, interval_s: float = 60.0, timeout_s: float = 5.0, stale_after_s: float = 100.0) -> None:
        loop = asyncio.get_running_loop()
        self.scraper = Scraper(interval_s=interval_s, timeout_s=timeout_s, stale_after_s=stale_after_s, loop=loop)
        self.seen: list[tuple[str, Load]] = []

    def observe(self, name: str, load: Load, _asked_at: float) -> None:
        self.seen.append((name, load))

    async def __aenter__(self) -> Wire:
        await self.scraper.start(self.observe)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.scraper.stop()

    def errors(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for name, reason, count in self.scraper.errors():
            found.setdefault(name, {})[reason] = count
        return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds, none with an event
            await asyncio.sleep(0.002)


def server_tls(ca: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    return context
