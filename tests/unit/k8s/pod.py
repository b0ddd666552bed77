"""The base's pod, run here: the same files, other paths."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.kit.envoy import envoy_binary
from tests.e2e.kit.processes import Child, free_port, http_get
from tests.unit.k8s.rendering import (
    Document,
    containers,
    gateway,
    one,
)


class Pod:
    """The base's sidecar and Envoy as child processes, with the ConfigMaps' files; paths and ports moved."""

    def __init__(self, documents: list[Document], directory: Path) -> None:
        self.containers = containers(gateway(documents))
        self.admin, self.http, self.stats, self.envoy_admin = (free_port() for _ in range(4))
        files = one(documents, "ConfigMap", "extproc-envoy")["data"]
        for name, text in files.items():
            (directory / name).write_text(text)
        moved = {"/run/extproc": str(directory), '"/dev/stdout"': f'"{directory}/access.log"'}
        ports = {8080: self.http, 9901: self.envoy_admin, 9903: self.stats}
        bootstrap, config = files["envoy.yaml"], one(documents, "ConfigMap", "extproc-sidecar")["data"]["sidecar.yaml"]
        for old, new in moved.items():
            assert old in bootstrap
            bootstrap, config = bootstrap.replace(old, new), config.replace(old, new)
        bootstrap = bootstrap.replace('"0.0.0.0"', '"127.0.0.1"')
        for port, here in ports.items():
            assert f"port_value: {port}}}" in bootstrap
            bootstrap = bootstrap.replace(f"port_value: {port}}}", f"port_value: {here}}}")
        config = config.replace("0.0.0.0:9902", f"127.0.0.1:{self.admin}").replace("name: vllm", "name: localhost")
        config = config.replace("port: 8000", f"port: {free_port()}")  # nobody is there
        config += "\nallowed_addresses: [127.0.0.0/8]\n"
        (directory / "envoy.yaml").write_text(bootstrap)
        (directory / "sidecar.yaml").write_text(config)
        self.directory = directory
        arguments = [
            str(directory / "sidecar.yaml") if part.startswith("/") else part
            for part in self.containers["extproc"]["args"]
        ]
        self.sidecar = Child([sys.executable, "-m", "extproc", *arguments], directory / "sidecar.log")
        command = self.containers["envoy"]["command"]
        assert command[:3] == ["envoy", "--config-path", "/etc/envoy/envoy.yaml"]
        self.envoy = Child(
            [
                str(envoy_binary()),
                "--config-path",
                str(directory / "envoy.yaml"),
                *command[3:],
                "--log-level",
                "warning",
            ],
            directory / "envoy.log",
        )

    def hook(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        """Run what a probe or a hook runs in Envoy's container."""
        here = [part.replace("/etc/envoy", str(self.directory)) for part in command]
        environ = {"PATH": os.environ["PATH"], "ENVOY_ADMIN_PORT": str(self.envoy_admin), **more}
        return subprocess.run(here, env=environ, capture_output=True, text=True, timeout=60, check=False)

    def endpoints_are_down(self) -> bool:
        """Whether the one endpoint, where nobody is, was found and seen to be down: until then it gets requests."""
        known = json.loads(http_get(f"127.0.0.1:{self.admin}", "/queues")[1])["endpoints"]
        return bool(known) and not any(endpoint["up"] for endpoint in known)

    def ask(self, body: bytes = b"{}", budget: str = "2s") -> tuple[int, bytes]:
        """The answer to one request: its status and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)
        connection.request("POST", "/v1/completions", body=body, headers={"x-queue-budget": budget})
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        connection.close()
        return status, text
