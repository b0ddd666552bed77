"""Several gateways before one stack's engines, an Envoy and a sidecar each, and what happens to them in the middle.

`ours` takes these settings beside config keys: `replicas=8` gateways, which share one queue through a store of their
own; with `share=false` they know nothing of each other; `replicas_fault=` is one of FAULTS, as in `extproc simulate`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from tests.e2e.kit.processes import free_port, http_get, tcp_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from tests.e2e.kit.processes import Child

FAULTS = ("none", "leader-killed", "store-gone")
FAULT_AT_S = 30.0
RESTART_S = 3.0
"""How long a sidecar that was killed is gone: as long as a kubelet takes, about."""
STORE_GONE_S = 10.0
STORE = shutil.which("valkey-server") or shutil.which("redis-server")

Event = tuple[float, "Callable[[], None]"]


@dataclass(frozen=True, slots=True)
class Among:
    """How many gateways there are, and what they are to each other.

    Attributes:
        keys: of the configuration, what else the contender's name sets.
    """

    count: int = 1
    shares: bool = True
    fault: str = "none"
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def has_store(self) -> bool:
        """Return whether they find each other."""
        return self.count > 1 and self.shares


def among(settings: Iterable[str]) -> Among:
    """Read what follows the name of a contender. Raises ValueError for what can't be."""
    keys = dict(map(_setting, settings))
    count, shares, fault = keys.pop("replicas", 1), keys.pop("share", True), keys.pop("replicas_fault", "none")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"replicas={count}: how many gateways there are, 1 or more")
    if fault not in FAULTS:
        raise ValueError(f"replicas_fault={fault}: known are {', '.join(FAULTS)}")
    found = Among(count, bool(shares), fault, keys)
    if fault != "none" and not found.has_store:
        raise ValueError(f"replicas_fault={fault}: needs two gateways or more that share")
    return found


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


class Group:
    """The sidecars of one stack that find each other: their store, who leads, and their faults."""

    def __init__(self, among: Among, directory: Path) -> None:
        """Choose the store's port. Raises ValueError where no store is installed."""
        if STORE is None:
            raise ValueError(
                "several gateways need valkey-server or redis-server on PATH: apt-get install redis-server"
            )
        self._among = among
        self._address = f"127.0.0.1:{free_port()}"
        port = self._address.rpartition(":")[2]
        self.argv = [STORE, "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
        self.store: Child | None = None
        self.sidecars: dict[str, Child] = {}
        """By the address of its admin interface."""
        self._killed: Child | None = None

    def keys(self) -> dict[str, Any]:
        """Return what a sidecar's configuration says of the others."""
        return {"replicas": {"listen": f"127.0.0.1:{free_port()}", "valkey": {"url": f"valkey://{self._address}"}}}

    def store_is_up(self) -> bool:
        """Return whether the store takes connections."""
        return tcp_open(self._address)

    def knows_all(self, admin: str) -> bool:
        """Return whether this sidecar and all others are one group."""
        return _replicas(admin).get("group") == self._among.count

    def events(self) -> Sequence[Event]:
        """Return what happens, and when, in seconds from the start."""
        match self._among.fault:
            case "leader-killed":
                return [(FAULT_AT_S, self._kill_leader), (FAULT_AT_S + RESTART_S, self._restart)]
            case "store-gone":
                return [(FAULT_AT_S, self._kill_store), (FAULT_AT_S + STORE_GONE_S, self._restart)]
            case _:
                return []

    def _kill_leader(self) -> None:
        leader = next(one for admin, one in self.sidecars.items() if _replicas(admin).get("role") == "leading")
        self._kill(leader)

    def _kill_store(self) -> None:
        assert self.store is not None
        self._kill(self.store)

    def _kill(self, child: Child) -> None:
        self._killed = child
        child.signal(signal.SIGKILL)
        child.stop()

    def _restart(self) -> None:
        if self._killed is not None:
            self._killed.start()


def _replicas(admin: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        found: dict[str, Any] = json.loads(http_get(admin, "/queues", timeout_s=5)[1])["replicas"]
        return found
    return {}
