"""The objects of one kind in a namespace of Kubernetes, by list and watch.

Straight on aiohttp: it is two GET requests. kubernetes_asyncio would bring its whole model of the API, and its Watch
takes the version of the last object for that of the list and retries a 410 with the version that is gone (its issue
135, pull request 327), so that the part that matters would be written here anyway.

    list ──version──▶ watch ──events, bookmarks──▶ watch again … 410 Gone: list again; dropped: wait, watch again
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import aiohttp

from extproc.errors import plain_words
from extproc.kubernetes import refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from extproc.kubernetes import ApiServer

log = logging.getLogger("extproc.discovery.kubernetes")

WATCH_S = 240
"""How long we ask for a watch to last; a connection that died without a word is noticed then."""
LIST_S = 30.0
PAGE = 500
LINE_BYTES = 16 << 20
"""A slice has at most 1,000 endpoints, about 400 KiB; an object of any kind some MiB."""
BACKOFF_S = (0.2, 30.0)
STEADY_S = 5.0
"""A watch that lasted this long was no failure, whatever ended it."""
LIST_AFTER = 3
"""Barren watches in a row before everything is listed again: some servers answer a version that is too old with nothing
(kubernetes issue 104171)."""
UNKNOWN_KIND_S = 60.0
"""How often a kind that the cluster does not know is asked for again."""

Item = dict[str, Any]
Kept = TypeVar("Kept")


class GoneError(Exception):
    """The version we know is too old for the server: everything must be listed again."""


class UnknownKindError(ValueError):
    """The cluster does not know the kind."""


class Watch(Generic[Kept]):
    """Lists and watches the objects of one kind that a query selects.

    Attributes:
        items: what is kept of each object, by its name; as of the last report.
        version: of the API, as far as everything is known; None: all must be listed, at first or again.
        is_known: all was listed once, or the kind is unknown there: an empty `items` is an answer.
    """

    def __init__(
        self,
        api: ApiServer,
        group_version: str,
        kind: str,
        query: Mapping[str, str],
        keep: Callable[[Item], Kept],
        *,
        is_optional: bool = False,
    ) -> None:
        """Watch what `query` (labelSelector, fieldSelector) selects; hold on to what `keep` returns of each object.

        `is_optional`: a cluster that does not know the kind has none of it; else that is a failure.
        """
        self._api = api
        self._group_version = group_version
        self._kind = kind
        self._query = dict(query)
        self._keep = keep
        self._is_optional = is_optional
        self.items: dict[str, Kept] = {}
        self.version: str | None = None
        self.is_known = False
        self._fresh = False  # whether this connection brought anything: then the next failure is a new one

    async def run(self, changed: Callable[[], None]) -> None:
        """Watch for ever; call `changed` after the list and whenever `items` is another.

        Failures change nothing: what was seen stays until the server says otherwise. Run again, it lists all again:
        what an error in `changed` kept from being told is told then.
        """
        self.version = None
        failures = 0
        while True:
            self._fresh = False
            began = asyncio.get_running_loop().time()
            pause_s = None
            try:
                await self._follow(changed)
                why = "the watch ended"
            except GoneError:
                self.version = None
                why = "the version is gone, listing again"
            except UnknownKindError as error:
                why = str(error)
                if self._is_optional and (not self.items or failures >= LIST_AFTER):  # a server that starts says so too
                    self._know_none(changed)
                    pause_s = UNKNOWN_KIND_S
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                why = f"{type(error).__name__}: {plain_words(error)}"
            lasted_s = asyncio.get_running_loop().time() - began
            failures = 0 if self._fresh or pause_s or lasted_s >= STEADY_S else failures + 1
            if failures >= LIST_AFTER:
                self.version = None
            log.log(logging.WARNING if failures else logging.DEBUG, "kubernetes %s: %s", self._what, why)
            await asyncio.sleep(_backoff(failures) if pause_s is None else pause_s * random.uniform(0.8, 1.0))  # noqa: S311

    @property
    def _what(self) -> str:
        return f"{self._kind} {','.join(self._query.values())}".strip()

    async def _follow(self, changed: Callable[[], None]) -> None:
        """List if nothing is known, then watch until the server or the network ends it."""
        url = self._api.url(self._group_version, self._kind)
        async with self._api.client(url) as client:
            if self.version is None:
                self.items, self.version = await self._list(client, url)
                self._fresh = self.is_known = True
                changed()
            async with aclosing(self._watch(client, url)) as events:
                async for kind, item in events:
                    self._fresh = True
                    if self._take(kind, item):
                        changed()

    def _take(self, kind: str, item: Item) -> bool:
        """Take an event over; tell whether it changed what is kept. Of a bookmark only the version is news."""
        name = item["metadata"].get("name", "")
        self.version = item["metadata"]["resourceVersion"]
        if kind in ("ADDED", "MODIFIED"):
            kept = self._keep(item)
            is_news = name not in self.items or self.items[name] != kept
            self.items[name] = kept
            return is_news
        return kind == "DELETED" and self.items.pop(name, None) is not None

    def _know_none(self, changed: Callable[[], None]) -> None:
        is_news = bool(self.items) or not self.is_known
        self.items, self.version, self.is_known = {}, None, True
        if is_news:
            changed()

    # ---- HTTP

    async def _list(self, client: aiohttp.ClientSession, url: str) -> tuple[dict[str, Kept], str]:
        items: dict[str, Kept] = {}
        query = {**self._query, "limit": str(PAGE)}
        while True:
            timeout = aiohttp.ClientTimeout(total=LIST_S)
            async with self._api.ask(client, "GET", url, query=query, timeout=timeout) as response:
                await self._check(response)
                page = json.loads(await response.read())
            try:
                items |= {_name_of(item, index): self._keep(item) for index, item in enumerate(page["items"] or ())}
                version, more = str(page["metadata"]["resourceVersion"]), page["metadata"].get("continue")
            except (KeyError, TypeError) as error:
                raise ValueError(f"no list of {self._kind}: {error!r}") from None
            if not more:
                return items, version
            query["continue"] = more

    async def _watch(self, client: aiohttp.ClientSession, url: str) -> AsyncGenerator[tuple[str, Item], None]:
        query = {
            **self._query,
            "watch": "1",
            "resourceVersion": self.version or "",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_S + 30)
        async with self._api.ask(client, "GET", url, query=query, timeout=timeout) as response:
            await self._check(response)
            async with aclosing(_lines(response)) as lines:
                async for line in lines:
                    yield _event(line)

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 410:
            raise GoneError
        if response.status == 404:
            raise UnknownKindError(f"the cluster knows no {self._group_version}/{self._kind}")
        if response.status != 200:
            raise ValueError(await refusal(response))


def _name_of(item: object, index: int) -> str:
    """Return the name of an item of a list; one of its own where it has none."""
    name = item["metadata"].get("name") if isinstance(item, dict) and isinstance(item.get("metadata"), dict) else None
    return name if isinstance(name, str) else f"item {index}"


def _event(line: bytes) -> tuple[str, Item]:
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
