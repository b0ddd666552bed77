"""The configuration as JSON Schema (draft 2020-12), for editors and CI: `extproc schema`.

It says less than `extproc check`: how keys depend on one another stands in `rules`. What `check` takes, it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extproc.config.keys import Config, sections
from extproc.config.types import is_duration
from extproc.durations import format_duration
from extproc.stability import Level, of_key

if TYPE_CHECKING:
    from pydantic import BaseModel

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXPERIMENTAL = "Experimental: it may change or go with any release."


def schema() -> dict[str, Any]:
    """Return the schema of the configuration file."""
    found = Config.model_json_schema(by_alias=True)
    definitions = found.pop("$defs")
    every: list[tuple[str, type[BaseModel]]] = [("", Config), *sections()]
    for path, section in every:
        node = definitions[section.__name__] if path else found
        node.pop("title", None)
        for name, field in section.model_fields.items():
            key = field.alias or name
            shown = node["properties"][key]
            shown.pop("title", None)
            default = field.get_default()
            if is_duration(field) and isinstance(default, float):
                shown["default"] = format_duration(default)
            elif name == "socket_mode":
                shown["default"] = f"{default:04o}"
            elif shown.get("default") is None or isinstance(shown["default"], (dict, list)):
                shown.pop("default", None)  # absent says it as well
            if not path and of_key(key) is Level.EXPERIMENTAL:
                shown["description"] += f" {EXPERIMENTAL}"
    top = {"$schema": DIALECT, "title": "extproc, the waiting room for GPUs", **found}
    return {**top, "$defs": dict(sorted(definitions.items()))}
