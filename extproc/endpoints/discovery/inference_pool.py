"""An InferencePool of Kubernetes: its ready pods, an endpoint for each target port, and its objectives' priorities.

    the pool ──selector──▶ its pods ──ready, ports──▶ endpoints
    InferenceObjectives, of two API groups ──those of this pool──▶ priorities by name

Which pods are in, and the annotation that takes ports out, is as llm-d's router and the lightweight picker of
gateway-api-inference-extension have it (pkg/epp/datastore/datastore.go, pkg/lwepp/datastore/datastore.go).
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from extproc.endpoints.discovery.findings import Findings
from extproc.endpoints.discovery.watch import Watch
from extproc.endpoints.names import address_of
from extproc.kubernetes import ApiServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from extproc.config import EndpointConfig, InferencePoolConfig
    from extproc.endpoints.discovery.watch import Item

    Report = Callable[[Sequence[EndpointConfig]], None]

log = logging.getLogger("extproc.discovery.inference_pool")

POOLS = "inference.networking.k8s.io/v1"
OBJECTIVES = ("inference.networking.x-k8s.io/v1alpha2", "llm-d.ai/v1alpha2")
"""API groups that have InferenceObjectives. Where both name one, the last counts: the first is deprecated."""
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
"""Annotations of a pod, like `8000,8002`: of the target ports these alone. The first that is there counts."""
MOST_PORTS = 8
"""Target ports of a pool, says its API."""


class _Pool(NamedTuple):
    selector: str
    ports: tuple[int, ...]


class _Pod(NamedTuple):
    """`address`: None while the pod must get nothing. `active`: None if no annotation names ports."""

    address: str | None
    active: frozenset[int] | None


class _Objective(NamedTuple):
    pool: str
    priority: int


class InferencePool:
    """Watches a pool, its pods and its objectives."""

    def __init__(
        self,
        config: InferencePoolConfig,
        environ: Mapping[str, str] = os.environ,
        leave_out: Callable[[int], None] = lambda _number: None,
        rank: Callable[[Mapping[str, int]], None] = lambda _priorities: None,
    ) -> None:
        """Watch the pool that `config` names; `leave_out` counts; `rank` is told the objectives' priorities by name."""
        self._name = config.name
        self._api = ApiServer(config, environ)
        self._rank = rank
        self._pools: Watch[_Pool | None] = Watch(
            self._api, POOLS, "inferencepools", {"fieldSelector": f"metadata.name={config.name}"}, _pool_of
        )
        self._objectives: list[Watch[_Objective | None]] = []
        if config.objectives:
            self._objectives = [
                Watch(self._api, group, "inferenceobjectives", {}, _objective_of, is_optional=True)
                for group in OBJECTIVES
            ]
        self._findings = Findings(log, f"inference pool {config.name}", config, leave_out)
        self._pool: _Pool | None = None
        self._pods: Watch[_Pod | None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._report: Report = lambda _endpoints: None

    async def run(self, report: Report) -> None:
        """Watch for ever. A pool that is deleted has no endpoints; failures change nothing."""
        self._report = report
        self._pool, self._following = None, None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pools.run(lambda: self._see_pool(tasks)), name="pool")
            for watch in self._objectives:
                tasks.create_task(watch.run(self._see_objectives), name="objectives")

    # ---- what is seen

    def _see_pool(self, tasks: asyncio.TaskGroup) -> None:
        """Follow the pods that the pool selects now; until they are listed, those of before stay."""
        seen = self._pools.items.get(self._name)
        if seen is None and self._name in self._pools.items:
            log.error(
                "inference pool %s: it has no selector or ports that we understand; going on as before", self._name
            )
            return
        before, self._pool = self._pool, seen
        if before is not None and (seen is None or seen.selector != before.selector):
            self._stop_following()
        if seen is None:
            log.warning("inference pool %s: there is none of this name, so it has no endpoints", self._name)
            self._report([])
        elif self._following is None:
            query = {"labelSelector": seen.selector}
            self._pods = pods = Watch(self._api, "v1", "pods", query, _pod_of)
            self._following = tasks.create_task(pods.run(self._see_pods), name="pods")
        else:
            self._see_pods()

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self._pods = self._following = None

    def _see_pods(self) -> None:
        if self._pods is None or self._pool is None or not self._pods.is_known:
            return
        found: dict[str, str] = {}
        problems: set[str] = set()
        for name, pod in sorted(self._pods.items.items()):
            if pod is None:
                problems.add(f"pod {name!r:.100}")
            else:
                found.update(_addresses(name, pod, self._pool.ports))
        self._report(self._findings.endpoints(found, problems))

    def _see_objectives(self) -> None:
        priorities = {
            name: objective.priority
            for watch in self._objectives
            for name, objective in watch.items.items()
            if objective is not None and objective.pool == self._name
        }
        self._rank(priorities)


def _addresses(name: str, pod: _Pod, ports: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Walk name and address of a pod's endpoints: POD, or POD-rank-N where the pool has several ports."""
    if pod.address is None:
        return
    for rank, port in enumerate(ports):
        if pod.active is None or port in pod.active:
            yield (name if len(ports) == 1 else f"{name}-rank-{rank}"), address_of(pod.address, port)


def _pool_of(item: Item) -> _Pool | None:
    """Return what matters of an InferencePool; None: it has not what its API says."""
    try:
        labels = item["spec"]["selector"]["matchLabels"]
        ports = tuple(port["number"] for port in item["spec"]["targetPorts"])
        selector = ",".join(f"{key}={labels[key]}" for key in sorted(labels))
    except (AttributeError, LookupError, TypeError):
        return None
    fits = 1 <= len(ports) <= MOST_PORTS and all(type(port) is int and 1 <= port <= 65535 for port in ports)
    return _Pool(selector, ports) if fits and selector else None


def _pod_of(item: Item) -> _Pod | None:
    """Return what matters of a pod; None: it is none."""
    try:
        metadata, status = item["metadata"], item.get("status") or {}
        conditions = status.get("conditions") or ()
        is_ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
        is_in = is_ready and metadata.get("deletionTimestamp") is None
        return _Pod(status.get("podIP") or None if is_in else None, _active(metadata.get("annotations") or {}))
    except (AttributeError, LookupError, TypeError):
        return None


def _active(annotations: Mapping[str, Any]) -> frozenset[int] | None:
    for name in ACTIVE_PORTS:
        text = annotations.get(name)
        if text is not None:
            words = [word.strip() for word in str(text).split(",")]
            return frozenset(int(word) for word in words if word.isascii() and word.isdigit() and len(word) <= 5)
    return None


def _objective_of(item: Item) -> _Objective | None:
    """Return what matters of an InferenceObjective; None: it has not what its API says."""
    try:
        spec = item["spec"]
        priority = spec.get("priority")
        pool, priority = spec["poolRef"]["name"], 0 if priority is None else priority
    except (AttributeError, LookupError, TypeError):
        return None
    return _Objective(pool, priority) if isinstance(pool, str) and type(priority) is int else None
