"""Requests in the words of OpenTelemetry's conventions for generative AI, beside our own: dashboards join on them.

`gen_ai.server.request.duration`: from a request's arrival at Envoy to the last byte of its answer, so our wait is part
of it; of one that got no answer, to the refusal. https://github.com/open-telemetry/semantic-conventions-genai
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import HistogramMetricFamily

from extproc.admission.outcome import Outcome
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision

DURATION = "gen_ai_server_request_duration_seconds"
BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Those that the conventions give."""
LABELS = ("gen_ai_operation_name", "gen_ai_request_model", "error_type")
NAMES = {
    DURATION: "gen_ai.server.request.duration",
    "gen_ai_operation_name": "gen_ai.operation.name",
    "gen_ai_request_model": "gen_ai.request.model",
    "error_type": "error.type",
}
"""What OTLP calls what Prometheus can't."""


class GenAi:
    """An observer of decisions and of finished answers, and a collector for a Prometheus registry.

    Labels are bounded: a model is named only if an endpoint or the configuration names it.
    """

    def __init__(self, clock: Callable[[], float], is_model: Callable[[str], bool]) -> None:
        """Measure by the core's `clock`; `is_model`: whether a name is one of ours, not a client's fancy."""
        self._clock = clock
        self._is_model = is_model
        self._counts: dict[tuple[str, str, str], list[int]] = {}
        self._sums: dict[tuple[str, str, str], float] = {}

    def decided(self, decision: Decision) -> None:
        """Count a refusal; what is dispatched is counted when it ends."""
        if not isinstance(decision, Dispatch):
            self._note(decision.ticket, decision.outcome.value)

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Count a request whose client left while it waited."""
        del wait_s
        self._note(ticket, Outcome.CANCELLED.value)

    def finished(self, ticket: Ticket, answer: Answer) -> None:
        """Count a request that was dispatched and is over."""
        self._note(ticket, "" if answer is Answer.OK else answer.value)

    def _note(self, ticket: Ticket, error: str) -> None:
        request = ticket.request
        model = request.model or ""
        key = (request.operation, model if self._is_model(model) else "", error)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * (len(BUCKETS_S) + 1)
            self._sums[key] = 0.0
        lasted_s = max(self._clock() - request.arrived, 0.0)
        counts[bisect_left(BUCKETS_S, lasted_s)] += 1
        self._sums[key] += lasted_s

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        family = HistogramMetricFamily(
            DURATION,
            "From a request's arrival to its answer's last byte, or to its refusal; OpenTelemetry's names. Needs "
            "`otlp_metrics`.",
            labels=LABELS,
        )
        bounds = (*map(str, BUCKETS_S), "+Inf")
        for key, counts in self._counts.items():
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric(key, buckets, self._sums[key])
        yield family
