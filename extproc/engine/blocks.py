"""Blocks of the KV cache: owned by running sequences, shared as prefixes, free but still remembered, or free.

What is remembered goes when its blocks are needed, what nobody used for longest first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.engine.sequence import Sequence

Key = str | int | tuple[str]
"""Of what is remembered: a session, a preempted sequence by its number, a prefix as a tuple of its name."""


@dataclass(slots=True, eq=False)
class Prefix:
    """A prefix in use: its blocks are owned once, by all its users together."""

    blocks: int  # owned
    computed: int  # of these, the ones that others may use
    users: int = 0
    filler: Sequence | None = None  # who computes the rest


class Blocks:
    """All blocks of one engine.

    Attributes:
        used: blocks that running sequences own.
        cached: blocks that are free but still hold something.
        entries: these, by what they hold.
        prefixes: those that running sequences use.
    """

    __slots__ = ("_most", "_size", "cached", "entries", "prefixes", "used")

    def __init__(self, most: int, size: int) -> None:
        """Have `most` blocks of `size` tokens."""
        self._most = most
        self._size = size
        self.used = 0
        self.cached = 0
        self.entries: OrderedDict[Key, int] = OrderedDict()
        self.prefixes: dict[str, Prefix] = {}

    def sharable(self, seq: Sequence) -> int:
        """Return how many blocks of its prefix are owned already, so that it needs no own ones."""
        prefix = self.prefixes.get(seq.prefix) if seq.prefix is not None else None
        return 0 if prefix is None else min(prefix.computed, seq.prefix_blocks)

    def join(self, seq: Sequence, name: str) -> int:
        """Let `seq` use its prefix, and compute what is missing if nobody does; return the blocks that it finds."""
        prefix = self.prefixes.get(name)
        if prefix is None:
            held = self.forget((name,))
            held = min(held, seq.prefix_blocks)  # a longer one would own blocks that nobody uses, and may need
            self.used += held
            prefix = self.prefixes[name] = Prefix(held, held)
        found = min(prefix.computed, seq.prefix_blocks)
        prefix.users += 1
        seq.shared = found
        if prefix.filler is None and found < seq.prefix_blocks:
            prefix.filler = seq
            self.take(seq.prefix_blocks - prefix.blocks)
            prefix.blocks = seq.shared = seq.prefix_blocks
        return found

    def fill(self, seq: Sequence, name: str) -> None:
        """Note how far the one that computes a prefix is."""
        prefix = self.prefixes[name]
        if prefix.filler is seq:
            prefix.computed = min((seq.length - seq.left) // self._size, prefix.blocks)
            if prefix.computed == prefix.blocks:
                prefix.filler = None

    def leave(self, seq: Sequence, name: str) -> None:
        """End the use of a prefix: with its last user it becomes a free one that is remembered."""
        prefix = self.prefixes[name]
        prefix.users -= 1
        seq.shared = 0
        if prefix.filler is seq:
            prefix.filler = None
            self.used -= prefix.blocks - prefix.computed
            prefix.blocks = prefix.computed
        if not prefix.users:
            del self.prefixes[name]
            self.used -= prefix.blocks
            self.remember((name,), prefix.blocks)

    def forget(self, key: Key) -> int:
        """Drop what is remembered under `key`; return how many blocks that was."""
        blocks = self.entries.pop(key, 0)
        self.cached -= blocks
        return blocks

    def give(self, blocks: int) -> None:
        """Own `blocks` less."""
        self.used -= blocks

    def remember(self, key: Key, blocks: int) -> None:
        """Keep free blocks with what they hold, so far as they are more than is remembered already."""
        old = self.entries.pop(key, 0)
        kept = max(old, blocks)
        if kept:
            self.entries[key] = kept
            self.cached += kept - old

    def take(self, blocks: int) -> None:
        """Own `blocks` more, at the cost of the prefixes that nobody used for longest. There must be room."""
        self.used += blocks
        excess = self.used + self.cached - self._most
        while excess > 0:
            key, held = next(iter(self.entries.items()))
            lost = min(held, excess)
            if lost == held:
                del self.entries[key]
            else:
                self.entries[key] = held - lost
            self.cached -= lost
            excess -= lost
