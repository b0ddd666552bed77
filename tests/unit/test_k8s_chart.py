"""The Helm chart: its values are checked, and what Helm makes of it is what kustomize makes of the same manifests.

Helm comes in no package for machines without it: there `make test-helm` builds it, and a plain run skips what needs it.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from extproc import __version__
from k8s.chart import CHART, EXTRAS, VARIANTS, without_namespace
from tests.e2e.kit.processes import run
from tests.unit.k8s.rendering import K8S, one, rendered

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rendered"]  # a fixture

Document = dict[str, Any]
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture(scope="session")
def helm() -> str:
    found = shutil.which("helm")
    if found is None:
        pytest.skip("no helm here: `make test-helm` builds it")
    return found


def installed(helm: str, **values: Any) -> list[Document]:
    """What Helm would install."""
    given = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    done = run([helm, "template", "extproc", str(CHART), "--namespace", "llm", "--kube-version", "1.33", *given])
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document is not None]


def anywhere(documents: list[Document]) -> list[str]:
    """Documents in no order that means anything, for the namespace that they are applied to."""
    for document in documents:
        assert document["metadata"].pop("namespace", "llm") == "llm"
    return sorted(json.dumps(document, sort_keys=True) for document in documents)


def test_the_values_that_ship_fit_their_schema_and_every_variant_is_one():
    jsonschema.validate(VALUES, SCHEMA)
    assert SCHEMA["properties"]["variant"]["enum"] == list(VARIANTS)
    assert SCHEMA["properties"].keys() - {"global"} == VALUES.keys()
    assert {path.name for path in (CHART / "files").iterdir()} == {*VARIANTS, *EXTRAS}


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "gatewy"},
        {"image": {"repository": "x"}},
        {"image": {"repository": "x", "tag": 1}},
        {"resources": {"extprok": {}}},
        {"monitoring": True},
        {"replicas": 2},
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_refused(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**VALUES, **wrong}, SCHEMA)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_charts_files_are_what_kustomize_renders_now(rendered: Callable[..., list[Document]], variant):
    files = [yaml.safe_load(path.read_text()) for path in (CHART / "files" / variant).iterdir()]
    now = [without_namespace(document) for document in rendered(*VARIANTS[variant])]
    assert anywhere(files) == anywhere(now), "run `make envoy-files`"


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_installs_what_kustomize_would(helm, rendered, variant):
    assert anywhere(installed(helm, variant=variant)) == anywhere(rendered(*VARIANTS[variant]))


def test_helm_installs_what_monitoring_and_autoscaling_add(helm, rendered):
    switched = {"monitoring": {"enabled": True}, "autoscaling": {"enabled": True}}
    assert anywhere(installed(helm, **switched)) == anywhere(rendered("base", "monitoring", "autoscaling"))


def test_the_values_reach_the_manifests(helm):
    text = "enable_queue: true\nlisten: unix:/run/extproc/sidecar.sock\n"
    resources = {"limits": {"memory": "1Gi"}, "requests": {"memory": "1Gi"}}
    documents = installed(
        helm,
        sidecar=text,
        image={"repository": "registry.example/extproc", "tag": "9"},
        envoyImage={"repository": "registry.example/envoy", "tag": "8"},
        resources={"extproc": resources},
        nodeSelector={"pool": "cpu"},
        imagePullSecrets=[{"name": "registry"}],
    )
    assert one(documents, "ConfigMap", "extproc-sidecar")["data"] == {"sidecar.yaml": text}
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    (sidecar,), (envoy,) = pod["initContainers"], pod["containers"]
    assert (sidecar["image"], envoy["image"]) == ("registry.example/extproc:9", "registry.example/envoy:8")
    assert sidecar["resources"] == resources
    assert envoy["resources"] != resources
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"pool": "cpu"}, [{"name": "registry"}])


def test_helm_finds_no_fault_with_the_chart_and_refuses_a_value_that_means_nothing(helm):
    assert run([helm, "lint", "--strict", str(CHART)]).returncode == 0
    done = run([helm, "template", str(CHART), "--kube-version", "1.33", "--set", "variant=gatewy"])
    assert done.returncode != 0
    assert "variant" in done.stderr


def test_the_chart_has_the_version_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    deployment = yaml.safe_load((K8S / "base/kustomization.yaml").read_text())
    tags = {image["name"]: image["newTag"] for image in deployment["images"]}
    assert chart["version"] == chart["appVersion"] == __version__
    assert {VALUES["image"]["tag"], VALUES["envoyImage"]["tag"]} == set(tags.values())
