"""What the lines of a page mean: which engine's it is, and where each figure of `Readings` comes from.

Found out once for all pages that have the same lines: what they say may change, what they mean doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from extproc.endpoints.telemetry.bounds import MOST_COUNTED, MOST_REQUESTS, MOST_TOKENS, share, whole, within
from extproc.endpoints.telemetry.lines import Pairs, Series, number
from extproc.endpoints.telemetry.readings import Counter, Readings, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.endpoints.telemetry.engines import Engine, Metric, Names

Values = list[float | None]
"""Of all wanted lines of a page, in their order, and behind them what labels say. None isn't believed."""

MOST_ADAPTERS = 64
"""LoRA adapters that a page is heard of; each occupies memory of the GPU."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Where a figure stands among the values of a page: its series.

    Attributes:
        series: names and labels.
        places: of each, the place of its value; several where it is seen by several ranks: the greatest counts.
        scale: what to multiply with.
    """

    series: tuple[Series, ...]
    places: tuple[tuple[int, ...], ...]
    scale: float = 1.0

    def each(self, values: Values) -> Values:
        """Return the value of each series; of several views one that isn't believed makes it unknown."""
        found: Values = []
        for places in self.places:
            value = values[places[0]] if len(places) == 1 else _greatest([values[place] for place in places])
            found.append(None if value is None else value * self.scale)
        return found

    def known(self, values: Values, most: float) -> list[float]:
        """Return all values, or none at all if one of them is unknown."""
        known: list[float] = []
        for value in self.each(values):
            if value is None or not 0.0 <= value <= most:
                return []
            known.append(value)
        return known

    def total(self, values: Values, most: float) -> float | None:
        """Return the sum; unknown if one is."""
        known = self.known(values, most)
        return within(sum(known), most) if known else None

    def shares(self, values: Values) -> list[float]:
        """Return shares of 1; none if one is unknown."""
        shares = [share(value) for value in self.each(values)]
        known = [value for value in shares if value is not None]
        return known if len(known) == len(shares) else []

    def counter(self, values: Values) -> Counter | None:
        """Return a counter's series; unknown if one is."""
        known = self.known(values, MOST_COUNTED)
        return Counter(self.series, known) if known else None


def _greatest(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


_NOT_THERE = Figure((), ())


def _requests(figure: Figure, values: Values) -> float | None:
    return figure.total(values, MOST_REQUESTS)


def _tokens(figure: Figure, values: Values) -> float | None:
    return figure.total(values, MOST_TOKENS)


def _most_requests(figure: Figure, values: Values) -> int | None:
    return whole(figure.total(values, MOST_REQUESTS), MOST_REQUESTS)


def _longest(figure: Figure, values: Values) -> int | None:
    return whole(max(figure.known(values, MOST_TOKENS), default=None), MOST_TOKENS)


def _fullest(figure: Figure, values: Values) -> float | None:
    return max(figure.shares(values), default=None)


def _mean(figure: Figure, values: Values) -> float | None:
    shares = figure.shares(values)
    return sum(shares) / len(shares) if shares else None


def _asleep(figure: Figure, values: Values) -> bool | None:
    awake = figure.shares(values)
    return min(awake) < 1.0 if awake else None


_COUNTERS = ("preemptions", "prompt_tokens", "cached_tokens", "first_tokens", "output_tokens", "decoded_tokens")
_READ: dict[str, Callable[[Figure, Values], object]] = {
    "running": _requests,
    "waiting": _requests,
    "asleep": _asleep,
    "kv_usage": _fullest,
    "gpu_usage": _mean,
    "tokens_per_s": _tokens,
    "max_running": _most_requests,
    "context_tokens": _longest,
    **dict.fromkeys(_COUNTERS, Figure.counter),
}
_SAME_NAME = tuple(_READ)[3:]
"""Figures that an engine's table calls as `Readings` does."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the lines of a page mean.

    Attributes:
        told: what labels say, behind the values of the lines.
        figures: those that are there, by their names in `Readings`, and how each is read.
    """

    engine: Engine
    told: tuple[float | None, ...]
    figures: tuple[tuple[str, Figure, Callable[[Figure, Values], object]], ...]
    kv_capacity: tuple[tuple[Figure, ...], ...]

    def readings(self, values: Values, newest: Series | None) -> Readings:
        """Return what a page says by the `values` of its lines. `newest`: the newest line that tells of adapters."""
        values.extend(self.told)
        found: dict[str, Any] = {name: read(figure, values) for name, figure, read in self.figures}
        if newest is not None:
            found |= _adapters(self.engine.adapters, newest)
        return Readings(self.engine.name, kv_capacity_tokens=_size(self.kv_capacity, values), **found)


def layout_of(
    lines: Sequence[Series],
    newest: str | None,
    engines: tuple[Engine, ...],
    labels: Pairs,
    own: frozenset[str],
) -> Layout | Reason:
    """Return what these `lines` mean, or why nothing is known. Only those count that carry `labels`.

    `newest`: the name of the metric that tells of adapters, whose lines are not among these.
    `own`: what a line may say to name the endpoint, for pages of several engines.
    """
    page = _Page(lines, labels)
    engine = _engine_of(page, newest, engines, own)
    if isinstance(engine, Reason):
        return engine
    first = page.first
    figures = {
        "running": _together(first(engine.running, engine), [first(names, engine) for names in engine.also_running]),
        "waiting": _together(first(engine.waiting, engine), [first(names, engine) for names in engine.also_waiting]),
        "asleep": first(engine.awake, engine),
        **{name: first(getattr(engine, name), engine) for name in _SAME_NAME},
    }
    there = tuple((name, figure, _READ[name]) for name, figure in figures.items() if figure.places)
    kv_capacity = page.products(engine)
    return Layout(engine, tuple(page.told), there, kv_capacity)  # these found what labels tell


class _Page:
    """The places of a page's lines by name and labels; of an identical series the last one."""

    def __init__(self, lines: Sequence[Series], labels: Pairs) -> None:
        self.places: dict[str, dict[Pairs, int]] = {}
        self.told: Values = []
        self._lines = len(lines)
        for place, (name, pairs) in enumerate(lines):
            if all(pair in pairs for pair in labels):
                self.places.setdefault(name, {})[pairs] = place

    def first(self, names: Names, engine: Engine) -> Figure:
        """Return the first of the alternatives that is on the page, each scheduler of `engine` once."""
        for metric in names:
            found = self._series(metric)
            if found:
                views = _once(found, engine)
                return Figure(tuple(views), tuple(views.values()), metric.scale)
        return _NOT_THERE

    def products(self, engine: Engine) -> tuple[tuple[Figure, ...], ...]:
        """Return the products that may be the KV cache's size, the first that gives one to be believed."""
        products = (self._factors(names, engine) for names in engine.kv_capacity)
        return tuple(factors for factors in products if factors)

    def _factors(self, names: Names, engine: Engine) -> tuple[Figure, ...]:
        """Return the factors of a product that is made per series: all, in one order of series, or none."""
        figures: list[Figure] = []
        for metric in names:
            figure = self.first((metric,), engine)
            by_labels = {pairs: places for (_, pairs), places in zip(figure.series, figure.places, strict=True)}
            order = [pairs for _, pairs in figures[0].series] if figures else list(by_labels)
            if not by_labels or by_labels.keys() != set(order):
                return ()
            series = tuple((metric.name, pairs) for pairs in order)
            figures.append(Figure(series, tuple(by_labels[pairs] for pairs in order), figure.scale))
        return tuple(figures)

    def _series(self, metric: Metric) -> dict[Series, int]:
        """Return what `metric` names on the page: place by series.

        The labels that select a metric or hold its value are left out of the keys, so that two metrics of one
        product meet in the same series.
        """
        there = self.places.get(metric.name)
        found: dict[Series, int] = {}
        if there is None:
            return found
        chosen = {name for name, _ in metric.labels}
        for pairs, place in there.items():
            if metric.labels and not _carries(pairs, metric.labels):
                continue
            if metric.in_label is None:
                rest = tuple(pair for pair in pairs if pair[0] not in chosen) if chosen else pairs
                found[metric.name, rest] = place
                continue
            told = dict(pairs).get(metric.in_label)
            if told is not None:
                found[metric.name, pairs] = self._lines + len(self.told)
                self.told.append(number(told))
        return found


def _together(figure: Figure, others: Sequence[Figure]) -> Figure:
    """Return a figure with the series of `others` in it; without it they tell nothing."""
    if not figure.places:
        return figure
    return Figure(
        sum((other.series for other in others), figure.series),
        sum((other.places for other in others), figure.places),
        figure.scale,
    )


def _size(alternatives: tuple[tuple[Figure, ...], ...], values: Values) -> int | None:
    """Return the KV cache's size: of the first alternative that gives one."""
    for factors in alternatives:
        products: list[float] | None = None
        for factor in factors:
            known = [value for value in factor.each(values) if value is not None and value > 0]
            if len(known) < len(factor.places):
                break
            products = known if products is None else [one * more for one, more in zip(products, known, strict=True)]
        else:
            size = whole(sum(products or ()), MOST_TOKENS)
            if size is not None:
                return size
    return None


def _adapters(names: Names, newest: Series) -> dict[str, object]:
    """Return the adapters that run, those that wait, and how many fit, by the `newest` line that tells of them."""
    if all(newest[0] != metric.name for metric in names):
        return {}
    told = dict(newest[1])
    waiting = told.get("waiting_lora_adapters")
    return {
        "adapters": _listed(told.get("running_lora_adapters", "")),
        "waiting_adapters": None if waiting is None else _listed(waiting),
        "adapter_slots": whole(number(told.get("max_lora", "")), MOST_ADAPTERS),
    }


def _listed(names: str) -> tuple[str, ...]:
    return tuple(sorted({name for part in names.split(",") if (name := part.strip())}))[:MOST_ADAPTERS]


# ---- whose page it is


def _engine_of(page: _Page, newest: str | None, engines: tuple[Engine, ...], own: frozenset[str]) -> Engine | Reason:
    """Return whose page it is: of several engines the only one with a load, else the only one that names us."""
    names = page.places.keys() if newest is None else {*page.places, newest}
    there = [engine for engine in engines if not _names(engine).isdisjoint(names)]
    if len(there) > 1:
        there = [engine for engine in there if not engine.loads().isdisjoint(names)] or there
    if len(there) > 1:
        there = [engine for engine in there if _names_us(page, engine, own)] or there
    if not there:
        return Reason.NO_METRICS
    return there[0] if len(there) == 1 else Reason.SEVERAL_ENGINES


@lru_cache(maxsize=32)
def _names(engine: Engine) -> frozenset[str]:
    return engine.metrics()


def _names_us(page: _Page, engine: Engine, own: frozenset[str]) -> bool:
    lines = (pairs for name in engine.loads() for pairs in page.places.get(name, ()))
    return any(value in own for pairs in lines for _, value in pairs)


def _carries(pairs: Pairs, wanted: tuple[tuple[str, tuple[str, ...]], ...]) -> bool:
    there = dict(pairs)
    return all(there.get(name) in values for name, values in wanted)


# ---- each scheduler once


def _once(found: dict[Series, int], engine: Engine) -> dict[Series, tuple[int, ...]]:
    """Return the series with each scheduler once: totals without their parts, and the views of several ranks."""
    if engine.totals:
        found = _totals(found, engine.totals)
    labels = {label for _, pairs in found for label, _ in pairs}
    if len(found) == 1 or all(label in engine.ranks or not label.endswith("_rank") for label in labels):
        return {series: (place,) for series, place in found.items()}
    views: dict[Series, list[int]] = {}
    for (name, pairs), place in found.items():
        kept = tuple([pair for pair in pairs if not pair[0].endswith("_rank") or pair[0] in engine.ranks])
        views.setdefault((name, kept), []).append(place)
    if len(views) == len(found):
        return {series: (place,) for series, place in found.items()}
    return {series: tuple(places) for series, places in views.items()}


def _totals(found: dict[Series, int], splits: tuple[str, ...]) -> dict[Series, int]:
    """Leave out the parts of each total that is there too."""
    totals = {series: place for series, place in found.items() if not any(k in splits and v for k, v in series[1])}
    if not totals or len(totals) == len(found):
        return found
    bare = {tuple(pair for pair in pairs if pair[0] not in splits) for _, pairs in totals}
    rest = {
        series: place
        for series, place in found.items()
        if tuple(pair for pair in series[1] if pair[0] not in splits) not in bare
    }
    return totals | rest
