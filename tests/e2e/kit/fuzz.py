"""Mutated messages from tests/corpus: the same seed gives the same messages, so that a failure can be repeated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = Path(__file__).parents[2] / "corpus" / "seeds"


def corpus() -> dict[str, bytes]:
    """The seeds by name."""
    return {path.stem: path.read_bytes() for path in sorted(SEEDS.glob("*.bin"))}


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


class Fuzzer:
    """Draws messages: valid ones, mutated ones, and mutations of mutations."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self._corpus = list(corpus().values())
        self._mutations: list[Callable[[bytes], bytes]] = [
            self._flip,
            self._truncate,
            self._splice,
            self._lie_about_a_length,
            self._change_a_wire_type,
            self._nest,
            self._huge_varint,
            self._repeat,
            self._insert,
        ]

    def message(self) -> bytes:
        """One message: a third are valid."""
        data = self.dice.choice(self._corpus)
        for _ in range(self.dice.choice((0, 1, 1, 2, 4))):
            data = self.dice.choice(self._mutations)(data)
        return data[: 1 << 20]

    def conversation(self) -> list[bytes]:
        """What one stream says: some messages, in any order, sometimes beginning like Envoy."""
        messages = [self.message() for _ in range(self.dice.randint(1, 4))]
        if self.dice.random() < 0.4:
            messages.insert(0, self._corpus[self.dice.randrange(len(self._corpus))])
        return messages

    def _at(self, data: bytes) -> int:
        return self.dice.randrange(len(data) + 1)

    def _flip(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self.dice.randint(1, 8)):
            if out:
                out[self.dice.randrange(len(out))] ^= 1 << self.dice.randrange(8)
        return bytes(out)

    def _truncate(self, data: bytes) -> bytes:
        return data[: self._at(data)]

    def _splice(self, data: bytes) -> bytes:
        other = self.dice.choice(self._corpus)
        return data[: self._at(data)] + other[self._at(other) :]

    def _lie_about_a_length(self, data: bytes) -> bytes:
        """Overwrite a byte, often a length, with a number that is too big, too small, or absurd."""
        at = self._at(data)
        lie = self.dice.choice((0, 1, len(data), len(data) * 2, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        return data[:at] + varint(lie) + data[at + 1 :]

    def _change_a_wire_type(self, data: bytes) -> bytes:
        at = self._at(data[:-1]) if data else 0
        return data[:at] + bytes([(data[at] & 0xF8) | self.dice.randrange(8)]) + data[at + 1 :] if data else b"\x07"

    def _nest(self, data: bytes) -> bytes:
        """Wrap it in itself, deeper than any parser's recursion limit."""
        field = self.dice.choice((2, 3, 8, 9, 1, 5, 1000))
        for _ in range(self.dice.choice((3, 90, 110, 400))):
            data = varint(field << 3 | 2) + varint(len(data)) + data
        return data

    def _huge_varint(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + b"\xff" * self.dice.randint(9, 12) + self.dice.choice((b"\x01", b"\x7f", b"")) + data[at:]

    def _repeat(self, data: bytes) -> bytes:
        return data * self.dice.choice((2, 3, 50))

    def _insert(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + self.dice.randbytes(self.dice.randint(1, 40)) + data[at:]
