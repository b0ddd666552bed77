"""The lines of a metrics page: which are wanted, and what a sample says. Bytes in; no I/O, never an exception.

They are found by one regular expression that begins with a newline, so that the search hops from line to line, and
read by a small exact reader. prometheus_client's parser needs 3.5 ms for a page of 314 lines and 0.15 ms for its seven
wanted ones (`python -m bench.scrape parse`). Its looseness would not help either: it takes 1_000 for a number and
raises bare ValueErrors.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.bounds import MOST_COUNTED, within

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.endpoints.telemetry.engines import Engine

MOST_LINE_BYTES = 16 * 1024

Pairs = tuple[tuple[str, str], ...]
Series = tuple[str, Pairs]
"""A sample's name and its labels, sorted."""


def number(text: str | bytes) -> float | None:
    """Return the number `text` says; None if it is none, or negative, or too big to be one."""
    text = text if isinstance(text, bytes) else text.encode()
    return within(float(text), MOST_COUNTED) if _NUMBER.fullmatch(text) else None


def number_behind(line: bytes, head: bytes) -> float | None:
    """Return the number that stands behind `head`, the name and labels of a line; None if this is another line.

    Also None where more than a number stands there, or one that isn't believed: `sample` tells.
    """
    text = line.removeprefix(head)
    return within(float(text), MOST_COUNTED) if _NUMBER.fullmatch(text) else None


def sample(line: bytes) -> tuple[bytes, Series, float | None] | None:
    """Read a sample line, which begins with the newline before it: what stands before its value, series and value.

    A value of None isn't believed; None: this is no sample.
    """
    if len(line) > MOST_LINE_BYTES:
        return None
    try:
        text = line.rstrip(b"\r").decode()
    except UnicodeDecodeError:
        return None
    match = _SAMPLE.fullmatch(text)
    if match is None:
        return None
    name, inside, value = match.groups()
    labels = _labels(inside) if inside else ()
    if labels is None:
        return None
    if _NUMBER.fullmatch(value.encode()) or value.lower() in _NO_NUMBER:
        return text[: match.start(3)].encode(), (name, labels), number(value)
    return None


class Newest:
    """The newest line that tells of adapters. The others are not read, and nothing that is wrong with one is an error.

    Each combination that ever ran is a line for ever: vLLM sets the time of the one that runs, and its client library
    removes none. They would outgrow any bound, and of a line nothing but its time tells whether it still holds.
    """

    __slots__ = ("_at", "_labels", "_line", "_marks", "names")

    def __init__(self, engines: tuple[Engine, ...], labels: Pairs) -> None:
        """Look for lines of `engines` that carry `labels`."""
        self.names = _adapter_names(engines)
        self._labels = labels
        self._marks = tuple(f'{name}="{_escaped(value)}"'.encode() for name, value in labels)
        self._at = -1.0
        self._line = b""

    def note(self, line: bytes) -> None:
        """Keep `line` if it is the newest so far, as far as a glance at it tells."""
        words = line[line.rfind(b"}") + 1 :].split(None, 1)
        at = number(words[0]) if words else None
        if at is not None and at >= self._at and all(mark in line for mark in self._marks):
            self._at, self._line = at, line

    def series(self) -> Series | None:
        """Return what it says; None: there is none, or it can't be read."""
        read = sample(self._line) if self._line else None
        return None if read is None or any(pair not in read[1][1] for pair in self._labels) else read[1]


@lru_cache(maxsize=32)
def _adapter_names(engines: tuple[Engine, ...]) -> tuple[bytes, ...]:
    return tuple(f"\n{metric.name}".encode() for engine in engines for metric in engine.adapters)


@lru_cache(maxsize=32)
def finder(engines: tuple[Engine, ...]) -> re.Pattern[bytes]:
    """Return what finds the lines of all metrics of `engines`, each with the newline before it."""
    names = frozenset().union(*(engine.metrics() for engine in engines))
    return re.compile(rf"\n{_any_of(names)}(?=[{{ \t])[^\n]*".encode())


def _any_of(names: Iterable[str]) -> str:
    """Return an expression for any of `names`, in which no character is looked at twice.

    What some begin with stands once: with most lines of a page one is done after a few characters.
    """
    endings: dict[str, list[str]] = {}
    for name in sorted(names):
        endings.setdefault(name[:1], []).append(name[1:])
    choices = [re.escape(first) + (_any_of(rest) if first else "") for first, rest in endings.items()]
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})" if choices else "(?!)"


# Possessive, so that no line makes the search go back: time is linear in the line's length.
_SAMPLE = re.compile(
    r'\n([a-zA-Z_:][a-zA-Z0-9_:]*+)[ \t]*+(?:\{((?:[^"{}]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"{}]*+)\}[ \t]*+|(?<=[ \t]))'
    r"([^ \t]++)[ \t]*+(?:[+-]?[0-9.]++[ \t]*+)?+(?:#.*+)?"
)
_LABEL = re.compile(r'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t]*+(?:,|\Z)')
_NUMBER = re.compile(rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+")
_NO_NUMBER = frozenset({"nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"})
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
_ESCAPE = re.compile(r"\\.")


def _labels(inside: str) -> Pairs | None:
    """Return what stands between the braces, sorted; None if that is no list of labels."""
    return _short_labels(inside) if len(inside) <= _SHORT else _any_labels(inside)


def _any_labels(inside: str) -> Pairs | None:
    labels: dict[str, str] = {}
    at, inside = 0, inside.strip(" \t")
    while at < len(inside):
        label = _LABEL.match(inside, at)
        if label is None or label[1] in labels:
            return None
        value = label[2]
        labels[label[1]] = _ESCAPE.sub(_unescape, value) if "\\" in value else value
        at = label.end()
    return tuple(sorted(labels.items()))


_SHORT = 2048
_short_labels = lru_cache(maxsize=1024)(_any_labels)
"""Many lines have the same labels, and from scrape to scrape. 1,024 of 2 KB are some megabytes at worst."""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[0], match[0])
