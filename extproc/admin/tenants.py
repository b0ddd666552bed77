"""Which tenants have most in flight, and which were refused most: for who looks for the one that floods.

Names are what clients wrote, so they make no metrics: those have a series for each tenant that the configuration names.
Here they are counted when somebody looks, and the first few are told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import Counter

    from extproc.admission.tenants import TenantRules

MOST = 5
"""Tenants that are told."""


def busiest(
    rules: TenantRules, waiting: Counter[str], running: Counter[str], refused: Counter[str]
) -> list[dict[str, Any]]:
    """Return the tenants with most requests of these, a few; none where no request names one.

    `in_flight`: what waits and what runs, as its cap counts; `max_in_flight`: of a tenant that has a cap; those that
    are not named may share it.
    """
    all_of_it = waiting + running + refused
    if not any(all_of_it):
        return []
    rows = []
    for name, _ in all_of_it.most_common(MOST):
        account, rule = rules.who(name)
        counts = {"waiting": waiting[name], "running": running[name]}
        row: dict[str, Any] = {"tenant": name, "in_flight": waiting[name] + running[name], **counts}
        if rule.max_in_flight is not None:
            row |= {"max_in_flight": rule.max_in_flight, "shared": account != name}
        rows.append(row | {"refused": refused[name]})
    return rows
