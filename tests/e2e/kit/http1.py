"""HTTP/1.1 on the wire, as little as the kit needs: a message head, and a body decoded as its bytes come."""

from __future__ import annotations

MAX_HEAD_BYTES = 1 << 20

Headers = list[tuple[str, str]]


def parse_head(head: bytes) -> tuple[str, Headers]:
    """First line and headers (lower-case names, order kept) of a head without its final empty line."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = []
    for line in lines:
        name, _, value = line.partition(":")
        headers.append((name.strip().lower(), value.strip()))
    return first, headers


def render_head(first: str, headers: Headers) -> bytes:
    """The bytes of a head, its final empty line included. Values are written as they are: a test may want bad ones."""
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """One chunk of chunked transfer coding; the empty one ends the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def header(headers: Headers, name: str) -> str | None:
    """The first value of a header, by lower-case name."""
    return next((value for key, value in headers if key == name), None)


class Body:
    """Decodes one body: `feed` bytes, get payload; `done` says that it is whole, `rest` holds what came behind it."""

    def __init__(self, headers: Headers, *, until_close: bool = False) -> None:
        self.done = False
        self.rest = b""
        self._buffer = bytearray()
        self._chunked = "chunked" in (header(headers, "transfer-encoding") or "").lower()
        length = header(headers, "content-length")
        self._left: int | None = int(length) if length is not None else None if until_close else 0
        self._in_trailers = False
        if self._chunked:
            self._left = 0
        elif self._left == 0:
            self.done = True

    def feed(self, data: bytes) -> bytes:
        if self.done:
            self.rest += data
            return b""
        if self._chunked:
            self._buffer += data
            return self._feed_chunked()
        if self._left is None:
            return data
        payload, self.rest = data[: self._left], data[self._left :]
        self._left -= len(payload)
        self.done = self._left == 0
        return payload

    def _feed_chunked(self) -> bytes:
        payload = bytearray()
        buffer = self._buffer
        while not self.done:
            if self._left:
                # What is left of the chunk: its data and, as the last two bytes, the line end behind it.
                piece = bytes(buffer[: self._left])
                del buffer[: len(piece)]
                payload += piece[: max(0, self._left - 2)]
                self._left -= len(piece)
                if self._left:
                    break
                continue
            line_end = buffer.find(b"\r\n")
            if line_end < 0:
                break
            line = bytes(buffer[:line_end])
            del buffer[: line_end + 2]
            if self._in_trailers:
                self.done = not line
            elif (size := int(line.split(b";")[0], 16)) == 0:
                self._in_trailers = True
            else:
                self._left = size + 2
        if self.done:
            self.rest = bytes(buffer)
        return bytes(payload)
