"""Active health: asks each endpoint now and then whether it lives, and tells the queue when that changes.

Passive health, ejection after failed answers, is the core's; this finds a dead endpoint without spending requests on
it, and a returned one at once. So do looks at metrics pages, where requests found no connection: whoever refuses both
gets no request until somebody listens there again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import aiohttp
from yarl import URL

from extproc.endpoints.access import HOPS, Credentials, onward
from extproc.errors import plain_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.config import HealthCheckConfig
    from extproc.tasks import Tasks

log = logging.getLogger("extproc.health")

TRIAL_S = 30.0
"""Without checks an endpoint whose page can't be connected to is tried so often all the same: Envoy may reach it."""
SPREAD_S = 0.1
"""First checks of many endpoints come within this time, not all at once."""


class SetUp(Protocol):
    """Where verdicts go: the gate's `set_up`."""

    def __call__(self, name: str, *, is_up: bool | None) -> None: ...


@dataclass(slots=True)
class _Patient:
    """One endpoint. `is_up` None: nothing is known yet, and one failure is enough."""

    address: str
    is_up: bool | None = None
    streak: int = 0  # checks in a row that spoke against the verdict
    was_there: bool = False  # its page took a connection from here
    away_at: float | None = None  # neither its page nor requests got a connection then; None: not so
    task: asyncio.Task[None] | None = None


class HealthChecks:
    """Checks endpoints, each in a task of its own."""

    def __init__(
        self,
        set_up: SetUp,
        config: HealthCheckConfig | None,
        tasks: Tasks,
        heard_at: Callable[[str], float | None],
        is_unreached: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Tell `set_up`; config None: nothing is checked, and what answers show is all that is known.

        `tasks`: who keeps each check running; `heard_at`: when an endpoint's answers last showed that it works;
        `is_unreached`: whether the latest request there found no connection, and none was answered well since.
        """
        self._set_up = set_up
        self._config = config
        self._tasks = tasks
        self._heard_at = heard_at
        self._is_unreached = is_unreached
        self._patients: dict[str, _Patient] = {}
        self._client: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Begin to check."""
        # A connection of its own for each check: one that is kept alive would not see that nobody listens any more. No
        # cookies: servers whose names end alike would get those of one of them, and refuse checks with too many.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), cookie_jar=aiohttp.DummyCookieJar()
        )
        for name in self._patients:
            self._begin(name)

    async def stop(self) -> None:
        """End all checks."""
        tasks = [patient.task for patient in self._patients.values() if patient.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
            self._client = None

    def configure(self, config: HealthCheckConfig | None) -> None:
        """Check in another way, or no more."""
        if config == self._config:
            return
        self._config = config
        for name, patient in self._patients.items():
            patient.streak, patient.away_at = 0, None
            if config is None:
                patient.is_up = None
                self._set_up(name, is_up=None)
            self._begin(name)

    def put(self, name: str, address: str, *, waits: bool = False) -> None:
        """Check an endpoint, new or at a new address: nothing is known of it then. Known: no-op.

        `waits`: the core knows that it is new, and sends it nothing before its first check while others can serve.
        """
        known = self._patients.get(name)
        if known is not None and known.address == address:
            return
        self.remove(name)
        self._patients[name] = _Patient(address)
        if not waits:
            self._set_up(name, is_up=None)
        self._begin(name)

    def page(self, name: str, now: float, *, is_there: bool) -> None:
        """Follow a look at an endpoint's metrics page at its own address: whether that took the connection.

        Where requests found none either, it is down until its page, or a check if there are any, says otherwise: a look
        costs nobody a request, as a trial does. A page alone is never a reason, and one that can't be reached from here
        is none where answers came. Unknown: no-op.
        """
        patient = self._patients.get(name)
        if patient is None:
            return
        patient.was_there |= is_there
        if patient.away_at is not None:
            if is_there or now - patient.away_at >= TRIAL_S:
                patient.away_at = None
                if is_there:
                    log.info("endpoint %s takes connections again", name)
                if self._config is None:
                    self._set_up(name, is_up=None)
        elif (
            not is_there
            and patient.is_up is not False
            and self._is_unreached(name)
            and (patient.was_there or self._heard_at(name) is None)
        ):
            log.warning("endpoint %s is down: neither requests nor its metrics page get a connection", name)
            patient.away_at = now
            if self._config is None:
                self._set_up(name, is_up=False)
            else:
                self._found(name, patient, is_up=False)

    def remove(self, name: str) -> None:
        """Forget an endpoint. Unknown: no-op."""
        patient = self._patients.pop(name, None)
        if patient is not None and patient.task is not None:
            patient.task.cancel()

    def _begin(self, name: str) -> None:
        patient = self._patients[name]
        if patient.task is not None:
            patient.task.cancel()
            patient.task = None
        if self._config is not None and self._client is not None:
            attend = partial(self._attend, name, patient, self._config, self._client)
            patient.task = self._tasks.keep("health", f"health checks of {name}", attend)

    async def _attend(
        self, name: str, patient: _Patient, config: HealthCheckConfig, client: aiohttp.ClientSession
    ) -> None:
        url = URL(f"{'http' if config.ca_file is None else 'https'}://{patient.address}{config.path}")
        credentials = Credentials(config.access())
        timeout = aiohttp.ClientTimeout(total=config.timeout)
        pause_s = random.uniform(0.0, min(SPREAD_S, config.interval))  # noqa: S311 - spreads load
        clock = asyncio.get_running_loop().time
        before = clock()
        while True:
            await asyncio.sleep(pause_s)
            pause_s = config.interval * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load
            since, before = before, clock()
            try:
                problem = await _check(client, url, timeout, credentials)
            except TimeoutError:
                heard_at = self._heard_at(name)
                problem = f"no answer in {config.timeout:g}s"
                if heard_at is not None and heard_at >= since:  # too busy to talk about its health is not ill
                    if patient.is_up is not None:
                        continue
                    problem = None  # a new one, of which others ask so much
            self._judge(name, patient, config, problem)

    def _judge(self, name: str, patient: _Patient, config: HealthCheckConfig, problem: str | None) -> None:
        """Count a check; `problem` None: it passed."""
        passed = problem is None
        if patient.is_up is passed:
            patient.streak = 0
            return
        patient.streak += 1
        needed = config.healthy_threshold if passed else config.unhealthy_threshold
        if patient.is_up is not None and patient.streak < needed:
            return
        if not passed:
            log.warning("endpoint %s is down: %d failed check(s), the last one: %s", name, patient.streak, problem)
        elif patient.is_up is False:
            log.info("endpoint %s is up again", name)
        self._found(name, patient, is_up=passed)

    def _found(self, name: str, patient: _Patient, *, is_up: bool) -> None:
        """Tell a verdict of checks."""
        patient.is_up, patient.streak = is_up, 0
        self._set_up(name, is_up=is_up)


async def _check(
    client: aiohttp.ClientSession, url: URL, timeout: aiohttp.ClientTimeout, credentials: Credentials
) -> str | None:
    """Return what was wrong, or None. Raises TimeoutError if it says nothing."""
    try:
        headers, tls = credentials.headers(), credentials.tls()
        for _ in range(HOPS + 1):
            async with client.get(url, timeout=timeout, headers=headers, ssl=tls, allow_redirects=False) as response:
                further = onward(response.status, response.headers.get("location"), url)
                if further is None:
                    return None if 200 <= response.status < 300 else f"status {response.status}"
                url = further
    except TimeoutError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {plain_words(error)}"
    return "too many redirects"
