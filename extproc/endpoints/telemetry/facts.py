"""What an engine says of itself in JSON, beside its metrics: how many requests it runs at once, how long a context.

Asked at first contact and then once a minute: these numbers change only with a restart. No I/O here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extproc.endpoints.telemetry.bounds import MOST_REQUESTS, MOST_TOKENS, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from extproc.endpoints.telemetry.engines import Engine, Fact

MOST_BYTES = 256 * 1024
"""SGLang's server_info has 50 KB, llama.cpp's props a chat template."""
EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine said of itself. None is unknown."""

    max_running: int | None = None
    context_tokens: int | None = None


def paths(engine: Engine) -> tuple[str, ...]:
    """Return the pages to ask an engine for, each once."""
    return tuple(dict.fromkeys(fact.path for facts in engine.asked for fact in facts))


def read_facts(engine: Engine, pages: Mapping[str, bytes]) -> Facts:
    """Return what `pages`, path -> body, tell. Garbage is unknown, never an exception."""
    told = {path: _parsed(body) for path, body in pages.items()}
    running, context = engine.asked
    return Facts(_first(running, told, MOST_REQUESTS), _first(context, told, MOST_TOKENS))


def _first(facts: Iterable[Fact], told: Mapping[str, object], most: float) -> int | None:
    """Return the number that the first of `facts` gives."""
    for fact in facts:
        numbers = [number for value in _at(told.get(fact.path), fact.keys) if (number := _number(value)) is not None]
        number = whole(sum(numbers) if fact.is_sum else max(numbers, default=None), most)
        if number is not None:
            return number
    return None


def _at(page: object, keys: tuple[str, ...]) -> Iterator[object]:
    """Walk what stands at `keys`."""
    if not keys:
        yield page
    elif keys[0] == "*" and isinstance(page, list):
        for item in page:
            yield from _at(item, keys[1:])
    elif isinstance(page, dict) and keys[0] in page:
        yield from _at(page[keys[0]], keys[1:])


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= MOST_TOKENS else None


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
