"""What an answer tells of the endpoint that gave it. Whether that is the endpoint's fault, the core finds out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.admission.values import Answer

if TYPE_CHECKING:
    from extproc.stream.wire import Incoming

GRPC: Final = "application/grpc"
GRPC_STATUS: Final = "grpc-status"
_USUAL: Final = frozenset(("application/json", "text/event-stream"))
"""What nearly all content types are: to look here costs a fifth of `startswith`."""
_OK: Final = Answer.OK
_RESET: Final = "upstream_reset"
_RESETS: Final = "upstream_reset_before_response_started"
_BY_ENVOY: Final = {
    "cluster_not_found": Answer.NO_CLUSTER,
    "no_healthy_upstream": Answer.NO_ADDRESS,
    f"{_RESETS}{{overflow}}": Answer.BREAKER,
    f"{_RESETS}{{connection_termination}}": Answer.BROKE_OFF,
    f"{_RESETS}{{protocol_error}}": Answer.BROKE_OFF,
    f"{_RESETS}{{remote_reset}}": Answer.BROKE_OFF,
    "maintenance_mode": Answer.DROPPED,
    "drop_overload": Answer.DROPPED,
    "unconditional_drop_overload": Answer.DROPPED,
    "response_timeout": Answer.TIMEOUT,
    "upstream_per_try_timeout": Answer.TIMEOUT,
    "upstream_per_try_idle_timeout": Answer.TIMEOUT,
    "upstream_max_stream_duration_reached": Answer.TIMEOUT,
    "stream_idle_timeout": Answer.TIMEOUT,
    "max_duration_timeout": Answer.TIMEOUT,
}
"""What Envoy's details of an answer of its own tell of the server; what begins with _RESET and is not here: FAILED.
All others, as of filters, limiters and direct responses: UNASKED. Each was had from
Envoy 1.40: tests/e2e/test_envoys_own_answers.py."""
_UNAVAILABLE: Final = "14"
_GRPC = {
    "0": Answer.OK,
    "2": Answer.ERROR,  # UNKNOWN
    "4": Answer.ERROR,  # DEADLINE_EXCEEDED
    "8": Answer.SATURATED,  # RESOURCE_EXHAUSTED
    "13": Answer.ERROR,  # INTERNAL
    _UNAVAILABLE: Answer.SATURATED,
    "15": Answer.ERROR,  # DATA_LOSS
}
"""What a gRPC status tells; any other: REFUSED. An error's stands in the head only where a server had sent none yet."""


BODILESS: Final = frozenset(("HEAD", "OPTIONS", "DELETE"))
"""Methods whose answers need no body: HEAD's never has one (RFC 9110, 9.3.2), and the others' often have none. Whoever
asks by another one, in a body, wants something: nothing, be it called 204, is no service. Whether that is wrong, its
peers tell. A POST without a body asks for no completion (vLLM's /sleep, /wake_up, /reset_prefix_cache): it may get
nothing."""
_NOT_MODIFIED = "304"


def is_grpc(content_type: str) -> bool:
    """Tell whether a message with this content type is gRPC's."""
    return content_type not in _USUAL and content_type.startswith(GRPC)


def judge(incoming: Incoming, *, needs_body: bool = True) -> Answer:
    """Read from the response headers what the answer says about the endpoint; `needs_body`: without one, it is none.

    Attribute response.code_details tells who answered: "via_upstream", or words of Envoy's own. Without it (an Envoy
    whose bootstrap does not ask for it) the two look alike.
    """
    headers = incoming.headers
    status = headers.get(":status", "")
    details = incoming.attributes.get("response.code_details")
    if details is not None and details != "via_upstream":
        found = _BY_ENVOY.get(details)
        if found is Answer.TIMEOUT and _is_upload_late(status, headers.get(GRPC_STATUS)):
            return Answer.UNKNOWN
        if found is not None:
            return found
        return Answer.FAILED if details.startswith(_RESET) else Answer.UNASKED
    if status != "200":  # as nearly all are
        answer = _judge_status(status, is_told=details is not None)
        if answer is not _OK:
            return answer
    if GRPC_STATUS in headers:
        return _judge_grpc_head(incoming, needs_body=needs_body)
    if not incoming.has_body or ("content-length" in headers and headers["content-length"] == "0"):
        return Answer.EMPTY if needs_body else Answer.UNKNOWN
    if is_grpc(headers.get("content-type", "")):
        return Answer.UNKNOWN  # its trailers tell
    return _OK


def _is_upload_late(status: str, grpc_status: str | None) -> bool:
    """Tell whether Envoy still waited for the rest of a request: the client was late, and no server.

    Envoy's code for that is 408 and not 504 (maybeRequestTimeoutCode); of gRPC it is UNKNOWN and not UNAVAILABLE.
    """
    return status == "408" or (grpc_status is not None and grpc_status != _UNAVAILABLE)


def _judge_status(status: str, *, is_told: bool) -> Answer:
    """Judge a status that is not 200 by itself; OK: it is a good one. `is_told`: Envoy says that an engine gave it."""
    if status == "429" or (status == "503" and is_told):
        return Answer.SATURATED
    if status == "503":
        return Answer.UNKNOWN  # a full engine or a dead one: this Envoy doesn't say
    if status.startswith("5"):
        return Answer.ERROR if is_told else Answer.FAILED
    if status == _NOT_MODIFIED:
        return Answer.UNKNOWN  # the client has it already
    return _OK if status.startswith(("1", "2")) else Answer.REFUSED


def _judge_grpc_head(incoming: Incoming, *, needs_body: bool) -> Answer:
    """Judge a good head that has a gRPC status: it is all there is. With nothing behind it, it is no answer."""
    answer = judge_trailers(incoming)
    if answer is not Answer.OK or incoming.has_body:
        return answer
    return Answer.EMPTY if needs_body else Answer.UNKNOWN


def judge_trailers(incoming: Incoming) -> Answer:
    """Read the status of a gRPC answer from its trailers, or from a head that is all there is; UNKNOWN: it has none."""
    status = incoming.headers.get(GRPC_STATUS)
    return Answer.UNKNOWN if status is None else _GRPC.get(status, Answer.REFUSED)
