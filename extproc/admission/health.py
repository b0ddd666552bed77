"""Whether an endpoint may be sent requests for reasons of health: what checks say of it, and what its answers say.

An endpoint is made of it, and asks it before it looks at its own room; only the controller's events change it.

    unknown ──a good answer, a passed check──▶ up ──refusals in a row──▶ in doubt ──worse than its peers──▶ ejected
                                               ▲                         │                                    │
                                               └──────a good answer──────┴──────────── on trial ◀──its time───┘

A refusal is any answer that is not what a client came for, or none at all: no status code is looked up in a list. What
counts is that the others serve what this one refuses. So a client's own mistakes, which all refuse, and an outage that
all share put nobody out; and where a client's are refused all day, as many in a row as that makes likely are no news.
Who is unknown, in doubt or on trial is sent a few requests at a time.
"""

from __future__ import annotations

from math import exp, lgamma
from typing import TYPE_CHECKING, Final, TypeAlias

from extproc.admission.held import HeldBy
from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import HealthLaw
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Answer

BREAKER_S: Final = 1.0
"""So late one more is tried than a breaker of Envoy's let through, at first: each that it does not costs a request."""
BREAKER_MOST_S: Final = 30.0
USUAL_S: Final = 10.0
"""So far back one looks for what a pool refuses all the time, up to twice as far."""
EJECTED = "ejected after failures"
"""The condition of an endpoint that is out."""


Numbers: TypeAlias = tuple[int, int, int]
"""Of a record: served, led, refused."""
NONE: Final = (0, 0, 0)


class Record:
    """What became of the requests of one pool, or of those that one of its endpoints refused: the measure.

    Attributes:
        served: answers that were good.
        led: those of them whose client had them go where they went. Refusals of such are not counted.
        refused: answers that were not good.
    """

    __slots__ = ("_before", "_begin", "_number", "led", "refused", "served")

    def __init__(self) -> None:
        """Start without any."""
        self.served = self.led = self.refused = 0
        self._number = 0  # of the time of USUAL_S that the last refusal came in
        self._begin = self._before = NONE  # what was counted when that began, and the one before it

    def now(self) -> Numbers:
        """Return all three numbers."""
        return self.served, self.led, self.refused

    def before(self, now: float) -> Numbers:
        """Return what they were a while ago, the refused ones exactly. To be asked before any refusal is counted."""
        number = int(now / USUAL_S)
        if number != self._number:
            self._before = self._begin if number == self._number + 1 else self.now()
            self._begin, self._number = self.now(), number
        return self._before

    def is_recent(self, now: float) -> bool:
        """Tell whether a refusal of that while is in it."""
        return int(now / USUAL_S) <= self._number + 1


class Streak:
    """Refusals in a row by one endpoint, in one pool, and what the pool had seen when the first one came.

    Attributes:
        record: of the pool.
        own: what this endpoint refused of it, before, too.
        before: the numbers of both a while before the first of them.
        count: refusals in a row.
    """

    __slots__ = ("_begun", "before", "count", "own", "record")

    def __init__(
        self, record: Record, own: Record | None = None, before: tuple[Numbers, Numbers] = (NONE, NONE)
    ) -> None:
        """Begin with what `record` says now. What is usual needs the other two."""
        self.record = record
        self.own = own or Record()
        self.before = before
        self.count = 0
        self._begun = record.now()

    def peers_share(self) -> float:
        """Return the share of their requests that the others of the pool refused meanwhile; 1/2: nobody can say."""
        served, _, refused = self._begun
        refused = self.record.refused - refused - self.count
        return (refused + 1) / (refused + self.record.served - served + 2)

    def _peers(self, since: Numbers, own: int) -> tuple[int, int]:
        """Return what was served and what the others refused `since` then, as far as requests that fail compare to it.

        `own`: refusals that are this endpoint's. Where the others refuse any, a good answer to one that was led there
        is left out: it shows that it works for those who go there by themselves, and bad requests that nobody leads
        may all have come here.
        """
        record, (served, led, refused) = self.record, since
        served, refused = record.served - served, record.refused - refused - own
        return served - (record.led - led) if refused else served, refused

    def is_usual(self, law: HealthLaw) -> bool:
        """Tell whether so many in a row are no news, by the share that is refused all the time.

        What the others did since the first of them says little: a client's bad requests are over at once, and so go to
        the emptiest one after the other. Its own refusals before count as far as the others refused as many. A few are
        taken as served that nobody saw: the first refusals are news.
        """
        since, (_, _, own_before) = self.before
        own = self.own.refused - own_before
        served, refused = self._peers(since, own)
        refused += min(own - self.count, refused)
        usual: float = (refused / (refused + served + law.few)) ** self.count
        return usual > law.chance

    def chance(self) -> float:
        """Return the chance that one who is as its peers are refuses so many in a row, by what these did meanwhile.

        Of a few good answers of theirs little follows, however many it refused: one client's bad requests may all have
        come here. (Laplace's rule of succession, for all of them together.)
        """
        served, refused = self._peers(self._begun, self.count)
        answers = served + refused
        return exp(
            lgamma(refused + self.count + 1)
            - lgamma(refused + 1)
            - lgamma(answers + self.count + 2)
            + lgamma(answers + 2)
        )


class _Doubt:
    """A few requests at a time: how many of this step are left, and whether one was refused in it."""

    __slots__ = ("allowed", "ends", "has_failed", "sent", "step_s")

    def __init__(self, allowed: int, step_s: float) -> None:
        self.allowed = allowed
        self.sent = 0
        self.step_s = step_s
        self.ends: float | None = None  # None: nothing was sent yet
        self.has_failed = False

    @property
    def is_spent(self) -> bool:
        return self.has_failed or self.sent >= self.allowed

    def send(self, now: float, law: HealthLaw) -> None:
        self.pass_time(now, law)
        if self.ends is None:
            self.ends = now + self.step_s
        self.sent += 1

    def fail(self, now: float, law: HealthLaw) -> None:
        self.pass_time(now, law)
        if not self.has_failed:  # those of the same step have nothing to add
            self.has_failed, self.ends = True, now + self.step_s

    def pass_time(self, now: float, law: HealthLaw) -> None:
        if self.ends is None or now < self.ends:
            return
        if self.has_failed:
            self.allowed, self.step_s = 1, min(2 * self.step_s, law.step_most_s)
        else:
            self.allowed, self.step_s = min(2 * self.allowed, 1 << 20), law.step_s
        self.sent, self.ends, self.has_failed = 0, None, False


class Breaker:
    """A circuit breaker of Envoy's, below our limit: how many at once it let through. One more is tried now and then.

    It may be gone, as where it was met in a burst, or others' requests filled it: then twice as many more are tried in
    each step, a sixteenth more at the most. From 50 to 1,000 that takes 9 s.

    Attributes:
        most: so many.
        is_reached: so many were sent since: else one more would tell nothing.
        until: one more is tried then.
    """

    __slots__ = ("_is_raised", "_more", "_wait_s", "is_reached", "most", "until")

    def __init__(self) -> None:
        """Begin; `refused` follows."""
        self.most = 0
        self.until = 0.0
        self.is_reached = self._is_raised = False
        self._wait_s = BREAKER_S
        self._more = 1

    def refused(self, held: int, now: float) -> None:
        """Note that it let one not through, and `held` others."""
        if self._is_raised:
            self._wait_s = min(2 * self._wait_s, BREAKER_MOST_S)
        self.most, self.until, self._more = held, now + self._wait_s, 1
        self.is_reached, self._is_raised = True, False  # these run

    def pass_time(self, now: float) -> None:
        """Allow one more, if it is time; sooner, and more, where the last ones were let through."""
        if self.is_reached and now >= self.until:
            if self._is_raised:
                self._wait_s = max(self._wait_s / 2, BREAKER_S / 8)
                self._more = min(2 * self._more, max(self.most // 16, 1))
            self.most, self.until = self.most + self._more, now + self._wait_s
            self.is_reached, self._is_raised = False, True


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
        on_trial: back from an ejection, and no good answer since.
        is_failing: it refused `eject_after` requests in a row and more, nobody is better, and it is tried now and then.
        full_until: it refused a request as full, and is left alone till then.
        breaker: of Envoy's, that let a request not through; None: none was met.
        heard_at: when an answer of it began or ended well last, or its page showed that it makes tokens.
        own: what it refused itself, by the record of each pool.
        law: the constants.
    """

    __slots__ = (
        "_back_at",
        "_doubt",
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
        "own",
        "refusals",
        "refused_by",
        "shut_by",
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
        self._streaks: dict[Record, Streak] = {}  # since its last good answer
        self.own: dict[Record, Record] = {}
        self._doubt: _Doubt | None = _Doubt(self.law.few, self.law.step_s)
        self._look()

    # ---- what it allows

    @property
    def held_back_by(self) -> HeldBy | None:
        """What keeps all more from a usable endpoint for the moment: it was full, or had its few; None: nothing."""
        if self.full_until is not None:
            return HeldBy.REFUSED
        return HeldBy.TRIAL if self._doubt is not None and self._doubt.is_spent else None

    @property
    def is_doubtful(self) -> bool:
        """Whether it had the few requests that one in doubt gets at a time."""
        return self._doubt is not None and self._doubt.is_spent

    @property
    def in_a_row(self) -> int:
        """How many requests it refused since its last good answer, in the pool where they were most."""
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
            if not self._streaks and not self.on_trial and not was_down:
                self._doubt = None
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
        self.is_doubted = self._doubt is not None or bool(self._streaks) or self.on_trial
        self.shut_by = self._shut_by()
        self.is_well = self._doubt is None and self.full_until is None and self.breaker is None and self.shut_by is None

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
        if self._doubt is not None:
            self._doubt.send(now, self.law)

    def wakes(self, now: float, page_at: float | None) -> None:
        """Note that an idle one is sent a request; `page_at`: when its page was read last. Checks speak for it, too."""
        if self._doubt is not None or self.is_up is not None:
            return
        heard_at = self.heard_at if page_at is None or (self.heard_at or page_at) > page_at else page_at
        if heard_at is not None and now - heard_at > self.law.quiet_s:
            self._doubt = _Doubt(self.law.few, self.law.step_s)
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
        self._doubt, self._streaks = None, {}
        self._look()
        return True

    def refused(
        self,
        ticket: Ticket,
        record: Record,
        now: float,
        *,
        is_own_fault: bool,
        has_peers: bool,
        is_certain: bool = False,
    ) -> None:
        """Note that `ticket`, of the pool with this `record`, was refused, or not answered at all.

        `is_own_fault`: the request can't be to blame; `has_peers`: the pool has others that may be sent requests;
        `is_certain`: the next one would fare the same, so one is enough.
        The last one of a pool stays; where requests may be to blame and nobody can compare, nothing is held against it.
        """
        if self.ejected_until is None and ticket.leased_at >= self._back_at:
            self._refused(record, now, is_own_fault=is_own_fault, has_peers=has_peers, is_certain=is_certain)
            self._look()

    def _own_of(self, record: Record, now: float) -> Record:
        """Return what it refused itself of those in `record`; of pools where that is long ago nothing is kept."""
        own = self.own.get(record)
        if own is None:
            self.own = {other: one for other, one in self.own.items() if one.is_recent(now)}
            own = self.own[record] = Record()
        return own

    def _refused(self, record: Record, now: float, *, is_own_fault: bool, has_peers: bool, is_certain: bool) -> None:
        own = self._own_of(record, now)
        streak = self._streaks.get(record)
        before = record.before(now), own.before(now)
        if streak is None:
            streak = Streak(record, own, before)
        record.refused += 1  # of the only one, too: else it would seem to others that come back to refuse nothing
        own.refused += 1
        if not has_peers and not is_own_fault:
            self.is_known = True  # it speaks
            self.is_failing = False
            self._doubt = None
            self._streaks.pop(record, None)
            return
        self._streaks[record] = streak
        streak.count += 1
        share = streak.peers_share()
        if not is_own_fault and streak.is_usual(self.law):
            self.is_failing = False
            if self.is_known and not self.on_trial:
                self._doubt = None
                return
            if share > 0.5:  # the others refuse as well: as good as they are
                return
        is_seen = is_certain or streak.count >= self.law.eject_after
        chance = share**streak.count if is_own_fault else streak.chance()
        if has_peers and is_seen and (is_certain or chance <= self.law.chance):
            self.ejections += 1
            self.ejected_until = now + self.ejection_s
            self.refusals = streak.count
            self.on_trial = self.is_failing = False
            return
        if is_seen:
            self.is_failing = is_own_fault
            self._doubt = self._doubt or _Doubt(1, self.law.step_s)
        if self._doubt is not None:
            self._doubt.fail(now, self.law)

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

    def take_back(self, now: float) -> None:
        """End its ejection: it is on trial."""
        self.ejected_until = None
        self.on_trial = True
        self._back_at = now
        self._doubt = _Doubt(1, self.law.step_s)
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
            self.take_back(now)

    # ---- time

    def next_change(self) -> float | None:
        """Return when time alone changes it."""
        soonest = self.full_until
        if self.ejected_until is not None and (soonest is None or self.ejected_until < soonest):
            soonest = self.ejected_until
        breaker = self.breaker
        if breaker is not None and breaker.is_reached and (soonest is None or breaker.until < soonest):
            soonest = breaker.until
        if self._doubt is not None and self._doubt.is_spent:
            ends = self._doubt.ends
            if ends is not None and (soonest is None or ends < soonest):
                soonest = ends
        return soonest

    def pass_time(self, now: float) -> None:
        """End what is over."""
        if self.full_until is not None and now >= self.full_until:
            self.full_until = None
            self._look()
        if self.breaker is not None:
            self.breaker.pass_time(now)
        if self._doubt is not None:
            self._doubt.pass_time(now, self.law)
        if self.ejected_until is not None and now >= self.ejected_until:
            self.take_back(now)

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
