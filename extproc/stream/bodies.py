"""Pieces of bodies, as bytes: taken out of their message, and sent on unchanged; no protobuf object is made of them.

A gateway in FULL_DUPLEX_STREAMED sends every piece of both bodies here, one for each token, and passes on only what it
gets back. `HttpBody`, in which a piece comes, and `StreamedBodyResponse`, in which it goes back, are the same on the
wire: a piece is wrapped anew, and never read.
"""

from __future__ import annotations

import json
from functools import lru_cache

from google.protobuf.message import DecodeError

from extproc._pb import ext_proc_pb2 as pb
from extproc.errors import ProtocolError

_LENGTH_DELIMITED = 2


def _tag(number: int) -> int:
    return number << 3 | _LENGTH_DELIMITED


REQUEST = _tag(pb.ProcessingRequest.REQUEST_BODY_FIELD_NUMBER)
RESPONSE = _tag(pb.ProcessingRequest.RESPONSE_BODY_FIELD_NUMBER)
"""How a message with a piece begins. Whoever writes fields in another order has it read as any other message."""
_BEGINNINGS = (bytes((REQUEST,)), bytes((RESPONSE,)))
_REPLIES = {
    REQUEST: _tag(pb.ProcessingResponse.REQUEST_BODY_FIELD_NUMBER),
    RESPONSE: _tag(pb.ProcessingResponse.RESPONSE_BODY_FIELD_NUMBER),
}
_AROUND = (
    _tag(pb.BodyMutation.STREAMED_RESPONSE_FIELD_NUMBER),
    _tag(pb.CommonResponse.BODY_MUTATION_FIELD_NUMBER),
    _tag(pb.BodyResponse.RESPONSE_FIELD_NUMBER),
)
"""What a piece is wrapped in on its way back, from the inside."""
_IS_LAST = bytes((pb.HttpBody.END_OF_STREAM_FIELD_NUMBER << 3, 1))


def has_piece(data: bytes) -> bool:
    """Tell whether a message is a piece of a body."""
    return data[:1] in _BEGINNINGS


def piece_of(data: bytes) -> bytes:
    """Return the `HttpBody` of a message that has a piece. Raises ProtocolError."""
    length, at = _varint(data, 1)
    if at + length > len(data):
        raise ProtocolError(f"not a ProcessingRequest: a body of {length} bytes in a message of {len(data)}")
    return data[at : at + length]


def is_last(piece: bytes) -> bool:
    """Tell whether the body ends with this piece. Raises ProtocolError."""
    rest = piece
    if piece[:1] == b"\x0a":
        length, at = _varint(piece, 1)
        rest = piece[at + length :]
    if not rest:
        return False
    if rest == _IS_LAST:
        return True
    try:
        return pb.HttpBody.FromString(piece).end_of_stream
    except DecodeError:
        raise ProtocolError(f"not an HttpBody: {len(piece)} bytes that don't parse") from None


def echo(kind: int, piece: bytes) -> bytes:
    """Return the answer that lets a piece of `kind` (REQUEST or RESPONSE) go on as it came."""
    return _head(kind, len(piece)) + piece


def text_of(piece: bytes, most: int | None = None) -> bytes:
    """Return the body's own bytes in a piece, the first `most` of them. Raises ProtocolError."""
    if piece[:1] != b"\x0a":
        return b""
    length, at = _varint(piece, 1)
    return piece[at : at + (length if most is None else min(length, most))]


@lru_cache(maxsize=4096)
def _head(kind: int, length: int) -> bytes:
    head = b""
    for tag in (*_AROUND, _REPLIES[kind]):
        head = bytes((tag,)) + _encoded(length + len(head)) + head
    return head


def _encoded(number: int) -> bytes:
    """Return `number` as a varint."""
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that stands at `at`, and where it ends. Raises ProtocolError."""
    number = shift = 0
    for end in range(at, min(at + 5, len(data))):
        byte = data[end]
        number |= (byte & 127) << shift
        if byte < 128:
            return number, end + 1
        shift += 7
    raise ProtocolError(f"not a ProcessingRequest: {len(data)} bytes that don't parse")


# ---- what a held request has sent


PIECE_BYTES = 48
"""What Python needs beside the bytes of each piece that is kept."""


class Allowance:
    """What all held requests together may keep of their bodies.

    Attributes:
        used_bytes: what they keep.
    """

    __slots__ = ("most_bytes", "used_bytes")

    def __init__(self, most_bytes: int) -> None:
        """Allow so much; it is passed by what was on its way."""
        self.most_bytes = most_bytes
        self.used_bytes = 0


class Kept:
    """The answers to what came of a request's body before its headers were answered: they go out after those.

    Attributes:
        is_whole: nothing more of the body comes.
    """

    __slots__ = ("_allowance", "_is_too_long", "_least_bytes", "_looked_bytes", "_most_bytes", "_replies",
                 "_size_bytes", "_text", "is_whole")  # fmt: skip

    def __init__(
        self, least_bytes: int, most_bytes: int, allowance: Allowance, *, text: bool, coming_bytes: int = 0
    ) -> None:
        """Take `most_bytes` or one piece more, and then ask that the rest be left where it is.

        While `allowance` is used up by all together, `least_bytes` are enough. `text`: the model is looked for.
        `coming_bytes`: the body's length if it is known; of one that is longer nothing is taken, since one piece of it
        may be as long as all that Envoy buffers (1 MiB).
        """
        self._is_too_long = coming_bytes > most_bytes
        self._least_bytes = least_bytes
        self._most_bytes = most_bytes
        self._allowance = allowance
        self._size_bytes = 0
        self._replies: list[bytes] = []
        self._text: bytearray | None = bytearray() if text else None  # the first bytes, while it is looked for
        self._looked_bytes = 0  # of the text, when it was last looked at
        self.is_whole = False

    @property
    def is_full(self) -> bool:
        """More may come, and shall wait."""
        is_spent = self._allowance.used_bytes >= self._allowance.most_bytes
        enough_bytes = self._least_bytes if is_spent else self._most_bytes
        return (self._is_too_long or self._size_bytes >= enough_bytes) and not self.is_whole

    @property
    def is_read(self) -> bool:
        """All of the body that is looked at for a model is here."""
        return self.is_whole or self._text is None or len(self._text) >= MODEL_WITHIN

    def add(self, piece: bytes, reply: bytes) -> None:
        """Keep what will answer a piece of the request's body."""
        self._keep(reply)
        self.is_whole = is_last(piece)
        if self._text is not None:
            self._text += text_of(piece)[: MODEL_WITHIN - len(self._text)]

    def end(self, reply: bytes) -> None:
        """Keep what will answer the request's trailers."""
        self._keep(reply)
        self.is_whole = True

    def _keep(self, reply: bytes) -> None:
        size_bytes = len(reply) + PIECE_BYTES
        self._replies.append(reply)
        self._size_bytes += size_bytes
        self._allowance.used_bytes += size_bytes

    def model(self) -> str | None:
        """Return the model that the body names, if it is seen yet.

        Looked for anew when the text is four times as long as at the last look: all looks together read less than one
        and a half times MODEL_WITHIN, in however small pieces a body comes.
        """
        text = self._text
        if text is None or not (self.is_read or len(text) >= 4 * self._looked_bytes):
            return None
        self._looked_bytes = len(text)
        return model_in(bytes(text))

    def look_no_more(self) -> None:
        """Drop the text: the model is known, or will not be."""
        self._text = None

    def take(self) -> list[bytes]:
        """Return all answers, in order, and keep none of them."""
        replies, self._replies = self._replies, []
        self._allowance.used_bytes -= self._size_bytes
        self._size_bytes = 0
        return replies


# ---- the model in a body

MODEL_WITHIN = 64 << 10
"""Bytes of a body in which its model is looked for."""
MOST_NAMED = 500
"""Strings `"model"` that are looked at: more of them before the one that counts are no request, and would take time."""


def model_in(text: bytes) -> str | None:
    """Return the top-level `"model"` of a JSON object that may be cut off; None: it is not there, or not yet.

    Not a parser: what is no JSON has a model, or none, and never an error. Whatever it is, 64 KiB take less than a
    millisecond: everything that has to be done for each byte or string is one call of bytes or list.
    """
    if b'"model"' not in text:
        return None
    plain = text.replace(rb"\\", b"__").replace(rb"\"", b"__")  # as long as before, and each quote left is a string's
    parts = plain.split(b'"')
    outside, strings = parts[::2], parts[1::2]
    depth = at = 0
    for _ in range(MOST_NAMED):
        try:
            key = strings.index(b"model", at)
        except ValueError:
            return None
        passed = b"".join(outside[at : key + 1])
        depth += passed.count(b"{") + passed.count(b"[") - passed.count(b"}") - passed.count(b"]")
        at = key + 1
        after = outside[at].strip() if at < len(outside) else b""
        if depth == 1 and after[:1] == b":":
            if after != b":" or at + 1 >= len(outside):  # no string, or it is cut off
                return None
            begins = len(b'"'.join(parts[: 2 * at + 1]))
            return _string(text[begins : begins + len(strings[at]) + 2])
    return None


def _string(token: bytes) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    # JSON can spell half of a surrogate pair: no UTF-8 can, so neither another sidecar nor a page could be told it.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
