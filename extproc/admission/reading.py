"""What an endpoint says of itself: its metrics page, the reports in its answers, and how old they are."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.laws import ForeignLaw
    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket

MOST_LET = 32
"""So many of ours at the most are let in above the limit because of others: a page may say anything, and of a request
with many sequences whose body nobody read all but one are others on it. No simulated traffic of others wanted more."""
MOST_HIDDEN = 100
"""Who ran before us is forgotten once no page has shown more than our leases for so many times `ForeignLaw.arrived_s`.
While many short answers of ours begin and end no page shows that the last of others is gone: their places stayed empty
for a minute. One whom what is on its way hides for so long goes above the limit."""


class Reading:
    """The last page and the last report of one endpoint.

    Attributes:
        page, page_at: what its metrics page said last, and when.
        booked: tokens in our books when that came: of prompts that are computed, and of their answers.
        report, report_at: what the headers of an answer said last, where the page said nothing since, and when.
        capacity: the size of the KV cache that a page told; its word lasts.
    """

    __slots__ = ("booked", "capacity", "page", "page_at", "report", "report_at")

    def __init__(self) -> None:
        """Start without a word."""
        self.page: Load | None = None
        self.page_at = 0.0
        self.booked = (0, 0)
        self.report: Load | None = None
        self.report_at = 0.0
        self.capacity: int | None = None

    @property
    def known(self) -> Load | None:
        """The last report over the last page; None: nothing is known, or all is stale."""
        return self.page if self.report is None else self.report.over(self.page)

    @property
    def told_at(self) -> list[float]:
        """When its page and its answers spoke last, as far as that still counts."""
        page = [] if self.page is None else [self.page_at]
        return page if self.report is None else [*page, self.report_at]

    def take_page(self, load: Load, now: float) -> None:
        """Note a fresh page: what it says ends what reports said of the same."""
        self.page, self.page_at = load, now
        if load.kv_capacity_tokens:  # an engine may say 0 before it knows
            self.capacity = load.kv_capacity_tokens
        if self.report is not None:
            self.report = self.report.without(load)

    def take_report(self, report: Load, now: float) -> None:
        """Note what came with an answer."""
        self.report, self.report_at = report, now


class Foreign:
    """The requests that an engine held when its telemetry came first and that are not ours, as far as they still run.

    They are answers whose leases were lost when a sidecar died. Never more: what an engine holds above our leases later
    is mostly our own, between two looks at it. But where its batch is what limits, whoever is seen twice has a place.

    Attributes:
        count: how many; they take room like leases.
        takes: how many take room: these, or all others that two pages show, if those are in the way of ours in a batch.
        lets: so many of ours run there whatever was learned, because others send past the queue (`ForeignLaw.each`).
        law: the constants.
    """

    __slots__ = ("_changed_at", "_hidden_since", "_met", "_ours", "_seen", "_shown", "count", "law", "lets", "takes")

    def __init__(self, law: ForeignLaw = LAWS.foreign) -> None:
        """Start before the first page."""
        self.law = law
        self.count = self.lets = self.takes = 0
        self._seen = 0  # others on the last page
        self._shown: tuple[float | None, ...] = ()  # what it said
        self._ours = 0  # the most of ours that were there while pages said that
        self._changed_at = 0.0  # when they became fewer last
        self._hidden_since = inf  # when the first of the last pages came that show no more than our leases
        self._met = False  # telemetry came at least once

    def add(self, count: int, most: int, now: float) -> None:
        """Count `count` more that were ours until now, up to `most`; no fewer, if that has become less."""
        self.count, self._changed_at = max(min(self.count + count, most), self.count), now
        self._hidden_since = inf
        self.takes = max(self.takes, self.count)

    def meet_again(self) -> None:
        """Look at the next page as at the first."""
        self._met = False

    def forget(self) -> None:
        """Note that nothing is known of them any more."""
        self.count = self.lets = self.takes = self._seen = 0
        self._shown, self._hidden_since = (), inf

    def follow(
        self,
        load: Load,
        leases: Iterable[Ticket],
        in_flight: int,
        most: int,
        now: float,
        unsent: int = 0,
        *,
        is_learned: bool = False,
        in_batch: bool = False,
    ) -> None:
        """Count them when telemetry comes first, at most `most`; after that they can only become fewer.

        `unsent`: of the leases as old as `arrived_s`, how many may not have been sent for all that. `is_learned`: no
        limit here is a number that a person chose. `in_batch`: its limit is the size of a batch, which others are in,
        too.

        Those who were known before we look as at the first are fewer only if nothing of ours is on its way.
        """
        if load.running is None:
            self.forget()
            return
        there = int(load.running + (load.waiting or 0.0))
        # It may be the page before once more, of an exporter that looks now and then: who was ours is nobody else's.
        shown = load.running, load.waiting, load.kv_usage
        self._ours = max(in_flight, self._ours) if shown == self._shown else in_flight
        self._shown, others = shown, there - self._ours
        self.lets = min(max(others // self.law.each, 1), max(most, MOST_LET)) if is_learned and others > 0 else 0
        self._hidden_since = inf if there > in_flight else min(self._hidden_since, now)
        count = 0
        if self.count and now < self._hidden_since + MOST_HIDDEN * self.law.arrived_s:
            arrived = sum(ticket.sequences for ticket in leases if ticket.leased_at <= now - self.law.arrived_s)
            count = min(max(there - arrived + unsent, 0), most, self.count)
            if count == self.count and now >= self._changed_at + self.law.steady_s:
                count //= 2
        if not self._met:
            self._met = True
            count = max(count, min(max(there - in_flight, 0), most))
        if count != self.count:
            self.count, self._changed_at = count, now
        beside = min(others, self._seen) if is_learned and in_batch else 0
        self.takes, self._seen = max(self.count, beside), others
