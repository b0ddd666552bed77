"""Our figures under the names of llm-d's router: dashboards and autoscalers that were made for it go on to work.

Both its own names (`llm_d_epp_*`, since 0.10) and the older ones that those replaced. No label is a client's: all
requests are one flow, and a model is named where all endpoints serve the same one alone.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from extproc.admission.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from extproc.admission.controller import Controller
    from extproc.observe.metrics import Metrics

PREFIX = "llm_d_epp_"
FLOW = "default-flow"
"""What llm-d calls requests that name no flow of their own."""
OTHER = "RejectedOther"
OUTCOMES = {
    Outcome.DISPATCHED: "Dispatched",
    Outcome.REROUTED: "Dispatched",
    Outcome.QUEUE_FULL: "RejectedCapacity",
    Outcome.TENANT_LIMIT: "RejectedCapacity",
    Outcome.BUDGET_PREDICTED: "RejectedCapacity",
    Outcome.BUDGET_EXPIRED: "EvictedTTL",
    Outcome.CANCELLED: "EvictedContextCancelled",
}
"""How llm-d's flow control calls the ways out of its queue (pkg/epp/flowcontrol/types); the rest is OTHER."""
OLD = {
    "flow_control_queue_size": "inference_extension_flow_control_queue_size",
    "flow_control_request_queue_duration_seconds": "inference_extension_flow_control_request_queue_duration_seconds",
    "flow_control_pool_saturation": "inference_extension_flow_control_pool_saturation",
    "request": "inference_objective_request",
    "request_running": "inference_objective_running_requests",
    "ready_endpoints": "inference_pool_ready_pods",
    "average_queue_size": "inference_pool_average_queue_size",
    "average_running_requests": "inference_pool_average_running_requests",
    "average_kv_cache_utilization": "inference_pool_average_kv_cache_utilization",
}
"""What each was called before."""


class _Family(NamedTuple):
    """One of them, before it has a name: `rows` are labels and what `add_metric` of its kind takes."""

    kind: type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]
    says: str
    labels: tuple[str, ...]
    rows: Iterable[tuple[Any, ...]]


class Aliases:
    """A collector for a Prometheus registry."""

    def __init__(self, controller: Controller, metrics: Metrics, pool: str) -> None:
        """Tell of `controller` what `metrics` counted; `pool`: the InferencePool's name, "" without one."""
        self._controller = controller
        self._metrics = metrics
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield each family under all of its names."""
        for name, family in (*self._requests(), *self._endpoints()):
            for whole in (PREFIX + name, *([OLD[name]] if name in OLD else ())):
                written = family.kind(whole, f"With `metrics_aliases`. {family.says}", labels=family.labels)
                for row in family.rows:
                    written.add_metric(*row)
                yield written

    def _requests(self) -> Iterator[tuple[str, _Family]]:
        priorities = {one.name: str(one.priority) for one in self._controller.policy.classes}
        model, pool = self._model(), self._pool
        waiting, running = Counter(priorities.values()), Counter(priorities.values())
        waiting.subtract(waiting)  # 0 for each priority: no line would look like a picker that is gone
        running.subtract(running)
        for one in self._controller.pools():
            for its, count in one.waiting.items():
                waiting[str(its)] += count
        for endpoint in self._controller.endpoints.values():
            running.update(str(ticket.request_class.priority) for ticket in endpoint.leases)
        asked, ended = Counter[str](), Counter[tuple[str, str]]()
        for (outcome, name), count in self._metrics.outcomes.items():
            priority = priorities.get(name, "0")
            asked[priority] += count
            if outcome is not Outcome.PASSED:
                ended[OUTCOMES.get(outcome, OTHER), priority] += count
        flow, models = ("fairness_id", "priority"), ("model_name", "target_model_name")
        yield (
            "flow_control_queue_size",
            _Family(
                GaugeMetricFamily,
                "Requests that wait.",
                (*flow, "inference_pool", *models),
                [((FLOW, priority, pool, model, model), count) for priority, count in waiting.items()],
            ),
        )
        yield (
            "flow_control_requests",
            _Family(
                CounterMetricFamily,
                "Requests by how they left the queue.",
                ("outcome", "priority", "inference_pool"),
                [((outcome, priority, pool), count) for (outcome, priority), count in ended.items()],
            ),
        )
        yield (
            "flow_control_request_queue_duration_seconds",
            _Family(
                HistogramMetricFamily,
                "How long dispatched requests waited.",
                (*flow, "outcome", "inference_pool", *models),
                [
                    ((FLOW, priority, "Dispatched", pool, model, model), list(buckets.items()), total_s)
                    for priority, (buckets, total_s) in self._waits(priorities).items()
                ],
            ),
        )
        yield (
            "request_running",
            _Family(
                GaugeMetricFamily,
                "Requests that endpoints hold.",
                (*models, *flow),
                [((model, model, FLOW, priority), count) for priority, count in running.items()],
            ),
        )
        yield (
            "request",
            _Family(
                CounterMetricFamily,
                "Requests.",
                (*models, *flow),
                [((model, model, FLOW, priority), count) for priority, count in asked.items()],
            ),
        )

    def _waits(self, priorities: Mapping[str, str]) -> dict[str, tuple[Counter[str], float]]:
        """Return buckets and sum of the waits by priority: classes share one, and a class that is gone has 0."""
        found: dict[str, tuple[Counter[str], float]] = {}
        for name, buckets, total_s in self._metrics.waits():
            priority = priorities.get(name, "0")
            counts, so_far_s = found.get(priority, (Counter[str](), 0.0))
            for bound, count in buckets:
                counts[bound] += count  # type: ignore[assignment]  # a count, as a float
            found[priority] = counts, so_far_s + total_s
        return found

    def _endpoints(self) -> Iterator[tuple[str, _Family]]:
        ready = [one for one in self._controller.endpoints.values() if one.available]
        loads = [load for load in (one.known for one in ready) if load is not None]
        room = sum(one.limit.value for one in ready)
        full = sum(one.held for one in ready) / room if room else 1.0
        labels = (self._pool, "effective")
        yield (
            "flow_control_pool_saturation",
            _Family(GaugeMetricFamily, "Share of slots that is taken.", ("inference_pool", "stage"), [(labels, full)]),
        )
        for name, says, value in (
            ("ready_endpoints", "Endpoints that may be sent requests.", len(ready)),
            ("average_queue_size", "Requests that wait in an endpoint.", _average([one.waiting for one in loads])),
            ("average_running_requests", "Requests that run in one.", _average([one.running for one in loads])),
            ("average_kv_cache_utilization", "Of their KV caches.", _average([one.kv_usage for one in loads])),
        ):
            rows = [] if value is None else [((self._pool,), value)]
            yield name, _Family(GaugeMetricFamily, says, ("name",), rows)

    def _model(self) -> str:
        """Return the model that all endpoints serve, and nothing else; "" if there is none such."""
        served = {one.spec.models for one in self._controller.endpoints.values()}
        models = served.pop() if len(served) == 1 else frozenset[str]()
        return next(iter(models)) if len(models) == 1 else ""


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
