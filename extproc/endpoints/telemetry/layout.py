"""What the lines of a page mean: which engine's it is, and where each figure of `Readings` comes from.

Found out once for all pages that have the same lines: what they say may change, what they mean doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.bounds import MOST_COUNTED, MOST_REQUESTS, MOST_TOKENS, share, whole, within
from extproc.endpoints.telemetry.lines import Pairs, Series, number
from extproc.endpoints.telemetry.readings import Counter, Readings, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

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
            value = values[places[0]]
            if len(places) > 1:
                value = _greatest([values[place] for place in places])
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
        known = self.known(values, most) if self.places else None
        return within(sum(known), most) if known else None

    def shares(self, values: Values) -> list[float]:
        """Return shares of 1; none if one is unknown."""
        shares = [share(value) for value in self.each(values)]
        known = [value for value in shares if value is not None]
        return known if len(known) == len(shares) else []

    def counter(self, values: Values) -> Counter | None:
        """Return a counter's series; unknown if one is."""
        known = self.known(values, MOST_COUNTED) if self.places else None
        return dict(zip(self.series, known, strict=True)) if known else None


def _greatest(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


_NOT_THERE = Figure((), ())


@dataclass(frozen=True, slots=True)
class Layout:
    """What the lines of a page mean. `told`: what labels say, behind the values of the lines."""

    engine: Engine
    told: tuple[float | None, ...]
    running: Figure
    waiting: Figure
    kv_usage: Figure
    gpu_usage: Figure
    kv_capacity: tuple[tuple[Figure, ...], ...]
    tokens_per_s: Figure
    max_running: Figure
    context_tokens: Figure
    awake: Figure
    preemptions: Figure
    prompt_tokens: Figure
    cached_tokens: Figure
    first_tokens: Figure
    output_tokens: Figure
    decoded_tokens: Figure

    def readings(self, values: Values, newest: Series | None) -> Readings:
        """Return what a page says by the `values` of its lines. `newest`: the newest line that tells of adapters."""
        values.extend(self.told)
        gpu_shares, awake = self.gpu_usage.shares(values), self.awake.shares(values)
        adapters, waiting_adapters, adapter_slots = _adapters(self.engine.adapters, newest)
        return Readings(
            engine=self.engine.name,
            running=self.running.total(values, MOST_REQUESTS),
            waiting=self.waiting.total(values, MOST_REQUESTS),
            kv_usage=max(self.kv_usage.shares(values), default=None),
            gpu_usage=sum(gpu_shares) / len(gpu_shares) if gpu_shares else None,
            kv_capacity_tokens=_size(self.kv_capacity, values),
            tokens_per_s=self.tokens_per_s.total(values, MOST_TOKENS),
            max_running=whole(self.max_running.total(values, MOST_REQUESTS), MOST_REQUESTS),
            context_tokens=whole(max(self.context_tokens.known(values, MOST_TOKENS), default=None), MOST_TOKENS),
            asleep=min(awake) < 1.0 if awake else None,
            adapters=adapters,
            waiting_adapters=waiting_adapters,
            adapter_slots=adapter_slots,
            preemptions=self.preemptions.counter(values),
            prompt_tokens=self.prompt_tokens.counter(values),
            cached_tokens=self.cached_tokens.counter(values),
            first_tokens=self.first_tokens.counter(values),
            output_tokens=self.output_tokens.counter(values),
            decoded_tokens=self.decoded_tokens.counter(values),
        )


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
    return Layout(
        engine=engine,
        running=_together(first(engine.running, engine), [first(names, engine) for names in engine.also_running]),
        waiting=_together(first(engine.waiting, engine), [first(names, engine) for names in engine.also_waiting]),
        kv_usage=first(engine.kv_usage, engine),
        gpu_usage=first(engine.gpu_usage, engine),
        kv_capacity=page.products(engine),
        tokens_per_s=first(engine.tokens_per_s, engine),
        max_running=first(engine.max_running, engine),
        context_tokens=first(engine.context_tokens, engine),
        awake=first(engine.awake, engine),
        preemptions=first(engine.preemptions, engine),
        prompt_tokens=first(engine.prompt_tokens, engine),
        cached_tokens=first(engine.cached_tokens, engine),
        first_tokens=first(engine.first_tokens, engine),
        output_tokens=first(engine.output_tokens, engine),
        decoded_tokens=first(engine.decoded_tokens, engine),
        told=tuple(page.told),
    )


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


def _adapters(names: Names, newest: Series | None) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, int | None]:
    """Return the adapters that run, those that wait, and how many fit, by the `newest` line that tells of them.

    None: nothing is told.
    """
    if newest is None or all(newest[0] != metric.name for metric in names):
        return None, None, None
    told = dict(newest[1])
    waiting = told.get("waiting_lora_adapters")
    return (
        _listed(told.get("running_lora_adapters", "")),
        None if waiting is None else _listed(waiting),
        whole(number(told.get("max_lora", "")), MOST_ADAPTERS),
    )


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
