"""Kubernetes: the ready addresses of a service's EndpointSlices, by list and watch.

Straight on aiohttp: it is two GET requests. kubernetes_asyncio would bring its whole model of the API, and its Watch
takes the version of the last object for that of the list and retries a 410 with the version that is gone (its issue
135, pull request 327), so that the part that matters would be written here anyway.

    list ──version──▶ watch ──events, bookmarks──▶ watch again … 410 Gone: list again; dropped: wait, watch again
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from extproc.endpoints.access import client_tls
from extproc.endpoints.names import address_of, name_of
from extproc.errors import plain_words

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

    from extproc.config import EndpointConfig, KubernetesConfig

    Report = Callable[[Sequence[EndpointConfig]], None]

log = logging.getLogger("extproc.discovery.kubernetes")

WATCH_S = 240
"""How long we ask for a watch to last; a connection that died without a word is noticed then."""
LIST_S = 30.0
PAGE = 500
LINE_BYTES = 16 << 20
"""A slice has at most 1,000 endpoints, about 400 KiB."""
BACKOFF_S = (0.2, 30.0)
STEADY_S = 5.0
"""A watch that lasted this long was no failure, whatever ended it."""
LIST_AFTER = 3
"""Barren watches in a row before everything is listed again: some servers answer a version that is too old with nothing
(kubernetes issue 104171)."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
MOST_NAME = 128
MOST_TOLD = 10
"""Lines about what is left out, at a time; all of it is counted."""

Slice = dict[str, Any]


class GoneError(Exception):
    """The version we know is too old for the server: everything must be listed again."""


class Kubernetes:
    """Lists and watches EndpointSlices."""

    def __init__(
        self,
        config: KubernetesConfig,
        environ: Mapping[str, str] = os.environ,
        leave_out: Callable[[int], None] = lambda _number: None,
    ) -> None:
        """Watch what `config` says; `environ` tells a pod where the API server is; `leave_out` counts."""
        self._config = config
        self._environ = environ
        self._slices: dict[str, Slice] = {}
        self._version: str | None = None
        self._leave_out = leave_out
        self._told: set[str] = set()
        self._fresh = False  # whether this connection brought anything: then the next failure is a new one

    async def run(self, report: Report) -> None:
        """Watch for ever. Failures change nothing: what was seen stays until the server says otherwise."""
        failures = 0
        while True:
            self._fresh = False
            began = asyncio.get_running_loop().time()
            try:
                await self._follow(report)
                why = "the watch ended"
            except GoneError:
                self._version = None
                why = "the version is gone, listing again"
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                why = f"{type(error).__name__}: {plain_words(error)}"
            lasted_s = asyncio.get_running_loop().time() - began
            failures = 0 if self._fresh or lasted_s >= STEADY_S else failures + 1
            if failures >= LIST_AFTER:
                self._version = None
            level = logging.WARNING if failures else logging.DEBUG
            log.log(level, "kubernetes %s: %s", self._what, why)
            await asyncio.sleep(_backoff(failures))

    @property
    def _what(self) -> str:
        return self._config.service or self._config.selector or ""

    async def _follow(self, report: Report) -> None:
        """List if nothing is known, then watch until the server or the network ends it."""
        url = self._url()
        context = self._context(url)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as client:
            if self._version is None:
                self._slices, self._version = await self._list(client, url)
                self._fresh = True
                report(self._endpoints())
            async with aclosing(self._watch(client, url)) as events:
                async for kind, slice_ in events:
                    self._fresh = True
                    if self._take(kind, slice_):
                        report(self._endpoints())

    def _take(self, kind: str, slice_: Slice) -> bool:
        """Take an event over; tell whether it was more than a bookmark, of which only the version is news."""
        name = slice_["metadata"].get("name", "")
        self._version = slice_["metadata"]["resourceVersion"]
        if kind in ("ADDED", "MODIFIED"):
            self._slices[name] = slice_
        elif kind == "DELETED":
            self._slices.pop(name, None)
        else:
            return False
        return True

    # ---- HTTP

    async def _list(self, client: aiohttp.ClientSession, url: str) -> tuple[dict[str, Slice], str]:
        slices: dict[str, Slice] = {}
        query = {**self._selector(), "limit": str(PAGE)}
        while True:
            timeout = aiohttp.ClientTimeout(total=LIST_S)
            async with client.get(url, params=query, headers=self._headers(), timeout=timeout) as response:
                await _check(response)
                page = json.loads(await response.read())
            try:
                slices |= {_name_of(item, index): item for index, item in enumerate(page["items"] or ())}
                version, more = str(page["metadata"]["resourceVersion"]), page["metadata"].get("continue")
            except (KeyError, TypeError) as error:
                raise ValueError(f"no EndpointSliceList: {error!r}") from None
            if not more:
                return slices, version
            query["continue"] = more

    async def _watch(self, client: aiohttp.ClientSession, url: str) -> AsyncGenerator[tuple[str, Slice], None]:
        query = {
            **self._selector(),
            "watch": "1",
            "resourceVersion": self._version or "",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_S + 30)
        async with client.get(url, params=query, headers=self._headers(), timeout=timeout) as response:
            await _check(response)
            async with aclosing(_lines(response)) as lines:
                async for line in lines:
                    yield _event(line)

    def _url(self) -> str:
        config = self._config
        api = config.api
        if api is None:
            host, port = (
                self._environ.get("KUBERNETES_SERVICE_HOST"),
                self._environ.get("KUBERNETES_SERVICE_PORT", "443"),
            )
            if not host:
                raise ValueError("not in a pod: KUBERNETES_SERVICE_HOST is not set; set `api`")
            api = f"https://{address_of(host, int(port))}"
        namespace = config.namespace
        if namespace is None:
            namespace = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"
        return f"{api.rstrip('/')}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    def _context(self, url: str) -> ssl.SSLContext | bool:
        """Trust the cluster's CA, read again for every connection, else what the system trusts."""
        path = Path(self._config.ca_file)
        if not url.startswith("https:") or not path.exists():
            return True
        return client_tls(self._config.ca_file)

    def _headers(self) -> dict[str, str]:
        path = Path(self._config.token_file)
        token = {"authorization": f"Bearer {path.read_text().strip()}"} if path.exists() else {}
        return {"accept": "application/json", **token}

    def _selector(self) -> dict[str, str]:
        config = self._config
        return {"labelSelector": config.selector or f"kubernetes.io/service-name={config.service}"}

    # ---- slices to endpoints

    def _endpoints(self) -> list[EndpointConfig]:
        """Return each pod and port once: it may stand in several slices for a while, and in one per IP family.

        What makes no endpoint is left out, said and counted once, and the rest is followed.
        """
        found: dict[str, str] = {}
        problems: set[str] = set()
        seen = [pair for slice_ in self._slices.values() for pair in ready_addresses(slice_, self._config, problems)]
        for name, address in sorted(seen):
            if name not in found or (found[name].startswith("[") and not address.startswith("[")):
                found[name] = address
        endpoints = []
        for name, address in found.items():
            try:
                endpoints.append(self._config.endpoint(name, address))
            except ValueError:  # pydantic's too
                problems.add(f"{name!r:.100} at {address!r:.100}")
        for problem in sorted(problems - self._told)[:MOST_TOLD]:
            log.warning("kubernetes %s: left out, no endpoint: %s", self._what, problem)
        self._leave_out(len(problems - self._told))
        self._told = problems
        return endpoints


def ready_addresses(slice_: Slice, config: KubernetesConfig, problems: set[str]) -> Iterator[tuple[str, str]]:
    """Walk name and address of the endpoints of a slice that may be sent requests; add what is none to `problems`.

    A missing condition says yes, says the API. `serving` is the pod's readiness where `ready` is always true
    (publishNotReadyAddresses); what terminates is left out even while it still serves.
    """
    if not isinstance(slice_, dict) or not isinstance(slice_.get("metadata"), dict):
        problems.add("an item that is no EndpointSlice")
        return
    which = slice_["metadata"].get("name", "?")
    endpoints = slice_.get("endpoints") or []
    if not isinstance(endpoints, list):
        problems.add(f"slice {which!r:.100}: endpoints is no list")
        return
    numbers = _ports_of(slice_, config)
    several = config.ports is not None and len(config.ports) > 1
    for index, endpoint in enumerate(endpoints):
        try:
            conditions = endpoint.get("conditions") or {}
            is_ready = conditions.get("ready") is not False and conditions.get("serving") is not False
            if not is_ready or conditions.get("terminating") is True or not endpoint.get("addresses"):
                continue
            host = endpoint["addresses"][0]  # more than one is never used, says the API
            target = endpoint.get("targetRef") or {}
            pod = target.get("name") if target.get("kind") == "Pod" else None
        except (AttributeError, LookupError, TypeError):
            problems.add(f"slice {which!r:.100}, endpoint {index}")
            continue
        for number in numbers:
            address = address_of(str(host), number)
            name = f"{pod}-{number}" if several else str(pod)
            yield (name if pod and len(name) <= MOST_NAME else name_of(address)), address


def _ports_of(slice_: Slice, config: KubernetesConfig) -> list[int]:
    """Return the numbers of the ports that are wanted, those that the slice names only if it has them."""
    ports = [port for port in _listed(slice_.get("ports")) if isinstance(port, dict)]
    if config.ports is None and config.port is None:
        numbers = [port.get("port") for port in ports][:1]
    else:
        wanted = [config.port] if config.ports is None else config.ports
        numbers = [number for one in wanted for number in ([one] if isinstance(one, int) else _named(ports, one))]
    return list(dict.fromkeys(number for number in numbers if isinstance(number, int)))


def _named(ports: list[dict[str, Any]], name: str | None) -> list[Any]:
    return [port.get("port") for port in ports if port.get("name") == name][:1]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _name_of(item: object, index: int) -> str:
    """Return the name of an item of a list; one of its own where it has none."""
    name = item["metadata"].get("name") if isinstance(item, dict) and isinstance(item.get("metadata"), dict) else None
    return name if isinstance(name, str) else f"item {index}"


def _event(line: bytes) -> tuple[str, Slice]:
    """Return kind and object of a watch event. Raises GoneError, or ValueError for anything unexpected."""
    event = json.loads(line)
    try:
        kind, item = str(event["type"]), event["object"]
        if kind == "ERROR" and item.get("code") == 410:
            raise GoneError
        if kind == "ERROR":
            raise ValueError(f"the server says: {item.get('message')}")
        _ = item["metadata"]["resourceVersion"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no watch event: {error!r}") from None
    return kind, item


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 410:
        raise GoneError
    if response.status != 200:
        said = (await response.content.read(300)).decode(errors="replace")
        raise ValueError(f"{response.status} {response.reason}: {said}")


async def _lines(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > LINE_BYTES:
            raise ValueError(f"an event is longer than {LINE_BYTES} bytes")


def _backoff(failures: int) -> float:
    first, most = BACKOFF_S
    return min(first * 2.0 ** min(failures, 16), most) * random.uniform(0.5, 1.0)  # noqa: S311 - keeps replicas apart
