"""Clients on real sockets: raw HTTP/1.1 and HTTP/2 that can leave in every rude way, and many polite ones at once.

The raw clients are synchronous and do nothing behind the test's back: bytes are read only while the test reads. Every
read has a deadline (`timeout_s`, AssertionError after it).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import select
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

import aiohttp
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from .awake import awake
from .http1 import Body, Headers, header, parse_head, render_head
from .loops import cut
from .processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

COMPLETIONS = "/v1/chat/completions"

STALL_S = 2.0
"""Who takes no byte of an upload for so long takes none at all."""
_LOOK_S = 0.05
_RECEIVE_BYTES = 64 * 1024


def _connect(address: str, timeout_s: float, receive_buffer_bytes: int | None = None) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.socket()
    try:
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(timeout_s)
        connection.connect((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    return connection


def _reset(connection: socket.socket) -> None:
    """Close with a TCP RST."""
    if connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


class Answer:
    """What was read of an answer: as far as the test has asked for it. `complete`: it came whole."""

    def __init__(self, timeout_s: float) -> None:
        self.status = 0
        self.headers: Headers = []
        self.complete = False
        self._received = bytearray()
        self._timeout_s = timeout_s

    def read_chunk(self, timeout_s: float | None = None) -> bytes:
        """The next piece of the body; b"" at its end."""
        raise NotImplementedError

    def read_all(self, timeout_s: float | None = None) -> bytes:
        """Read to the end; the whole body, also what earlier reads returned."""
        deadline = self._deadline(timeout_s)
        while self.read_chunk(deadline - time.monotonic()):
            pass
        return self.received

    @property
    def received(self) -> bytes:
        """The payload that was read so far."""
        return bytes(self._received)

    def header(self, name: str) -> str | None:
        """A response header."""
        return header(self.headers, name)

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)


class H1Request(Answer):
    """One HTTP/1.1 request on its own connection.

    `complete` says that the whole answer was read; when the connection ended before that it stays False and `ended`
    names how: "fin" or "rst".
    """

    def __init__(
        self,
        address: str,
        path: str = COMPLETIONS,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        method: str = "POST",
        timeout_s: float = PATIENCE_S,
        receive_buffer_bytes: int | None = None,
    ) -> None:
        super().__init__(timeout_s)
        self.method = method
        self.path = path
        self.body = body
        self.ended = ""
        self._raw = b""
        self._decoder: Body | None = None
        given = list(headers)
        # Not twice: Envoy makes one value of both, and that is no type that anything reads.
        kind = [] if header(given, "content-type") is not None else [("content-type", "application/json")]
        self._request_headers: Headers = [("host", address), *kind, *given]
        self._socket = _connect(address, timeout_s, receive_buffer_bytes)

    def __enter__(self) -> H1Request:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # Sending

    def send(self) -> H1Request:
        """Send head and body."""
        self.send_head(len(self.body))
        self._socket.sendall(self.body)
        return self

    def send_head(self, body_bytes: int) -> H1Request:
        """Send the head alone, announcing a body of this size."""
        announced = [*self._request_headers, ("content-length", str(body_bytes))]
        self._socket.sendall(render_head(f"{self.method} {self.path} HTTP/1.1", announced))
        return self

    def upload(self, size_bytes: int) -> int:
        """Send up to `size_bytes` of body; stops when nobody takes bytes for `STALL_S`. Returns what was taken."""
        piece, sent = b"u" * _RECEIVE_BYTES, 0
        last = awake() + STALL_S
        while sent < size_bytes:
            came, room, _ = select.select([self._socket], [self._socket], [], _LOOK_S)
            if room:
                sent += self._socket.send(piece[: size_bytes - sent])
                last = awake() + STALL_S
            elif came or awake() > last:  # it is answered, or the connection has ended
                break
        return sent

    # Reading

    def read_head(self, timeout_s: float | None = None) -> int:
        """The status, once the head has come; 0 when the connection ended before it."""
        deadline = self._deadline(timeout_s)
        while not self.status and not self.ended:
            head, found, rest = self._raw.partition(b"\r\n\r\n")
            if found:
                first, headers = parse_head(head)
                status = int(first.split(" ")[1])
                self._raw = rest
                if status >= 200:
                    self.status, self.headers = status, headers
                    bodiless = status in (204, 304) or self.method == "HEAD"
                    self._decoder = Body([] if bodiless else headers, until_close=not bodiless)
                    self.complete = self._decoder.done
            elif not (data := self._receive(deadline, "response head")):
                break
            else:
                self._raw += data
        return self.status

    def read_chunk(self, timeout_s: float | None = None) -> bytes:
        """The next piece of the body as it comes; b"" at the end of the answer (or of the connection)."""
        deadline = self._deadline(timeout_s)
        if not self.read_head(deadline - time.monotonic()) or self._decoder is None:
            return b""
        while not self.complete and not self.ended:
            data, self._raw = self._raw, b""
            data = data or self._receive(deadline, "more of the body")
            payload = self._decoder.feed(data) if data else b""
            self.complete = self._decoder.done or self._ended_by_close()
            if payload:
                self._received += payload
                return payload
        return b""

    def _ended_by_close(self) -> bool:
        framed = self.header("content-length") is not None or self.header("transfer-encoding") is not None
        return self.ended == "fin" and not framed

    def _receive(self, deadline: float, what: str) -> bytes:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise AssertionError(f"no {what} in time; status {self.status}, {len(self._received)} bytes") from None
        except ConnectionError:
            self.ended = "rst"
            return b""
        finally:
            self._socket.settimeout(self._timeout_s)
        if not data:
            self.ended = "fin"
        return data

    # Leaving

    def fin(self) -> None:
        """Close: FIN (the kernel makes it a RST if unread bytes are left)."""
        self._socket.close()

    def half_close(self) -> None:
        """Close the writing side only; reading goes on."""
        self._socket.shutdown(socket.SHUT_WR)

    def rst(self) -> None:
        """Close with a TCP RST."""
        _reset(self._socket)


class H2Client:
    """One HTTP/2 connection (prior knowledge) with many streams. Bytes are read only while some stream is read."""

    def __init__(self, address: str, *, timeout_s: float = PATIENCE_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.closed = ""  # how the connection ended: "fin" or "rst"
        self._streams: dict[int, H2Stream] = {}
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._socket = _connect(address, timeout_s)
        self._flush()

    def __enter__(self) -> H2Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(
        self,
        path: str = COMPLETIONS,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        method: str = "POST",
        end: bool = True,
    ) -> H2Stream:
        """Open a stream: send its headers and body. `end=False` leaves our side open for `upload`."""
        stream_id = self._h2.get_next_available_stream_id()
        stream = self._streams[stream_id] = H2Stream(self, stream_id)
        fixed = [(":method", method), (":path", path), (":scheme", "http"), (":authority", self.address)]
        self._h2.send_headers(stream_id, [*fixed, *headers], end_stream=end and not body)
        self._flush()
        if body:
            stream.upload(len(body), body=body, end=end)
        return stream

    def pump(self, timeout_s: float) -> bool:
        """Read once and hand out what came; False when nothing came in time or the connection has ended."""
        if self.closed:
            return False
        self._socket.settimeout(max(0.001, timeout_s))
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            return False
        except ConnectionError:
            self.closed = "rst"
            return False
        finally:
            self._socket.settimeout(self.timeout_s)
        if not data:
            self.closed = "fin"
            return False
        for event in self._h2.receive_data(data):
            self._hand_out(event)
        self._flush()
        return True

    def grant(self, size_bytes: int) -> None:
        """Send a WINDOW_UPDATE for the connection: a frame that nobody answers."""
        self._h2.increment_flow_control_window(size_bytes)
        self._flush()

    def _hand_out(self, event: h2.events.Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if stream is None:
            return
        match event:
            case h2.events.ResponseReceived():
                headers = [(str(name), str(value)) for name, value in event.headers]
                stream.status = int(dict(headers)[":status"])
                stream.headers = [pair for pair in headers if not pair[0].startswith(":")]
            case h2.events.DataReceived():
                if event.data:
                    stream._chunks.append(bytes(event.data))
                if event.flow_controlled_length:
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                stream.trailers = [(str(name), str(value)) for name, value in event.headers]
            case h2.events.StreamEnded():
                stream.complete = True
            case h2.events.StreamReset():
                stream.reset_code = int(event.error_code)
            case _:
                pass

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and not self.closed:
            try:
                self._socket.sendall(data)
            except ConnectionError:
                self.closed = "rst"

    def fin(self) -> None:
        """Close the connection: FIN."""
        self._socket.close()

    def rst(self) -> None:
        """Close the connection with a TCP RST."""
        _reset(self._socket)


class H2Stream(Answer):
    """One request on an `H2Client`. `complete` = ended well; `reset_code` = of the peer's RST_STREAM, if one came."""

    def __init__(self, client: H2Client, stream_id: int) -> None:
        super().__init__(client.timeout_s)
        self.id = stream_id
        self.trailers: Headers = []
        self.reset_code: int | None = None
        self.client = client
        self._chunks: deque[bytes] = deque()

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.complete or self.reset_code is not None or bool(self.client.closed)

    def upload(self, size_bytes: int, *, body: bytes = b"", end: bool = True) -> int:
        """Send up to `size_bytes` of body (`body`, else filler) until no window comes for `STALL_S`; what was sent."""
        connection = self.client._h2
        sent, last = 0, awake() + STALL_S
        while sent < size_bytes and not self.over:
            window = min(connection.local_flow_control_window(self.id), connection.max_outbound_frame_size)
            if window <= 0:
                if not self.client.pump(_LOOK_S) and awake() > last:
                    break
                continue
            size = min(window, size_bytes - sent)
            data = body[sent : sent + size] if body else b"u" * size
            connection.send_data(self.id, data, end_stream=end and sent + size == size_bytes)
            sent += size
            self.client._flush()
            last = awake() + STALL_S
        return sent

    def read_head(self, timeout_s: float | None = None) -> int:
        """The status, once it has come; 0 when the stream or the connection ended before it."""
        self._pump_until(lambda: self.status or self.over, timeout_s, "response head")
        return self.status

    def read_chunk(self, timeout_s: float | None = None) -> bytes:
        """The next DATA frame's payload; b"" at the end of the stream."""
        self._pump_until(lambda: self._chunks or self.over, timeout_s, "more of the body")
        if self._chunks:
            piece = self._chunks.popleft()
            self._received += piece
            return piece
        return b""

    def rst(self, code: int = h2.errors.ErrorCodes.CANCEL) -> None:
        """Abort this stream alone: RST_STREAM."""
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self.client._h2.reset_stream(self.id, code)
        self.client._flush()

    def _pump_until(self, condition: Callable[[], object], timeout_s: float | None, what: str) -> None:
        deadline = self._deadline(timeout_s)
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"stream {self.id}: no {what} in time; status {self.status}")
            self.client.pump(left)


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """What one polite client saw. Times are seconds after `started_at` (`time.monotonic()`); None: never came."""

    number: int
    started_at: float
    status: int  # 0: no answer
    headers: dict[str, str]
    head_s: float | None
    first_chunk_s: float | None
    end_s: float
    body: bytes
    error: str  # "" when the answer came whole


MUCH_BYTES = 1 << 20
"""More in one write might stop aiohttp's loop, and it warns of that."""


async def complete(
    session: aiohttp.ClientSession, url: str, number: int, headers: Mapping[str, str], body: bytes
) -> Completion:
    """Send one completion and read its answer to the end. Never raises for what the network does."""
    status, answer_headers, chunks, error = 0, {}, [], ""
    head_s = first_chunk_s = None
    started_at = time.monotonic()
    data = io.BytesIO(body) if len(body) > MUCH_BYTES else body
    try:
        async with session.post(url, headers=headers, data=data) as answer:
            head_s = time.monotonic() - started_at
            status, answer_headers = answer.status, {name.lower(): value for name, value in answer.headers.items()}
            async for piece in answer.content.iter_any():
                if first_chunk_s is None:
                    first_chunk_s = time.monotonic() - started_at
                chunks.append(piece)
    except (aiohttp.ClientError, OSError, TimeoutError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    end_s = time.monotonic() - started_at
    return Completion(number, started_at, status, answer_headers, head_s, first_chunk_s, end_s, b"".join(chunks), error)


def complete_many(
    url: str,
    count: int,
    headers: Callable[[int], Mapping[str, str]],
    *,
    body: bytes = b"{}",
    gap_s: float = 0.0,
    timeout_s: float = 2 * PATIENCE_S,
) -> list[Completion]:
    """`count` completions at once, each on its own connection, in the order of their numbers.

    `headers(number)` gives the headers of each; they start `gap_s` apart. An answer that is not whole after `timeout_s`
    is an `error`, not an exception.
    """

    async def one(session: aiohttp.ClientSession, number: int) -> Completion:
        await asyncio.sleep(number * gap_s)
        return await complete(session, url, number, {"content-type": "application/json", **headers(number)}, body)

    async def all_of_them() -> list[Completion]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            answers = await asyncio.gather(*(one(session, number) for number in range(count)))
        await cut()
        return answers

    return asyncio.run(all_of_them())
