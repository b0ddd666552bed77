"""A small Kubernetes API server: objects in pages, watches, bookmarks, 410 Gone, bad days; and Leases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiohttp import web

from extproc.endpoints.discovery import watch

from .processes import PATIENCE_S, end_server, free_port, take_turns, wait_until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
SLICES = "discovery.k8s.io/v1/endpointslices"
PODS = "v1/pods"
POOLS = "inference.networking.k8s.io/v1/inferencepools"
OBJECTIVES = "inference.networking.x-k8s.io/v1alpha2/inferenceobjectives"
LLM_D_OBJECTIVES = "llm-d.ai/v1alpha2/inferenceobjectives"


def slice_of(
    name: str, pods: dict[str, str], *, service: str = "vllm", port: int = 8000, **more: Any
) -> dict[str, Any]:
    """An EndpointSlice whose ready endpoints are `pods`: name -> IP."""
    endpoints = [
        {
            "addresses": [ip],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {"kind": "Pod", "name": pod},
        }
        for pod, ip in pods.items()
    ]
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        **more,
    }


def pool_of(name: str, labels: dict[str, str], ports: tuple[int, ...] = (8000,)) -> dict[str, Any]:
    """An InferencePool."""
    spec = {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}
    return {"metadata": {"name": name}, "spec": spec}


def pod_of(
    name: str, ip: str | None, labels: dict[str, str], *, ready: str = "True", **metadata: Any
) -> dict[str, Any]:
    """A pod, ready if not said otherwise."""
    status = {"conditions": [{"type": "Ready", "status": ready}], **({"podIP": ip} if ip else {})}
    return {"metadata": {"name": name, "labels": labels, **metadata}, "status": status}


def objective_of(name: str, pool: str, priority: int | None) -> dict[str, Any]:
    """An InferenceObjective."""
    spec = {"poolRef": {"name": pool}, **({} if priority is None else {"priority": priority})}
    return {"metadata": {"name": name}, "spec": spec}


class _Change(NamedTuple):
    """What became of an object; of no kind: a bookmark."""

    version: int
    kind: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    def told(self, kind: str, query: dict[str, str]) -> dict[str, Any] | None:
        """The event that who watches `kind` with `query` is told, if any."""
        if self.kind is None:
            return {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}}
        was_in, is_in = (item is not None and _fits(item, query) for item in (self.before, self.after))
        if self.kind != kind or not (was_in or is_in):
            return None
        what = "DELETED" if not is_in else "MODIFIED" if was_in else "ADDED"
        item = self.after or self.before or {}
        return {
            "type": what,
            "object": {**item, "metadata": {**item["metadata"], "resourceVersion": str(self.version)}},
        }


def _fits(item: dict[str, Any], query: dict[str, str]) -> bool:
    """Whether the selectors of a query select an object."""
    labels = item["metadata"].get("labels", {})
    wanted = [pair.partition("=") for pair in query.get("labelSelector", "").split(",") if pair]
    field, _, name = query.get("fieldSelector", "").partition("=")
    assert field in ("", "metadata.name")
    return all(labels.get(key) == value for key, _, value in wanted) and (not field or item["metadata"]["name"] == name)


class KubeApi:
    """The server, in a thread of its own while `with` lasts. All methods may be called from the test's thread.

    requests   query and authorization of every request, in order
    token      the only bearer token that is let in; None: anybody
    kinds      of what objects are known; any other is a 404
    page       objects in one page of a list, whatever `limit` says
    gone_as    how a version that is too old is refused: "event" (200 and an ERROR event) or "status" (410)
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.requests: list[tuple[dict[str, str], str]] = []
        self.token: str | None = None
        self.kinds = {SLICES, PODS, POOLS, OBJECTIVES, LLM_D_OBJECTIVES}
        self.page = 500
        self.gone_as = "event"
        self._tls = tls
        self._objects: dict[tuple[str, str], dict[str, Any]] = {}  # by kind and name
        self.leases: dict[str, dict[str, Any]] = {}
        self._version = 100
        self._oldest = 100
        self._history: list[_Change] = []
        self._watches: dict[asyncio.Event, asyncio.Transport] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._site: web.TCPSite | None = None
        self._runner: web.AppRunner | None = None
        self._started, self._stopping = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> KubeApi:
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stopping.set)
        self._thread.join(PATIENCE_S)

    # What a test orders

    def put(self, item: dict[str, Any], kind: str = SLICES) -> None:
        """Add or change an object; watchers hear of it."""
        self._do(lambda: self._change(kind, item["metadata"]["name"], item))

    def delete(self, name: str, kind: str = SLICES) -> None:
        """Delete an object; watchers hear of it."""
        self._do(lambda: self._change(kind, name, None))

    def change_unheard(self, item: dict[str, Any], kind: str = SLICES) -> None:
        """Change an object and forget the history: whoever knew the version before must list again."""

        def change() -> None:
            self._change(kind, item["metadata"]["name"], item, wake=False)
            self._history.clear()
            self._oldest = self._version

        self._do(change)

    def forget(self) -> None:
        """Forget the history up to now; versions from before are gone."""

        def forget() -> None:
            self._version += 1
            self._history.clear()
            self._oldest = self._version

        self._do(forget)

    def bookmark(self) -> int:
        """Raise the version and tell it to all watchers by a bookmark; return it."""

        def mark() -> None:
            self._version += 1
            self._history.append(_Change(self._version, None, None, None))
            self._wake()

        self._do(mark)
        return self._version

    def drop(self) -> None:
        """Cut every watch connection without a word."""

        self._do(self._abort)

    def down(self) -> None:
        """Refuse connections, and cut those there are."""
        self._await(self._close())

    def up(self) -> None:
        """Listen again."""
        self._await(self._listen())

    def lists(self) -> int:
        """How many times somebody asked for a list."""
        return sum("watch" not in query for query, _ in self.requests)

    def watches(self) -> list[str]:
        """The versions from which somebody asked to watch."""
        return [query["resourceVersion"] for query, _ in self.requests if "watch" in query]

    def wait_watching(self, count: int = 1) -> None:
        """Wait until so many watches are open."""

        def open_now() -> bool:
            return sum(not transport.is_closing() for transport in list(self._watches.values())) == count

        wait_until(open_now, message=f"{count} open watches")

    # Inside the thread

    def _do(self, work: Callable[[], object]) -> None:
        async def call() -> None:
            work()

        self._await(call())

    def _await(self, work: Any) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_get(LEASES, self._list_leases)
        app.router.add_get("/apis/{group}/{version}/namespaces/{namespace}/{kind}", self._get)
        app.router.add_get("/api/{version}/namespaces/{namespace}/{kind}", self._get)
        app.router.add_post(LEASES, self._create_lease)
        app.router.add_patch(LEASES + "/{name}", self._patch_lease)
        app.router.add_delete(LEASES + "/{name}", self._delete_lease)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()
        self._started.set()
        await self._stopping.wait()
        await self._close()
        await end_server(self._runner)

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True)
        await self._site.start()

    async def _close(self) -> None:
        if self._site is not None:
            await self._site.stop()
            self._site = None
            await take_turns()
        self._abort()

    def _abort(self) -> None:
        for transport in self._watches.values():
            transport.abort()
        self._wake()

    def _change(self, kind: str, name: str, item: dict[str, Any] | None, *, wake: bool = True) -> None:
        self._version += 1
        before = self._objects.pop((kind, name), None)
        if item is not None:
            item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
            self._objects[kind, name] = item
        self._history.append(_Change(self._version, kind, before, item))
        if wake:
            self._wake()

    def _wake(self) -> None:
        for event in self._watches:
            event.set()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        authorization = request.headers.get("authorization", "")
        self.requests.append((query, authorization))
        if self.token is not None and authorization != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        group, version, kind = (request.match_info.get(one, "") for one in ("group", "version", "kind"))
        resource = "/".join(filter(None, (group, version, kind)))
        if resource not in self.kinds:
            return web.Response(status=404, text="404 page not found")
        if "watch" in query:
            return await self._watch(request, resource, int(query["resourceVersion"]))
        items = [item for (kind, _), item in self._objects.items() if kind == resource and _fits(item, query)]
        begin = int(query.get("continue", 0))
        page = items[begin : begin + self.page]
        metadata = {"resourceVersion": str(self._version)}
        if begin + self.page < len(items):
            metadata["continue"] = str(begin + self.page)
        return web.json_response({"metadata": metadata, "items": page or None})

    async def _watch(self, request: web.Request, resource: str, since: int) -> web.StreamResponse:
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {since}"}
        if since < self._oldest and self.gone_as == "status":
            return web.json_response(gone, status=410)
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        if since < self._oldest:
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        woken = asyncio.Event()
        transport = self._watches[woken] = request.transport
        try:
            with contextlib.suppress(ConnectionError):
                while not transport.is_closing():
                    for change in list(self._history):
                        if change.version > since and (event := change.told(resource, dict(request.query))):
                            line = json.dumps(event).encode() + b"\n"
                            await response.write(line[:30])  # in two pieces: a line need not come in one read
                            await response.write(line[30:])
                        since = max(since, change.version)
                    woken.clear()
                    await woken.wait()
        finally:
            del self._watches[woken]
        return response

    # Leases: as much of the API as one sidecar with one Lease of its own sees

    def _refusal(self, request: web.Request) -> web.Response | None:
        authorization = request.headers.get("authorization", "")
        if self.token is None or authorization == f"Bearer {self.token}":
            return None
        return web.json_response({"kind": "Status", "code": 403, "message": "forbidden"}, status=403)

    async def _list_leases(self, request: web.Request) -> web.Response:
        key, _, value = request.query["labelSelector"].partition("=")
        items = [lease for lease in self.leases.values() if lease["metadata"]["labels"].get(key) == value]
        metadata = {"resourceVersion": str(self._version)}
        return self._refusal(request) or web.json_response({"kind": "LeaseList", "metadata": metadata, "items": items})

    async def _create_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        name = lease["metadata"]["name"]
        if name in self.leases:
            return web.json_response({"kind": "Status", "code": 409, "reason": "AlreadyExists"}, status=409)
        self._version += 1
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lease["metadata"] |= {"resourceVersion": str(self._version), "creationTimestamp": created}
        refusal = self._refusal(request)
        if refusal is None:
            self.leases[name] = lease
        return refusal or web.json_response(lease, status=201)

    async def _patch_lease(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/merge-patch+json"
        lease = self.leases.get(request.match_info["name"])
        if lease is None:
            return web.json_response({"kind": "Status", "code": 404, "reason": "NotFound"}, status=404)
        patch = await request.json()
        self._version += 1
        lease["metadata"]["annotations"] |= patch["metadata"]["annotations"]
        lease["metadata"]["resourceVersion"] = str(self._version)
        lease["spec"] |= patch["spec"]
        return self._refusal(request) or web.json_response(lease)

    async def _delete_lease(self, request: web.Request) -> web.Response:
        self.leases.pop(request.match_info["name"], None)
        return self._refusal(request) or web.json_response({"kind": "Status", "status": "Success"})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches try again at once."""
    monkeypatch.setattr(watch, "BACKOFF_S", (0.01, 0.05))


@pytest.fixture
def api(quick: None) -> Iterator[KubeApi]:
    """A server, and watches that try again at once."""
    with KubeApi() as server:
        yield server
