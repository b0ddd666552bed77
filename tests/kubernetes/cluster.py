"""The API server of apiserver.go as a test sees it: requests, namespaces, accounts, pods, bad days."""

from __future__ import annotations

import http.client
import json
import signal
import ssl
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.kit.processes import Child, free_port, wait_until

Document = dict[str, Any]

NODE = "node-1"
ADMIN = "admin-of-the-tests"
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"


class Cluster:
    """The server, running while `with` lasts. Its data outlive a restart."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.folder = folder
        self.port, self.etcd_port, self.metrics_port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.ca_file = folder / "apiserver.crt"
        argv = [server, "-data", folder, "-port", self.port, "-etcd-port", self.etcd_port]
        argv += ["-metrics-port", self.metrics_port]
        self._child = Child(list(map(str, argv)), folder / "log", name="kube-apiserver")
        self._numbers = iter(range(1, 1000))

    def __enter__(self) -> Cluster:
        self.start()
        self.do("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, on its data if it ran before."""
        self._child.start()
        self._child.wait_ready(self._is_ready, timeout_s=90.0, what="/readyz")

    def kill(self) -> None:
        """Kill it hard."""
        self._child.signal(signal.SIGKILL)
        self._child.stop()

    def _is_ready(self) -> bool:
        try:
            return self.call("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException, AssertionError):
            return False

    # ---- requests

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = ADMIN,
        kind: str = "application/json",
        port: int | None = None,
    ) -> tuple[int, Any]:
        """Status and answer, JSON if it is such; of another `port`, whoever serves there is believed."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if port is not None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port or self.port, context=context, timeout=20)
        try:
            headers = {"authorization": f"Bearer {token}", "content-type": kind, "accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text.decode()
        finally:
            connection.close()

    def do(self, method: str, path: str, body: object = None, kind: str = "application/json") -> Any:
        """The answer; AssertionError unless it is a success."""
        status, answer = self.call(method, path, body, kind=kind)
        assert 200 <= status < 300, f"{method} {path}: {status} {answer}"
        return answer

    def compact(self) -> None:
        """Have etcd forget all versions but the newest."""
        newest = self._ask_etcd("/v3/kv/range", {"key": "AA=="})["header"]["revision"]
        self._ask_etcd("/v3/kv/compaction", {"revision": newest, "physical": True})

    def _ask_etcd(self, path: str, body: Document) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.etcd_port, timeout=10)
        try:
            connection.request("POST", path, json.dumps(body))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    # ---- what a test needs

    def namespace(self) -> str:
        """A new namespace, with the account that pods of nobody's have."""
        name = f"test-{next(self._numbers)}"
        self.do("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        self.do("POST", f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "default"}})
        return name

    def token(self, namespace: str, account: str) -> str:
        """A token of an account, which is made if it is not there."""
        accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        self.call("POST", accounts, {"metadata": {"name": account}})
        return str(self.do("POST", f"{accounts}/{account}/token", {"spec": {}})["status"]["token"])

    def put_pod(self, namespace: str, name: str, ip: str, *, ready: bool = True, **metadata: Any) -> None:
        """Make a pod and say as a kubelet would that it runs at `ip`; a second time: only whether it is ready."""
        pods = f"/api/v1/namespaces/{namespace}/pods"
        spec: Document = {"nodeName": NODE, "terminationGracePeriodSeconds": 30}
        spec |= {"containers": [{"name": "engine", "image": "none", "ports": [{"containerPort": 8000}]}]}
        self.call("POST", pods, {"metadata": {"name": name, **metadata}, "spec": spec})
        now = "2026-01-01T00:00:00Z"
        condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": now}
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [condition]}
        self.do("PATCH", f"{pods}/{name}/status", {"status": status}, MERGE)

    def install(self, *definitions: Document) -> None:
        """Install CustomResourceDefinitions, and wait until the API serves their kinds."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for definition in definitions:
            name = definition["metadata"]["name"]
            query = "fieldManager=tests&force=true"
            self.do("PATCH", f"{path}/{name}?{query}", definition, APPLY)
        for definition in definitions:
            spec = definition["spec"]
            versions = [version["name"] for version in spec["versions"] if version["served"]]
            served = f"/apis/{spec['group']}/{versions[0]}/{spec['names']['plural']}?limit=1"
            wait_until(lambda served=served: self.call("GET", served)[0] == 200, 20.0, served)

    def path_of(self, document: Document, namespace: str | None = None) -> str:
        """Where an object is, as the API itself tells for its kind."""
        version = document["apiVersion"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        kinds = {one["kind"]: one for one in self.do("GET", root)["resources"] if "/" not in one["name"]}
        kind = kinds[document["kind"]]
        where = f"/namespaces/{namespace}" if kind["namespaced"] else ""
        return f"{root}{where}/{kind['name']}/{document['metadata']['name']}"


# ---- definitions that modules of Go's proxy ship

INFERENCE = "sigs.k8s.io/gateway-api-inference-extension"
KEDA = "github.com/kedacore/keda/v2@v2.21.0"
DEFINITIONS = (
    (f"{INFERENCE}@v1.6.0", "config/crd/bases/inference.networking.k8s.io_inferencepools.yaml"),
    (f"{INFERENCE}@v1.4.0", "config/crd/bases/inference.networking.x-k8s.io_inferenceobjectives.yaml"),
    ("sigs.k8s.io/gateway-api@v1.4.1", "config/crd/standard/gateway.networking.k8s.io_*.yaml"),
    ("istio.io/api@v1.31.0", "kubernetes/customresourcedefinitions.gen.yaml"),
    (KEDA, "config/crd/bases/keda.sh_scaledobjects.yaml"),
    ("github.com/cert-manager/cert-manager@v1.19.0", "deploy/crds/*.yaml"),
    ("github.com/envoyproxy/gateway@v1.6.0", "charts/gateway-helm/crds/generated/*.yaml"),
)
"""Module and files. Two of one module: newer ones have no InferenceObjective, which moved to llm-d's router."""


@cache
def shipped(module: str, files: str) -> tuple[Document, ...]:
    """CustomResourceDefinitions in a module's files."""
    done = subprocess.run(
        ["go", "mod", "download", "-json", module], capture_output=True, text=True, timeout=300, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [
        document
        for path in sorted(Path(json.loads(done.stdout)["Dir"]).glob(files))
        for document in yaml.load_all(path.read_text(), yaml.CSafeLoader)
        if document and document["kind"] == "CustomResourceDefinition"
    ]
    assert found, (module, files)
    return tuple(found)


def stand_in(group: str, kind: str, plural: str, version: str, spec: Document | None = None) -> Document:
    """A definition of our own, for a kind whose module nobody serves; without `spec` it takes anything."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": spec} if spec else anything}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


LLM_D_OBJECTIVE = stand_in(
    *("llm-d.ai", "InferenceObjective", "inferenceobjectives", "v1alpha2"),
    {
        "priority": {"type": "integer", "format": "int32"},
        "poolRef": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
)
