"""The two protocols that a scripted upstream speaks on its sockets: HTTP/1.1, and HTTP/2 with prior knowledge.

What to answer is decided in `upstream.py`; here it becomes bytes, and what the peer does becomes a record.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from typing import TYPE_CHECKING, Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

from .http1 import MAX_HEAD_BYTES, Body, Headers, chunk, header, parse_head, render_head

if TYPE_CHECKING:
    from .upstream import Received, Upstream


class Connection(asyncio.Protocol):
    """One accepted connection: the first three bytes choose its protocol."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._first = b""
        self._speaker: H1 | H2 | None = None
        self.gone = asyncio.Event()
        self._can_write = asyncio.Event()
        self._can_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.upstream.connections.add(self)
        if self.upstream.is_shut:  # it was accepted before, and comes to be only now
            self.reset()

    def data_received(self, data: bytes) -> None:
        if self._speaker is None:
            self._first += data
            if len(self._first) < 3:
                return
            self._speaker = H2(self) if self._first.startswith(b"PRI") else H1(self)
            data = self._first
        self._speaker.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self._can_write.set()
        if self._speaker is not None:
            self._speaker.lost()
        self.upstream.connections.discard(self)

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    async def write(self, data: bytes) -> None:
        """Write, then wait while the peer is slow. ConnectionError when the peer is gone."""
        if self.transport.is_closing():
            raise ConnectionResetError("the peer is gone")
        self.transport.write(data)
        await self._can_write.wait()

    def reset(self) -> None:
        """End with a TCP RST."""
        raw = self.transport.get_extra_info("socket")
        if raw is not None and not self.transport.is_closing():
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class H1:
    """HTTP/1.1 on one connection: one request at a time, keep-alive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._upstream = connection.upstream
        self._buffer = b""
        self._body: Body | None = None
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._record: Received | None = None
        self._task: asyncio.Task[None] | None = None
        self._chunked = False

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        while self._buffer and self._task is None:
            if self._record is None:
                head, found, rest = self._buffer.partition(b"\r\n\r\n")
                if not found:
                    if len(self._buffer) > MAX_HEAD_BYTES:
                        self._connection.reset()
                    return
                first, headers = parse_head(head)
                method, path, _ = first.split(" ", 2)
                self._record = self._upstream.begin("h1", method, path, headers)
                self._body = Body(headers)
                self._sha1 = hashlib.sha1(usedforsecurity=False)
                self._buffer = rest
            if self._body is None:
                raise AssertionError("a record without a body")
            payload, self._buffer = self._body.feed(self._buffer), b""
            self._sha1.update(payload)
            self._record.body_bytes += len(payload)
            if self._body.done:
                self._buffer = self._body.rest
                self._record.body_sha1 = self._sha1.hexdigest()
                self._record.body_complete = True
                self._task = asyncio.get_running_loop().create_task(self._answer(self._record))

    async def _answer(self, record: Received) -> None:
        try:
            await self._upstream.answer(record, self)
        except (ConnectionError, TimeoutError):
            self._connection.reset()
        except Exception:
            self._connection.reset()  # a script that can't be played: the client must not wait for it
            raise
        finally:
            if self._task is asyncio.current_task():
                self._task = self._record = None
        if not self._connection.transport.is_closing():
            self._advance()

    def lost(self) -> None:
        if self._record is not None:
            self._upstream.close(self._record, "aborted")
        if self._task is not None:
            self._task.cancel()

    async def head(self, status: int, headers: Headers) -> None:
        self._chunked = status != 204 and header(headers, "content-length") is None
        framing = [("transfer-encoding", "chunked")] if self._chunked else []
        await self._connection.write(render_head(f"HTTP/1.1 {status} Scripted", headers + framing))

    async def data(self, data: bytes) -> None:
        await self._connection.write(chunk(data) if self._chunked else data)

    async def end(self, trailers: Headers) -> None:
        if trailers:
            raise ValueError("trailers need HTTP/2")
        if self._chunked:
            await self._connection.write(chunk(b""))

    async def reset(self, *, as_not_begun: bool = False) -> None:
        self._connection.reset()

    async def close(self) -> None:
        self._connection.transport.close()


class H2:
    """HTTP/2 on one connection: many streams, one task per answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._upstream = connection.upstream
        self._streams: dict[int, H2Stream] = {}
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 10_000
        self.h2.initiate_connection()
        self._flush()

    def _flush(self) -> None:
        if not self._connection.transport.is_closing():
            self._connection.transport.write(self.h2.data_to_send())

    async def flush(self) -> None:
        await self._connection.write(self.h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            self._take(event)
        self._flush()

    def _take(self, event: h2.events.Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        match event:
            case h2.events.RequestReceived():
                self._streams[event.stream_id] = H2Stream(self, event.stream_id, event.headers)
            case h2.events.DataReceived():
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if stream:
                    stream.received(event.data)
            case h2.events.StreamEnded() if stream:
                stream.complete()
            case h2.events.StreamReset() if stream:
                self.forget(stream.id)
                stream.lost()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for waiting in self._streams.values():
                    waiting.window.set()
            case _:
                pass

    def lost(self) -> None:
        for stream in self._streams.values():
            stream.lost()
        self._streams.clear()

    def forget(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)

    def begin(self, headers: Headers) -> Received:
        pseudo = dict(headers)
        plain = [(name, value) for name, value in headers if not name.startswith(":") or name == ":authority"]
        return self._upstream.begin("h2", pseudo[":method"], pseudo[":path"], plain)

    async def answer(self, stream: H2Stream) -> None:
        try:
            await self._upstream.answer(stream.record, stream)
        except (ConnectionError, TimeoutError):
            if not self._connection.transport.is_closing():
                self.h2.reset_stream(stream.id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                self._flush()
        finally:
            self.forget(stream.id)

    def close_record(self, record: Received, how: str) -> None:
        self._upstream.close(record, how)

    def hang_up(self) -> None:
        self._connection.transport.close()


class H2Stream:
    """One HTTP/2 request and its answer."""

    def __init__(self, connection: H2, stream_id: int, headers: Any) -> None:
        self.id = stream_id
        self.window = asyncio.Event()
        self._connection = connection
        self._h2 = connection.h2
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._task: asyncio.Task[None] | None = None
        self._ended = False
        self.record = connection.begin([(str(name), str(value)) for name, value in headers])

    def received(self, data: bytes) -> None:
        self._sha1.update(data)
        self.record.body_bytes += len(data)

    def complete(self) -> None:
        self.record.body_sha1 = self._sha1.hexdigest()
        self.record.body_complete = True
        self._task = asyncio.get_running_loop().create_task(self._connection.answer(self))

    def lost(self) -> None:
        self._connection.close_record(self.record, "aborted")
        if self._task is not None:
            self._task.cancel()

    async def head(self, status: int, headers: Headers) -> None:
        self._ended = status == 204  # it has no body: its head is its end
        self._h2.send_headers(self.id, [(":status", str(status)), *headers], end_stream=self._ended)
        await self._connection.flush()

    async def data(self, data: bytes) -> None:
        while data:
            self.window.clear()
            room = min(self._h2.local_flow_control_window(self.id), self._h2.max_outbound_frame_size)
            if room <= 0:
                await self.window.wait()
                continue
            self._h2.send_data(self.id, data[:room])
            data = data[room:]
            await self._connection.flush()

    async def end(self, trailers: Headers) -> None:
        if self._ended:
            return
        if trailers:
            self._h2.send_headers(self.id, trailers, end_stream=True)
        else:
            self._h2.end_stream(self.id)
        await self._connection.flush()

    async def reset(self, *, as_not_begun: bool = False) -> None:
        codes = h2.errors.ErrorCodes
        self._h2.reset_stream(self.id, codes.REFUSED_STREAM if as_not_begun else codes.INTERNAL_ERROR)
        await self._connection.flush()

    async def close(self) -> None:
        self._connection.hang_up()
