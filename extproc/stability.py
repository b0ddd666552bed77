"""What may still change without notice. All else is stable: it changes only as COMPATIBILITY.md says.

The reference shows it beside each key, metric and command, and `extproc schema` to an editor.
"""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    """How much one may build on a name."""

    STABLE = "stable"
    EXPERIMENTAL = "experimental"


KEYS = frozenset(
    {
        "adapter_affinity",  # young
        "adaptive_limit",  # constants of a law that measurements still move
        "classes.objectives",  # their API is alpha
        "classes.on_refusal",  # young
        "binding",  # `bound` is there to be compared with
        "dialect",
        "first_byte_probe",
        "learning",  # as `adaptive_limit`
        "inference_pool",  # young, and so are the gateways that it is for
        "max_prompt_tokens",
        "metrics_aliases",  # the names are llm-d's to change
        "otlp_metrics",  # OpenTelemetry's own names for generative AI are not final
        "overflow_clusters",
        "picker",
        "replicas",
        "second_try",
        "session_affinity",  # young
        "short_prompts_first",
        "tenants",  # what users of caps and guarantees want is not known yet
        "transport",  # completion_queue drives private parts of grpcio (docs/adr/0006)
    }
)
"""Keys of the configuration, by path as in `adaptive_limit.start`; one stands for all below it."""
METRICS = frozenset(
    {
        *(
            "extproc_bad_answers",
            "extproc_capacity_",
            "extproc_endpoint_silent",
            "extproc_endpoint_slowness",
            "extproc_engines_needed",
            "extproc_held_requests",
            "extproc_limited_by",
            "extproc_pool_",
        ),
        *("extproc_overflowed", "extproc_replica_", "extproc_second_tries", "extproc_tenant_", "extproc_transport"),
        *("gen_ai_", "inference_", "llm_d_epp_"),
    }
)
"""How the names of metrics begin."""
COMMANDS = frozenset({"engine", "simulate", "up"})
"""Commands: their options, and what they print."""


def of_key(path: str) -> Level:
    """Return the level of a key; `path` as in the reference: `discovery[].dns.name`."""
    parts = path.replace("[]", "").split(".")
    above = {".".join(parts[: length + 1]) for length in range(len(parts))}
    return Level.EXPERIMENTAL if above & KEYS else Level.STABLE


def of_metric(name: str) -> Level:
    """Return the level of a metric."""
    return Level.EXPERIMENTAL if name.startswith(tuple(METRICS)) else Level.STABLE


def of_command(name: str) -> Level:
    """Return the level of a command."""
    return Level.EXPERIMENTAL if name in COMMANDS else Level.STABLE
