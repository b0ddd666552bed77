"""Fetches the metrics pages of all endpoints, again and again: one HTTP client, one task per endpoint.

Rules of this room: nothing an endpoint sends ends a task, costs more than its deadline and a mebibyte, or leads us to
another address. A failed scrape is counted once, with its reason, and changes nothing else: the core goes on with
the last load until that is stale, and then by its own books.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from yarl import URL

from extproc.admission.load import Load
from extproc.endpoints.access import Credentials
from extproc.endpoints.telemetry import facts
from extproc.endpoints.telemetry.engines import DCGM, engines_for
from extproc.endpoints.telemetry.fetch import Pages
from extproc.endpoints.telemetry.orca import parse_orca
from extproc.endpoints.telemetry.page import MOST_BYTES, Reader
from extproc.endpoints.telemetry.rates import Rates
from extproc.endpoints.telemetry.readings import Readings, Reason
from extproc.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extproc.endpoints.telemetry.target import Target

log = logging.getLogger("extproc.telemetry")

SLOW_S = 5.0
"""Limits follow the engine this late. Simulated, 5 s cost next to nothing (docs/simulate.md); from 15 s on much hung on
where an adaptive limit started."""
_JITTER = 0.1
_SLOTS = 10
"""Of an interval, at least. Ten scrapes in a row cost half of ten scrapes apart, since the processor's caches are still
warm (`python -m bench.scrape scrape`)."""
_LOOK_AGAIN_S = 0.1
"""A page is not looked at out of turn sooner after the last time: a broken server may fail many requests."""
_BACK_S = 1.0
"""At the most, between looks at a page that can't be connected to."""
_TOGETHER = 20
"""Scrapes in one slot, on average: many more in a row would hold others up (`make bench-turns`)."""
_ASKED, _READ = 1, 3
"""Shares of a turn of the loop that it takes to ask for a page, and to read one: after a moment in which this process
had no processor, hundreds are due or have come."""
_RATE_GAPS = 3.5
"""Intervals over which a token rate still means something: one or two failed scrapes lie between."""


_UNTOLD = (Reason.TIMEOUT, Reason.CREDENTIALS)
"""What says nothing of whether a connection was had."""


class _Watch:
    """One endpoint: its target, its task and its freshness."""

    __slots__ = (
        *("ask_at", "base", "began", "credentials", "facts", "gpu_reader", "gpu_url", "is_own", "is_stale", "last_at"),
        *("rates", "reader", "reported_at", "rests", "silent", "since", "target", "task", "tried", "url"),
    )

    def __init__(self, target: Target, now: float, rates: Rates) -> None:
        self.target = target
        self.url = URL(target.url)  # parsed once: every scrape uses it
        self.gpu_url = None if target.gpu_url is None else URL(target.gpu_url)
        self.reader = Reader(engines_for(target.engine), (), target.own)
        self.gpu_reader = Reader((DCGM,), target.gpu_labels)
        self.base = None if target.base is None else URL(target.base)
        # Its page is where its requests go: the same host and port.
        self.is_own = self.base is not None and (self.base.host, self.base.port) == (self.url.host, self.url.port)
        self.began = now  # its latest scrape
        self.rests = False  # until the next one
        self.credentials = Credentials(target.access)
        self.facts = facts.Facts()
        self.ask_at = now  # when the engine is next asked for what it says of itself
        self.rates = rates
        self.since = now
        self.last_at: float | None = None
        self.reported_at: float | None = None
        self.is_stale = False
        self.silent: Reason | None = None  # why the last look at its page told nothing
        self.tried = asyncio.Event()  # there was a scrape, good or bad
        self.task: asyncio.Task[None] | None = None


class Scraper:
    """Scrapes endpoints and tells who wants to know what they say. Lives on one event loop.

    Attributes:
        is_there: is told of each look at a page that stands where an endpoint's requests go: whether that found a
            connection.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        stale_after_s: float,
        loop: asyncio.AbstractEventLoop,
        turns: Turns | None = None,
    ) -> None:
        """Prepare; `interval_s` 0 means that nothing is ever scraped. `put` may come before `start`.

        `turns`: who shares turns of `loop` with this.
        """
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self.stale_after_s = stale_after_s
        self._observe: Callable[[str, Load, float], None] = lambda _name, _load, _asked_at: None
        self.is_there: Callable[[str, bool], None] = lambda _name, _is_there: None
        self._loop = loop
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._watches: dict[str, _Watch] = {}
        self._errors: dict[str, dict[Reason, int]] = {}
        self._pages: Pages | None = None
        self._turns = Turns() if turns is None else turns

    async def start(self, observe: Callable[[str, Load, float], None]) -> None:
        """Begin to scrape, if there is an interval, and call `observe(name, load, asked_at)` with each reading."""
        if self.interval_s <= 0 or self._pages is not None:
            return
        self._observe = observe
        if self.interval_s > SLOW_S:
            log.warning(
                "scrape_interval is %gs: above %gs limits follow the engines too late; 1s is right for most",
                self.interval_s,
                SLOW_S,
            )
        if self.interval_s >= self.stale_after_s:
            log.warning(
                "scrape_interval (%gs) is not below telemetry_stale_after (%gs): telemetry is stale between scrapes",
                self.interval_s,
                self.stale_after_s,
            )
        self._pages = Pages(timeout_s=self.timeout_s, keep_s=2 * self.interval_s + 5, loop=self._loop)
        for watch in self._watches.values():
            self._begin(watch)

    async def wait_first(self) -> None:
        """Wait until each endpoint was scraped once, well or not: what runs there already must not be overlooked."""
        running = [watch.tried.wait() for watch in self._watches.values() if watch.task is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self.timeout_s):
                await asyncio.gather(*running)

    async def stop(self) -> None:
        """End all scrapes and close all connections."""
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pages is not None:
            await self._pages.close()
            self._pages = None

    def put(self, target: Target) -> None:
        """Scrape a new endpoint, or a changed one in the new way. Unchanged: no-op."""
        known = self._watches.get(target.name)
        if known is not None:
            if replace(known.target, own=target.own) == target:  # the same pages, of which other lines may count
                known.target = target
                known.reader = Reader(engines_for(target.engine), (), target.own)
                return
            self._end(known)
        rates = Rates(_RATE_GAPS * self.interval_s + self.timeout_s)
        watch = self._watches[target.name] = _Watch(target, self._loop.time(), rates)
        if known is not None:
            watch.last_at, watch.since, watch.is_stale = known.last_at, known.since, known.is_stale
            watch.silent = known.silent
            watch.reported_at = known.reported_at
        if self._pages is not None:
            self._begin(watch)

    def remove(self, name: str) -> None:
        """Forget an endpoint, its errors included. Unknown: no-op."""
        watch = self._watches.pop(name, None)
        if watch is not None:
            self._end(watch)
            self._errors.pop(name, None)

    def look(self, name: str) -> None:
        """Scrape an endpoint now: a request found no connection. Unknown, under way, or only just done: no-op."""
        watch = self._watches.get(name)
        if watch is not None and watch.rests and self._loop.time() - watch.began >= _LOOK_AGAIN_S:
            self._end(watch)
            self._begin(watch)

    def read_report(self, name: str, value: str) -> Load | None:
        """Return what a load report says that came with an answer of the endpoint `name`; None: nothing, counted."""
        load, watch = parse_orca(value), self._watches.get(name)
        if watch is not None and load is None:
            self._count_error(name, Reason.ORCA)
        elif watch is not None:
            watch.reported_at = self._loop.time()
        return load

    # ---- what others may look at

    def age_s(self, name: str) -> float | None:
        """Return how old an endpoint's last good reading is, in seconds; None: there never was one.

        Of its page, if that could ever be read: reports in answers are no substitute. Else of the last report.
        """
        watch = self._watches.get(name)
        if watch is None:
            return None
        at = watch.reported_at if watch.last_at is None else watch.last_at
        return None if at is None else max(self._loop.time() - at, 0.0)

    def silence(self, name: str) -> str | None:
        """Return why the last look at an endpoint's page told nothing, as errors are counted; None: it told."""
        watch = self._watches.get(name)
        return None if watch is None or watch.silent is None else watch.silent.value

    def follows(self, name: str) -> bool:
        """Tell whether an endpoint is scraped at all."""
        watch = self._watches.get(name)
        return watch is not None and watch.task is not None

    def errors(self) -> Iterator[tuple[str, str, int]]:
        """Walk endpoint, reason and number of failed scrapes."""
        return (
            (name, reason.value, count) for name, counts in self._errors.items() for reason, count in counts.items()
        )

    # ---- one endpoint

    def _begin(self, watch: _Watch) -> None:
        watch.rests = False
        if watch.target.engine != "none" or watch.target.gpu_url is not None:
            watch.task = self._loop.create_task(self._run(watch), name=f"scrape {watch.target.name}")

    @staticmethod
    def _end(watch: _Watch) -> None:
        if watch.task is not None:
            watch.task.cancel()

    async def _run(self, watch: _Watch) -> None:
        """Scrape until cancelled. The second scrape comes at a random time, so that endpoints spread out."""
        spread = 0.5
        await self._turns.take(_ASKED)
        while True:
            watch.began = began = self._loop.time()
            try:
                await self._scrape(watch)
            except Exception:  # whatever it is, telemetry must go on
                self._failed(watch, Reason.INTERNAL)
                log.exception("scraping %s", watch.target.name)
            watch.tried.set()
            pause_s = self._pause_s(began + self.interval_s * self._random.uniform(1 - spread, 1 + spread))
            if watch.is_own and watch.silent is Reason.CONNECT:  # it may be waited for: that it is back is seen soon
                pause_s = min(pause_s, _BACK_S)
            spread = _JITTER
            watch.rests = True
            await asyncio.sleep(pause_s)
            watch.rests = False
            await self._turns.take(_ASKED)

    def _pause_s(self, due: float) -> float:
        """Return how long to sleep until about `due`: those due in the same slot go together, while caches are warm."""
        slot_s = self.interval_s / max(_SLOTS, len(self._watches) // _TOGETHER)
        now = self._loop.time()
        return max(round(max(due, now + slot_s) / slot_s) * slot_s - now, 0.0)

    async def _scrape(self, watch: _Watch) -> None:
        gpu_url = watch.gpu_url
        if gpu_url is None:
            page, gpu = await self._read_page(watch), None
        elif watch.target.engine == "none":
            page, gpu = None, await self._read(gpu_url, watch.gpu_reader)
        else:
            page, gpu = await asyncio.gather(self._read_page(watch), self._read(gpu_url, watch.gpu_reader))
        gpu_usage = None
        if gpu is not None:
            if isinstance(gpu[0], Readings):
                gpu_usage = gpu[0].gpu_usage
            else:
                self._failed(watch, gpu[0], alone=page is None)
        if page is None:
            if gpu is not None and isinstance(gpu[0], Readings):
                self._succeeded(watch, Load(gpu_usage=gpu_usage))
        elif isinstance(page[0], Readings):
            is_due, is_first = self._loop.time() >= watch.ask_at, watch.ask_at == watch.since
            if is_first:  # before anything is decided by the load; later it comes after it
                await self._ask(watch, page[0].engine)
            self._succeeded(watch, watch.rates.load(page[0], page[1], gpu_usage, watch.facts))
            if is_due and not is_first:
                await self._ask(watch, page[0].engine)
        else:
            self._failed(watch, page[0])

    async def _ask(self, watch: _Watch, name: str) -> None:
        """Ask an engine for what it says of itself. What can't be had now stays as it was, and harms nothing."""
        watch.ask_at = self._loop.time() + facts.EVERY_S * self._random.uniform(1 - _JITTER, 1 + _JITTER)
        if watch.base is None:
            return
        (engine,) = engines_for(name)
        paths = facts.paths(engine)
        assert self._pages is not None  # noqa: S101 - tasks run only while there is one
        secrets = watch.credentials if watch.base.origin() == watch.url.origin() else None  # another server's, not ours
        get, base = self._pages.get, watch.base
        bodies = await asyncio.gather(*(get(base.join(URL(path)), facts.MOST_BYTES, secrets) for path in paths))
        pages = {path: body for path, body in zip(paths, bodies, strict=True) if isinstance(body, bytes)}
        if pages:
            watch.facts = facts.read_facts(engine, pages)

    def _succeeded(self, watch: _Watch, load: Load) -> None:
        name, now = watch.target.name, self._loop.time()
        if watch.is_stale:
            log.warning("telemetry of %s is back after %.1fs", name, now - self._silent_since(watch))
        watch.is_stale, watch.last_at, watch.silent = False, now, None
        self._observe(name, load, watch.began)

    def _failed(self, watch: _Watch, reason: Reason, *, alone: bool = True) -> None:
        """Count a failure; `alone` it leaves us without a reading, and that may make the telemetry stale."""
        name = watch.target.name
        self._count_error(name, reason)
        silent_s = self._loop.time() - self._silent_since(watch)
        log.debug("scraping %s: %s", name, reason)
        if alone:
            watch.silent = reason
        if alone and not watch.is_stale and silent_s >= self.stale_after_s:
            watch.is_stale = True
            log.warning(
                "telemetry of %s is stale: nothing readable for %.1fs, last error %r; going on by our own books",
                name,
                silent_s,
                reason.value,
            )

    def _count_error(self, name: str, reason: Reason) -> None:
        counts = self._errors.setdefault(name, {})
        counts[reason] = counts.get(reason, 0) + 1

    @staticmethod
    def _silent_since(watch: _Watch) -> float:
        return watch.since if watch.last_at is None else watch.last_at

    # ---- one page

    async def _read_page(self, watch: _Watch) -> tuple[Readings | Reason, float]:
        """Read an engine's own page."""
        page = await self._read(watch.url, watch.reader, watch.credentials)
        if watch.is_own and page[0] not in _UNTOLD:
            self.is_there(watch.target.name, page[0] is not Reason.CONNECT)
        return page

    async def _read(
        self, url: URL, reader: Reader, credentials: Credentials | None = None
    ) -> tuple[Readings | Reason, float]:
        """Return what a page says, or why it says nothing, and when it came."""
        assert self._pages is not None  # noqa: S101 - tasks run only while there is one
        body = await self._pages.get(url, MOST_BYTES, credentials)
        now = self._loop.time()
        if isinstance(body, Reason):
            return body, now
        await self._turns.take(_READ)
        steps = reader.read(body)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: Readings | Reason = end.value
                return result, now
            await self._turns.take(_READ)
