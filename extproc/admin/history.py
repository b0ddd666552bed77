"""The last five minutes in a ring: a few numbers per class every two seconds, whether anybody looks or not.

A sample reads counters that are there anyway; nothing happens on the way of a request.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from extproc.observe.waits import WINDOW_S, percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from extproc.admission.controller import Controller
    from extproc.admission.values import Answer
    from extproc.observe.metrics import Metrics

STEP_S = 2.0
SAMPLES = 150
"""Samples kept, one each STEP_S: five minutes."""
SMOOTHED = 5
"""Steps over which one point of the wait's curve looks back; a single step often sees no request leave."""
RECENT_STEPS = 30
"""Steps over which a rate is taken: a minute."""
FAILING_STEPS = 60
"""Steps over which failed requests of an endpoint are told: two minutes."""
FAILURES = (
    "failed",
    "broke_off",
    "error",
    "empty",
    "no_cluster",
    "no_server_address",
    "breaker_open",
    "dropped",
    "timeout",
)
"""Kinds of bad answers that are an engine's doing, or Envoy's, and not a client's."""


class Sample(NamedTuple):
    """Counters as they stood at one moment."""

    at: float
    outcomes: dict[str, int]
    failures: dict[str, dict[str, int]]  # by endpoint and kind, of those that had any


class History:
    """What the admin page shows of the past."""

    def __init__(
        self,
        controller: Controller,
        metrics: Metrics,
        bad_elsewhere: Callable[[], Mapping[str, Mapping[Answer, int]]] = dict,
    ) -> None:
        """Remember nothing yet; `sample` is to be called each STEP_S.

        `bad_elsewhere`: what endpoints gave the clients of sidecars for which we decide, as `Metrics.bad_answers`.
        """
        self._controller = controller
        self._metrics = metrics
        self._bad_elsewhere = bad_elsewhere
        self._samples: deque[Sample] = deque(maxlen=SAMPLES + 1)
        self._busy_at: float | None = None  # when requests were last seen to come, to a step
        self._curves: deque[dict[str, tuple[int, float | None]]] = deque(maxlen=SAMPLES)

    def __len__(self) -> int:
        """Count the points of the curves."""
        return len(self._curves)

    def sample(self, now: float) -> None:
        """Note the counters, and a point of each class's curves."""
        taken = self._read(now)
        if self._samples:
            before = self._samples[-min(SMOOTHED, len(self._samples))]
            depth = waiting_by_class(self._controller)
            p95_s = {name: percentile(self._metrics.waits_since(name, before.at), 0.95) for name in depth}
            self._curves.append({name: (waiting, p95_s[name]) for name, waiting in depth.items()})
            if self._is_busy(taken):
                self._busy_at = now
        self._samples.append(taken)

    def quiet_s(self, now: float) -> float | None:
        """Return for how long no request has come, to STEP_S; 0: some do, or wait. None: there was none yet."""
        if self._samples and self._is_busy(self._read(now)):
            return 0.0
        return None if self._busy_at is None else round(now - self._busy_at, 1)

    def _is_busy(self, taken: Sample) -> bool:
        return self._controller.waiting > 0 or taken.outcomes != self._samples[-1].outcomes

    def curves(self, classes: Iterable[str]) -> dict[str, dict[str, list[float | None]]]:
        """Return for each class its waiting requests and its p95 wait in seconds, oldest first, STEP_S apart."""
        nothing = (0, None)
        points = {name: [at.get(name, nothing) for at in self._curves] for name in classes}
        return {
            name: {"waiting": [depth for depth, _ in curve], "p95_s": [_rounded(p95_s) for _, p95_s in curve]}
            for name, curve in points.items()
        }

    def percentiles(self, request_class: str, now: float) -> tuple[float | None, float | None]:
        """Return p50 and p95 of the waits of requests sent in the last five minutes, in seconds; None: none was."""
        waits = self._metrics.waits_since(request_class, now - WINDOW_S)
        return _rounded(percentile(waits, 0.5)), _rounded(percentile(waits, 0.95))

    def rates(self, now: float) -> dict[str, float]:
        """Return requests per second by outcome, over the last minute or what there is of it."""
        if not self._samples:
            return {}
        before = self._samples[-min(RECENT_STEPS, len(self._samples))]
        elapsed_s = max(now - before.at, STEP_S)
        return {
            outcome: (count - before.outcomes.get(outcome, 0)) / elapsed_s
            for outcome, count in self._read(now).outcomes.items()
        }

    def failures(self, now: float) -> dict[str, dict[str, int]]:
        """Return how many requests each endpoint failed in the last two minutes, by kind; those that failed any."""
        if not self._samples:
            return {}
        before = self._samples[-min(FAILING_STEPS, len(self._samples))].failures
        found = {}
        for name, counts in self._read(now).failures.items():
            then = before.get(name, {})
            news = {kind: more for kind, n in counts.items() if (more := n - then.get(kind, 0))}
            if news:
                found[name] = news if min(news.values()) > 0 else counts  # less than before: its counts began anew
        return found

    def _read(self, now: float) -> Sample:
        failures: dict[str, dict[str, int]] = {}
        for counted in (self._metrics.bad_answers(), self._bad_elsewhere()):
            for name, counts in counted.items():
                for kind, count in counts.items():
                    if count and kind.value in FAILURES:
                        of_one = failures.setdefault(name, {})
                        of_one[kind.value] = of_one.get(kind.value, 0) + count
        return Sample(now, outcome_totals(self._metrics), failures)


def waiting_by_class(controller: Controller) -> dict[str, int]:
    """Count what waits by class: all of the policy's, and former ones that somebody still waits in."""
    counts = {klass.name: 0 for klass in controller.policy.classes}
    for pool in controller.pools():
        for queue in pool.queues():
            for name, count in queue.depth.items():
                if count:
                    counts[name] = counts.get(name, 0) + count
    return counts


def outcome_totals(metrics: Metrics) -> dict[str, int]:
    """Count requests by outcome, all classes together."""
    totals: dict[str, int] = {}
    for (outcome, _), count in metrics.outcomes.items():
        totals[outcome.value] = totals.get(outcome.value, 0) + count
    return totals


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 4)
