"""What we say in place of an engine: refusals in the shape of their API, lists of models; what decisions tell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import unquote

from extproc.admission.outcome import Outcome
from extproc.admission.values import Dispatch
from extproc.stream import wire
from extproc.stream.routes import Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.admission.values import Decision, Reject
    from extproc.stream.reception import Reception

MOST_ID = 128
"""Characters of the longest request id that a refusal repeats; Envoy's own have 36."""


def refusal(
    reception: Reception,
    shape: Shape,
    outcome: Outcome,
    retry_after_s: int | None = None,
    wait_s: float | None = None,
    about: Mapping[str, str | float] | None = None,
) -> bytes:
    """Return the answer that refuses; `wait_s`: for a Server-Timing; `about`: what else the error says."""
    status = outcome.status or 500
    is_unnamed = outcome is Outcome.MODEL_MISSING
    message = reception.how_to_name_a_model if is_unnamed else outcome.message
    body = _error_body(shape, status, outcome.value, message, about)
    grpc_status = _GRPC_STATUSES.get(status, _GRPC_UNKNOWN) if shape is Shape.GRPC else None
    more = reception.dialect.refusal_headers(outcome)
    return wire.refuse(status, outcome.value, body, retry_after_s, wait_s, grpc_status=grpc_status, more=more)


def named(request_id: str) -> dict[str, str]:
    """Return what an error says of its request's id, for who asks `extproc why`; nothing of one that is no token."""
    return {"request_id": request_id} if _is_token(request_id) else {}


def _is_token(text: str) -> bool:
    return 0 < len(text) <= MOST_ID and text.isascii() and text.isprintable() and " " not in text


def whose(decision: Reject) -> dict[str, str | int]:
    """Return what an error says of the tenant at its limit: the caller's own name, as it sent it, and the limit.

    Of an account that several share there are no numbers: they would tell a client how busy all the others are.
    """
    crowd, tenant = decision.crowd, decision.ticket.request.tenant
    if crowd is None:
        return {}
    about: dict[str, str | int] = {"tenant": tenant} if _is_token(tenant) else {}
    return about if crowd.is_shared else about | {"in_flight": crowd.in_flight, "max_in_flight": crowd.most}


def model_list(reception: Reception, path: str, shape: Shape) -> bytes | None:
    """Return the answer with all models, or the one that `path` names after `/models/`; None: they are not known."""
    models = reception.models()
    if not models:
        return None
    reception.told_models += 1
    name = unquote(path.partition("?")[0].partition("/models/")[2])
    body = _models_body(models, name)
    return refusal(reception, shape, Outcome.UNKNOWN_MODEL) if body is None else wire.answer(body, "extproc_models")


def decision_details(decision: Decision, overflow: str = "") -> bytes:
    """Return what Envoy's access log can say about the decision; `overflow`: the cluster of last resort it went to."""
    ticket = decision.ticket
    endpoint, numbers, tenant = "", None, ""
    if isinstance(decision, Dispatch):
        endpoint = decision.endpoint
    else:
        tenant = ticket.request.tenant[:MOST_ID]
        numbers = {name: fact for name, fact in ticket.why().items() if not isinstance(fact, str)}
    texts = (
        decision.outcome._value_,
        ticket.request_class.name,
        endpoint,
        "" if ticket.home is None else ticket.home.name,
        "" if ticket.waited_for is None else ticket.waited_for.value,
        overflow,
    )
    wait_ms = int(decision.wait_s * 10_000 + 0.5) / 10  # round() costs 2,000 instructions
    return wire.decision_metadata(texts, wait_ms, ticket.position, numbers, tenant)


_OPENAI_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_GRPC_STATUSES = {400: 3, 404: 5, 429: 8, 503: 14}
"""INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE (google.rpc.Code)."""
_GRPC_UNKNOWN = 2


def _error_body(
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


def _models_body(models: frozenset[str], one: str = "") -> bytes | None:
    """Return OpenAI's list of `models`, or its object for `one`; None: it is none of them."""
    if one:
        return json.dumps(_model(one)).encode() if one in models else None
    return json.dumps({"object": "list", "data": [_model(name) for name in sorted(models)]}).encode()


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "extproc"}
