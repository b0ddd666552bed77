"""What people see of a sidecar among others."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a sidecar is to others."""

    SEEKING = "seeking"
    FOLLOWING = "following"
    LEADING = "leading"


class Picture(NamedTuple):
    """What people see of a replica.

    Attributes:
        leader: id of whom it follows, its own if it leads, None while it seeks.
        members, group: how many sidecars there are, and how many of them are in our group; 0: not known.
        store_age_s: since the store answered last; None: never.
        leader_age_s: since the leader was heard; None for who leads.
    """

    role: Role
    since_s: float
    leader: str | None
    epoch: int
    members: int
    group: int
    store_age_s: float | None
    leader_age_s: float | None
