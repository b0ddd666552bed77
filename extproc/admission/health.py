"""Whether an endpoint may be sent requests for reasons of health: what checks say of it, and what its answers say.

An endpoint is made of it, and asks it before it looks at its own room; only the controller's events change it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.held import HeldBy

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

EJECT_AFTER = 5
"""Consecutive failures that take an endpoint out."""
EJECT_S = 5.0
"""The first ejection; each one that follows without a success between lasts twice as long."""
EJECT_MAX_S = 60.0
EJECTED = "ejected after failures"
"""The condition of an endpoint that is out."""
SATURATED_S = 0.25
"""How long an endpoint that refused a request as full is left alone."""


class Health:
    """One endpoint's health.

    Attributes:
        is_up: False while health checks say that it is down.
        ejected_until: when its ejection ends; None: it is in.
        ejections: how many followed each other without a success between.
        on_trial: back from an ejection: one new request at a time until one succeeds.
        trial: that request; answers from before the ejection may still run beside it.
        full_until: it refused a request as full, and is left alone till then.
    """

    __slots__ = ("_failures", "ejected_until", "ejections", "full_until", "is_up", "on_trial", "trial")

    def __init__(self) -> None:
        """Start up, without a failure."""
        self.is_up = True
        self.ejected_until: float | None = None
        self.ejections = 0
        self.on_trial = False
        self.trial: Ticket | None = None
        self.full_until: float | None = None
        self._failures = 0

    @property
    def is_usable(self) -> bool:
        """Whether it may be sent anything at all."""
        return self.is_up and self.ejected_until is None

    @property
    def shut_by(self) -> HeldBy | None:
        """What makes it unusable; None: it is usable."""
        return None if self.is_usable else HeldBy.EJECTED if self.is_up else HeldBy.DOWN

    @property
    def held_back_by(self) -> HeldBy | None:
        """What keeps all more from a usable endpoint for the moment: its trial runs, or it was full; None: nothing."""
        if self.full_until is not None:
            return HeldBy.REFUSED
        return HeldBy.TRIAL if self.on_trial and self.trial is not None else None

    @property
    def is_doubted(self) -> bool:
        """Whether an answer that begins well is news."""
        return self.on_trial or self._failures > 0

    def leased(self, ticket: Ticket) -> None:
        """Note that `ticket` is sent there: on trial, it is the trial."""
        if self.on_trial:
            self.trial = ticket

    def succeeded(self) -> None:
        """Note an answer that shows that the endpoint works."""
        self._failures = 0
        self.ejections = 0
        self.on_trial = False
        self.trial = None

    def failed(self, ticket: Ticket, now: float, *, spare: bool) -> None:
        """Note a failure; enough of them in a row eject the endpoint, each time for longer, unless it is to be spared.

        On trial the trial's own failure is enough; those of older requests say nothing new.
        """
        on_trial, self.trial = ticket is self.trial, None if ticket is self.trial else self.trial
        if self.on_trial and not on_trial:
            return
        self._failures += 1
        if (self._failures >= EJECT_AFTER or on_trial) and self.ejected_until is None and not spare:
            self.ejections += 1
            self.ejected_until = now + self.ejection_s
            self._failures = 0

    def saturated(self, now: float) -> None:
        """Note that it refused a request as full: it works, and wants to be left alone for a moment."""
        self._failures = 0
        self.full_until = now + SATURATED_S

    def released(self, ticket: Ticket) -> None:
        """Note that `ticket` is over, whatever became of it: the next one may be the trial."""
        if ticket is self.trial:
            self.trial = None

    @property
    def ejection_s(self) -> float:
        """How long the latest ejection lasts, in seconds."""
        return min(EJECT_S * 2.0 ** (self.ejections - 1), EJECT_MAX_S)

    def next_change(self) -> float | None:
        """Return when time alone changes it."""
        if self.full_until is None or self.ejected_until is None:
            return self.full_until if self.ejected_until is None else self.ejected_until
        return min(self.full_until, self.ejected_until)

    def pass_time(self, now: float) -> None:
        """End what is over."""
        if self.full_until is not None and now >= self.full_until:
            self.full_until = None
        if self.ejected_until is not None and now >= self.ejected_until:
            self.ejected_until = None
            self.on_trial = True

    @property
    def condition(self) -> str:
        """Whether it may be used, in a few words for people."""
        if not self.is_up:
            return "down"
        return EJECTED if self.ejected_until is not None else "up"
