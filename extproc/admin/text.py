"""Values as JSON, a piece at a time: 500 endpoints are 300 kB, and to write those at once takes four milliseconds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp import web

    from extproc.turns import Turns

ROWS = 100
"""Of a list, written in one turn of the event loop."""
PIECE_BYTES = 128 * 1024
"""Sent in one turn: a megabyte at once takes one or two milliseconds."""


def pieces(values: Mapping[str, Any]) -> Iterator[bytes]:
    """Write an object; of each list in it ROWS at a time."""
    before = "{"
    for key, value in values.items():
        head, before = f"{before}{_json(key)}:", ","
        if isinstance(value, list) and len(value) > ROWS:
            head += "["
            for start in range(0, len(value), ROWS):
                yield f"{head}{_json(value[start : start + ROWS])[1:-1]}".encode()
                head = ","
            yield b"]"
        else:
            yield f"{head}{_json(value)}".encode()
    yield b"}" if values else b"{}"


async def send(response: web.StreamResponse, body: bytes, turns: Turns) -> None:
    """Send a page that may be long, each piece in a turn of its own."""
    for start in range(0, len(body), PIECE_BYTES):
        await turns.take()
        await response.write(body[start : start + PIECE_BYTES])


async def written(values: Mapping[str, Any], turns: Turns) -> bytes:
    """Return an object as JSON, each piece written in a turn of its own."""
    return b"".join([piece async for piece in turns.each(pieces(values))])


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
