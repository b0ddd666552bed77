"""Reads metrics pages: bytes in, `Readings` or one `Reason` out, never an exception. No I/O.

Only the wanted lines are looked at (lines.py), and what they mean (layout.py) is found out once for all pages of an
endpoint that have the same: an engine writes the same lines in the same order each time, and only numbers change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.layout import Layout, Values, layout_of
from extproc.endpoints.telemetry.lines import Newest, Pairs, Series, finder, number_behind, sample
from extproc.endpoints.telemetry.readings import Readings, Reason

if TYPE_CHECKING:
    from collections.abc import Generator

    from extproc.endpoints.telemetry.engines import Engine

MOST_BYTES = 1024 * 1024
MOST_SERIES = 1024
"""Wanted lines, but those of adapters. 64 data parallel engines need some 500; above it is not one endpoint's."""
MOST_WANTED_BYTES = 128 * 1024
"""All wanted lines together; vLLM's cache_config_info has 1.3 KB for each data parallel engine."""
SEARCH_BYTES = 256 * 1024
"""Searched for wanted lines between two turns of the loop: two milliseconds if it is all newlines."""
SLICE_BYTES = 16 * 1024
"""Wanted lines read between two turns of the loop: about a millisecond at worst. Of pages with more none are kept."""


_Line = tuple[bytes, Series]
"""What stands before a line's number, in its very bytes, and the series that this says."""


@dataclass(slots=True)
class _Page:
    """The wanted lines of one page, as far as it is read, and their values."""

    newest: Newest
    lines: list[_Line] = field(default_factory=list)
    values: Values = field(default_factory=list)
    is_large: bool = False

    def read(self, line: bytes, before: _Line | None) -> bool:
        """Read a line; False if it is no sample. If it begins as the one `before`, it is read by its number alone."""
        value = None if before is None else number_behind(line, before[0])
        if before is None or value is None:
            read = sample(line)
            if read is None:
                return False
            before, value = read[:2], read[2]
        self.lines.append(before)
        self.values.append(value)
        return True


class Reader:
    """Reads the pages of one endpoint, one after the other."""

    __slots__ = ("_engines", "_labels", "_layout", "_lines", "_newest", "_own")

    def __init__(self, engines: tuple[Engine, ...], labels: Pairs = (), own: frozenset[str] = frozenset()) -> None:
        """Look for `engines`; only series that carry `labels` count.

        Of several engines on one page it is the one whose lines name the endpoint: a label's value is in `own`.
        """
        self._engines = engines
        self._labels = labels
        self._own = own
        self._lines: list[_Line] = []  # of the page before
        self._newest: str | None = None  # what told of adapters there
        self._layout: Layout | None = None  # what these mean

    def read(self, body: bytes) -> Generator[None, None, Readings | Reason]:
        """Return what a page says of its engine's load, and yield wherever a loop may turn.

        An engine's own page is read in one go.
        """
        if len(body) > MOST_BYTES:
            return Reason.TOO_BIG
        page = _Page(Newest(self._engines, self._labels))
        problem = yield from self._collect(b"\n" + body, page)
        if problem is not None:
            return problem
        adapters = page.newest.series()
        layout = self._layout_of(page, adapters)
        if isinstance(layout, Reason):
            return layout
        if page.is_large:
            yield
        return layout.readings(page.values, adapters)

    def _collect(self, text: bytes, page: _Page) -> Generator[None, None, Reason | None]:
        """Read all wanted lines of `text`, which begins with a newline, into `page`."""
        find, newest, known = finder(self._engines).findall, page.newest, self._lines
        size_bytes = slice_bytes = start = place = 0
        while start < len(text):
            end = text.find(b"\n", start + SEARCH_BYTES)
            end = len(text) if end < 0 else end
            for line in find(text, start, end):
                line_bytes = len(line)
                slice_bytes += line_bytes
                if slice_bytes > SLICE_BYTES:
                    slice_bytes, page.is_large = 0, True
                    yield
                if line.startswith(newest.names):
                    newest.note(line)
                    continue
                size_bytes += line_bytes
                if place == MOST_SERIES:
                    return Reason.TOO_MANY_SERIES
                if size_bytes > MOST_WANTED_BYTES:
                    return Reason.TOO_BIG
                if not page.read(line, known[place] if place < len(known) else None):
                    return Reason.MALFORMED
                place += 1
            start = end
            if start < len(text):
                yield
        return None

    def _layout_of(self, page: _Page, adapters: Series | None) -> Layout | Reason:
        """Return what lines mean: what those of the page before did, if they are the same."""
        newest = None if adapters is None else adapters[0]
        if self._layout is not None and page.lines == self._lines and newest == self._newest:
            return self._layout
        layout = layout_of([series for _, series in page.lines], newest, self._engines, self._labels, self._own)
        if isinstance(layout, Layout) and not page.is_large:
            self._lines, self._newest, self._layout = page.lines, newest, layout
        return layout


def read_page(
    body: bytes, engines: tuple[Engine, ...], labels: Pairs = (), own: frozenset[str] = frozenset()
) -> Readings | Reason:
    """Read one page, in one go. The parameters are a `Reader`'s."""
    steps = Reader(engines, labels, own).read(body)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Readings | Reason = end.value
            return result
