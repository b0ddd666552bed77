"""Which requests wait for a slot: a table by method and path, and the shape that errors have there.

Not every request is a completion. A list of models, a browser's preflight or a lookup takes no part of a batch: it goes
at once, whatever waits. What the table does not name goes by its method: GET, HEAD, OPTIONS and DELETE at once, all
else is queued.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LIGHT = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))
"""Methods that ask an inference server for no tokens."""
REMEMBERED = 1024
"""Methods with paths whose rule is kept; clients write both, so there must be an end."""


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


# ---- what is written

_OPENAI_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
GRPC_STATUSES = {400: 3, 404: 5, 429: 8, 503: 14}
"""INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE (google.rpc.Code)."""
GRPC_UNKNOWN = 2


def error_body(
    shape: Shape, status: int, code: str, message: str, about: Mapping[str, str | float] | None = None
) -> bytes:
    """Return an error as clients of the API expect it: OpenAI's, Anthropic's, or text for a gRPC status.

    `about`: what else it says, beside the API's own fields.
    """
    more = about or {}
    if shape is Shape.GRPC:
        return message.encode()
    if shape is Shape.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": message, **more}}).encode()
    kind = _OPENAI_TYPES.get(status, "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code, **more}}).encode()


def models_body(models: frozenset[str], one: str = "") -> bytes | None:
    """Return OpenAI's list of `models`, or its object for `one`; None: it is none of them."""
    if one:
        return json.dumps(_model(one)).encode() if one in models else None
    return json.dumps({"object": "list", "data": [_model(name) for name in sorted(models)]}).encode()


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "extproc"}
