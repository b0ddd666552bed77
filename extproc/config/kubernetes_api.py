"""Keys of Kubernetes' API, which discovery and the Leases of sidecars ask alike."""

from __future__ import annotations

from pydantic import Field

from extproc.config.section import Section
from extproc.config.types import Label, Url


class KubernetesApi(Section):
    """Where the API server is, and how we are let in."""

    namespace: Label | None = Field(None, description="Default: the pod's own.")
    api: Url | None = Field(None, description="The API server. Default: the one that a pod is told of.")
    token_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/token", description="Read again for every call: it is rotated."
    )
    ca_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", description="Who signed the API server's certificate."
    )
