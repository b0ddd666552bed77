"""Cross-checks an Envoy bootstrap against a configuration: settings that silently lose or end held requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from extproc.durations import parse_duration
from extproc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extproc.config import Config

FILTER = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
DEFAULT_MESSAGE_TIMEOUT_S = 0.2
DEFAULT_STREAM_IDLE_TIMEOUT_S = 300.0


def check_envoy(config: Config, path: Path) -> list[str]:
    """Return what in the bootstrap at `path` does not fit `config`. Raises ConfigError if it can't be read."""
    try:
        bootstrap = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read: {error.strerror or error}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), ["is no valid YAML: " + " ".join(str(error).split())]) from None
    nodes = list(_walk(bootstrap, ""))
    filters = [(where, node) for where, node in nodes if node.get("@type") == FILTER]
    if not filters:
        return ["has no envoy.filters.http.ext_proc filter; `extproc envoy-config` prints a bootstrap that has one"]
    problems: list[str] = []
    for where, node in filters:
        if not node.get("observability_mode"):
            problems += _check_filter(where, node, config.longest_budget_s)
    for where, node in nodes:
        if "http_filters" in node:
            problems += _check_connection_manager(where, node, config.longest_budget_s)
    return problems


def _check_filter(where: str, node: dict[str, Any], longest_s: float) -> Iterator[str]:
    timeout_s = _seconds(node.get("message_timeout"), DEFAULT_MESSAGE_TIMEOUT_S)
    if timeout_s <= longest_s:
        yield (
            f"{where}.message_timeout: {timeout_s:g}s is not above the longest budget, {longest_s:g}s: Envoy would "
            f"give up on requests that wait; {longest_s + 20:g}s would be right"
        )
    if node.get("processing_mode", {}).get("response_trailer_mode") != "SEND":
        yield (
            f"{where}.processing_mode.response_trailer_mode: must be SEND: else the stream ends before the answer "
            "does, and its lease would be given back too early"
        )


def _check_connection_manager(where: str, node: dict[str, Any], longest_s: float) -> Iterator[str]:
    idle_s = _seconds(node.get("stream_idle_timeout"), DEFAULT_STREAM_IDLE_TIMEOUT_S)
    if 0 < idle_s <= longest_s:
        yield (
            f"{where}.stream_idle_timeout: {idle_s:g}s is not above the longest budget, {longest_s:g}s: held time "
            f"counts against it; {longest_s + 60:g}s or more would be right"
        )


def _walk(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from _walk(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{where}[{index}]")


def _seconds(value: object, default: float) -> float:
    seconds = parse_duration(str(value)) if value is not None else None
    return default if seconds is None else seconds
