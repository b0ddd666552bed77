"""Keys of several sidecars that decide as one: how they find and reach each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from extproc.config.kubernetes_api import KubernetesApi
from extproc.config.section import Section
from extproc.config.types import (
    Address,
    FilePath,
    PoolName,
    Server,
    StoreUrl,
)


class ValkeyConfig(Section):
    """Valkey 7 or Redis 6 and later. Needs the extra `valkey`."""

    url: StoreUrl = Field(
        description="Like `valkey://10.0.0.7:6379/0`; `valkeys://` is TLS; `redis://`, `rediss://` and `unix:///path` "
        "work too. Shown nowhere."
    )
    password_file: FilePath | None = Field(None, description="A password; read again for each connection.")


class LeaseConfig(KubernetesApi):
    """One Lease (`coordination.k8s.io`) per sidecar.

    Needs the rights to get, list, create, patch and delete `leases`, in its namespace.
    """


class ReplicasTlsConfig(Section):
    """Mutual TLS between sidecars. PEM files, read again for each connection."""

    cert_file: FilePath = Field(description="Our certificate, and after it those between it and its CA.")
    key_file: FilePath = Field(description="Its key, without a passphrase.")
    ca_file: FilePath = Field(description="Who signed the certificates of all sidecars.")
    server_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="A DNS name in the certificate of every sidecar of the pool, and in no other's."
    )


class ReplicasConfig(Section):
    """Several sidecars that share endpoints decide as one: one leads, the others follow (docs/replicas.md)."""

    pool: PoolName = Field("default", description="Sidecars of one pool share their endpoints; one pool per config.")
    listen: Address = Field("127.0.0.1:50061", description="Where other sidecars reach us: host:port.")
    advertise: Server | None = Field(
        None, description="The host:port that others are told. Default: `listen`. In a pod: its IP."
    )
    valkey: ValkeyConfig | None = Field(
        None, description="Find each other in Valkey or Redis. Either this or the next."
    )
    kubernetes_lease: LeaseConfig | None = Field(None, description="Find each other by Leases in Kubernetes.")
    tls: ReplicasTlsConfig | None = Field(None, description="TLS between sidecars. Unset: plain text.")
    allow_insecure: bool = Field(
        False, description="Allow `listen` without `tls` on addresses other than loopback: anyone there can take slots."
    )

    @property
    def reached_at(self) -> str:
        """The address that others are told."""
        return self.advertise or self.listen
