"""Requests that an engine makes wait for the slot of a LoRA adapter, and not for a place in its batch.

With all slots taken an engine passes over who needs another adapter, and goes on with the others (vLLM's scheduler by
`scheduled_loras`). That queue is no sign of a full batch, and no reason to keep those others away: whoever is deferred
takes no part of the limit, and has no prompt under way: it waits, whatever was predicted or taken for granted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.load import Load
    from extproc.admission.prefill import Prefill
    from extproc.admission.ticket import Ticket


class Deferred:
    """Which of one engine's requests are deferred, by its last page.

    Attributes:
        adapters: for whose slots they wait.
        count: how many sequences they are.
    """

    __slots__ = ("adapters", "count")

    def __init__(self) -> None:
        """Start with none."""
        self.adapters: frozenset[str] = frozenset()
        self.count = 0

    def follow(self, load: Load, leases: Iterable[Ticket], prefill: Prefill, now: float) -> None:
        """Follow a fresh page, before its counters are: they say nothing of who waits.

        One that does not name its adapters defers nobody, as far as one can tell.
        """
        self.adapters = _without_a_slot(load)
        held_back = [ticket for ticket in leases if ticket.request.model in self.adapters] if self.adapters else []
        prefill.hold_back(held_back, now)
        self.count = min(sum(ticket.sequences for ticket in held_back), int(load.waiting or 0))

    def forget(self, prefill: Prefill, now: float) -> None:
        """Note that telemetry has become stale: nobody is deferred, as far as one can tell."""
        self.adapters, self.count = frozenset(), 0
        prefill.hold_back((), now)


def _without_a_slot(load: Load) -> frozenset[str]:
    """Return the adapters for which requests wait while others have all slots."""
    if not load.has_all_adapters:
        return frozenset()
    return frozenset(load.waiting_adapters or ()).difference(load.adapters or ())
