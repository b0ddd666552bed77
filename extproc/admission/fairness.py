"""Fair shares between tenants: a virtual token counter kept as start tags (start-time fair queueing).

A tenant's next request is tagged with the tokens that the tenant has been promised so far, but never with less than
the tag that was served last: idling earns no credit. Requests of one class go in the order of their tags. A tenant
who sends six times its share waits behind its own tags; the others do not. Start-time fair queueing is Goyal, Vin
and Cheng (SIGCOMM 1996); charging input once and output twice follows VTC (Sheng et al., OSDI 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import nlargest
from operator import itemgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

OUTPUT_WEIGHT: Final = 2
"""Tokens of output cost twice those of input."""

MAX_TENANTS = 10_000
"""Tenants remembered per pool and priority; the one that asked longest ago is forgotten first, and so starts afresh."""
TRACKED: Final = 1 / 2
"""Who asked last is noted once this share of what may be remembered is: till then nobody is near being forgotten."""
MOST_TENANTS, LEAST_TENANTS = 100_000, 16
"""The most of all pools and priorities together, parted evenly; and the least of each, however many there are."""
AT_ONCE: Final = 500
"""Tenants that are forgotten in one go: an eighth of a millisecond's worth."""


class Flow:
    """What one tenant sends to one pool at one priority. Its requests know it: nobody looks for it again.

    Attributes:
        finish: the tokens promised to it so far. What a finished request cost beyond its estimate comes to it.
        tag: of its last request: where that stands.
        waiting: how many of its requests wait.
    """

    __slots__ = ("_share", "finish", "tag", "waiting")

    def __init__(self, share: FairShare) -> None:
        """Start with nothing promised."""
        self._share = share
        self.finish = 0.0
        self.tag = 0.0
        self.waiting = 0

    def served(self, tag: float) -> None:
        """Note that the request with `tag` was dispatched: nobody is tagged lower from now on."""
        if tag > self._share.virtual_time:
            self._share.virtual_time = tag
        if self.waiting:
            self.waiting -= 1

    def left(self, refund: float) -> None:
        """Note that a waiting request went without being served, and give back its cost."""
        if self.waiting:
            self.waiting -= 1
        self.finish -= refund


class FairShare:
    """The tags of one pool and one priority.

    Attributes:
        virtual_time: the tag that was served last.
    """

    __slots__ = ("_memory", "_tenants", "virtual_time")

    def __init__(self, memory: Memory | None = None) -> None:
        """Start with every tenant at zero; `memory` says how many to remember."""
        self._memory = memory if memory is not None else Memory()
        self._tenants: OrderedDict[str, Flow] = OrderedDict()
        self.virtual_time = 0.0

    def __len__(self) -> int:
        """Count the tenants that are remembered."""
        return len(self._tenants)

    def charge(self, tenant: str, cost: float) -> Flow:
        """Charge `cost` tokens to `tenant`; return its flow with the tag of its request. FIFO within a tenant."""
        tenants = self._tenants
        flow = tenants.get(tenant)
        if flow is None:
            flow = tenants[tenant] = Flow(self)
            self.forget_beyond(self._memory.each)
        elif len(tenants) > self._memory.each * TRACKED:
            tenants.move_to_end(tenant)
        tag = flow.finish if flow.finish > self.virtual_time else self.virtual_time
        if flow.waiting > 0 and tag < flow.tag:  # a refund must not let it pass its own earlier requests
            tag = flow.tag
        flow.tag = tag
        flow.finish = tag + cost
        flow.waiting += 1
        return flow

    def begin_anew(self) -> None:
        """Forget what everybody was promised: places are given by other rules from now on."""
        self._memory.drop(self._tenants)
        self._tenants = OrderedDict()

    def forget_beyond(self, most: int) -> None:
        """Forget those that asked longest ago, down to `most`; of many some."""
        for _ in range(min(len(self._tenants) - most, AT_ONCE)):
            self._tenants.popitem(last=False)


MAX_TURNS = 1000
"""Tenants remembered per endpoint and priority where pools meet, of those of all endpoints MOST_TENANTS, too."""
KEPT = 3 / 4
"""What is left of them when there are too many: those that are ahead of the others by most."""


class Turns:
    """Whose turn it is at one endpoint where requests of several pools meet, whose tags can't be compared.

    Start tags again, of what each tenant was sent there while others waited: naming another model gains no second turn,
    and what went there while nobody waited costs none.
    """

    __slots__ = ("_ahead", "_memory", "_virtual_time")

    def __init__(self, memory: Memory | None = None) -> None:
        """Start with every tenant at zero; `memory` says how many to remember."""
        self._memory = memory if memory is not None else Memory()
        self._ahead: dict[str, float] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        """Count the tenants that are remembered."""
        return len(self._ahead)

    def of(self, tenant: str) -> float:
        """Return the turn of a tenant: the least goes first."""
        return max(self._ahead.get(tenant, 0.0), self._virtual_time)

    def served(self, tenant: str, cost: float) -> None:
        """Charge `cost` tokens to `tenant`, whose request was dispatched."""
        turn = self._virtual_time = self.of(tenant)
        self._ahead[tenant] = turn + cost
        self.forget_beyond(self._memory.each_turns)

    def forget_beyond(self, most: int) -> None:
        """Forget those least ahead of the others, some at a time, if there are more than `most`."""
        if len(self._ahead) > most:
            kept = nlargest(int(most * KEPT), self._ahead.items(), key=itemgetter(1))
            self._ahead = {name: ahead for name, ahead in kept if ahead > self._virtual_time}

    def correct(self, tenant: str, difference: float) -> None:
        """Charge (or, negative, give back) what a request that `served` charged cost beyond its estimate."""
        if tenant in self._ahead:
            self._ahead[tenant] += difference


class Memory:
    """How many tenants the shares of all pools remember, and the turns of all endpoints.

    Who is to be forgotten may be very many: some with each tick, so that no event has to free all.

    Attributes:
        each: the most of one share.
        each_turns: the most of one endpoint's turns at one priority.
    """

    __slots__ = ("_dropped", "_shares", "_shares_over", "_turns", "_turns_over", "each", "each_turns")

    def __init__(self) -> None:
        """Start without shares."""
        self._shares: list[FairShare] = []
        self._shares_over: list[FairShare] = []  # those that remembered more than `each` when that became less
        self.each = MAX_TENANTS
        self._turns: list[Turns] = []
        self._turns_over: list[Turns] = []  # likewise
        self.each_turns = MAX_TURNS
        self._dropped: list[OrderedDict[str, Flow]] = []  # what shares remembered that began anew, or are gone

    def drop(self, tenants: OrderedDict[str, Flow]) -> None:
        """Forget what a share remembered of its tenants."""
        self._dropped.append(tenants)

    def forget_some(self) -> None:
        """Forget some of those who are to be forgotten."""
        if self._dropped:
            tenants = self._dropped[-1]
            for _ in range(min(len(tenants), AT_ONCE)):
                tenants.popitem()
            if not tenants:
                self._dropped.pop()
        elif self._shares_over:
            share = self._shares_over[-1]
            share.forget_beyond(self.each)
            if len(share) <= self.each:
                self._shares_over.pop()
        elif self._turns_over:
            self._turns_over.pop().forget_beyond(self.each_turns)

    def share(self) -> FairShare:
        """Return a new share. The others may have to forget some of their tenants."""
        share = FairShare(self)
        self._shares.append(share)
        self._part_shares()
        return share

    def keep(self, shares: Iterable[FairShare]) -> None:
        """Go on with these alone: the pools of others are gone."""
        kept = dict.fromkeys(shares)
        for share in self._shares:
            if share not in kept:
                share.begin_anew()
        self._shares = list(kept)
        self._part_shares()

    def _part_shares(self) -> None:
        each = min(_part(len(self._shares)), MAX_TENANTS)
        if each < self.each:
            self._shares_over = [share for share in self._shares if len(share) > each]
        self.each = each

    def turns(self) -> Turns:
        """Return new turns. The others may have to forget some of their tenants."""
        turns = Turns(self)
        self._turns.append(turns)
        self._part_turns()
        return turns

    def keep_turns(self, turns: Iterable[Turns]) -> None:
        """Go on with these alone: the endpoints of others are gone."""
        self._turns = list(turns)
        self._part_turns()

    def _part_turns(self) -> None:
        each = min(_part(len(self._turns)), MAX_TURNS)
        if each < self.each_turns:
            self._turns_over = [one for one in self._turns if len(one) > each]
        self.each_turns = each


def _part(count: int) -> int:
    """Return the part of each of `count`. It is halved now and then, and not less with each: all look at it then."""
    return max(MOST_TENANTS >> max(count - 1, 0).bit_length(), LEAST_TENANTS)
