"""Fetches one page: at most so many bytes, whole within a deadline, from the server that was asked and no other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp

from extproc.endpoints.access import HOPS, Credentials, onward
from extproc.endpoints.telemetry.page import Reason

if TYPE_CHECKING:
    from yarl import URL

_HEADERS = {"Accept": "text/plain;version=0.0.4, text/plain;q=0.5", "Accept-Encoding": "identity"}


class Pages:
    """One HTTP client for the pages of all endpoints. Close it."""

    def __init__(self, *, timeout_s: float, keep_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Give up a page that is not whole in `timeout_s`; keep an idle connection for `keep_s`."""
        self._timeout_s = timeout_s
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_s, loop=loop),
            cookie_jar=aiohttp.DummyCookieJar(loop=loop),
            auto_decompress=False,
            trust_env=False,
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # the deadline in `get` covers all
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def get(self, url: URL, most_bytes: int, credentials: Credentials | None = None) -> bytes | Reason:
        """Return a page's bytes, or why there are none."""
        try:
            headers, tls = (None, True) if credentials is None else (credentials.headers(), credentials.tls())
        except (OSError, ValueError):
            return Reason.CREDENTIALS
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(HOPS + 1):
                    async with self._client.get(url, headers=headers, ssl=tls, allow_redirects=False) as response:
                        further = onward(response, url)
                        if further is None:
                            return await _body(response, most_bytes)
                        response.close()  # whatever else it would send
                        url = further
                return Reason.REDIRECT
        except TimeoutError:
            return Reason.TIMEOUT
        except aiohttp.ClientConnectorError:
            return Reason.CONNECT
        except (aiohttp.ClientError, OSError, ValueError):
            return Reason.PROTOCOL


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes | Reason:
    refusal = _refusal(response, most_bytes)
    if refusal is not None:
        response.close()  # whatever else it would send
        return refusal
    body = bytearray()
    while piece := await response.content.readany():
        body += piece
        if len(body) > most_bytes:
            response.close()
            return Reason.TOO_BIG
    return bytes(body)


def _refusal(response: aiohttp.ClientResponse, most_bytes: int) -> Reason | None:
    """Return why the body of `response` isn't read, judging by its head."""
    if 300 <= response.status < 400:
        return Reason.REDIRECT
    if response.status != 200:
        return Reason.STATUS
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        return Reason.ENCODING
    if response.content_length is not None and response.content_length > most_bytes:
        return Reason.TOO_BIG
    return None
