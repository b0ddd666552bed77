"""One request's passage through admission. What it may become: `transitions.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.admission.transitions import NEW, State
from extproc.admission.values import DEFAULT_CLASS, Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.fairness import Flow, Turns
    from extproc.admission.first_bytes import Burst
    from extproc.admission.held import HeldBy
    from extproc.admission.pool import Pool
    from extproc.admission.queue import Queue
    from extproc.admission.tenants import Account
    from extproc.admission.values import Decision, Request, RequestClass

__all__ = ["Key", "State", "Ticket"]  # those who handle tickets ask for their state

UNKNOWN: Final = Answer.UNKNOWN

Key = tuple[int, float, int]
"""A place in the order: -priority, tag, sequence number."""


class Ticket:
    """Where one request stands. The driver makes it, offers it, and tells the core once how it ended (`Gate.close`).

    Attributes:
        request: what the headers say.
        deliver: whom the driver tells the decision; the core never calls it.
        state: see `transitions.py`.
        is_guard: it was passed over so often that room is kept for it.
        position: how many waited in its pool, of its class or above, when it came.
        waited_for: what held it when it joined the line; None: it did not wait, or its budget was over when it came.
        predicted_s: how long it would wait, as predicted then; None: nobody could say.
    """

    __slots__ = (
        "account",
        "alarm",
        "alarm_number",
        "answer",
        "beside",
        "burst",
        "charge",
        "choices",
        "computed_at",
        "deliver",
        "ended_at",
        "endpoint",
        "flow",
        "home",
        "is_answered",
        "is_favoured",
        "is_guard",
        "is_served",
        "kept",
        "kept_tokens",
        "key",
        "kv_tokens",
        "leased_at",
        "output_tokens",
        "passed_over",
        "patience_until",
        "pool",
        "position",
        "predicted_s",
        "prompt_pending",
        "prompt_tokens",
        "queue",
        "request",
        "request_class",
        "sequences",
        "state",
        "tenant",
        "turns",
        "wait_until",
        "waited_for",
        "work_tokens",
    )

    def __init__(self, request: Request, deliver: Callable[[Decision], None] | None = None) -> None:
        """Make a NEW ticket for `request`."""
        self.request = request
        self.deliver = deliver
        self.state = NEW
        self.position = 0
        self.waited_for: HeldBy | None = None
        self.predicted_s: float | None = None
        self.request_class: RequestClass = DEFAULT_CLASS
        self.sequences = request.sequences
        self.pool: Pool | None = None
        self.queue: Queue | None = None  # the queue it stands in while WAITING
        self.key: Key = (0, 0.0, 0)  # its place in that queue
        self.home: Endpoint | None = None
        self.endpoint: Endpoint | None = None  # the endpoint that it holds a lease of while LEASED
        self.choices: tuple[Endpoint, ...] = ()  # where its gateway may go instead
        self.kept = self.kept_tokens = 0  # what is kept for it at each of these: sequences, and tokens of the cache
        self.leased_at = 0.0
        self.ended_at = 0.0  # when its lease was given back, and what was known then of its answer
        self.answer = UNKNOWN
        self.is_answered = False  # a good answer to it has begun
        self.prompt_tokens = 0  # estimate, clipped
        self.work_tokens = 0  # of its prompt, what the engine has to compute: without what is cached there
        self.output_tokens = 0  # estimate
        self.charge: float | None = None  # what its tenant was charged for it; None while nobody counts
        self.flow: Flow | None = None  # to which it was charged
        self.turns: Turns | None = None  # those that charged it too, at the endpoint it was sent to while others waited
        self.kv_tokens = 0  # estimate of the KV cache it will need: prompt and answer
        self.beside = 0  # how many its endpoint held when it was sent there
        self.burst: Burst | None = None  # of first bytes, with which its own was seen
        self.computed_at = 0.0  # when its prompt will be computed, as far as that is predicted
        self.prompt_pending = False  # leased, and its first token has not been seen
        self.passed_over = 0  # how often a later request that fits was let past
        self.is_guard = False  # see guard.py
        self.tenant = request.tenant  # whom it counts for, see tenants.py
        self.account: Account | None = None  # of that tenant, while it waits or runs
        self.is_favoured = False  # guaranteed to its tenant
        self.wait_until = 0.0  # the end of its budget
        self.is_served = False  # somebody was up to serve it when that was last counted
        self.patience_until = 0.0  # the end of its wait for its home
        self.alarm = 0.0  # the one alarm that is set for it
        self.alarm_number = 0  # until it waits

    def book(self, prompt_tokens: int) -> None:
        """Take its prompt to have so many tokens."""
        self.prompt_tokens = prompt_tokens
        self.kv_tokens = prompt_tokens + self.output_tokens

    def why(self) -> dict[str, str | float]:
        """Return what people ask about its wait: its budget, the wait predicted when it came, what held it then.

        What is not known is absent.
        """
        facts: dict[str, str | float] = {}
        if self.pool is not None:
            facts["budget_s"] = round(self.wait_until - self.request.arrived, 3)
        if self.predicted_s is not None:
            facts["predicted_wait_s"] = round(self.predicted_s, 3)
        if self.waited_for is not None:
            facts["waited_for"] = self.waited_for.value
        return facts

    def __repr__(self) -> str:
        """Show what a person debugging wants first."""
        where = f" at {self.endpoint.name}" if self.endpoint is not None else ""
        return f"<Ticket {self.request.id} {self.state.name.lower()}{where}>"
