"""What of a sidecar's configuration decides about requests, as short marks that sidecars can compare.

The leader's rules are those that count, for everybody's requests. Where others differ is shown, and changes nothing.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from extproc.admission.controller import Controller
    from extproc.admission.values import EndpointSpec

KEYS = {
    "patience_s": "max_queue_wait_time",
    "fair": "tenant_fairness",
    "short_first": "short_prompts_first",
    "limit_law": "adaptive_limit",
    "laws": "learning",
    "max_kv_usage": "max_gpu_perc",
    "max_gpu_usage": "gpu_utilization_perc",
    "stale_after_s": "telemetry_stale_after",
}
"""Fields of the policy by the keys that people write, where they differ."""


def rules_of(controller: Controller) -> frozenset[str]:
    """Return a mark for each key that decides: `classes=1a2b3c4d`, `endpoints.a=…`."""
    policy = controller.policy
    marks = {_mark(KEYS.get(field.name, field.name), getattr(policy, field.name)) for field in fields(policy)}
    endpoints = controller.endpoints.values()
    return frozenset(marks.union(_of_endpoint(one.spec) for one in endpoints if not one.removed))


@lru_cache(maxsize=4096)
def _of_endpoint(spec: EndpointSpec) -> str:
    """Return its mark. Looked for at each change of one of them: for 500 that list 1,000 models it took 270 ms."""
    return _mark(f"endpoints.{spec.name}", (sorted(spec.models), spec.max_running_requests, spec.kv_capacity_tokens))


def _mark(key: str, value: object) -> str:
    return f"{key}={crc32(repr(value).encode()):08x}"


def differing(ours: frozenset[str], theirs: frozenset[str]) -> list[str]:
    """Return the keys that both have, and whose values differ."""
    mine, other = (dict(mark.rpartition("=")[::2] for mark in marks) for marks in (ours, theirs))
    return sorted(key for key in mine.keys() & other.keys() if mine[key] != other[key])
