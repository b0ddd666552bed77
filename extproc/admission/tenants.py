"""What the operator says of tenants: who they are, how much each may have in flight, what is guaranteed, and weights.

In flight is what waits or runs. Over its cap a tenant is refused at once, so no tenant can fill the queue or the
servers alone. Up to what it is guaranteed, its requests go before those of all other tenants in their class: not before
a higher class, and nothing is kept free for it. Beyond, fair shares decide (fairness.py), as the weights.

A tenant is a name that a client wrote. Where some are named, all other names count as one tenant, unless the rules say
that each stands for itself; so a name made up for each request gains nothing. An account lives while something of its
tenant is in flight: memory is bounded by that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping  # noqa: TC003 - a dataclass' field: needed when a recording is read, and compiled
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from extproc.admission.decision import Crowd

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

OTHERS = "*"
"""All tenants that are not named, where figures are told."""
GUARANTEED: Final = -1.0
"""The tag of a request that is guaranteed to its tenant: before all others of its class."""


@dataclass(frozen=True, slots=True)
class TenantRule:
    """What one tenant may have.

    Attributes:
        max_in_flight: the most requests that wait or run at once; None: any number.
        guaranteed: so many of them go before those of other tenants in their class.
        weight: of its fair share, in tokens.
    """

    max_in_flight: int | None = None
    guaranteed: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TenantRules:
    """Who tenants are.

    Attributes:
        named: rules by name.
        default: of those that are not named: of all of them together, or, if `apart`, of each.
        apart: a name that is not listed is a tenant too.
    """

    named: Mapping[str, TenantRule] = field(default_factory=dict)
    default: TenantRule = TenantRule()
    apart: bool = True

    def who(self, name: str) -> tuple[str, TenantRule]:
        """Return whom a request with this tenant's name counts for, and what holds for that one."""
        rule = self.named.get(name)
        if rule is not None:
            return name, rule
        return (name if self.apart else ""), self.default

    def label(self, name: str) -> str:
        """Return what figures call a tenant: its name if the rules name it, else OTHERS: clients make no new ones."""
        return name if name in self.named else OTHERS


NO_RULES = TenantRules()
"""Each name is a tenant, and may have whatever there is."""


class Account:
    """What one tenant has in flight.

    Attributes:
        in_flight: how many of its requests wait or run.
        favoured: how many of these are guaranteed to it.
        waiting: those that wait and are not, by class, as they came; kept only where something is guaranteed.
    """

    __slots__ = ("favoured", "in_flight", "name", "rule", "waiting")

    def __init__(self, name: str, rule: TenantRule) -> None:
        """Begin with nothing."""
        self.name = name
        self.rule = rule
        self.in_flight = 0
        self.favoured = 0
        self.waiting: dict[int, OrderedDict[Ticket, None]] = {}

    def add(self, ticket: Ticket) -> None:
        """Note one that waits."""
        self.waiting.setdefault(ticket.key[0], OrderedDict())[ticket] = None

    def drop(self, ticket: Ticket) -> None:
        """Forget one that waits no more. Not noted: no-op."""
        line = self.waiting.get(ticket.key[0])
        if line is not None and line.pop(ticket, self) is None and not line:
            del self.waiting[ticket.key[0]]

    def first(self) -> Ticket | None:
        """Return who waits first, of the highest class."""
        return next(iter(self.waiting[min(self.waiting)])) if self.waiting else None


class Tenants:
    """The accounts of tenants that have something in flight.

    Attributes:
        are_ruled: somebody has written rules; else there is nothing to count, and nobody need be asked.
    """

    __slots__ = ("accounts", "are_ruled", "rules")

    def __init__(self, rules: TenantRules) -> None:
        """Follow these rules."""
        self.rules = rules
        self.are_ruled = rules is not NO_RULES
        self.accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        """Count the accounts."""
        return len(self.accounts)

    def follow(self, rules: TenantRules) -> None:
        """Replace the rules. What is in flight keeps its places."""
        self.rules = rules
        self.are_ruled = rules is not NO_RULES
        for account in self.accounts.values():
            account.rule = rules.who(account.name)[1]

    def in_flight(self) -> dict[str, int]:
        """Count what each named tenant has in flight, and what all others have together, as "*"; no rules: nothing."""
        if not self.are_ruled:
            return {}
        counts = dict.fromkeys((*self.rules.named, OTHERS), 0)
        for name, account in self.accounts.items():
            counts[self.rules.label(name)] += account.in_flight
        return counts

    def crowd_of(self, ticket: Ticket) -> Crowd | None:
        """Return what the tenant of a request that comes has in flight, if that is all that it may have; else None."""
        name, rule = self.rules.who(ticket.request.tenant)
        if rule.max_in_flight is None:
            return None
        account = self.accounts.get(name)
        if account is None or account.in_flight < rule.max_in_flight:
            return None
        is_shared = not self.rules.apart and name not in self.rules.named
        return Crowd(account.in_flight, rule.max_in_flight, is_shared)

    def comes(self, ticket: Ticket) -> None:
        """Count a request."""
        name, rule = self.rules.who(ticket.request.tenant)
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name, rule)
        account.in_flight += 1
        ticket.account, ticket.tenant = account, name
        if account.favoured < rule.guaranteed:
            account.favoured += 1
            ticket.is_favoured = True

    def waits(self, ticket: Ticket) -> None:
        """Note that a request waits."""
        account = ticket.account
        if account is not None and account.rule.guaranteed and not ticket.is_favoured:
            account.add(ticket)

    def goes(self, ticket: Ticket) -> Ticket | None:
        """Note that a request is over. Return one of its tenant's that is guaranteed from now on, and waits."""
        account, ticket.account = ticket.account, None
        if account is None:
            return None
        account.in_flight -= 1
        account.drop(ticket)
        if not account.in_flight:
            del self.accounts[account.name]
        if not ticket.is_favoured:
            return None
        ticket.is_favoured = False
        account.favoured -= 1
        following = account.first() if account.favoured < account.rule.guaranteed else None
        if following is not None:
            account.drop(following)
            account.favoured += 1
            following.is_favoured = True
        return following
