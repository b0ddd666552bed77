"""Who is alive, told by something that is there already: Valkey or Redis, or Kubernetes. Never on a request's path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from extproc.config import ReplicasConfig
    from extproc.replicas.messages import Member


class StoreError(Exception):
    """The store did not answer, or not as one should."""


class Store(Protocol):
    """Where sidecars of a pool find each other."""

    beat_s: float
    """How often `beat` is to be called."""

    async def beat(self, me: Member) -> list[Member]:
        """Say that we live; return who does, ourselves included, each with its place in the order of joining.

        Whoever has no place yet gets the next one. Who has said that he goes comes without an address for some seconds
        more, so that all see it. Raises StoreError.
        """

    async def leave(self, me: Member) -> None:
        """Say that we go. Raises StoreError."""

    async def close(self) -> None:
        """Give up connections."""


def store_of(config: ReplicasConfig) -> Store:
    """Return the store that the configuration names. Raises ConfigError if what it needs is not installed."""
    if config.valkey is not None:
        from extproc.replicas.stores.valkey import ValkeyStore

        return ValkeyStore(config.valkey, config.pool)
    from extproc.replicas.stores.lease import LeaseStore

    assert config.kubernetes_lease is not None  # noqa: S101 - checked with the configuration
    return LeaseStore(config.kubernetes_lease, config.pool)
