"""A connection that is asked for one page after the other: HTTP/1.1 as httptools reads it, never more than was allowed.

With aiohttp's client a scrape cost 350 to 400 us where it costs 230 with this (`make bench-scrape`, a busy machine). No
redirects or credentials here: fetch.py has those.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import httptools

from extproc.endpoints.telemetry.readings import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_HEAD_BYTES = 64 * 1024
"""Heads together, interim ones and chunk lines included, beside the body."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said. `location`: where a redirect leads; `body` is read of a 200 only."""

    status: int
    location: str | None
    body: bytes


class Connection(asyncio.Protocol):
    """One connection. `ask` when it `is_idle`; close it if the answer is not waited for.

    Attributes:
        is_open: it may be asked, now or later.
        was_used: it gave an answer before, so the server may have been closing it when it was asked again.
        begun: bytes of the present answer came.
    """

    __slots__ = (
        *(
            "_answer",
            "_body",
            "_body_bytes",
            "_gone",
            "_has_length",
            "_is_chunked",
            "_is_done",
            "_is_encoded",
            "_keeps",
        ),
        *("_late", "_length", "_location", "_loop", "_most_bytes", "_parser", "_read_bytes", "_status", "_transport"),
        *("begun", "is_open", "was_used"),
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, gone: Callable[[Connection], None]) -> None:
        """Wait for a transport; `gone` is told when it closed."""
        self._loop = loop
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer | Reason] | None = None
        self._late: asyncio.TimerHandle | None = None
        self._location: str | None = None
        self._body: list[bytes] = []
        self._is_encoded = False
        self.is_open = self.was_used = self.begun = False

    def ask(self, request: bytes, most_bytes: int, until: float) -> asyncio.Future[Answer | Reason]:
        """Send a GET; its answer, or why there is none, comes by the future.

        More than `most_bytes` is none, and what is not whole by `until`, a time of the loop's clock.
        """
        assert self._transport is not None  # noqa: S101 - who has it got it connected
        assert self._answer is None  # noqa: S101 - one at a time
        self._answer = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._most_bytes = most_bytes
        self._read_bytes = 0
        self.begun = False
        self._reset()
        self._late = self._loop.call_at(until, self._end, Reason.TIMEOUT)
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        """Close it at once, whatever else it would send."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it up."""
        self._transport, self.is_open = cast("asyncio.Transport", transport), True  # uvloop's inherits from nothing

    def data_received(self, data: bytes) -> None:
        """Read on. What nobody asked for ends the connection."""
        if self._answer is None or self._answer.done():
            self.close()
            return
        self.begun = True
        self._read_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end(Reason.PROTOCOL)
            self.close()  # also where it was a whole answer that something odd came after
            return
        if self._answer is not None and self._read_bytes - self._body_bytes > MOST_HEAD_BYTES:
            self._end(Reason.TOO_BIG if self._status else Reason.PROTOCOL)

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end, which is that of an answer without a length, too."""
        self.is_open = False
        if self._answer is not None:
            is_whole = self._status == 200 and error is None and not (self._has_length or self._is_chunked)
            self._end(Answer(self._status, None, b"".join(self._body)) if is_whole else Reason.PROTOCOL)
        self._gone(self)

    # ---- httptools' side

    def on_message_begin(self) -> None:
        """Begin with a head."""
        if self._is_done:  # a second answer to one question
            self.close()
        else:
            self._reset()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the few that mean something here."""
        match name.lower():
            case b"content-length":
                self._has_length, self._length = True, int(value)
            case b"transfer-encoding":
                self._is_chunked, self._is_encoded = True, self._is_encoded or value.strip().lower() != b"chunked"
            case b"content-encoding":
                self._is_encoded = self._is_encoded or value.strip().lower() not in (b"", b"identity")
            case b"location":
                self._location = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Judge by the head whether the body is read."""
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            return  # an interim answer: the real one follows
        self._status, self._keeps = status, self._parser.should_keep_alive()
        if 300 <= status < 400:
            self._end(Answer(status, self._location, b""))
        elif status != 200:
            self._end(Reason.STATUS)
        elif self._is_encoded:
            self._end(Reason.ENCODING)
        elif self._length > self._most_bytes:
            self._end(Reason.TOO_BIG)

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if self._answer is None:
            return
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > self._most_bytes:
            self._end(Reason.TOO_BIG)

    def on_message_complete(self) -> None:
        """Give the answer, unless it was an interim one."""
        if self._status == 200 and self._answer is not None:
            self._is_done = True
            self._end(Answer(200, None, b"".join(self._body)))

    # ---- both

    def _reset(self) -> None:
        self._status = self._length = self._body_bytes = 0
        self._has_length = self._is_chunked = self._is_encoded = self._keeps = self._is_done = False
        self._location = None
        self._body = []

    def _end(self, answer: Answer | Reason) -> None:
        """Give the answer, once. Only a whole one leaves the connection open."""
        if self._answer is not None:
            if self._late is not None:
                self._late.cancel()
            if not self._answer.done():
                self._answer.set_result(answer)
            self._answer = None
            self._body = []  # hundreds of idle connections would keep their pages
            self.was_used = True
            if not (self._is_done and self._keeps):
                self.close()
