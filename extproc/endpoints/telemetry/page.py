"""Reads a metrics page: bytes in, `Readings` or one `Reason` out, never an exception. No I/O.

Only the wanted lines are looked at. They are found by one regular expression that begins with a newline, so that the
search hops from line to line, and read by a small exact reader of sample lines. prometheus_client's parser needs 3.5 ms
for a 314-line page and 0.15 ms for its seven wanted lines; this needs 0.05 ms (`python -m bench.scrape parse`). Its
looseness would not help either: it takes 1_000 for a number and raises bare ValueErrors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.bounds import MOST_COUNTED, MOST_REQUESTS, MOST_TOKENS, share, whole, within

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from extproc.endpoints.telemetry.engines import Engine, Metric, Names

MOST_BYTES = 1024 * 1024
MOST_SERIES = 1024
"""Wanted lines, but those of adapters. 64 data parallel engines need some 500; above it is not one endpoint's."""
MOST_LINE_BYTES = 16 * 1024
MOST_WANTED_BYTES = 128 * 1024
"""All wanted lines together; vLLM's cache_config_info has 1.3 KB for each data parallel engine."""
MOST_ADAPTERS = 64
"""LoRA adapters that a page is heard of; each occupies memory of the GPU."""
SEARCH_BYTES = 256 * 1024
"""Searched for wanted lines between two turns of the loop: two milliseconds if it is all newlines."""
SLICE_BYTES = 16 * 1024
"""Wanted lines read between two turns of the loop: about a millisecond at worst."""


class Reason(StrEnum):
    """Why a scrape told nothing: the `reason` label of extproc_scrape_errors_total."""

    CONNECT = "connect"  # no connection: refused, unreachable, name unknown, TLS
    TIMEOUT = "timeout"  # not whole within scrape_timeout
    PROTOCOL = "protocol"  # broken HTTP, or cut off
    STATUS = "status"  # neither 200 nor a redirect
    REDIRECT = "redirect"  # to another server, or too many
    CREDENTIALS = "credentials"  # metrics_token_file or metrics_ca_file can't be read
    ENCODING = "encoding"  # compressed, though we ask for plain text
    TOO_BIG = "too_big"  # above MOST_BYTES, or its wanted lines above MOST_WANTED_BYTES
    TOO_MANY_SERIES = "too_many_series"
    NO_METRICS = "no_metrics"  # no metric of the engine: HTML, another engine, binary
    SEVERAL_ENGINES = "several_engines"  # lines of two engines, and nothing says whose the endpoint is: set `engine`
    MALFORMED = "malformed"  # a wanted line is no sample
    ORCA = "orca"  # no page: a load report in an answer's header that can't be read, or tells nothing we know
    INTERNAL = "internal"  # a bug of ours; the log has the traceback


Pairs = tuple[tuple[str, str], ...]
Series = tuple[str, Pairs]
"""A sample's name and its labels, sorted."""
Counter = dict[Series, float]
"""A counter's series; told apart, because one that was reset must not hide behind the others."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What one page says. None is unknown; so is a counter that is None."""

    engine: str
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    gpu_usage: float | None = None
    kv_capacity_tokens: int | None = None
    tokens_per_s: float | None = None
    max_running: int | None = None
    context_tokens: int | None = None
    asleep: bool | None = None
    adapters: tuple[str, ...] | None = None
    waiting_adapters: tuple[str, ...] | None = None
    adapter_slots: int | None = None
    preemptions: Counter | None = None
    prompt_tokens: Counter | None = None
    cached_tokens: Counter | None = None
    first_tokens: Counter | None = None
    output_tokens: Counter | None = None
    decoded_tokens: Counter | None = None


@dataclass(slots=True)
class _Page:
    """Samples by name; of an identical series the last one."""

    samples: dict[str, dict[Series, float | None]] = field(default_factory=dict)
    is_large: bool = False

    def add(self, sample: tuple[Series, float | None], labels: Pairs) -> None:
        """Keep a sample, if it carries `labels`."""
        series, value = sample
        if all(pair in series[1] for pair in labels):
            self.samples.setdefault(series[0], {})[series] = value

    def series(self, metric: Metric) -> dict[Series, float | None] | None:
        """Return what `metric` says: value by series, None for a value that isn't believed; None: not on the page.

        The labels that select a metric or hold its value are left out of the keys, so that two metrics of one
        product meet in the same series.
        """
        there = self.samples.get(metric.name)
        if there is None:
            return None
        found: dict[Series, float | None] = {}
        for (_, labels), value in there.items():
            if metric.labels and not _carries(labels, metric.labels):
                continue
            if metric.in_label is None:
                seen = None if value is None else value * metric.scale
                chosen = {name for name, _ in metric.labels}
                rest = tuple(pair for pair in labels if pair[0] not in chosen) if chosen else labels
            else:
                told = dict(labels).get(metric.in_label)
                if told is None:
                    continue
                seen = _number(told) if _NUMBER.fullmatch(told) else None
                rest = labels
            found[metric.name, rest] = seen
        return found or None

    def first(self, names: Names, engine: Engine) -> dict[Series, float | None] | None:
        """Return the first of the alternatives that is on the page, each scheduler of `engine` once."""
        for metric in names:
            found = self.series(metric)
            if found is not None:
                return _once(found, engine)
        return None

    def total(self, names: Names, engine: Engine, more: tuple[Names, ...] = ()) -> float | None:
        """Return the number of requests over all series, with those of `more` added; unknown if one is."""
        found = self.first(names, engine)
        if found is None:
            return None
        added = [value for extra in more for value in (self.first(extra, engine) or {}).values()]
        values = _known((*found.values(), *added), MOST_REQUESTS)
        return within(sum(values), MOST_REQUESTS) if values else None

    def rate(self, names: Names, engine: Engine) -> float | None:
        """Return the sum of a gauge of tokens per second; unknown if one is."""
        values = _known((self.first(names, engine) or {}).values(), MOST_TOKENS)
        return within(sum(values), MOST_TOKENS) if values else None

    def adapters(self, names: Names) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, int | None]:
        """Return the adapters that run, those that wait, and how many fit; the newest of their lines is here.

        None: nothing is told.
        """
        lines = [dict(labels) for metric in names for _, labels in self.series(metric) or ()]
        if not lines:
            return None, None, None
        told = lines[0]
        slots = told.get("max_lora", "")
        most = whole(_number(slots) if _NUMBER.fullmatch(slots) else None, MOST_ADAPTERS)
        waiting = told.get("waiting_lora_adapters")
        return _listed(told.get("running_lora_adapters", "")), None if waiting is None else _listed(waiting), most

    def shares(self, names: Names, engine: Engine) -> list[float]:
        """Return the shares of all series; none if one is unknown."""
        shares = [share(value) for value in (self.first(names, engine) or {}).values()]
        known = [value for value in shares if value is not None]
        return known if len(known) == len(shares) else []

    def greatest(self, names: Names, engine: Engine) -> int | None:
        """Return the greatest size over all series; unknown if one is."""
        values = _known((self.first(names, engine) or {}).values(), MOST_TOKENS)
        return whole(max(values, default=None), MOST_TOKENS)

    def counter(self, names: Names, engine: Engine) -> Counter | None:
        """Return a counter's series; unknown if one is."""
        found = self.first(names, engine)
        if found is None:
            return None
        known = {series: value for series, value in found.items() if within(value, MOST_COUNTED) is not None}
        return {series: value for series, value in known.items() if value is not None} if known == found else None

    def size(self, alternatives: tuple[Names, ...], engine: Engine) -> int | None:
        """Return the KV cache's size: of the first alternative that gives one."""
        for factors in alternatives:
            product: dict[tuple[tuple[str, str], ...], float] | None = None
            for metric in factors:
                found = {series[1]: value for series, value in (self.first((metric,), engine) or {}).items()}
                known = {labels: value for labels, value in found.items() if value is not None and value > 0}
                if not known or len(known) < len(found) or (product is not None and product.keys() != known.keys()):
                    break
                product = {labels: value * (product or {}).get(labels, 1.0) for labels, value in known.items()}
            else:
                size = whole(sum((product or {}).values()), MOST_TOKENS)
                if size is not None:
                    return size
        return None


def read_page(
    body: bytes, engines: tuple[Engine, ...], labels: Pairs = (), own: frozenset[str] = frozenset()
) -> Readings | Reason:
    """Read what the page says of its engine's load; only series that carry `labels` count.

    Of several engines on one page it is the one whose lines name the endpoint: a label's value is in `own`.
    """
    steps = read_in_slices(body, engines, labels, own)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Readings | Reason = end.value
            return result


def read_in_slices(
    body: bytes, engines: tuple[Engine, ...], labels: Pairs = (), own: frozenset[str] = frozenset()
) -> Generator[None, None, Readings | Reason]:
    """Do what `read_page` does, and yield wherever a loop may turn. An engine's own page is read in one go."""
    if len(body) > MOST_BYTES:
        return Reason.TOO_BIG
    page = yield from _collect(b"\n" + body, engines, labels)
    if isinstance(page, Reason):
        return page
    engine = _engine_of(page, engines, own)
    if isinstance(engine, Reason):
        return engine
    kv_capacity_tokens = page.size(engine.kv_capacity, engine)
    if page.is_large:
        yield
    adapters, waiting_adapters, adapter_slots = page.adapters(engine.adapters)
    gpu_shares, awake = page.shares(engine.gpu_usage, engine), page.shares(engine.awake, engine)
    return Readings(
        engine=engine.name,
        running=page.total(engine.running, engine, engine.also_running),
        waiting=page.total(engine.waiting, engine, engine.also_waiting),
        kv_usage=max(page.shares(engine.kv_usage, engine), default=None),
        gpu_usage=sum(gpu_shares) / len(gpu_shares) if gpu_shares else None,
        kv_capacity_tokens=kv_capacity_tokens,
        tokens_per_s=page.rate(engine.tokens_per_s, engine),
        max_running=whole(page.total(engine.max_running, engine), MOST_REQUESTS),
        context_tokens=page.greatest(engine.context_tokens, engine),
        asleep=min(awake) < 1.0 if awake else None,
        adapters=adapters,
        waiting_adapters=waiting_adapters,
        adapter_slots=adapter_slots,
        preemptions=page.counter(engine.preemptions, engine),
        prompt_tokens=page.counter(engine.prompt_tokens, engine),
        cached_tokens=page.counter(engine.cached_tokens, engine),
        first_tokens=page.counter(engine.first_tokens, engine),
        output_tokens=page.counter(engine.output_tokens, engine),
        decoded_tokens=page.counter(engine.decoded_tokens, engine),
    )


def _listed(names: str) -> tuple[str, ...]:
    return tuple(sorted({name for part in names.split(",") if (name := part.strip())}))[:MOST_ADAPTERS]


def _engine_of(page: _Page, engines: tuple[Engine, ...], own: frozenset[str]) -> Engine | Reason:
    """Return whose page it is: of several engines the only one with a load, else the only one that names us."""
    there = [engine for engine in engines if not _names(engine).isdisjoint(page.samples)]
    if len(there) > 1:
        there = [engine for engine in there if not engine.loads().isdisjoint(page.samples)] or there
    if len(there) > 1:
        there = [engine for engine in there if _names_us(page, engine, own)] or there
    if not there:
        return Reason.NO_METRICS
    return there[0] if len(there) == 1 else Reason.SEVERAL_ENGINES


def _names_us(page: _Page, engine: Engine, own: frozenset[str]) -> bool:
    lines = (series for name in engine.loads() for series in page.samples.get(name, ()))
    return any(value in own for _, labels in lines for _, value in labels)


def _carries(labels: Pairs, wanted: tuple[tuple[str, tuple[str, ...]], ...]) -> bool:
    there = dict(labels)
    return all(there.get(name) in values for name, values in wanted)


def _once(found: dict[Series, float | None], engine: Engine) -> dict[Series, float | None]:
    """Return the series with each scheduler once: totals without their parts, and one view of several ranks'.

    Of several views the greatest counts, and an unknown one makes it unknown.
    """
    if engine.totals:
        found = _totals(found, engine.totals)
    if len(found) == 1:
        return found
    views: dict[Series, list[float | None]] = {}
    for (name, labels), value in found.items():
        kept = tuple(pair for pair in labels if not pair[0].endswith("_rank") or pair[0] in engine.ranks)
        views.setdefault((name, kept), []).append(value)
    if len(views) == len(found):
        return found
    return {
        series: max(known) if len(known := [one for one in values if one is not None]) == len(values) else None
        for series, values in views.items()
    }


def _totals(found: dict[Series, float | None], splits: tuple[str, ...]) -> dict[Series, float | None]:
    """Leave out the parts of each total that is there too."""
    totals = {series: value for series, value in found.items() if not any(k in splits and v for k, v in series[1])}
    if not totals or len(totals) == len(found):
        return found
    bare = {tuple(pair for pair in labels if pair[0] not in splits) for _, labels in totals}
    rest = {
        series: value
        for series, value in found.items()
        if series not in totals and tuple(pair for pair in series[1] if pair[0] not in splits) not in bare
    }
    return totals | rest


def _collect(text: bytes, engines: tuple[Engine, ...], labels: Pairs) -> Generator[None, None, _Page | Reason]:
    """Read all wanted lines of `text`, which begins with a newline."""
    page, finder, adapters = _Page(), _finder(engines), _Newest(engines, labels)
    count = size_bytes = slice_bytes = start = 0
    while start < len(text):
        end = text.find(b"\n", start + SEARCH_BYTES)
        end = len(text) if end < 0 else end
        for line in finder.findall(text, start, end):
            slice_bytes += len(line)
            if slice_bytes > SLICE_BYTES:
                slice_bytes, page.is_large = 0, True
                yield
            if line.startswith(adapters.names):
                adapters.note(line)
                continue
            count, size_bytes = count + 1, size_bytes + len(line)
            if count > MOST_SERIES:
                return Reason.TOO_MANY_SERIES
            if size_bytes > MOST_WANTED_BYTES:
                return Reason.TOO_BIG
            sample = _sample(line)
            if sample is None:
                return Reason.MALFORMED
            page.add(sample, labels)
        start = end
        if start < len(text):
            yield
    newest = _sample(adapters.line)
    if newest is not None:
        page.add(newest, labels)
    return page


class _Newest:
    """The newest line that tells of adapters. The others are not read, and nothing that is wrong with one is an error.

    Each combination that ever ran is a line for ever: vLLM sets the time of the one that runs, and its client library
    removes none. They would outgrow any bound, and of a line nothing but its time tells whether it still holds.
    """

    __slots__ = ("_at", "_marks", "line", "names")

    def __init__(self, engines: tuple[Engine, ...], labels: Pairs) -> None:
        self.names = _adapter_names(engines)
        self._marks = tuple(f'{name}="{_escaped(value)}"'.encode() for name, value in labels)
        self._at = -1.0
        self.line = b""

    def note(self, line: bytes) -> None:
        """Keep `line` if it is the newest so far, as far as a glance at it tells."""
        words = line[line.rfind(b"}") + 1 :].split(None, 1)
        text = words[0].decode("ascii", "replace") if words else ""
        at = _number(text) if _NUMBER.fullmatch(text) else None
        if at is not None and at >= self._at and all(mark in line for mark in self._marks):
            self._at, self.line = at, line


# ---- lines


@lru_cache(maxsize=32)
def _names(engine: Engine) -> frozenset[str]:
    return engine.metrics()


@lru_cache(maxsize=32)
def _adapter_names(engines: tuple[Engine, ...]) -> tuple[bytes, ...]:
    return tuple(f"\n{metric.name}".encode() for engine in engines for metric in engine.adapters)


@lru_cache(maxsize=32)
def _finder(engines: tuple[Engine, ...]) -> re.Pattern[bytes]:
    """Return what finds the lines of all metrics of `engines`, each with the newline before it.

    Names with a common first character stand together: of most lines, one look at that character is enough.
    """
    names = sorted(frozenset().union(*(_names(engine) for engine in engines)))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[:3], []).append(name[3:])
    choices = (re.escape(start) + "(?:" + "|".join(map(re.escape, rest)) + ")" for start, rest in groups.items())
    return re.compile(("\n(?:" + "|".join(choices) + r")(?=[{ \t])[^\n]*").encode())


# Possessive, so that no line makes the search go back: time is linear in the line's length.
_SAMPLE = re.compile(
    r'\n([a-zA-Z_:][a-zA-Z0-9_:]*+)[ \t]*+(?:\{((?:[^"{}]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"{}]*+)\}[ \t]*+|(?<=[ \t]))'
    r"([^ \t]++)[ \t]*+(?:[+-]?[0-9.]++[ \t]*+)?+(?:#.*+)?"
)
_LABEL = re.compile(r'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t]*+(?:,|\Z)')
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+")
_NO_NUMBER = frozenset({"nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"})
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
_ESCAPE = re.compile(r"\\.")


def _sample(line: bytes) -> tuple[Series, float | None] | None:
    """Read a sample line, which begins with the newline before it. A value of None isn't believed; None: no sample."""
    if len(line) > MOST_LINE_BYTES:
        return None
    try:
        match = _SAMPLE.fullmatch(line.rstrip(b"\r").decode())
    except UnicodeDecodeError:
        return None
    if match is None:
        return None
    name, inside, text = match.groups()
    labels = _labels(inside) if inside else ()
    if labels is None:
        return None
    if _NUMBER.fullmatch(text):
        return (name, labels), _number(text)
    return ((name, labels), None) if text.lower() in _NO_NUMBER else None


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
"""Labels hardly change from scrape to scrape. 1,024 of 2 KB are some megabytes at worst."""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[0], match[0])


def _number(text: str) -> float | None:
    """Return the number `text` says, or None if it is negative or too big to be one."""
    return within(float(text), MOST_COUNTED)


def _known(values: Iterable[float | None], most: float) -> list[float]:
    """Return all values, or none at all if one of them is unknown."""
    checked = [within(value, most) for value in values]
    known = [value for value in checked if value is not None]
    return known if len(known) == len(checked) else []
