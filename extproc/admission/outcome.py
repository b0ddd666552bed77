"""The one table of how a request can leave the queue: metric label, log field and HTTP status in one place."""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """How a request left. `value` is the metric label, the log field and the `x-extproc-outcome` header.

    Attributes:
        status: HTTP status of the refusal; None where the client gets an engine's answer or is gone.
        message: what the client reads in the error's body; empty where there is none.
    """

    status: int | None
    message: str

    __hash__ = object.__hash__  # a member equals nothing but itself; Enum's own hash is a call of Python's

    def __new__(cls, label: str, status: int | None, message: str) -> Outcome:
        """Make a member whose value is its label alone."""
        member = object.__new__(cls)
        member._value_ = label
        member.status = status
        member.message = message
        return member

    DISPATCHED = ("dispatched", None, "")
    REROUTED = ("rerouted", None, "")
    QUEUE_FULL = ("queue_full", 429, "The queue is full and other requests go first. Try again later.")
    BUDGET_PREDICTED = (
        "budget_predicted",
        429,
        "The wait would be longer than this request may wait. Try again later.",
    )
    BUDGET_EXPIRED = ("budget_expired", 429, "No inference server had room in time. Try again later.")
    TENANT_LIMIT = ("tenant_limit", 429, "This tenant has as many requests in flight as it may. Try again later.")
    NO_ENDPOINT = ("no_endpoint", 503, "No inference server is available for this model at the moment.")
    PASSED = ("passed", None, "")  # it takes no slot: sent on without a wait
    MODEL_MISSING = (
        "model_missing",
        400,
        "Several models are served here: name the one meant in a header (x-model).",
    )
    UNKNOWN_MODEL = ("unknown_model", 404, "No inference server serves this model.")
    NONE_ALLOWED = ("none_allowed", 503, "None of the inference servers that the gateway allows is available.")
    ENDLESS = ("endless", 503, "This gateway never tells when an answer ends, so no limit can be kept for it.")
    DRAINING = ("draining", 503, "The gateway is shutting down. Try again.")
    CANCELLED = ("cancelled", None, "")
