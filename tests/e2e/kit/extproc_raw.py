"""A raw gRPC client of the ext_proc method: bytes out, bytes in, so that a test may send what Envoy never would."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import grpc

from .processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


class StreamEnd(Exception):  # noqa: N818 - the end is news, not always an error
    """The server ended the stream: its status code and details."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class RawChannel:
    """One connection to the server; closing it resets every stream that is open on it."""

    def __init__(self, target: str) -> None:
        # Its own connection: grpc would share one between channels to the same target.
        self._channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._streams: list[RawStream] = []

    def __enter__(self) -> RawChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, metadata: tuple[tuple[str, str], ...] = (), *, deadline_s: float = 2 * PATIENCE_S) -> RawStream:
        """Open a stream; nothing is sent on it yet but its headers."""
        stream = RawStream(self._channel, metadata, deadline_s)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        self._channel.close()
        for stream in self._streams:
            stream.join()


class RawStream:
    """One Process stream. Reads have a deadline; the end of the stream is the exception `StreamEnd`."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], deadline_s: float) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[bytes | StreamEnd] = queue.SimpleQueue()
        self.end: StreamEnd | None = None
        process = channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
        self._call = process(self._requests(), metadata=metadata, timeout=deadline_s)
        self._reader = threading.Thread(target=self._read, name="raw-stream", daemon=True)
        self._reader.start()

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self.join()

    def send(self, message: bytes) -> None:
        self._outgoing.put(message)

    def half_close(self) -> None:
        """Say that no more messages will come."""
        self._outgoing.put(None)

    def cancel(self) -> None:
        """Reset the stream."""
        self._call.cancel()
        self._outgoing.put(None)

    def read(self, timeout_s: float = PATIENCE_S) -> bytes:
        """The next message; StreamEnd when the server or `cancel` ended the stream; AssertionError when too late."""
        if self.end is not None:
            raise self.end
        try:
            item = self._incoming.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no message and no end within {timeout_s:g} s") from None
        if isinstance(item, StreamEnd):
            self.end = item
            raise item
        return item

    def silent(self, for_s: float) -> bool:
        """Whether neither a message nor the end comes for this long."""
        try:
            item = self._incoming.get(timeout=for_s)
        except queue.Empty:
            return True
        raise AssertionError(f"the stream was to stay silent, but there came {item!r}")

    def wait_end(self, timeout_s: float = PATIENCE_S) -> StreamEnd:
        """The end of the stream; AssertionError when a message comes first."""
        try:
            message = self.read(timeout_s)
        except StreamEnd as end:
            return end
        raise AssertionError(f"expected the end, got the message {message!r}")

    def join(self) -> None:
        self._reader.join(PATIENCE_S)

    def _requests(self) -> Iterator[bytes]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        try:
            for message in self._call:
                self._incoming.put(message)
        except grpc.RpcError:
            pass
        self._incoming.put(StreamEnd(self._call.code(), self._call.details() or ""))
