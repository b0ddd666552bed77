"""Requests that an engine makes wait for the slot of a LoRA adapter, and not for a place in its batch.

With all slots taken an engine passes over who needs another adapter, and goes on with the others (vLLM's scheduler by
`scheduled_loras`). That queue is no sign of a full batch, and no reason to keep those others away: whoever is deferred
takes no part of the limit, and has no prompt under way: it waits, whatever was predicted or taken for granted.

A page that names no adapters does not tell who is. But where requests name several models, an engine that takes them
as they come can't end one before it has begun with all that came earlier: how many it began between two pages, these
tell. One that was not its turn yet, again and again, shows an engine that passes over others: then all that wait are
taken for deferred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from extproc.admission.load import Load
    from extproc.admission.prefill import Prefill
    from extproc.admission.ticket import Ticket

FULL = 0.9
"""Above this share of the KV cache in use an engine may have put back who had begun: then pages don't tell."""
KEPT, MOST = 0.99, 4.0
"""What a page keeps of the number of answers before their turn, until it is less than one; and the most of them: one
alone shows nothing, two are remembered for a minute, and more than two for no more than two minutes."""


class Deferred:
    """Which of one engine's requests are deferred, by its last page.

    Attributes:
        adapters: for whose slots they wait.
        count: how many sequences they are.
        is_found: whether the last page was the first to show it though it names no adapters.
        turns: of those who waited, if they go in turn: how many begin until it has.
    """

    __slots__ = ("_early", "_ended", "_held", "_passed", "_waiting", "adapters", "count", "is_found", "turns")

    def __init__(self) -> None:
        """Start with none."""
        self.adapters: frozenset[str] = frozenset()
        self.count = 0
        self.is_found = False
        self.turns: dict[Ticket, int] = {}
        self._early: list[int] = []  # turns of those that ended since
        self._held = self._waiting = self._ended = 0  # sequences: at the last page, and since
        self._passed = 0.0

    def follow(self, load: Load, leases: Collection[Ticket], prefill: Prefill, now: float) -> None:
        """Follow a fresh page, before its counters are: they say nothing of who waits."""
        self.adapters, self.is_found = _without_a_slot(load), False
        if load.adapters is None:
            held_back = self._by_turns(load, leases)
        else:
            held_back = [one for one in leases if one.request.model in self.adapters] if self.adapters else []
        prefill.hold_back(held_back, now)
        self.count = min(sum(ticket.sequences for ticket in held_back), int(load.waiting or 0))

    def ended(self, ticket: Ticket, *, served: bool) -> None:
        """Note that a request is over, while there are turns; if it was `served` whole, its own should have come."""
        turn = self.turns.get(ticket)
        if served and turn is not None:
            self._early.append(turn)
        self._ended += ticket.sequences

    def forget(self, prefill: Prefill, now: float) -> None:
        """Note that telemetry has become stale: nobody is deferred, as far as one can tell."""
        self.adapters, self.count = frozenset(), 0
        self.turns, self._early = {}, []
        prefill.hold_back((), now)

    def _by_turns(self, load: Load, leases: Collection[Ticket]) -> list[Ticket]:
        """Look whether answers came before their turn since the last page; return who waits if that is how it is."""
        waiting, running = int(load.waiting or 0.0), load.running
        held = sum(ticket.sequences for ticket in leases) if waiting or self.turns else 0
        before = self._passed
        ours = running is not None and running + waiting <= held
        if self._early and ours and not load.preemptions and (load.kv_usage or 0.0) < FULL:
            begun = self._waiting + (held - self._held + self._ended) - waiting
            self._passed += sum(turn > begun for turn in self._early)
        self._passed = KEPT * min(self._passed, MOST)
        self.is_found = self._passed > 1.0 >= before
        self.turns, self._early = {}, []
        self._held, self._waiting, self._ended = held, waiting, 0
        if waiting and len({ticket.request.model for ticket in leases}) > 1:
            turn = -int(running or 0.0)
            for ticket in leases:
                turn += ticket.sequences
                if turn > 0:
                    self.turns[ticket] = turn
        return list(self.turns) if self._passed > 1.0 else []


def _without_a_slot(load: Load) -> frozenset[str]:
    """Return the adapters for which requests wait while others have all slots."""
    if not load.has_all_adapters:
        return frozenset()
    return frozenset(load.waiting_adapters or ()).difference(load.adapters or ())
