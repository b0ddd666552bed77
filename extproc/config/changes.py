"""What differs between two configurations, a line for each key: key, old value, new value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from extproc.config.types import shown
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.config.keys import Config

MOST_TEXT = 100
"""Characters of a list; of a longer one it is told what came and what went."""
MOST_NAMED = 8


def changes(old: Config, new: Config) -> list[str]:
    """Return a line for each key of which the value differs, items of lists by their names."""
    keys = {key for key in type(new).model_fields if getattr(old, key) != getattr(new, key)}
    before, after = (one.model_dump(by_alias=True, include=keys) for one in (old, new))
    return list(_changes(before, after, ""))


def _changes(old: Any, new: Any, where: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, SecretStr) or isinstance(new, SecretStr):  # that it changed is told, and not to what
        yield f"{where}: changed"
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif _are_named(old) and _are_named(new):
        yield from _named_changes(old, new, where)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(old[0], dict):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _changes(*pair, f"{where}[{index}]")
    elif _are_words(old) and _are_words(new) and max(len(_short(old)), len(_short(new))) > MOST_TEXT:
        yield f"{where}: {_difference(old, new)}"
    else:
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _named_changes(old: list[dict[str, Any]], new: list[dict[str, Any]], where: str) -> Iterator[str]:
    before, after = ({item["name"]: item for item in items} for items in (old, new))
    for name in {**before, **after}:
        if name not in after:
            yield f"{where}: {name} is gone"
        elif name not in before:
            yield f"{where}: {name} is new{_address_of(after[name])}"
        else:
            yield from _changes(before[name], after[name], f"{where}[{name}]")
    if list(before) != list(after) and before.keys() == after.keys():
        yield f"{where}: in another order: {', '.join(after)}"
    first, was = next(iter(after), None), next(iter(before), None)
    if where == "classes" and first != was:
        yield f"{where}: who names none is of {first} now, and was of {was}"


def _are_named(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value)


def _address_of(item: dict[str, Any]) -> str:
    return f" ({item['address']})" if item.get("address") is not None else ""


def _are_words(value: object) -> bool:
    return isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)


def _difference(old: list[object], new: list[object]) -> str:
    come, gone = ([one for one in some if one not in others] for some, others in ((new, old), (old, new)))
    parts = [
        f"{len(some)} {what} ({some_of(list(map(str, some)), MOST_NAMED)})"
        for what, some in (("come", come), ("go", gone))
        if some
    ]
    return ", ".join(parts) or "in another order"


def _short(value: Any) -> str:
    if _are_words(value):
        return f"[{', '.join(map(str, value)) or 'none'}]"
    if value is None:
        return "unset"
    if isinstance(value, list):
        return f"{len(value)} item(s)"
    return f"{value:.15g}" if isinstance(value, float) else shown(value).strip("'")
