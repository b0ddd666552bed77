"""Prometheus metrics. Counters follow decisions; gauges are read from the books when somebody asks.

Labels come from the config and from the tables here alone, never from a client: their number is bounded.

A page is one moment: what is counted is read in one go, so that counts agree with each other (leases never outnumber
the streams that hold them). Making samples and text of them takes longer, so that is done in pieces, and the loop turns
in between. Two things are some milliseconds younger: who has waited longest (thousands wait, and are looked at some at
a time, so that it is of those who still wait then), and the states of endpoints, whose families endpoints.py has.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from itertools import accumulate, chain
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

from extproc import __version__
from extproc.admission.outcome import Outcome
from extproc.admission.values import Dispatch
from extproc.observe import endpoints
from extproc.observe.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

    from extproc.admission.controller import Controller
    from extproc.admission.held import HeldBy
    from extproc.admission.queue import Queue
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Answer, Decision
    from extproc.observe.endpoints import Telemetry

    Parts = Iterator[Metric | None]
    """One family in parts, each made when it is asked for; None: nothing to write yet, and enough for one turn."""

WAIT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0),
    *(90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0),
)
"""Narrow where budgets are: a percentile read off them is not twice the truth. The last is the longest budget."""
BUDGET_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of a request's budget: the same buckets fit a class that may wait 2 s and one that may wait 5 minutes."""
_PASSED, _TENANT_LIMIT = Outcome.PASSED, Outcome.TENANT_LIMIT
SHARED = "*"
"""The `endpoint` label of requests that any endpoint of their pool may take."""
PIECE_LINES = 125
"""Samples written as text in one turn of the loop: a millisecond."""
PIECE_ENDPOINTS = 50
"""Endpoints whose state is read in one turn: a millisecond."""
PIECE_TICKETS = 1000
"""Waiting requests looked at in one turn: half a millisecond."""


def _nothing() -> Mapping[str, int]:
    return {}


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


class _Histogram:
    """Counts by bucket of one class."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        bounds = self.bounds
        self.counts[0 if value <= bounds[0] else bisect_left(bounds, value)] += 1  # as most are: none waited
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        bounds = (*map(str, self.bounds), "+Inf")
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class _Waited:
    """How long the requests of one class waited that were dispatched."""

    __slots__ = ("latest", "seconds", "shares")

    def __init__(self) -> None:
        self.seconds = _Histogram(WAIT_BUCKETS_S)
        self.shares = _Histogram(BUDGET_BUCKETS)
        self.latest = Waits()


def _none() -> int:
    return 0


class Metrics:
    """An observer of decisions, and a collector for a Prometheus registry."""

    def __init__(
        self,
        controller: Controller,
        streams: Callable[[], int],
        telemetry: Telemetry | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        ignored: Callable[[], Mapping[str, int]] = _nothing,
        clock_offset_s: Callable[[], float] = float,
        config_is_refused: Callable[[], bool] = _no,
        left_out: Callable[[], int] = _none,
        second_tries: Callable[[], int] = _none,
        overflowed: Callable[[], Mapping[str, int]] = _nothing,
        bad_answers: Callable[[], Mapping[str, Mapping[Answer, int]]] = dict,
        transport: str | None = None,
        rehearsed: Mapping[tuple[str, str], int] | None = None,
        restarts: Mapping[str, int] = MappingProxyType({}),
        told_models: Callable[[], int] = _none,
        decides: Callable[[], bool] = _yes,
    ) -> None:
        """Count for `controller`.

        `streams`: how many ext_proc streams are open; `telemetry`: how the scraping goes; `clock`: the core's;
        `left_out`: found endpoints that were not taken; `second_tries`: requests that came back;
        `overflowed`: those that went to a cluster of last resort, by class;
        `bad_answers`: how many requests each endpoint gave no good answer, by kind;
        `transport`: what carries gRPC;
        `ignored`: header values of requests that told nothing, by header; `clock_offset_s`: of our wall clock against
        Envoy's; `config_is_refused`: the file is worse than what runs; `rehearsed`: a dry run's counts, by what would
        have happened and class; `restarts`: of tasks, by kind; `told_models`: requests answered by a list of models;
        `decides`: we do, and no other sidecar. Who decides tells of endpoints, so that sums over sidecars are right.
        """
        self._controller = controller
        self._clock = clock
        self._ignored = ignored
        self._clock_offset_s = clock_offset_s
        self._config_is_refused = config_is_refused
        self._left_out = left_out
        self._second_tries = second_tries
        self._overflowed = overflowed
        self.bad_answers = bad_answers
        self._transport = transport
        self.rehearsed = rehearsed
        self._restarts = restarts
        self._told_models = told_models
        self._decides = decides
        self.unknown_classes = 0
        self._telemetry = telemetry
        self._streams = streams
        self.outcomes: dict[tuple[Outcome, str], int] = {}
        self.limited: dict[str, int] = {}
        self.waited_for: dict[tuple[HeldBy, str], int] = {}
        self._waited: dict[str, _Waited] = {}
        self.config_reloads = {"success": 0, "failure": 0}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._others: list[Collector] = []
        self._at_once: list[Collector] = []
        self.add(ProcessCollector(registry=None))

    # ---- an observer

    def decided(self, decision: Decision) -> None:
        """Count a decision."""
        ticket, outcome = decision.ticket, decision.outcome
        name, asked = ticket.request_class.name, ticket.request.request_class
        self._count(outcome, name)
        if asked != name and asked:
            self.unknown_classes += 1
        if ticket.waited_for is not None:
            self._note_held(ticket.waited_for, name)
        if isinstance(decision, Dispatch):
            if outcome is not _PASSED:
                self._note_wait(name, decision.wait_s, ticket.wait_until - ticket.request.arrived)
        elif outcome is _TENANT_LIMIT:
            tenant = self._controller.policy.tenants.label(ticket.request.tenant)
            self.limited[tenant] = self.limited.get(tenant, 0) + 1

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Count a client that left while it waited. Its wait is none that anybody was served after."""
        del wait_s
        self._count(Outcome.CANCELLED, ticket.request_class.name)
        if ticket.waited_for is not None:
            self._note_held(ticket.waited_for, ticket.request_class.name)

    def _note_held(self, by: HeldBy, request_class: str) -> None:
        key = (by, request_class)
        self.waited_for[key] = self.waited_for.get(key, 0) + 1

    def _count(self, outcome: Outcome, request_class: str) -> None:
        key = (outcome, request_class)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1

    def _note_wait(self, request_class: str, wait_s: float, budget_s: float) -> None:
        waited = self._waited.get(request_class)
        if waited is None:
            waited = self._waited[request_class] = _Waited()
        waited.seconds.note(wait_s)
        if budget_s > 0:
            waited.shares.note(wait_s / budget_s)
        waited.latest.note(self._clock(), wait_s)

    def waits_since(self, request_class: str, at: float) -> list[float]:
        """Return how long the requests of a class waited that were dispatched at `at` or later, shortest first."""
        waited = self._waited.get(request_class)
        return [] if waited is None else waited.latest.since(at)

    def waits(self) -> Iterator[tuple[str, list[tuple[str, float]], float]]:
        """Walk class, buckets and sum of how long dispatched requests waited."""
        for request_class, waited in self._waited.items():
            yield request_class, waited.seconds.cumulative(), waited.seconds.total

    # ---- a collector

    def add(self, collector: Collector, *, at_once: bool = False) -> None:
        """Have another collector's families on the page, too; `at_once`: they are read in the moment of our counts."""
        (self._at_once if at_once else self._others).append(collector)
        self.registry.register(collector)

    def pieces(self) -> Iterator[bytes]:
        """Write a page, a piece at a time: of the moment in which the first is asked for."""
        moment = self._moment()
        moment += _collected(self._at_once)
        yield b""
        yield from self._written(chain(moment, _collected(self._others)))

    @staticmethod
    def _written(families: Iterable[Parts]) -> Iterator[bytes]:
        for parts in families:
            is_begun = False
            for part in parts:
                if part is None:
                    yield b""
                    continue
                samples = part.samples
                for start in range(0, max(len(samples), 1), PIECE_LINES):
                    part.samples = samples[start : start + PIECE_LINES]
                    text = generate_latest(_Page(part))
                    yield text.split(b"\n", 2)[2] if is_begun else text  # HELP and TYPE stand once
                    is_begun = True

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families."""
        for parts in self._moment():
            whole: Metric | None = None
            for part in parts:
                if whole is None:
                    whole = part
                elif part is not None:
                    whole.samples += part.samples
            if whole is not None:
                yield whole

    def _moment(self) -> list[Parts]:
        """Read all counts; return what reads the rest and makes families of all, each in parts, in this order."""
        now = self._clock()
        counted = endpoints.counts(self._controller)
        rows: list[endpoints.Row] = []
        decides = self._decides()
        errors = list(self._telemetry.errors()) if self._telemetry is not None else []
        bad = [
            (name, kind._value_, count) for name, counts in self.bad_answers().items() for kind, count in counts.items()
        ]
        return [
            *(iter((family,)) for family in self._request_families()),
            *self._queue_families(now),
            self._read(counted, rows),
            *(family.parts(rows) for family in endpoints.FAMILIES if decides),
            *(family.parts(rows) for family in endpoints.TELEMETRY),
            endpoints.tally(*endpoints.BAD_ANSWERS, bad),
            endpoints.tally(*endpoints.SCRAPE_ERRORS, errors),
            *(iter((family,)) for family in self._other_families()),
        ]

    def _read(self, counted: Sequence[endpoints.Count], rows: list[endpoints.Row]) -> Parts:
        """Read the states of endpoints into `rows`, some at a time; that is no family yet."""
        for row in endpoints.rows(counted, self._controller, self._telemetry, self._clock):
            rows.append(row)
            if len(rows) % PIECE_ENDPOINTS == 0:
                yield None

    def _other_families(self) -> Iterator[Metric]:
        if self.rehearsed is not None:
            rehearsed = CounterMetricFamily(
                "extproc_dry_run_requests",
                "Dry run: what would have happened to requests, were the queue on.",
                labels=["outcome", "class"],
            )
            for key, count in self.rehearsed.items():
                rehearsed.add_metric(key, count)
            yield rehearsed
        yield CounterMetricFamily(
            "extproc_models_answers",
            "Requests for the list of models, or one of them, that were answered here; no outcome counts them.",
            value=self._told_models(),
        )
        streams = GaugeMetricFamily("extproc_streams", "Open ext_proc streams: requests waiting or running.")
        streams.add_metric([], self._streams())
        restarts = CounterMetricFamily(
            "extproc_task_restarts",
            "Times that an unexpected error ended a task that follows endpoints, files or the load, which began again.",
            labels=["task"],
        )
        for task, count in self._restarts.items():
            restarts.add_metric([task], count)
        yield restarts
        yield streams
        yield GaugeMetricFamily(
            "extproc_clock_offset_seconds",
            "How far our clock is ahead of Envoy's, as far as requests have shown; negative: behind it.",
            value=round(self._clock_offset_s(), 3),
        )
        yield from self._config_families()
        ignored = CounterMetricFamily(
            "extproc_ignored_values",
            "Values of request headers that the configuration does not know, or that don't parse; they are ignored.",
            labels=["header"],
        )
        for header, count in {"class": self.unknown_classes, **self._ignored()}.items():
            ignored.add_metric([header], count)
        yield ignored
        yield InfoMetricFamily(
            "extproc_build",
            "What runs.",
            value={"version": __version__, "python": platform.python_version()},
        )

    def _config_families(self) -> Iterator[Metric]:
        reloads = CounterMetricFamily(
            "extproc_config_reloads", "Reloads of the configuration file, by result.", labels=["result"]
        )
        for result, count in self.config_reloads.items():
            reloads.add_metric([result], count)
        yield reloads
        yield GaugeMetricFamily(
            "extproc_config_refused",
            "1 while the configuration file has mistakes and an older one is in force.",
            value=int(self._config_is_refused()),
        )
        left_out = CounterMetricFamily(
            "extproc_discovery_left_out", "Found items that became no endpoint: malformed, not allowed, there already."
        )
        left_out.add_metric([], self._left_out())
        yield left_out
        overflowed = CounterMetricFamily(
            "extproc_overflowed",
            "Requests that went to their class's cluster of last resort instead of a refusal, which is counted too.",
            labels=["class"],
        )
        for name, count in self._overflowed().items():
            overflowed.add_metric([name], count)
        yield overflowed
        again = CounterMetricFamily(
            "extproc_second_tries",
            "Requests that came back because their server took no connection, and waited for another: see second_try.",
        )
        again.add_metric([], self._second_tries())
        yield again
        transport = GaugeMetricFamily("extproc_transport", "1 for what carries gRPC.", labels=["transport"])
        if self._transport is not None:
            transport.add_metric([self._transport], 1)
        yield transport
        policy = self._controller.policy
        yield GaugeMetricFamily(
            "extproc_queue_enabled", "1 while requests are held or refused for load.", value=int(policy.enable_queue)
        )
        yield GaugeMetricFamily(
            "extproc_queue_limit", "The most requests that may wait.", value=policy.max_queued_requests
        )
        budgets = GaugeMetricFamily(
            "extproc_class_budget_seconds", "The longest that requests of a class may wait.", labels=["class"]
        )
        for klass in policy.classes:
            budgets.add_metric([klass.name], klass.budget_s)
        yield budgets

    def _request_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "extproc_requests", "Requests by how they left the queue.", labels=["outcome", "class"]
        )
        for (outcome, request_class), count in self.outcomes.items():
            requests.add_metric([outcome.value, request_class], count)
        yield requests
        limited = CounterMetricFamily(
            "extproc_tenant_limited",
            "Requests refused because their tenant had in flight what it may; * are all tenants that are not named.",
            labels=["tenant"],
        )
        for tenant, count in self.limited.items():
            limited.add_metric([tenant], count)
        yield limited
        tenants = GaugeMetricFamily(
            "extproc_tenant_inflight_requests",
            "What waits and runs of a tenant that the configuration names; * are all others. Absent without `tenants`.",
            labels=["tenant"],
        )
        for tenant, count in self._controller.tenants_in_flight().items() if self._decides() else ():
            tenants.add_metric([tenant], count)
        yield tenants
        held = CounterMetricFamily(
            "extproc_held_requests",
            "Requests that found no room when they came, by the limit that had none.",
            labels=["limit", "class"],
        )
        for (limit, request_class), count in self.waited_for.items():
            held.add_metric([limit.value, request_class], count)
        yield held
        waits = HistogramMetricFamily(
            "extproc_queue_wait_seconds", "How long dispatched requests waited.", labels=["class"]
        )
        for request_class, buckets, total_s in self.waits():
            waits.add_metric([request_class], buckets, total_s)
        yield waits
        used = HistogramMetricFamily(
            "extproc_budget_used_ratio",
            "Which share of its budget a request had waited when it was dispatched; without those that may not wait.",
            labels=["class"],
        )
        for request_class, waited in self._waited.items():
            used.add_metric([request_class], waited.shares.cumulative(), waited.shares.total)
        yield used

    def _queue_families(self, now: float) -> Iterator[Parts]:
        depth = GaugeMetricFamily(
            "extproc_queue_depth",
            'Waiting requests by the endpoint they are at home at; "*": any of their pool.',
            labels=["endpoint", "class"],
        )
        classes = [klass.name for klass in self._controller.policy.classes]
        depths: dict[tuple[str, str], int] = {(SHARED, name): 0 for name in classes}
        lines: list[Queue] = []
        for pool in self._controller.pools():
            homes = ((home.name, queue) for home, queue in pool.homes.items())
            for home, queue in ((SHARED, pool.shared), *homes, *((SHARED, queue) for queue in pool.left)):
                for request_class, count in queue.depth.items():
                    key = (home, request_class)
                    depths[key] = depths.get(key, 0) + count
                lines.append(queue)
        for (endpoint, request_class), count in depths.items():
            depth.add_metric([endpoint, request_class], count)
        yield iter((depth,))
        yield _oldest(dict.fromkeys(classes, now), lines, now)

    def age_s(self, name: str) -> float | None:
        """Return the age of an endpoint's last good reading, in seconds; None: there never was one."""
        return self._telemetry.age_s(name) if self._telemetry is not None else None

    def silence(self, name: str) -> str | None:
        """Return why the last look at an endpoint's page told nothing, in a word; None: it told."""
        return self._telemetry.silence(name) if self._telemetry is not None else None


def _oldest(arrivals: dict[str, float], lines: Iterable[Queue], now: float) -> Parts:
    """Look at those who wait, some at a time: who comes meanwhile is younger than any of them, who leaves is missed."""
    for queue in lines:
        for some in queue.pieces(PIECE_TICKETS):
            for ticket in some:
                name, arrived = ticket.request_class.name, ticket.request.arrived
                if arrived < arrivals.get(name, now):
                    arrivals[name] = arrived
            yield None
    oldest = GaugeMetricFamily(
        "extproc_oldest_waiting_seconds",
        "Age of the request that has waited longest; 0 while none waits.",
        labels=["class"],
    )
    for request_class, arrived in arrivals.items():
        oldest.add_metric([request_class], now - arrived)
    yield oldest


def _collected(collectors: Iterable[Collector]) -> Iterator[Parts]:
    for collector in collectors:
        for family in collector.collect():
            yield iter((family,))


class _Page(CollectorRegistry):
    """A registry that holds one family, for the library's writer."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """Yield the family."""
        yield self._family
