"""Which requests wait for a slot: a table by method and path, and the shape that errors have there.

Not every request is a completion. A list of models, a browser's preflight or a lookup takes no part of a batch: it goes
at once, whatever waits. What the table does not name goes by its method: GET, HEAD, OPTIONS and DELETE at once, all
else is queued.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

LIGHT = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))
"""Methods that ask an inference server for no tokens."""
REMEMBERED: Final = 1024
LONGEST: Final = 256
"""Methods with paths whose rule is kept, and the most characters of a path; clients write both, so there is an end."""


class Action(Enum):
    """What becomes of a request."""

    QUEUE = "queue"  # it waits for a slot, and takes it
    PASS = "pass"  # noqa: S105 - it goes at once to an endpoint that serves its model, and takes no slot
    MODELS = "models"  # we answer it with the models of all endpoints; passed on where the config does not list them


class Shape(Enum):
    """How an error is written."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table.

    Attributes:
        path: the path without its query; with a `*` at its end, all that begin so; "" or "*": any.
        methods: upper case; none: any.
        action: what becomes of the request; None: by its method.
        shape: how errors are written; None: as the path's API has it.
    """

    path: str
    methods: frozenset[str] = frozenset()
    action: Action | None = None
    shape: Shape | None = None

    def fits(self, method: str, path: str) -> bool:
        """Tell whether a request is meant."""
        if self.methods and method not in self.methods:
            return False
        return path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path


OWN = (
    Rule("/v1/models", frozenset(("GET",)), Action.MODELS),
    Rule("/v1/models/*", frozenset(("GET",)), Action.MODELS),
)
"""Rows after those of the config."""


class Routes:
    """The table. The first row that fits decides, for action and shape apart."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        """Look at `rules` first, then at our own."""
        self._rules = (*rules, *OWN)
        self._known: dict[tuple[str, str], tuple[Action, Shape]] = {}

    def find(self, method: str, path: str) -> tuple[Action, Shape]:
        """Return what becomes of a request, and the shape of its errors. Without a method: it is queued."""
        key = (method, path)
        found = self._known.get(key)
        if found is None:
            found = self._look(method, path.partition("?")[0])
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            if len(method) + len(path) <= LONGEST and "?" not in path:  # a query may have a secret
                self._known[key] = found
        return found

    def _look(self, method: str, path: str) -> tuple[Action, Shape]:
        fitting = [rule for rule in self._rules if rule.fits(method, path)]
        action = next((rule.action for rule in fitting if rule.action is not None), None)
        shape = next((rule.shape for rule in fitting if rule.shape is not None), None)
        if action is None:
            action = Action.PASS if method in LIGHT else Action.QUEUE
        if shape is None:
            shape = Shape.ANTHROPIC if path == "/v1/messages" or path.startswith("/v1/messages/") else Shape.OPENAI
        return action, shape
