"""Whether an endpoint may be sent requests for reasons of health: what checks say of it, and what its answers say.

An endpoint is made of it, and asks it before it looks at its own room; only the controller's events change it.

    unknown ──a good answer, a passed check──▶ up ──refusals in a row──▶ in doubt ──worse than its peers──▶ ejected
                                               ▲                         │                                    │
                                               └──────a good answer──────┴──────────── on trial ◀──its time───┘

A refusal is any answer that is not what a client came for, or none at all. What counts is that the others serve what
this one refuses (`streak.py`). So a client's own mistakes, which all refuse, and an outage that all share put nobody
out; and where a client's are refused all day, as many in a row as that makes likely are no news. What follows from a
refusal is decided in one place, `refused`. Who is unknown, in doubt or on trial is sent a few requests at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.admission.breaker import Breaker
from extproc.admission.held import HeldBy
from extproc.admission.laws import LAWS
from extproc.admission.slow_start import SlowStart
from extproc.admission.streak import Streak

if TYPE_CHECKING:
    from extproc.admission.laws import HealthLaw
    from extproc.admission.streak import Tally
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Answer

EJECTED: Final = "ejected after failures"
"""The condition of an endpoint that is out."""


class Health:
    """One endpoint's health.

    Attributes:
        is_well: it may be sent whatever it has room for; else look closer. Asked for several times a request.
        shut_by: what keeps everything from it; None: it is usable.
        is_doubted: an answer that begins well is news. Asked for as often.
        is_up: what health checks say; None: nothing.
        is_known: a request was answered well there, or a check passed.
        awaits_check: it is down since nobody has checked it yet, and is used as soon as nobody else is left.
        is_asleep: its page says that it sleeps or is paused.
        ejected_until: when its ejection ends; None: it is in.
        ejections: how many followed each other without a good answer between.
        refusals: how many in a row led to the last ejection.
        refused_by: how the latest request that it refused was answered; None: it refused none since its last good one.
        on_trial: it came back from an ejection, and had no good answer since.
        is_failing: it refused `eject_after` requests in a row and more, nobody is better, and it is tried now and then.
        slow_start: it is unknown, in doubt or on trial, and is sent a few at a time; None: it is not.
        full_until: it refused a request as full, and is left alone till then.
        breaker: of Envoy's, that let a request not through; None: none was met.
        heard_at: when an answer of it began or ended well last, or its page showed that it makes tokens.
        law: the constants.
    """

    __slots__ = (
        "_back_at",
        "_streaks",
        "awaits_check",
        "breaker",
        "ejected_until",
        "ejections",
        "full_until",
        "heard_at",
        "is_asleep",
        "is_doubted",
        "is_failing",
        "is_known",
        "is_up",
        "is_well",
        "law",
        "on_trial",
        "refusals",
        "refused_by",
        "shut_by",
        "slow_start",
    )

    def __init__(self, law: HealthLaw = LAWS.health) -> None:
        """Start unknown."""
        self.law = law
        self.is_asleep = False
        self.reset()

    def reset(self) -> None:
        """Forget everything but what its page says: it is another server now, or nobody checks it any more."""
        self.is_up: bool | None = None
        self.is_known = False
        self.awaits_check = False
        self.ejected_until: float | None = None
        self.ejections = 0
        self.refusals = 0
        self.refused_by: Answer | None = None
        self.on_trial = False
        self.is_failing = False
        self.full_until: float | None = None
        self.breaker: Breaker | None = None
        self.heard_at: float | None = None
        self._back_at = 0.0  # requests that were sent before tell nothing of how it is now
        self._streaks: dict[Tally, Streak] = {}  # by what all of a pool did
        self.slow_start: SlowStart | None = SlowStart(self.law.few, self.law.step_s)
        self._look()

    # ---- what it allows

    @property
    def held_back_by(self) -> HeldBy | None:
        """What keeps all more from a usable endpoint for the moment: it was full, or had its few; None: nothing."""
        if self.full_until is not None:
            return HeldBy.REFUSED
        return HeldBy.TRIAL if self.had_its_few else None

    @property
    def had_its_few(self) -> bool:
        """Whether it is sent a few at a time, and had these."""
        return self.slow_start is not None and self.slow_start.is_spent

    @property
    def in_a_row(self) -> int:
        """How many requests in a row it refused, in the pool where they were most."""
        return max((streak.count for streak in self._streaks.values()), default=0)

    # ---- what is known of it

    def check(self, *, is_up: bool | None) -> None:
        """Follow health checks. A passed one ends that it is unknown, and no other doubt: an engine may pass them and
        refuse everything."""
        if is_up is None:
            self.reset()
            return
        was_down, self.is_up = self.is_up is False, is_up
        self.awaits_check = False
        if is_up and not self.is_known:
            self.is_known = True
            if not self.in_a_row and not was_down:
                self.slow_start = None
        self._look()

    def await_check(self) -> None:
        """Note that nothing is known of it, and a check to come will tell."""
        self.reset()
        self.awaits_check = True
        self.is_up = False
        self._look()

    def sleep(self, *, is_asleep: bool) -> None:
        """Follow what its page says of sleeping."""
        if is_asleep is not self.is_asleep:
            self.is_asleep = is_asleep
            self._look()

    def _look(self) -> None:
        self.is_doubted = self.slow_start is not None or self.in_a_row > 0 or self.on_trial
        self.shut_by = self._shut_by()
        self.is_well = (
            self.slow_start is None and self.full_until is None and self.breaker is None and self.shut_by is None
        )

    def _shut_by(self) -> HeldBy | None:
        if self.is_up is False:
            return HeldBy.DOWN
        if self.ejected_until is not None:
            return HeldBy.EJECTED
        return HeldBy.ASLEEP if self.is_asleep else None

    def leased(self, now: float, held: int) -> None:
        """Note that a request is sent there, which holds so many with it."""
        if self.breaker is not None and held >= self.breaker.most:
            self.breaker.is_reached = True
        if self.slow_start is not None:
            self.slow_start.send(now, self.law)

    def wakes(self, now: float, page_at: float | None) -> None:
        """Note that an idle one is sent a request; `page_at`: when its page was read last. Checks speak for it, too."""
        if self.slow_start is not None or self.is_up is not None:
            return
        heard_at = self.heard_at if page_at is None or (self.heard_at or page_at) > page_at else page_at
        if heard_at is not None and now - heard_at > self.law.quiet_s:
            self.slow_start = SlowStart(self.law.few, self.law.step_s)
            self._look()

    def answered(self, now: float) -> bool:
        """Note an answer that begins well: whatever was held against it is over. Tell whether anything was."""
        self.heard_at = now
        if not self.is_doubted:
            return False
        self.is_known = True
        self.on_trial = self.is_failing = False
        self.ejections = 0
        self.refused_by = None
        self.slow_start = None
        for streak in self._streaks.values():
            streak.end()
        self._look()
        return True

    def refused(
        self, ticket: Ticket, tally: Tally, now: float, *, is_own_fault: bool, has_peers: bool, is_certain: bool = False
    ) -> None:
        """Note that `ticket`, of the pool with this `tally`, was refused, or not answered at all; decide what follows.

        `is_own_fault`: the request can't be to blame; `has_peers`: the pool has others that may be sent requests;
        `is_certain`: the next one would fare the same, so one is enough.
        """
        if self.ejected_until is not None or ticket.leased_at < self._back_at:
            return  # sent before it was left out, or while
        streak = self._streak_of(tally, now)
        streak.add(now)  # of the only one, too: else it would seem to others that come back to refuse nothing
        is_enough = is_certain or streak.count >= self.law.eject_after
        if not is_own_fault and not has_peers:
            self._clear(streak)
        elif not is_own_fault and streak.is_usual(self.law):
            self._excuse()
        elif has_peers and is_enough and (is_certain or streak.chance(is_own_fault=is_own_fault) <= self.law.chance):
            self._eject(now, streak)
        else:
            self._doubt(now, is_enough=is_enough, is_own_fault=is_own_fault)
        self._look()

    def _streak_of(self, tally: Tally, now: float) -> Streak:
        """Return what it refused of those in `tally`; of pools where that is long ago nothing is kept."""
        streak = self._streaks.get(tally)
        if streak is None:
            kept = {other: one for other, one in self._streaks.items() if one.count or one.own.is_recent(now)}
            self._streaks = kept
            streak = kept[tally] = Streak(tally)
        return streak

    def _clear(self, streak: Streak) -> None:
        """Hold nothing against it: the request may be to blame, and nobody can compare."""
        self.is_known = True
        self.is_failing = False
        self.slow_start = None
        streak.end()

    def _excuse(self) -> None:
        """Hold nothing against it: so many in a row are usual. Who is unknown gets no more at a time for that."""
        self.is_failing = False
        if self.is_known and not self.on_trial:
            self.slow_start = None

    def _eject(self, now: float, streak: Streak) -> None:
        """Leave it out for a while: its peers serve."""
        self.ejections += 1
        self.ejected_until = now + self.ejection_s
        self.refusals = streak.count
        self.is_failing = False

    def _doubt(self, now: float, *, is_enough: bool, is_own_fault: bool) -> None:
        """Send it a few at a time if it refused enough, and fewer if it was sent a few."""
        if is_enough:
            self.is_failing = is_own_fault
            self.slow_start = self.slow_start or SlowStart(1, self.law.step_s)
        if self.slow_start is not None:
            self.slow_start.fail(now, self.law)

    def saturated(self, now: float) -> None:
        """Note that it refused a request as full: it works, and wants to be left alone for a moment."""
        self.full_until = now + self.law.full_s
        self._look()

    def met_breaker(self, now: float, held: int) -> None:
        """Note that Envoy let a request not through while it had let `held` others: no more than these, for a while."""
        if self.breaker is None:
            self.breaker = Breaker()
        self.breaker.refused(held, now)
        self._look()

    def forget_breaker(self) -> None:
        """Note that as many are let through as it may run."""
        self.breaker = None
        self._look()

    @property
    def ejection_s(self) -> float:
        """How long the latest ejection lasts, in seconds."""
        return self.law.ejection_s(self.ejections)

    def _take_back(self, now: float) -> None:
        """End its ejection: it is on trial."""
        self.ejected_until = None
        self.on_trial = True
        self._back_at = now
        self.slow_start = SlowStart(1, self.law.step_s)
        self._look()

    @property
    def is_spared(self) -> bool:
        """Whether it is shut because others serve, and not once nobody does."""
        return self.ejected_until is not None or self.awaits_check

    def spare(self, now: float) -> None:
        """Note that nobody else is left: better it than nobody."""
        if self.awaits_check:
            self.reset()
        else:
            self._take_back(now)

    # ---- time

    def next_change(self) -> float | None:
        """Return when time alone changes it."""
        breaks = None if self.breaker is None else self.breaker.next_change()
        starts = None if self.slow_start is None else self.slow_start.next_change()
        soonest = self.full_until
        for at in (self.ejected_until, breaks, starts):
            if at is not None and (soonest is None or at < soonest):
                soonest = at
        return soonest

    def pass_time(self, now: float) -> None:
        """End what is over."""
        if self.full_until is not None and now >= self.full_until:
            self.full_until = None
            self._look()
        if self.breaker is not None:
            self.breaker.pass_time(now)
        if self.slow_start is not None:
            self.slow_start.pass_time(now, self.law)
        if self.ejected_until is not None and now >= self.ejected_until:
            self._take_back(now)

    @property
    def condition(self) -> str:
        """Whether it may be used, in a few words for people."""
        if self.is_up is False:
            return "down"
        if self.ejected_until is not None:
            return EJECTED
        if self.is_asleep:
            return "asleep"
        if self.on_trial:
            return "on trial"
        if self.is_failing:
            return "failing"
        return "up" if self.is_known else "unknown"
