"""Kubernetes' API: where its server is, and how a pod is let in. Whoever speaks to it does so through here.

What is said is theirs: discovery lists and watches, a store of sidecars keeps Leases.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import aiohttp

from extproc.endpoints.access import client_tls
from extproc.endpoints.names import address_of

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiKeys(Protocol):
    """What a configuration says of the API server."""

    @property
    def namespace(self) -> str | None:
        """The namespace that is looked into; None: the pod's own."""

    @property
    def api(self) -> str | None:
        """URL of the server; None: the one that a pod is told of."""

    @property
    def token_file(self) -> str:
        """Where our token is."""

    @property
    def ca_file(self) -> str:
        """Who signed the server's certificate."""


class ApiServer:
    """Where the API server is, and how we are let in."""

    def __init__(self, keys: ApiKeys, environ: Mapping[str, str] = os.environ) -> None:
        """Follow `keys`; `environ` tells a pod where the server is."""
        self._keys = keys
        self._environ = environ

    def url(self, group_version: str, kind: str) -> str:
        """Return where objects of a kind are: `group_version` like discovery.k8s.io/v1, `kind` in the plural.

        Raises ValueError where nothing tells the server's address, OSError if the namespace can't be read.
        """
        keys = self._keys
        server = keys.api
        if server is None:
            host, port = (
                self._environ.get("KUBERNETES_SERVICE_HOST"),
                self._environ.get("KUBERNETES_SERVICE_PORT", "443"),
            )
            if not host:
                raise ValueError("not in a pod: KUBERNETES_SERVICE_HOST is not set; set `api`")
            server = f"https://{address_of(host, int(port))}"
        namespace = keys.namespace
        if namespace is None:
            namespace = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"
        root = f"apis/{group_version}" if "/" in group_version else f"api/{group_version}"
        return f"{server.rstrip('/')}/{root}/namespaces/{namespace}/{kind}"

    def client(self, url: str) -> aiohttp.ClientSession:
        """Return a client that trusts the cluster's CA as it is now, else what the system trusts. Raises OSError."""
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls(url)))

    def ask(
        self,
        client: aiohttp.ClientSession,
        method: str,
        url: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: aiohttp.ClientTimeout,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Ask `url` for something, with our token as it is now. Nothing follows a redirect: the token would go along.

        Raises OSError if the token can't be read; the rest is aiohttp's.
        """
        return client.request(
            method, url, params=query, data=body, headers=self.headers(method), timeout=timeout, allow_redirects=False
        )

    def headers(self, method: str) -> dict[str, str]:
        """Return what lets us in; the token is read again, for it is rotated. Raises OSError."""
        headers = {"accept": "application/json"}
        if method in _BODIES:
            headers["content-type"] = _BODIES[method]
        path = Path(self._keys.token_file)
        if path.exists():
            headers["authorization"] = f"Bearer {path.read_text().strip()}"
        return headers

    def _tls(self, url: str) -> ssl.SSLContext | bool:
        path = Path(self._keys.ca_file)
        if not url.startswith("https:") or not path.exists():
            return True
        return client_tls(self._keys.ca_file)  # also CAs without key identifiers, which clusters still have


_BODIES = {"POST": "application/json", "PATCH": "application/merge-patch+json"}


async def refusal(response: aiohttp.ClientResponse) -> str:
    """Return what the server says about a request that it refuses, for people."""
    said = (await response.content.read(300)).decode(errors="replace")
    return f"{response.status} {response.reason}: {said}"
