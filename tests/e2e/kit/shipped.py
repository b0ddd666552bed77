"""What a user starts: a file of envoy/ as it is shipped, examples/sidecar.yaml and two servers; only ports differ."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .envoy import Envoy
from .processes import free_port
from .stack import Sidecar, local
from .upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[3]
_PORTS = {8080: "http", 9901: "envoy", 50051: "listen", 8001: "vllm-a", 8002: "vllm-b"}


class Shipped:
    """Sidecar, Envoy and two upstreams, running while `with` lasts.

    name      the file in envoy/
    config    top-level keys over examples/sidecar.yaml
    edit      changes the text of the bootstrap before Envoy starts
    """

    def __init__(
        self,
        directory: Path,
        name: str = "sidecar.yaml",
        *,
        config: Mapping[str, Any] | None = None,
        edit: Callable[[str], str] = str,
    ) -> None:
        self.upstreams = {name: Upstream(name) for name in ("vllm-a", "vllm-b")}
        ports = {name: free_port() for name in _PORTS.values()}
        ports |= {name: upstream.port for name, upstream in self.upstreams.items()}
        keys = yaml.safe_load((ROOT / "examples/sidecar.yaml").read_text())
        for endpoint in keys["endpoints"]:
            endpoint["address"] = f"127.0.0.1:{ports[endpoint['name']]}"
        keys |= {"listen": f"127.0.0.1:{ports['listen']}", "admin": local(), **(config or {})}
        self.sidecar = Sidecar(keys, directory)
        text = (ROOT / "envoy" / name).read_text()
        for port, what in _PORTS.items():
            if f"port_value: {port}}}" not in text:
                raise AssertionError(f"envoy/{name} has no port {port}")
            text = text.replace(f"port_value: {port}}}", f"port_value: {ports[what]}}}")
        text = text.replace("/dev/stdout", str(directory / "access.log"))
        self.envoy = Envoy(edit(text), directory)
        self.address = f"127.0.0.1:{ports['http']}"
        self.url = f"http://{self.address}/v1/chat/completions"
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Shipped:
        with contextlib.ExitStack() as starting:
            for part in (*self.upstreams.values(), self.sidecar, self.envoy):
                starting.enter_context(part)
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def kill(self, number: int = 9) -> None:
        """Let the sidecar die of a signal, and wait until it is dead."""
        self.sidecar.child.signal(number)
        code = self.sidecar.child.wait_exit()
        if code != -number:
            raise AssertionError(f"ended with {code}, not by signal {number}:\n{self.sidecar.child.output()[-2000:]}")
        self.sidecar.child.stop()  # reaps it

    def release(self, request_id: str) -> None:
        """Let a held answer go on, wherever it runs."""
        for upstream in self.upstreams.values():
            upstream.release(request_id)

    def reached(self) -> list[str]:
        """The ids of all requests that reached an upstream, retries included, in the order of their arrival."""
        records = [record for upstream in self.upstreams.values() for record in upstream.records()]
        return [record.request_id for record in sorted(records, key=lambda record: record.arrived_at)]
