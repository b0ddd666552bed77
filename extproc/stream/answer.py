"""What an answer's head says of the endpoint that gave it. Whether that is the endpoint's fault, the core finds out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.values import Answer

if TYPE_CHECKING:
    from extproc.stream.wire import Incoming

GRPC_STATUS = "grpc-status"
_GRPC = {
    "0": Answer.OK,
    "2": Answer.ERROR,  # UNKNOWN
    "4": Answer.ERROR,  # DEADLINE_EXCEEDED
    "8": Answer.SATURATED,  # RESOURCE_EXHAUSTED
    "13": Answer.ERROR,  # INTERNAL
    "14": Answer.SATURATED,  # UNAVAILABLE
    "15": Answer.ERROR,  # DATA_LOSS
}
"""What a gRPC status tells that comes with the head, as it does when there is no message; any other: REFUSED."""


def judge(incoming: Incoming) -> Answer:
    """Read from the response headers what the answer says about the endpoint.

    Attribute response.code_details tells who answered: "via_upstream", or words of Envoy's own. Without it (an Envoy
    whose bootstrap does not ask for it) the two look alike.
    """
    status = incoming.headers.get(":status", "")
    details = incoming.attributes.get("response.code_details")
    if details is not None and details != "via_upstream":  # Envoy's own: a client's mistake says nothing of the engine
        return Answer.FAILED if status.startswith("5") else Answer.UNKNOWN
    if status == "429" or (status == "503" and details is not None):
        return Answer.SATURATED
    if status == "503":
        return Answer.UNKNOWN  # a full engine or a dead one: this Envoy doesn't say
    if status.startswith("5"):
        return Answer.ERROR if details is not None else Answer.FAILED
    if not status.startswith(("1", "2")):
        return Answer.REFUSED
    return _judge_success(incoming)


def _judge_success(incoming: Incoming) -> Answer:
    """Judge an answer whose status is good. With nothing behind the head, it is none."""
    status = incoming.headers.get(GRPC_STATUS)
    if status is not None:
        return _GRPC.get(status, Answer.REFUSED)
    if not incoming.has_body or incoming.headers.get("content-length") == "0":
        return Answer.EMPTY
    return Answer.OK
