"""Failing open among servers of different models: what no sidecar steered goes to servers that have its model.

Any server would be wrong: one that lacks the model answers 404, which clients take for good. Which servers have it, the
configuration says (`models`). Where a clusters file tells Envoy who is there, that is not known when the bootstrap is
rendered, and requests go to any: `any_server` says so.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from extproc.envoy.filters import lua_filter
from extproc.envoy.skeleton import other_host
from extproc.stream import wire

if TYPE_CHECKING:
    from extproc.config import Config

CLUSTER = "extproc_unsteered_"
"""How such clusters are called; a number follows."""
FILTER = "extproc-fallback"
ELSEWHERE = f"""\
                  # What no server has begun to read is sent to another one. Whoever is dead has the fewest requests, so
                  # least request draws it again and again: hence so many attempts.
                  retry_policy:
                    retry_on: "connect-failure,refused-stream,reset-before-request"
                    num_retries: 10
{other_host(20, attempts=100)}"""
"""What a route to any of several servers has below its `route`."""


class Serving(NamedTuple):
    """Models that the same endpoints serve, and the cluster of these."""

    cluster: str
    models: tuple[str, ...]
    addresses: tuple[str, ...]


def differ(config: Config) -> bool:
    """Tell whether endpoints list different models, as far as the configuration says."""
    return len({frozenset(one.models) for one in (*config.endpoints, *config.sources)}) > 1


def any_server(config: Config) -> str | None:
    """Return what is wrong with failing open to any endpoint of `config`; None: nothing, or that it is not so."""
    if config.envoy_clusters_file is None or not differ(config):
        return None
    return (
        "endpoints list different models, and Envoy has them from a file (envoy_clusters_file): while no sidecar "
        "answers, a request goes to any of them, and one lacking its model answers 404, which clients take for good; "
        "without --fail-open it gets 503"
    )


def by_model(config: Config) -> list[Serving]:
    """Return who serves which models; empty where all serve the same, and where that is not known."""
    if config.envoy_clusters_file is not None or not differ(config):
        return []
    serving: dict[tuple[str, ...], list[str]] = {}
    for model in sorted(filter(str.isprintable, config.models)):
        serving.setdefault(_serving(config, model), []).append(model)
    return [
        Serving(f"{CLUSTER}{number}", tuple(models), addresses)
        for number, (addresses, models) in enumerate(serving.items(), 1)
        if addresses
    ]


def others(config: Config) -> list[str]:
    """Return the addresses of who gets what names no model, or one that nobody lists."""
    addresses = [endpoint.address for endpoint in config.endpoints]
    if not by_model(config):
        return addresses
    any_model = [endpoint.address for endpoint in config.endpoints if not endpoint.models]
    if any_model or config.default_model is None:
        return any_model or addresses
    return list(_serving(config, config.default_model)) or addresses


def _serving(config: Config, model: str) -> tuple[str, ...]:
    return tuple(one.address for one in config.endpoints if not one.models or model in one.models)


def route(config: Config, answer: str) -> str:
    """Return the route of what `steering` sends somewhere; `answer`: what it adds to answers."""
    if not by_model(config):
        return ""
    header = json.dumps(config.headers.cluster)
    return f"""\
              # Steered by its model alone, failing open: no sidecar answered, or none was asked (the bypass).
              - match:
                  prefix: /
                  headers: [{{name: {header}, string_match: {{prefix: {CLUSTER}}}}}]
                route:
                  cluster_header: {header}
                  timeout: 0s
{ELSEWHERE}                request_headers_to_remove: [{header}]
{answer}"""


def is_route(match: dict[str, Any]) -> bool:
    """Tell whether what a route asks for is what `route` does: it follows no decision of ours."""
    asked = (one.get("string_match") for one in match.get("headers") or [] if isinstance(one, dict))
    return any(isinstance(one, dict) and one.get("prefix") == CLUSTER for one in asked)


def steering(config: Config) -> str:
    """Return the filter behind ours that steers by the model what no sidecar steered; "": none is wanted."""
    found = by_model(config)
    if not found:
        return ""
    header = _lua(config.headers.cluster)
    named = " ".join(f"name(headers:get({_lua(name)})) or" for name in config.headers.model)
    in_body = (
        f'handle:streamInfo():dynamicMetadata():get("{wire.FIELDS_NAMESPACE}")' if config.request_fields else "nil"
    )
    source = "\n".join(
        (
            "local clusters = {}",
            *(f"clusters[{_lua(model)}] = {_lua(one.cluster)}" for one in found for model in one.models),
            'local function name(text) return text ~= "" and text end',
            "function envoy_on_request(handle)",
            "  local headers = handle:headers()",
            f"  if headers:get({header}) then return end",
            f"  local fields = {in_body}",
            f"  local cluster = clusters[{named} (fields and fields.model) or 0]",
            "  if cluster then",
            f"    headers:add({header}, cluster)",
            "    handle:clearRouteCache()",
            "  end",
            "end",
        )
    )
    return f"""\
          # Failing open: what no sidecar steered goes to a server that has its model. Any other would answer 404, which
          # clients take for good.
{lua_filter(FILTER, source)}"""


def _lua(text: str) -> str:
    """Return `text` as Lua writes it, byte by byte where it is not plain."""
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03d}" for byte in text.encode())
    return f'"{"".join(plain)}"'
