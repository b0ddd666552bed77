"""Writes docs/reference.md and docs/config.schema.json from the code: `make reference`. Tests hold them current."""

from __future__ import annotations

import argparse
import json
from inspect import cleandoc
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from extproc import stability
from extproc.admission.controller import Controller
from extproc.admission.outcome import Outcome
from extproc.admission.values import Policy
from extproc.commands import cli
from extproc.config import Config, sections
from extproc.config.schema import schema
from extproc.config.types import is_duration
from extproc.durations import format_duration
from extproc.observe.aliases import Aliases
from extproc.observe.capacity import Capacity
from extproc.observe.genai import GenAi
from extproc.observe.metrics import Metrics
from extproc.observe.paces import Paces
from extproc.observe.served import Served
from extproc.replicas.observe import ReplicaMetrics

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TARGET = Path(__file__).with_name("reference.md")
SCHEMA = Path(__file__).with_name("config.schema.json")
_INTRODUCTION = """\
# Reference

Written from the code by `make reference`; `make test` checks that it is current.

## Configuration

YAML. Unknown keys are errors; `extproc check FILE` names all mistakes at once. Durations are like `10s`, `250ms`, `2m`;
a bare number is seconds, with a warning.
Each key can be set by an environment variable too, which wins: `EXTPROC_ENABLE_QUEUE=true`,
`EXTPROC_HEADERS__MODEL=x-llm`, and as YAML `EXTPROC_ENDPOINTS='[{name: a, address: "10.0.0.7:8000"}]'`.

Editors complete keys and underline mistakes with the [JSON Schema](config.schema.json) (`extproc schema` prints it) and
a first line like `# yaml-language-server: $schema=config.schema.json`. It knows each key, not how keys depend on one
another: `check` does, and with `--output json` it tells a pipeline, as `{"ok": false, "findings": [{"file": ...,
"severity": "error", "at": "endpoints[0].address", "message": ...}]}`; `severity` is `error`, `warning` or `info`.

Everything here is stable, and changes only as [COMPATIBILITY.md](../COMPATIBILITY.md) says, but what is marked
*experimental*: that may change or go with any release.
"""
ADAPTIVE = {"max_running_requests"}


def reference() -> str:
    """Return the reference as Markdown."""
    parts = [
        _INTRODUCTION,
        _keys(Config),
        *(f"### `{path}`\n\n{cleandoc(one.__doc__ or '')}\n\n{_keys(one, f'{path}.')}" for path, one in sections()),
        _outcomes(),
        _metrics(),
        _commands(),
    ]
    return "\n".join(parts)


def schema_text() -> str:
    """Return the JSON Schema of the configuration, as `extproc schema` prints it."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _keys(section: type[BaseModel], path: str = "") -> str:
    rows = ["| key | default | meaning | stability |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        default = _default(name, field)
        key = field.alias or name
        rows.append(f"| `{key}` | {default} | {field.description} | {_shown(stability.of_key(path + key))} |")
    return "\n".join(rows) + "\n"


def _shown(level: stability.Level) -> str:
    return level if level is stability.Level.STABLE else f"*{level}*"


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if value is None:
        return "`adaptive`" if name in ADAPTIVE else ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if name == "socket_mode":
        return f"`{value:04o}`"
    if isinstance(value, float):
        return f"`{format_duration(value) if is_duration(field) else format(value, 'g')}`"
    if isinstance(value, (list, BaseModel)):
        return "one, `default`" if value and name == "classes" else "below" if name == "headers" else "none"
    return f"`{value}`"


def _outcomes() -> str:
    rows = [
        "## Outcomes\n\nHow a request leaves the queue: label of metrics, `x-extproc-outcome` of refusals, `outcome`",
        "in Envoy's dynamic metadata (namespace `extproc`, with `endpoint`, `home`, `class`, `wait_ms`, `position`,",
        '`waited_for`). `model_missing` names your header, and with `request_fields` the body\'s "model", too.\n',
        "| outcome | HTTP | the client reads |",
        "| --- | --- | --- |",
    ]
    rows += [f"| `{outcome.value}` | {outcome.status or ''} | {outcome.message} |" for outcome in Outcome]
    rows.append("| `unsteered` | 503 | (Envoy's own text: no sidecar answered, and the bootstrap fails closed) |")
    return "\n".join(rows) + "\n"


def _metrics() -> str:
    """Describe what /metrics has, from the collectors themselves, in a dry run so that its metrics are there too."""
    rows = [
        "## Metrics\n\nAt `/metrics` of the admin port. Labels come from the configuration, never from clients.",
        "On Linux `process_*` too: CPU, memory, file descriptors. The alerts: [runbook.md](runbook.md).\n",
        "| metric | type | labels | meaning | stability |",
        "| --- | --- | --- | --- | --- |",
    ]
    controller = Controller(Policy())
    ours = Metrics(controller, lambda: 0, rehearsed={})
    aliases, full = Aliases(controller, ours, ""), Capacity(controller, float)
    collectors = (ours, full, Paces(controller), Served(controller), aliases, GenAi(float, bool), ReplicaMetrics())
    for family in chain.from_iterable(one.collect() for one in collectors):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        level = _shown(stability.of_metric(family.name))
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} | {level} |")
    return "\n".join(rows) + "\n"


def _commands() -> str:
    parts = ["## Commands\n\nExit codes: 0 ok, 1 invalid input, 2 usage, 3 could not bind or start.\n"]
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in commands._choices_actions}
    for name, command in commands.choices.items():
        level = "" if stability.of_command(name) is stability.Level.STABLE else " *(experimental)*"
        rows = [f"### `extproc {name}`\n\n{helps[name]}{level}"]
        arguments = [_argument(action) for action in command._actions if action.dest != "help"]
        if arguments:
            rows += ["", "| argument | default | meaning |", "| --- | --- | --- |", *arguments]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _argument(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    default = f"`{action.default}`" if action.default not in (None, False) else ""
    if action.choices is not None:
        default += " of " + ", ".join(f"`{choice}`" for choice in action.choices)
    meaning = (action.help or "").replace(" (%(default)s)", "").replace(" (default: %(default)s)", "")
    return f"| {names} | {default.strip()} | {meaning} |"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
