"""From a file and environment variables to a `Config`.

All problems of a file are reported at once, each with its key path and what would be right.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from extproc.config.keys import Config, sections
from extproc.config.rules import cross_check
from extproc.config.types import shown
from extproc.errors import ConfigError
from extproc.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

ENV_PREFIX = "EXTPROC_"
NEARLY = 0.8
"""How like a key's name a variable must be to be a mistake: others may be somebody else's (a Kubernetes service that is
called extproc gives every pod EXTPROC_PORT and the like)."""


def load_config(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and validate a file. Environment variables win over it. Raises ConfigError with all problems."""
    return parse_config(read_text(path), str(path), environ)


def parse_config(text: str, source: str, environ: Mapping[str, str] = os.environ) -> Config:
    """Validate the YAML `text`, called `source` in messages. Raises ConfigError with all problems."""
    try:
        data = load_yaml(text)
    except YAML_ERRORS as error:
        raise ConfigError(source, ["is no valid YAML: " + one_line(error)]) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(source, [f"must be a mapping of keys to values, not {shown(data)}"])
    if "static_resources" in data or "dynamic_resources" in data:
        words = (
            "looks like an Envoy bootstrap, and no configuration of the sidecar: give it to --envoy of `extproc check`"
        )
        raise ConfigError(source, [words])
    problems = _overlay_environment(data, environ)
    config, found, gone = _validate(data)
    problems += found
    if config is not None:
        problems += [problem for problem in cross_check(config) if not _is_about(problem, gone)]
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError)
"""What PyYAML raises: also its own constructors' errors, for a date like 2024-13-45, `!!int abc`, or deep nesting."""


def one_line(error: BaseException) -> str:
    """Return what an error says, for a line of a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand only once in a mapping."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _overlay_environment(data: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Let EXTPROC_KEY, and EXTPROC_SECTION__KEY, win over the file. What is nearly a key's name is a problem."""
    problems = []
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX):
            continue
        path = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if path[0] not in Config.model_fields or len(path) > 2:
            close = difflib.get_close_matches(path[0], Config.model_fields, n=1, cutoff=NEARLY)
            if close:
                meant = "__".join([ENV_PREFIX + close[0].upper(), *map(str.upper, path[1:2])])
                problems.append(f"environment variable {variable}: no such key; did you mean {meant}?")
            continue
        try:
            value = yaml.safe_load(environ[variable])
        except YAML_ERRORS:
            problems.append(f"{'.'.join(path)}: environment variable {variable} is no valid YAML")
            continue
        target = data
        if len(path) > 1:
            section = data.get(path[0])
            target = section if isinstance(section, dict) else {}
            data[path[0]] = target
        target[path[-1]] = value
    return problems


def load_yaml(text: str) -> Any:
    """Return what the YAML `text` says. Raises what YAML_ERRORS lists."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that also refuses duplicate keys


_WORD = re.compile(r"\w+")


def _validate(data: dict[str, Any]) -> tuple[Config | None, list[str], set[str]]:
    """Validate types; on problems, return also the config without the broken parts, so that the rest is checked too.

    The last is the keys, and their paths, that were left out of it: what a rule says of these, nobody wrote.
    """
    problems: list[str] = []
    dropped: set[tuple[int | str, ...]] = set()
    gone: set[str] = set()
    for _ in range(20):
        try:
            return Config.model_validate(data), problems, gone
        except ValidationError as error:
            details = error.errors(include_url=False)
        problems += [
            problem
            for detail in details
            if detail["loc"] not in dropped and (problem := _explain(detail)) not in problems
        ]
        for detail in sorted(details, key=lambda detail: str(detail["loc"]), reverse=True):
            location = detail["loc"]
            while location in dropped:  # nothing can stand in for it: what it is part of goes too
                location = location[:-1]
            if location:
                dropped.add(location)
                _drop(data, location)
                if detail["type"] != "extra_forbidden" and not _stood_in(location):
                    gone |= {_path(location), *[part for part in location if isinstance(part, str)][-1:]}
    return None, problems, gone


def _is_about(problem: str, gone: set[str]) -> bool:
    """Tell whether a problem is that of a key in `gone`, or speaks of one."""
    path, _, words = problem.partition(": ")
    return path in gone or not gone.isdisjoint(_WORD.findall(words))


_STAND_INS = {"name": "broken-{}", "address": "[100::{:x}]:1"}
"""Each unlike all others. The addresses are of the block that leads nowhere (RFC 6666)."""


def _drop(data: Any, location: tuple[int | str, ...]) -> None:
    """Replace the broken part at `location` by its default, or by a stand-in where a value is required."""
    index: int | str = 0
    if location[0] in ("discovery", "replicas", "inference_pool"):
        data.pop(location[0], None)  # all that is wrong in it was reported at once
        return
    if location[0] == "tls":
        data["tls"] = {"cert_file": "/broken", "key_file": "/broken"}  # likewise, and it is there
        return
    for depth, key in enumerate(location):
        last = depth + 1 == len(location)
        if isinstance(data, list) and isinstance(key, int):
            index = key
            if last or not isinstance(data[key], dict):
                names = _required(location) if depth == 1 else ()
                data[key] = {name: _STAND_INS[name].format(index) for name in names} or ""
                return
        elif last or not isinstance(data.get(key), (dict, list)):
            if _stood_in(location):
                data[key] = _STAND_INS[str(key)].format(index)
            else:
                data.pop(key, None)
            return
        data = data[key]


def _stood_in(location: tuple[int | str, ...]) -> bool:
    """Tell whether what is broken at `location` has a stand-in."""
    names = _required(location)
    return location[-1] in names if len(location) > 2 else bool(names) and len(location) == 2


def _required(location: tuple[int | str, ...]) -> tuple[str, ...]:
    return {"endpoints": ("name", "address"), "classes": ("name",), "overflow_clusters": ("name",)}.get(
        str(location[0]), ()
    )


def _path(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


_BOUNDS = {
    "missing": "is required",
    "literal_error": "must be {expected}, not {value}",
    "greater_than_equal": "must be {ge} or more, not {value}",
    "less_than_equal": "must be {le} or less, not {value}",
    "too_short": "needs {min_length} item at least",
    "too_long": "may have {max_length} items at most, not {actual_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "may have {max_length} characters at most",
    "string_pattern_mismatch": "must match {pattern}, not {value}",
}
"""What pydantic finds by itself, in our words."""


def _explain(detail: ErrorDetails) -> str:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    context = detail.get("ctx", {})
    path = _path(part for part in location if not _is_union_branch(part))
    match kind:
        case "extra_forbidden":
            known = _keys_at(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            return f"{path}: unknown key; {hint}"
        case "value_error":
            return f"{path}: {context['error']}"
        case "invalid_key":
            return f"{path}: unknown key; keys are words"
        case _ if kind in _TYPES:
            hint = ""
            if location[0] == "endpoints" and len(location) == 2 and isinstance(value, str):
                host = value.partition("//")[2].partition("/")[0] or value
                address = host if ":" in host else "10.0.0.7:8000"
                hint = f"; {{name: server-{int(location[1]) + 1}, address: {address!r}}} would be right"
            return f"{path}: must be {_TYPES[kind]}, not {shown(value)}{hint}"
        case _:
            words = _BOUNDS.get(kind, "can't be {value}")
            return f"{path}: {words.format(**context, value=shown(value))}"


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and "[" in part


SECTIONS: dict[str, type[BaseModel]] = {
    "": Config,
    **{path.replace("[]", ""): section for path, section in sections()},
}


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    section = SECTIONS[".".join(part for part in location if isinstance(part, str) and not _is_union_branch(part))]
    return [field.alias or name for name, field in section.model_fields.items()]
