"""What the log says: requests that were refused or moved, and endpoints that go out and come back.

One line for each of them would be a flood just when a person reads the log, so lines of a kind are rated: a few a
second, and then how many were left out. `/metrics` counts them all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from extproc.admission.outcome import Outcome
from extproc.admission.values import Dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.controller import Controller
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision

log = logging.getLogger("extproc.queue")

LINES = 5
PERIOD_S = 1.0
LOOK_S = 0.5


class QueueLog:
    """An observer of decisions that writes what a person on call wants to read."""

    def __init__(self, controller: Controller, clock: Callable[[], float]) -> None:
        """Write about `controller`; `clock` tells monotonic seconds."""
        self._controller = controller
        self._clock = clock
        self._since = 0.0
        self._written = 0
        self._left_out = 0
        self._states: dict[str, str] = {}

    def decided(self, decision: Decision) -> None:
        """Write a line for a refusal or a reroute. Everything else is in the metrics."""
        if decision.outcome is Outcome.DISPATCHED or not self._may_write():
            return
        ticket = decision.ticket
        what = f"to {decision.endpoint}" if isinstance(decision, Dispatch) else "refused"
        log.info(
            "%s: request %s, class %s, %s after %.3f s",
            decision.outcome.value,
            ticket.request.id or "without an id",
            ticket.request_class.name,
            what,
            decision.wait_s,
        )

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Write nothing: clients leave all the time."""

    def look(self) -> None:
        """Write a line for each endpoint that went out or came back since the last look; to be called now and then."""
        states = {name: endpoint.condition for name, endpoint in self._controller.endpoints.items()}
        for name, state in states.items():
            before = self._states.get(name)
            if before is not None and state != before:
                level = logging.INFO if state == "up" else logging.WARNING
                log.log(level, "endpoint %s: %s (was %s)", name, state, before)
        self._states = states

    def _may_write(self) -> bool:
        now = self._clock()
        if now - self._since >= PERIOD_S:
            if self._left_out:
                log.info("... and %d more such lines in the last %.0f s", self._left_out, now - self._since)
            self._since, self._written, self._left_out = now, 0, 0
        if self._written < LINES:
            self._written += 1
            return True
        self._left_out += 1
        return False
