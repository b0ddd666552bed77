"""What /metrics tells of endpoints: their values, and the families made of them.

500 endpoints have 12,500 samples. To read all their values takes five milliseconds (each lies somewhere else in
memory), to make samples of them and text of those eighty. So what must agree with other values, requests in flight and
sent, is read at once, and the rest is read and written for some endpoints at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.held import HeldBy
    from extproc.admission.load import Load

    Samples = Iterable[tuple[tuple[str, ...], float]]

ROWS = 25
"""Endpoints whose samples of one family are made in one go: five of each at most, a millisecond."""


PIECE_COUNTS = 125
"""The same, where each has a row of its own."""


class Telemetry(Protocol):
    """Who knows how the scraping of endpoints goes."""

    def age_s(self, name: str) -> float | None:
        """Return the age of an endpoint's last good reading, in seconds; None: there never was one."""

    def silence(self, name: str) -> str | None:
        """Return why the last look at an endpoint's page told nothing; None: it told."""

    def follows(self, name: str) -> bool:
        """Tell whether an endpoint is scraped at all."""

    def errors(self) -> Iterable[tuple[str, str, int]]:
        """Walk endpoint, reason and number of failed scrapes."""


def serves(endpoint: Endpoint) -> bool:
    """Tell whether it serves: one that is tried with single requests, or fails them, carries no load."""
    return endpoint.available and not (endpoint.health.on_trial or endpoint.health.is_failing)


def known_signals(load: Load | None) -> dict[str, float]:
    """Return the gauges of a load that are known; an unknown one is absent, never 0."""
    if load is None:
        return {}
    signals = {
        "running": load.running,
        "waiting": load.waiting,
        "kv_usage": load.kv_usage,
        "gpu_usage": load.gpu_usage,
        "tokens_per_s": load.tokens_per_s,
        "max_running": load.max_running,
        "context_tokens": load.context_tokens,
        "asleep": load.asleep,
    }
    return {signal: float(value) for signal, value in signals.items() if value is not None}


class Count(NamedTuple):
    """What one endpoint holds and was sent, at one moment."""

    endpoint: Endpoint
    in_flight: int
    sequences: int
    dispatched: int


def counts(controller: Controller) -> list[Count]:
    """Count what all endpoints hold at this moment."""
    return [
        Count(endpoint, len(endpoint.leases), endpoint.sequences, endpoint.dispatched)
        for endpoint in controller.endpoints.values()
    ]


def oldest_lease_s(endpoint: Endpoint, now: float) -> float | None:
    """Return for how long an endpoint has held the request that it holds longest, in seconds; None: it holds none.

    All are looked at: one that was adopted from another sidecar comes last, and may be the oldest.
    """
    since = min([ticket.leased_at for ticket in endpoint.leases], default=None)
    return None if since is None else max(now - since, 0.0)


class Row(NamedTuple):
    """One endpoint."""

    name: str
    in_flight: int
    sequences: int
    oldest_lease_s: float
    dispatched: int
    limit: float
    kv_capacity: int | None
    is_up: bool
    is_known: bool
    left_out: int
    closed: tuple[tuple[str, bool], ...]
    held: HeldBy | None
    full_s: float
    doubted: bool
    servers: int
    load: Load | None
    age_s: float | None
    is_stale: bool | None


def rows(
    counted: Iterable[Count], controller: Controller, telemetry: Telemetry | None, clock: Callable[[], float]
) -> Iterator[Row]:
    """Read what else there is to say of each endpoint, when it is asked for."""
    holds = controller.holds()
    stale_after_s = controller.policy.stale_after_s
    return (_row(count, holds, telemetry, clock(), stale_after_s) for count in counted)


def _row(
    count: Count, holds: Mapping[Endpoint, HeldBy], telemetry: Telemetry | None, now: float, stale_after_s: float
) -> Row:
    endpoint = count.endpoint
    health, held_since = endpoint.health, endpoint.held_since
    age_s, is_stale = None, None
    if telemetry is not None:
        age_s = telemetry.age_s(endpoint.name)
        if telemetry.follows(endpoint.name):
            is_stale = age_s is None or age_s > stale_after_s
    return Row(
        endpoint.name,
        count.in_flight,
        count.sequences,
        oldest_lease_s(endpoint, now) or 0.0,
        count.dispatched,
        endpoint.limit.value,
        endpoint.kv.capacity,
        endpoint.available and not health.is_failing,
        health.is_known,
        len(endpoint.missing.models),
        (
            ("down", health.is_up is False),
            ("ejected", health.ejected_until is not None),
            ("asleep", health.is_asleep),
            ("doubt", health.had_its_few),
            ("load", endpoint.closed_until is not None or health.full_until is not None),
        ),
        holds.get(endpoint),
        0.0 if held_since is None else max(now - held_since, 0.0),
        endpoint.counters.doubted,
        endpoint.servers.count,
        endpoint.known,
        age_s,
        is_stale,
    )


class Family(NamedTuple):
    """One metric family of endpoints: what it is called, and its samples in a row, as further labels and a value."""

    kind: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    text: str
    labels: tuple[str, ...]
    samples: Callable[[Row], Samples]

    def parts(self, rows: Sequence[Row]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Make the family, some endpoints at a time."""
        for start in range(0, max(len(rows), 1), ROWS):
            family = self.kind(self.name, self.text, labels=("endpoint", *self.labels))
            for row in rows[start : start + ROWS]:
                for more, value in self.samples(row):
                    # A truth is a number: OTLP's encoder takes no bool.
                    family.add_metric((row.name, *more), int(value) if isinstance(value, bool) else value)
            yield family


def _one(name: str, text: str, value: Callable[[Row], float | None], kind: type = GaugeMetricFamily) -> Family:
    """Return a family with one sample per endpoint; None: with none."""

    def samples(row: Row) -> Samples:
        found = value(row)
        return () if found is None else (((), found),)

    return Family(kind, name, text, (), samples)


def _limits(row: Row) -> Samples:
    yield ("requests",), row.limit
    if row.kv_capacity is not None:
        yield ("kv_tokens",), row.kv_capacity


BAD_ANSWERS = (
    "extproc_bad_answers",
    (
        "Requests to which an endpoint gave no good answer: none (failed: no connection; broke_off: cut before it "
        "began), its own 5xx (error), a success without a byte (empty), as full (saturated: 429, 503), 4xx (refused); "
        "or Envoy in its place (no_cluster, no_server_address, breaker_open, dropped, timeout). All others of "
        "extproc_dispatched_total run, were answered well, or were ended by their client."
    ),
    "answer",
)
SCRAPE_ERRORS = ("extproc_scrape_errors", "Scrapes, and reports in answers, that told nothing, by why.", "reason")


def tally(name: str, text: str, label: str, counts: Sequence[tuple[str, str, int]]) -> Iterator[CounterMetricFamily]:
    """Make a family of what was counted by endpoint and `label`, some at a time."""
    for start in range(0, max(len(counts), 1), PIECE_COUNTS):
        family = CounterMetricFamily(name, text, labels=("endpoint", label))
        for endpoint, value, count in counts[start : start + PIECE_COUNTS]:
            family.add_metric((endpoint, value), count)
        yield family


FAMILIES = (
    _one("extproc_inflight_requests", "Requests that an endpoint holds now.", lambda row: row.in_flight),
    _one(
        "extproc_inflight_sequences",
        "What those requests count as against the endpoint's limit: n, best_of and lists of prompts take several.",
        lambda row: row.sequences,
    ),
    _one(
        "extproc_oldest_lease_seconds",
        "How long an endpoint has held the request that it holds longest; 0 while it holds none.",
        lambda row: row.oldest_lease_s,
    ),
    _one("extproc_dispatched", "Requests sent to an endpoint.", lambda row: row.dispatched, CounterMetricFamily),
    Family(
        GaugeMetricFamily,
        "extproc_endpoint_limit",
        "What an endpoint may hold, by kind of limit.",
        ("kind",),
        _limits,
    ),
    _one(
        "extproc_endpoint_up",
        "1 while an endpoint may be sent requests, and does not refuse one after the other.",
        lambda row: row.is_up,
    ),
    _one(
        "extproc_endpoint_known",
        "1 once an endpoint has answered a request well or passed a health check; before, it gets a few at a time.",
        lambda row: row.is_known,
    ),
    _one(
        "extproc_endpoint_models_left_out",
        "Models that an endpoint refuses while it serves others and its peers serve them: it gets none of those.",
        lambda row: row.left_out,
    ),
    Family(
        GaugeMetricFamily,
        "extproc_endpoint_closed",
        "1 while this keeps requests from an endpoint: health checks (down), refusals of what its peers serve "
        "(ejected), its page (asleep), a doubt whether it works (doubt), its telemetry or its own refusals (load).",
        ("reason",),
        lambda row: (((reason,), is_so) for reason, is_so in row.closed),
    ),
    Family(
        GaugeMetricFamily,
        "extproc_limited_by",
        "1 for the limit that keeps the next request from an endpoint; no line while there is room.",
        ("limit",),
        lambda row: () if row.held is None else (((row.held.value,), 1),),
    ),
    _one(
        "extproc_endpoint_full_seconds",
        "For how long an endpoint has had no room but what the next in line took at once; 0 while it has some.",
        lambda row: row.full_s,
    ),
    _one(
        "extproc_counters_doubted",
        "1 while an endpoint's counters are not believed: by them its answers are many times longer or shorter "
        "than its peers'. It goes by its gauges and by how long its answers take.",
        lambda row: row.doubted,
    ),
    _one(
        "extproc_endpoint_servers",
        "How many servers an endpoint's address seems to stand for: its page shows one of them. Above 1, name each "
        "server as an endpoint of its own.",
        lambda row: row.servers,
    ),
)
"""What who decides tells."""

TELEMETRY = (
    Family(
        GaugeMetricFamily,
        "extproc_endpoint_load",
        "What an endpoint's fresh telemetry says; a signal that is unknown or stale is absent.",
        ("signal",),
        lambda row: (((signal,), value) for signal, value in known_signals(row.load).items()),
    ),
    _one("extproc_telemetry_age_seconds", "Age of an endpoint's last good reading.", lambda row: row.age_s),
    _one(
        "extproc_telemetry_stale",
        "1 while a scraped endpoint has told nothing for telemetry_stale_after, or nothing yet: it goes by our own "
        "books.",
        lambda row: row.is_stale,
    ),
)
"""What each tells that scrapes."""
