"""Streams between sidecars: TCP or mutual TLS on asyncio, frames of batched messages; what one turn of the loop has to
say goes out as one frame.

Plain asyncio and not gRPC: it costs half the CPU per message, and grpc.aio would share the process with the server that
drives gRPC's core by itself (docs/adr/0007).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, cast

from extproc.config import split_address
from extproc.errors import ProtocolError, StartError
from extproc.replicas.log import SidecarLog, log
from extproc.replicas.wire import LENGTH_BYTES, MOST_BYTES, frames, read

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from extproc.replicas.door import Door, Guest
    from extproc.replicas.messages import Message

Log = logging.Logger | SidecarLog

MOST_UNSENT_BYTES = 64 << 20
"""Who takes in nothing while so much waits for him is cut off; 10,000 waiting requests are about 2 MiB."""
MOST_GUESTS = 200
HELLO_S = 5.0
"""How long somebody who connected may take to say hello."""


class TcpLink(asyncio.Protocol):
    """One side of a stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop, written: Log, peer: str = "") -> None:
        """Wait for a connection, which leads to `peer`; what is sent before is sent then."""
        self._log = written
        self._peer = peer
        self.receive: Callable[[Message], None] = lambda _: None
        self.closed: Callable[[], None] = lambda: None
        self.bounced: Callable[[Message], None] = lambda _: None
        self._has_bounced = False
        self.spoke = False  # a message came
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._unsent: list[Message] = []
        self._flushing = False
        self._buffer = bytearray()
        self._is_over = False

    # ---- as the replica has it

    def send(self, message: Message) -> None:
        """Send with what else this turn of the loop sends."""
        if self._is_over:
            return
        self._unsent.append(message)
        if not self._flushing and self._transport is not None:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send what is to be sent, then end."""
        if not self._is_over:
            self._flush()
            self._is_over = True
            if self._transport is not None:
                self._transport.close()

    # ---- as asyncio has it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        if not self._peer:
            host, port = (transport.get_extra_info("peername") or ("?", "?"))[:2]
            self._peer = f"a guest from {host}:{port}"
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one, but does not say so
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._is_over:
            self._transport.abort()
        else:
            self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what came; nonsense ends the stream."""
        self._buffer += data
        try:
            while not self._is_over and (frame := self._next_frame()) is not None:
                for message in read(frame):
                    self.spoke = True
                    self.receive(message)
        except ProtocolError as error:
            self._log.warning("the stream with %s ends: %s", self._peer, error)
            self._abort()

    def _next_frame(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(buffer[:LENGTH_BYTES])
        if end > LENGTH_BYTES + MOST_BYTES:
            raise ProtocolError(f"a frame of {end - LENGTH_BYTES} bytes; at most {MOST_BYTES} are allowed")
        if len(buffer) < end:
            return None
        frame = bytes(buffer[LENGTH_BYTES:end])
        del buffer[:end]
        return frame

    def eof_received(self) -> bool:
        """End with the other side."""
        return False

    def connection_lost(self, _: Exception | None) -> None:
        """Tell that the stream is over, unless we ended it."""
        if not self._is_over:
            self._is_over = True
            self.closed()

    # ----

    def _flush(self) -> None:
        self._flushing = False
        transport = self._transport
        if self._is_over or transport is None or not self._unsent:
            return
        unsent, self._unsent = self._unsent, []
        bounced: list[tuple[Message, str]] = []
        transport.write(frames(unsent, lambda message, why: bounced.append((message, why))))
        for message, why in bounced:
            self._bounce(message, why)
        if transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
            self._log.warning("the stream with %s ends: %d bytes wait there to be read", self._peer, MOST_UNSENT_BYTES)
            self._abort()

    def _bounce(self, message: Message, why: str) -> None:
        """Give back what can't be sent; the rest must not suffer."""
        if not self._has_bounced:
            self._has_bounced = True
            self._log.error("a message to %s (%s) can't be sent: %s", self._peer, type(message).__name__, why)
        self.bounced(message)

    def _abort(self) -> None:
        """End at once; the replica hears of it."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self) -> None:
        """Tell that there will be no connection."""
        self.connection_lost(None)


class TcpNetwork:
    """How this sidecar reaches others, and is reached."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        written: Log = log,
        *,
        client_tls: Callable[[], ssl.SSLContext] | None = None,
        server_tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        """Use mutual TLS if there are contexts; others must show a certificate for `server_name`.

        `written`: the log, as who we are.
        """
        self._loop = loop
        self._log = written
        self._client_tls = client_tls
        self._server_tls = server_tls
        self._server_name = server_name
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._guests: set[TcpLink] = set()

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> TcpLink:
        """Open a stream to `address`."""
        link = TcpLink(self._loop, self._log, f"the sidecar at {address}")
        link.receive, link.closed = receive, closed
        task = self._loop.create_task(self._connect(link, address), name=f"to sidecar {address}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return link

    async def _connect(self, link: TcpLink, address: str) -> None:
        try:
            host, port = split_address(address)
            tls = self._client_tls() if self._client_tls is not None else None
            name = self._server_name if tls is not None else None
            async with asyncio.timeout(HELLO_S):
                await self._loop.create_connection(lambda: link, host, port, ssl=tls, server_hostname=name)
        except (OSError, ValueError, TimeoutError) as error:
            self._log.debug("no stream to the sidecar at %s: %s", address, error)
            link.fail()

    async def listen(self, address: str, door: Door) -> None:
        """Have others reach `door` at `address`. Raises StartError."""
        host, port = split_address(address)
        try:
            self._server = await self._loop.create_server(
                lambda: self._guest(door), host, port, ssl=self._server_tls, reuse_address=True
            )
        except OSError as error:
            raise StartError(f"replicas.listen: can't listen at {address}: {error.strerror}") from None

    def _guest(self, door: Door) -> TcpLink:
        name = self._server_name if self._server_tls else None
        link = _Accepted(self._loop, self._log, door, self._guests, name)
        self._loop.call_later(HELLO_S, link.hurry)
        return link

    async def close(self) -> None:
        """Give up the port, and connections that are being made."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in list(self._guests):
            guest.close()


class _Accepted(TcpLink):
    """A stream that somebody opened to us."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, written: Log, door: Door, guests: set[TcpLink], name: str | None
    ) -> None:
        super().__init__(loop, written)
        self._door = door
        self._guests = guests
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._guests) >= MOST_GUESTS or not self._is_one_of_us(transport):
            self._is_over = True
        else:
            guest: Guest = self._door.accept(self)
            self.receive, self.closed = guest.receive, guest.closed
            self._guests.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._guests.discard(self)
        super().connection_lost(error)

    def _is_one_of_us(self, transport: asyncio.BaseTransport) -> bool:
        """Tell whether a certificate for our common name was shown: the CA may have signed that of Envoy, too."""
        if self._name is None:
            return True
        shown = transport.get_extra_info("peercert") or {}
        names = [value for kind, value in shown.get("subjectAltName", ()) if kind == "DNS"]
        if self._name not in names:
            self._log.warning("%s is refused: its certificate is for %s, not for %s", self._peer, names, self._name)
        return self._name in names

    def hurry(self) -> None:
        """End if no hello came in time."""
        if not self.spoke:
            self._abort()
