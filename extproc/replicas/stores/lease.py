"""Kubernetes: one Lease per sidecar, renewed by it alone. Who is alive is told by whether its Lease still changes.

A Lease's times are its writer's clock, so they are not looked at: a Lease that did not change for ALIVE_S by our own
clock is that of a dead sidecar. It is as the kubelets do it (a Lease per node). What a dead one leaves is deleted by
whoever notices after FORGOTTEN_S.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp

from extproc.kubernetes import ApiServer, refusal
from extproc.replicas.messages import Member
from extproc.replicas.stores import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from extproc.config import LeaseConfig

BEAT_S = 2.0
ALIVE_S = 6.0
FORGOTTEN_S = 120.0
TIMEOUT = aiohttp.ClientTimeout(total=1.5)
LABEL = "extproc/pool"
ADDRESS = "extproc/address"
MOST = 500
"""Leases listed: a pool has a handful."""


class LeaseStore:
    """Members of a pool as Leases."""

    beat_s = BEAT_S

    def __init__(
        self,
        config: LeaseConfig,
        pool: str,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use the API server that `config` names, or that a pod is told of in `environ`."""
        self._api = ApiServer(config, environ)
        self._pool = pool
        self._clock = clock
        self._client: aiohttp.ClientSession | None = None
        self._changed: dict[str, tuple[str, float]] = {}  # of each Lease: its version, and since when it has that

    async def beat(self, me: Member) -> list[Member]:
        """Renew our Lease; return whose Leases change."""
        await self._renew(me)
        query = {"labelSelector": f"{LABEL}={self._pool}", "limit": str(MOST)}
        page = await self._call("GET", "", query=query)
        now, found, dead = self._clock(), [], []
        seen: dict[str, tuple[str, float]] = {}
        try:
            for item in page["items"] or ():
                metadata = item["metadata"]
                name, version = str(metadata["name"]), str(metadata["resourceVersion"])
                before = self._changed.get(name)
                seen[name] = before if before is not None and before[0] == version else (version, now)
                age_s = now - seen[name][1]
                if age_s < ALIVE_S:
                    joined = datetime.fromisoformat(metadata["creationTimestamp"]).timestamp()
                    found.append(Member(_id_of(item), str(metadata["annotations"][ADDRESS]), int(joined)))
                elif age_s >= FORGOTTEN_S:
                    dead.append(name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"no LeaseList: {error!r}") from None
        self._changed = seen
        for name in dead:
            with contextlib.suppress(StoreError):
                await self._call("DELETE", f"/{name}")
        return found

    async def leave(self, me: Member) -> None:
        """Take our address out of our Lease; whoever sees it last deletes it."""
        await self._renew(me._replace(address=""))

    async def close(self) -> None:
        """Give up connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    # ----

    def _name(self, me: Member) -> str:
        return re.sub(r"[^a-z0-9-]+", "-", f"{self._pool}-{me.id}".lower()).strip("-")[:253]

    async def _renew(self, me: Member) -> None:
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": self._name(me),
                "labels": {LABEL: self._pool},
                "annotations": {ADDRESS: me.address},
            },
            "spec": {
                "holderIdentity": me.id,
                "leaseDurationSeconds": int(ALIVE_S),
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        if await self._call("PATCH", f"/{self._name(me)}", lease, missing_is_ok=True) is None:
            await self._call("POST", "", lease)

    async def _call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: dict[str, str] | None = None,
        missing_is_ok: bool = False,
    ) -> Any:
        try:
            url = self._api.url("coordination.k8s.io/v1", "leases")
            if self._client is None:
                self._client = self._api.client(url)
            content = None if body is None else json.dumps(body).encode()
            async with self._api.ask(
                self._client, method, url + path, query=query, body=content, timeout=TIMEOUT
            ) as response:
                if response.status == 404 and missing_is_ok:
                    return None
                if response.status not in (200, 201):
                    raise StoreError(f"{method} lease: {await refusal(response)}")
                return json.loads(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            await self.close()
            raise StoreError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None


def _id_of(item: Mapping[str, Any]) -> str:
    return str(item["spec"]["holderIdentity"])
