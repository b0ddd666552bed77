"""What people see of a sidecar among others: metrics, and a part of /queues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from extproc.replicas.forwarded import Forwarded
from extproc.replicas.picture import Picture, Role
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Answer
    from extproc.replicas.member import Membership
    from extproc.stream.gate import Gate

MOST_NAMED = 3
"""Sidecars that a line for people names."""
_NOBODY = Picture(Role.SEEKING, 0.0, None, 0, 0, 0, None, None)


class ReplicaMetrics:
    """A collector for a Prometheus registry."""

    def __init__(
        self,
        picture: Callable[[], Picture] = lambda: _NOBODY,
        turns: Callable[[], Mapping[Role, int]] = dict,
        forwarded: Callable[[], int] = int,
        differing: Callable[[], int] = int,
        store_errors: Callable[[], int] = int,
        disruptions: Callable[[], int] = int,
    ) -> None:
        """Tell of a replica."""
        self._picture = picture
        self._turns = turns
        self._forwarded = forwarded
        self._differing = differing
        self._store_errors = store_errors
        self._disruptions = disruptions

    @classmethod
    def of(cls, membership: Membership) -> ReplicaMetrics:
        """Tell of this sidecar."""
        replica = membership.replica
        return cls(
            replica.picture,
            lambda: replica.turns,
            lambda: replica.forwarded,
            lambda: replica.differing,
            lambda: membership.store_errors,
            lambda: replica.disruptions,
        )

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families."""
        picture = self._picture()
        role = GaugeMetricFamily("extproc_replica_role", "1 for the role that this sidecar has.", labels=["role"])
        turns = CounterMetricFamily("extproc_replica_turns", "How often this sidecar took on a role.", labels=["role"])
        for one in Role:
            role.add_metric([one.value], int(picture.role is one))
            turns.add_metric([one.value], self._turns().get(one, 0))
        yield role
        yield turns
        yield CounterMetricFamily(
            "extproc_replica_disruptions",
            "How often this sidecar lost its leader without a goodbye, or was given up because it stood still.",
            value=self._disruptions(),
        )
        yield GaugeMetricFamily(
            "extproc_replica_members",
            "Sidecars of the pool, by what our leader knows; 0: nobody has told.",
            value=picture.members,
        )
        yield GaugeMetricFamily(
            "extproc_replica_group",
            "Sidecars that decide together with this one; fewer than members: limits are used in parts.",
            value=picture.group,
        )
        yield GaugeMetricFamily(
            "extproc_replica_forwarded_requests",
            "Requests of other sidecars in our books, waiting or running, while we lead.",
            value=self._forwarded(),
        )
        yield GaugeMetricFamily(
            "extproc_replica_differing",
            "Followers whose configuration is not as ours, which counts, while we lead; /queues names the keys.",
            value=self._differing(),
        )
        yield GaugeMetricFamily(
            "extproc_replica_epoch", "Of the leadership that this sidecar takes part in.", value=picture.epoch
        )
        for name, text, age_s in (
            ("extproc_replica_store_age_seconds", "Since the store answered last.", picture.store_age_s),
            ("extproc_replica_leader_age_seconds", "Since the leader was heard last.", picture.leader_age_s),
        ):
            yield GaugeMetricFamily(name, text, value=-1 if age_s is None else age_s)
        yield CounterMetricFamily(
            "extproc_replica_store_errors", "How often the store failed to answer.", value=self._store_errors()
        )


class Shown:
    """What pages show of a sidecar among others."""

    def __init__(self, membership: Membership, gate: Gate) -> None:
        """Show this sidecar, which runs on `gate`."""
        self._membership = membership
        self._gate = gate

    def described(self) -> dict[str, Any]:
        """Return who we are among the others."""
        return described(self._membership, self._gate.waiting)

    async def whole(self, what: str, limit: int) -> dict[str, Any]:
        """Return what our leader shows; empty if we lead, or if it does not answer."""
        return await self._membership.ask_leader(what, limit)

    def whose(self, ticket: Ticket) -> str | None:
        """Return the sidecar that forwarded a request."""
        return ticket.follower.member.id if isinstance(ticket, Forwarded) else None

    def bad_answers(self) -> Mapping[str, Mapping[Answer, int]]:
        """Return how many requests of other sidecars each endpoint gave no good answer while we led, by kind."""
        return self._membership.replica.bad_answers


def described(membership: Membership, waiting: int) -> dict[str, Any]:
    """Return what /queues says of a sidecar among others, by what its gate tells of those who are `waiting`."""
    replica = membership.replica
    picture = replica.picture()
    leading = replica.leading
    missing = [f"{name} at {address}" for name, address in replica.missing.items()]
    return {
        "id": replica.me.id,
        "role": picture.role.value,
        "words": _words(picture, replica.me.id, missing),
        "since_s": round(picture.since_s, 1),
        "leader": picture.leader,
        "epoch": picture.epoch,
        "members": picture.members,
        "group": picture.group,
        "cut_off": picture.role is Role.SEEKING or picture.group < picture.members,
        "missing": missing,
        "refused": replica.refused,
        "waiting_here": waiting - replica.others_waiting,
        "store_age_s": _rounded(picture.store_age_s),
        "leader_age_s": _rounded(picture.leader_age_s),
        "followers": []
        if leading is None
        else [
            {
                "id": follower.member.id,
                "address": follower.member.address,
                "heard_s": round(replica.now() - follower.heard_at, 2),
                "requests": len(follower.tickets),
                "lacks": leading.lacks(follower.names)[:20],
                "differs": leading.differs(follower)[:20],
            }
            for follower in leading.followers.values()
        ],
    }


def _words(picture: Picture, me: str, missing: Sequence[str]) -> str:
    """Return for people who decides, and without whom."""
    of = f"{picture.group} of {picture.members or '?'} sidecars"
    match picture.role:
        case Role.LEADING:
            return f"leads {of}" + (f", without {some_of(missing, MOST_NAMED)}" if missing else "")
        case Role.FOLLOWING:
            return f"follows {picture.leader}: all that waits is shown as it tells ({of})"
    return f"looks for a leader ({me})"


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 2)
