"""Fetches one page: at most so many bytes, whole within a deadline, from the server that was asked and no other."""

from __future__ import annotations

import asyncio
import ssl
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.endpoints.access import HOPS, Credentials, onward
from extproc.endpoints.telemetry.connection import Answer, Connection
from extproc.endpoints.telemetry.readings import Reason

if TYPE_CHECKING:
    from yarl import URL

_HEADERS = {"accept": "text/plain;version=0.0.4, text/plain;q=0.5", "accept-encoding": "identity"}

_SWEPT = 100
"""Servers whose idle connections are looked at in one turn of the loop."""

_Origin = tuple[str, int, ssl.SSLContext | None]
"""Host, port, and what is trusted there; None: no TLS."""


class Pages:
    """One HTTP client for the pages of all endpoints. Close it."""

    def __init__(self, *, timeout_s: float, keep_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Give up a page that is not whole in `timeout_s`; keep an idle connection for `keep_s`."""
        self._timeout_s = timeout_s
        self._keep_s = keep_s
        self._loop = loop
        self._system_tls: ssl.SSLContext | None = None
        self._idle: dict[_Origin, list[tuple[float, Connection]]] = {}  # since when, the latest last
        self._connections: set[Connection] = set()
        self._sweep = loop.call_later(keep_s, self._close_idle, ())

    async def close(self) -> None:
        """Close all connections."""
        self._sweep.cancel()
        self._idle.clear()
        for connection in tuple(self._connections):
            connection.close()
        while self._connections:  # noqa: ASYNC110 - each says when it is gone, in the loop's next turns
            await asyncio.sleep(0)

    async def get(self, url: URL, most_bytes: int, credentials: Credentials | None = None) -> bytes | Reason:
        """Return a page's bytes, or why there are none."""
        try:
            headers, tls = (None, True) if credentials is None else (credentials.headers(), credentials.tls())
        except (OSError, ValueError):
            return Reason.CREDENTIALS
        try:
            return await self._follow(url, headers, tls, most_bytes)
        except TimeoutError:
            return Reason.TIMEOUT
        except OSError:  # refused, unreachable, name unknown, TLS
            return Reason.CONNECT
        except ValueError:
            return Reason.PROTOCOL

    async def _follow(
        self, url: URL, headers: dict[str, str] | None, tls: ssl.SSLContext | bool, most_bytes: int
    ) -> bytes | Reason:
        """Follow redirects, all within the deadline. Raises what `_ask` does."""
        until = self._loop.time() + self._timeout_s
        for _ in range(HOPS + 1):
            answer = await self._ask(url, headers, tls, most_bytes, until)
            if isinstance(answer, Reason):
                return answer
            if answer.status == 200:
                return answer.body
            further = onward(answer.status, answer.location, url)
            if further is None:
                return Reason.REDIRECT
            url = further
        return Reason.REDIRECT

    async def _ask(
        self, url: URL, headers: dict[str, str] | None, tls: ssl.SSLContext | bool, most_bytes: int, until: float
    ) -> Answer | Reason:
        """Return what the server says to one GET by `until`.

        Raises OSError without a connection, TimeoutError if that is late, ValueError for an odd URL.
        """
        if url.host is None or url.port is None:
            raise ValueError(f"{url}: no address")
        context = None if url.scheme != "https" else self._context(tls)
        origin = url.host, url.port, context
        request = _request(url, headers) if headers else _plain_request(url)
        while True:
            connection = self._take(origin) or await self._connect(origin, until)
            is_old = connection.was_used
            try:
                answer = await connection.ask(request, most_bytes, until)
            except BaseException:
                connection.close()
                raise
            if connection.is_open:
                self._idle.setdefault(origin, []).append((self._loop.time(), connection))
                return answer
            connection.close()  # nobody will know of it any more
            if not is_old or connection.begun or answer is Reason.TIMEOUT:
                return answer
            # else closed by the server as it was asked again: a GET may be asked twice

    def _context(self, tls: ssl.SSLContext | bool) -> ssl.SSLContext:
        if isinstance(tls, ssl.SSLContext):
            return tls
        if self._system_tls is None:
            self._system_tls = ssl.create_default_context()
        return self._system_tls

    def _take(self, origin: _Origin) -> Connection | None:
        idle = self._idle.get(origin, [])
        while idle:
            _, connection = idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, origin: _Origin, until: float) -> Connection:
        host, port, context = origin
        connection = Connection(self._loop, self._connections.discard)
        async with asyncio.timeout_at(until):
            await self._loop.create_connection(lambda: connection, host, port, ssl=context)
        self._connections.add(connection)
        return connection

    def _close_idle(self, origins: tuple[_Origin, ...]) -> None:
        """Close what nobody used for long, of some of `origins` (none: all that are there), and come again."""
        since = self._loop.time() - self._keep_s
        origins = origins or tuple(self._idle)
        for origin in origins[:_SWEPT]:
            idle = self._idle.get(origin, [])
            for at, connection in idle:
                if at < since:
                    connection.close()
            kept = [one for one in idle if one[1].is_open]
            if kept:
                self._idle[origin] = kept
            else:
                self._idle.pop(origin, None)
        rest = origins[_SWEPT:]
        self._sweep = self._loop.call_later(0 if rest else self._keep_s, self._close_idle, rest)


@lru_cache(maxsize=1024)
def _plain_request(url: URL) -> bytes:
    """Return a GET without secrets, as most are: made once."""
    return _request(url, {})


def _request(url: URL, headers: dict[str, str]) -> bytes:
    """Return a GET. Raises ValueError for headers that would be two."""
    fields = _HEADERS | {name.lower(): value for name, value in headers.items()}
    lines = [f"GET {url.raw_path_qs} HTTP/1.1", f"host: {url.host_port_subcomponent}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    text = "\r\n".join(lines)
    if text.count("\r") + text.count("\n") != 2 * (len(lines) - 1):
        raise ValueError("a header of several lines")
    return (text + "\r\n\r\n").encode()
