"""The whole picture for one test: upstreams, the sidecar as a child process, and Envoy in front.

Envoy's bootstrap is the one that the sidecar's own command renders. Only the public contract is used: `extproc serve`,
`extproc envoy-config`, the admin pages.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import yaml

from .commands import envoy_config
from .envoy import Envoy
from .processes import PATIENCE_S, Child, free_port, http_get, http_ok, wait_until
from .upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Edit = Callable[[dict[str, Any]], None]

_SOCKETS = tempfile.TemporaryDirectory(prefix="extproc-")
_NUMBERS = itertools.count()

# What a test wants unless it says otherwise: the queue is on, an endpoint takes one request, the end comes quickly.
DEFAULTS: dict[str, Any] = {"enable_queue": True, "max_running_requests": 1, "drain_timeout": "200ms"}


def local() -> str:
    """A free `host:port` on loopback."""
    return f"127.0.0.1:{free_port()}"


def beside_envoy() -> str:
    """A unix socket that nobody has, with a path short enough for one: how a sidecar is to be run."""
    return f"unix:{_SOCKETS.name}/{next(_NUMBERS)}"


class Sidecar:
    """`extproc serve` with this config, ready when `with` is entered. `listen` and `admin` are added if missing.

    `listen` is a unix socket; over TCP gRPC works differently (`extproc.commands.cli.IN_OUR_THREAD`): with TLS, as
    shipped, and in tests that say so.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        directory: Path,
        *,
        name: str = "sidecar",
        inside: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.config = {"listen": local() if "tls" in config else beside_envoy(), "admin": local(), **config}
        self.listen: str = self.config["listen"]
        self.admin: str = self.config["admin"]
        self.path = directory / f"{name}.yaml"
        argv = [*inside, sys.executable, "-m", "extproc", "serve", "--config", str(self.path)]
        self.child = Child(argv, directory / f"{name}.log", name=name, env=env)

    def __enter__(self) -> Sidecar:
        self.write_config()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()

    def write_config(self, **changes: Any) -> None:
        """Write the config file, with these top-level keys changed from now on (atomically: a reload may watch it)."""
        self.config |= changes
        fresh = self.path.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self.config, sort_keys=False))
        fresh.replace(self.path)

    def start(self) -> None:
        """Start it, also again after it was stopped or killed, and wait until /readyz answers 200."""
        self.child.start()
        try:
            self.child.wait_ready(lambda: http_ok(self.admin, "/readyz"), what="admin /readyz")
        except BaseException:
            self.child.stop()
            raise

    def queues(self) -> dict[str, Any]:
        """The page /queues."""
        status, body = http_get(self.admin, "/queues")
        if status != 200:
            raise AssertionError(f"/queues: {status} {body[:200]!r}")
        page: dict[str, Any] = json.loads(body)
        return page

    def metrics(self) -> dict[str, float]:
        """The page /metrics: sample as written, `name{labels}` -> value."""
        text = http_get(self.admin, "/metrics")[1].decode()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def envoy_config(self, http: str, admin: str, access_log: Path, protocol: str, sidecars: Sequence[str] = ()) -> str:
        """The bootstrap that `extproc envoy-config` prints for this config; for TLS also the files it names."""
        secrets = self.config.get("tls", {}).get("envoy", {}).get("secrets_directory")
        return envoy_config(
            *("--config", self.path, "--http", http, "--envoy-admin", admin, "--access-log", access_log),
            *("--upstream-protocol", protocol),
            *(("--sidecar", *sidecars) if sidecars else ()),
            *(("--secrets", secrets) if secrets else ()),
        )


class Front:
    """One Envoy in front of the sidecar: where clients send (`address`, `url`) and the Envoy itself."""

    def __init__(self, address: str, envoy: Envoy) -> None:
        self.address = address
        self.url = f"http://{address}/v1/chat/completions"
        self.envoy = envoy


class Stack:
    """Upstreams, sidecar and one Envoy, all running while `with` lasts.

    upstreams   names; each becomes a running `Upstream` and an endpoint of the same name
    protocol    between Envoy and the upstreams: "h1" or "h2"
    config      top-level config keys over `DEFAULTS`
    endpoints   name -> keys of that endpoint; a name that is no upstream becomes a further endpoint, at the first
                upstream's address if it brings none
    edit        changes the rendered bootstrap (parsed YAML, in place) before Envoy starts
    """

    def __init__(
        self,
        directory: Path,
        *,
        upstreams: Sequence[str] = ("a",),
        protocol: str = "h1",
        config: Mapping[str, Any] | None = None,
        endpoints: Mapping[str, Mapping[str, Any]] | None = None,
        edit: Edit | None = None,
    ) -> None:
        self.directory = directory
        self.upstreams = {name: Upstream(name) for name in upstreams}
        keys = {name: {"address": upstream.address} for name, upstream in self.upstreams.items()}
        first = next(iter(keys.values()), {})
        for name, more in (endpoints or {}).items():
            keys[name] = {**keys.get(name, first), **more}
        listed = [{"name": name, **values} for name, values in keys.items()]
        self.sidecar = Sidecar({**DEFAULTS, "endpoints": listed, **(config or {})}, directory)
        self._protocol = protocol
        self._edit = edit
        self._running = contextlib.ExitStack()
        self.front: Front

    def __enter__(self) -> Stack:
        with contextlib.ExitStack() as starting:
            for upstream in self.upstreams.values():
                starting.enter_context(upstream)
            starting.enter_context(self.sidecar)
            self._running = starting.pop_all()
        try:
            self.front = self.add_envoy("envoy", protocol=self._protocol, edit=self._edit)
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def add_envoy(
        self,
        name: str,
        *,
        protocol: str = "h1",
        edit: Edit | None = None,
        concurrency: int = 1,
        sidecars: Sequence[str] = (),
    ) -> Front:
        """One more Envoy in front of the same sidecar, or of `sidecars`, until the stack ends."""
        again = self.sidecar.config.get("second_try") if name == "envoy" else None  # it is Envoy's own listener
        address = again or local()
        text = self.sidecar.envoy_config(address, local(), self.directory / f"{name}.access", protocol, sidecars)
        if edit is not None:
            parsed = yaml.load(text, yaml.CSafeLoader)
            edit(parsed)
            text = json.dumps(parsed)  # JSON is YAML, and no parser takes its "n" for no
        envoy = Envoy(text, self.directory, name=name, concurrency=concurrency)
        return Front(address, self._running.enter_context(envoy))

    @property
    def address(self) -> str:
        """Where clients send: `host:port` of the first Envoy."""
        return self.front.address

    @property
    def url(self) -> str:
        """The chat completions URL at the first Envoy."""
        return self.front.url

    @property
    def envoy(self) -> Envoy:
        return self.front.envoy

    def endpoint(self, name: str) -> dict[str, Any]:
        """What /queues says about one endpoint."""
        page = self.sidecar.queues()
        for found in page["endpoints"]:
            if found["name"] == name:
                return dict(found)
        raise AssertionError(f"no endpoint {name!r} in /queues: {page['endpoints']}")

    def in_flight(self, name: str) -> int:
        """Leases that this endpoint holds now."""
        return int(self.endpoint(name)["in_flight"])

    def waiting(self) -> list[dict[str, Any]]:
        """The requests that wait now, as /queues lists them (it bounds the list)."""
        return list(self.sidecar.queues()["waiting"])

    def outcomes(self, outcome: str) -> int:
        """How many requests have left with this outcome so far."""
        return int(self.sidecar.queues()["outcomes"].get(outcome, 0))

    def wait_in_flight(self, name: str, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until this endpoint holds exactly `count` leases."""
        self._wait(lambda _: self.in_flight(name) == count, timeout_s, f"{name} with {count} in flight")

    def wait_waiting(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until exactly `count` requests wait."""
        self._wait(lambda page: page["waiting_total"] == count, timeout_s, f"{count} waiting")

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until nothing waits and all leases are back."""
        self._wait(
            lambda page: not page["waiting_total"] and not any(one["in_flight"] for one in page["endpoints"]),
            timeout_s,
            "idle",
        )

    def _wait(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float, what: str) -> None:
        try:
            wait_until(lambda: condition(self.sidecar.queues()), timeout_s)
        except AssertionError:
            raise AssertionError(f"not {what} within {timeout_s:g} s: {json.dumps(self.sidecar.queues())}") from None
