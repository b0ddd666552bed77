"""Active health checks against a real server that answers as told."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from extproc import tasks
from extproc.config import HealthCheckConfig
from extproc.endpoints.health import TRIAL_S, HealthChecks
from extproc.tasks import Tasks
from tests.e2e.kit.processes import PATIENCE_S, end_server

if TYPE_CHECKING:
    from collections.abc import Callable


class Engine:
    """A server whose /health answers `status`, after `wait_s`."""

    def __init__(self) -> None:
        self.status = 200
        self.wait_s = 0.0
        self.seen = 0
        self.address = ""
        self.sets: dict[str, str] = {}  # headers of its answers
        self.cookies: list[str | None] = []  # that it was sent

    async def __aenter__(self) -> Engine:
        app = web.Application()
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_server(self._runner)

    async def _health(self, request: web.Request) -> web.Response:
        self.seen += 1
        self.cookies.append(request.headers.get("cookie"))
        await asyncio.sleep(self.wait_s)
        headers = {"location": "/elsewhere"} if self.status == 302 else self.sets
        return web.Response(status=self.status, headers=headers)

    async def checks(self, more: int) -> None:
        """Wait for so many more checks."""
        target = self.seen + more
        await until(lambda: self.seen >= target)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what changes has no event
            await asyncio.sleep(0.002)


class Checked:
    """Health checks of one endpoint, and the verdicts in order."""

    def __init__(self, **how: Any) -> None:
        self.verdicts: list[bool | None] = []
        keys = {"interval": "10ms", "timeout": "30s", "unhealthy_threshold": 3, "healthy_threshold": 2, **how}
        self.config = HealthCheckConfig.model_validate(keys)
        self.tasks = Tasks()
        self.heard_at: float | None = None
        self.checks = HealthChecks(self._verdict, self.config, self.tasks, lambda _: self.heard_at)

    def hasten(self) -> None:
        """Give checks no time to be answered from now on."""
        self.checks.configure(self.config.model_copy(update={"timeout": 0.01}))

    def _verdict(self, name: str, *, is_up: bool | None) -> None:
        assert name == "a"
        self.verdicts.append(is_up)


def story(tell: Callable[[Checked, Engine], Any], **how: Any) -> None:
    async def main() -> None:
        ward = Checked(**how)
        async with Engine() as engine:
            await ward.checks.start()
            try:
                await tell(ward, engine)
            finally:
                await ward.checks.stop()

    asyncio.run(main())


def test_it_takes_so_many_failures_to_go_down_and_so_many_successes_to_come_back():
    async def tell(ward: Checked, engine: Engine) -> None:
        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, True])  # nothing is known, then it is seen
        engine.status = 503
        before = engine.seen
        await until(lambda: ward.verdicts[2:] == [False])
        assert engine.seen - before >= 3
        engine.status = 204
        before = engine.seen
        await until(lambda: ward.verdicts[3:] == [True])
        assert engine.seen - before >= 2

    story(tell)


def test_failures_that_are_not_in_a_row_change_nothing():
    async def tell(ward: Checked, engine: Engine) -> None:
        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, True])
        for _ in range(12):
            engine.status = 500
            await engine.checks(1)
            engine.status = 200
            await engine.checks(2)
        assert ward.verdicts == [None, True]

    story(tell, unhealthy_threshold=10)


@pytest.mark.parametrize(("status", "wait_s"), [(404, 0.0), (500, 0.0), (302, 0.0), (200, 0.5)])
def test_an_endpoint_that_never_passed_goes_down_at_its_first_failure(status, wait_s):
    async def tell(ward: Checked, engine: Engine) -> None:
        engine.status, engine.wait_s = status, wait_s
        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, False])
        assert engine.seen <= 2

    story(tell, unhealthy_threshold=100, timeout="100ms" if wait_s else "30s")


def test_of_one_that_waits_for_its_first_check_nothing_is_said_before():
    """That it is new the core knows, and who else serves its models. Found on call: a reload that named servers too
    early sent up to four requests to each, and they got 503."""

    async def main() -> None:
        verdicts: list[tuple[str, bool | None]] = []
        config = HealthCheckConfig.model_validate({"interval": "10ms", "timeout": "100ms"})
        checks = HealthChecks(
            lambda name, *, is_up: verdicts.append((name, is_up)), config, Tasks(), {"busy": math.inf}.get
        )
        async with Engine() as engine, Engine() as busy:
            await checks.start()
            try:
                busy.wait_s = 10.0
                for name, address in (("b", engine.address), ("gone", "127.0.0.1:1"), ("busy", busy.address)):
                    checks.put(name, address, waits=True)
                assert verdicts == []
                await until(lambda: {("b", True), ("busy", True), ("gone", False)} <= set(verdicts))
                assert ("gone", True) not in verdicts
            finally:
                await checks.stop()

    asyncio.run(main())


def test_a_server_that_is_not_there_is_down_and_a_known_endpoint_put_again_stays_so():
    async def tell(ward: Checked, engine: Engine) -> None:
        ward.checks.put("a", "127.0.0.1:1")
        await until(lambda: ward.verdicts == [None, False])
        ward.checks.put("a", "127.0.0.1:1")
        assert ward.verdicts == [None, False]
        ward.checks.put("a", engine.address)  # it moved: nothing is known of it
        await until(lambda: ward.verdicts == [None, False, None, True])

    story(tell)


def test_switched_off_nothing_is_known_and_nobody_is_asked():
    async def tell(ward: Checked, engine: Engine) -> None:
        engine.status = 500
        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, False])
        ward.checks.configure(None)
        assert ward.verdicts == [None, False, None]
        seen = engine.seen
        await asyncio.sleep(0.05)
        assert engine.seen <= seen + 1
        ward.checks.configure(ward.config)
        await until(lambda: ward.verdicts == [None, False, None, False])
        ward.checks.remove("a")
        ward.checks.remove("a")

    story(tell)


def test_a_check_that_hears_nothing_counts_for_nothing_while_answers_flow():
    """A saturated engine answers its health check after seconds, and streams tokens all the while."""

    async def tell(ward: Checked, engine: Engine) -> None:
        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, True])
        engine.wait_s = 5.0
        ward.heard_at = math.inf
        ward.hasten()
        await engine.checks(8)
        assert ward.verdicts == [None, True]
        ward.heard_at = asyncio.get_running_loop().time()  # the last answer was now
        await until(lambda: ward.verdicts == [None, True, False])

    story(tell)


@pytest.mark.parametrize("status", [500, 0])
def test_a_check_that_fails_in_words_counts_whatever_flows(status):
    async def tell(ward: Checked, engine: Engine) -> None:
        engine.status = 500
        ward.heard_at = math.inf
        ward.checks.put("a", engine.address if status else "127.0.0.1:1")
        await until(lambda: ward.verdicts == [None, False])

    story(tell)


def test_what_one_server_has_its_checks_remember_is_told_to_no_other_one():
    """Cookies know no ports, and one may set them for all names that end alike: enough of them, and others refuse."""

    def set_up(name: str, *, is_up: bool | None) -> None:
        del name, is_up

    async def main() -> None:
        checked = Checked()
        checked.checks = HealthChecks(set_up, checked.config, checked.tasks, lambda _: None)
        async with Engine() as one, Engine() as other:
            one.sets = {"set-cookie": f"a={'x' * 4000}; Path=/"}
            for name, engine in (("one", one), ("other", other)):
                checked.checks.put(name, engine.address.replace("127.0.0.1", "localhost"))
            await checked.checks.start()
            await one.checks(2)
            await other.checks(2)
            await checked.checks.stop()
            assert set(one.cookies + other.cookies) == {None}

    asyncio.run(main())


def test_a_bug_ends_no_health_check_and_is_counted(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "RESTART_S", 0.01)

    async def tell(ward: Checked, engine: Engine) -> None:
        def broken(_: str) -> float:
            raise ZeroDivisionError

        ward.checks.put("a", engine.address)
        await until(lambda: ward.verdicts == [None, True])
        engine.wait_s, ward.checks._heard_at = 5.0, broken
        ward.hasten()
        await until(lambda: ward.tasks.restarts["health"] >= 2)
        engine.status, engine.wait_s = 500, 0.0
        await until(lambda: ward.verdicts == [None, True, False])

    story(tell)
    assert "health checks of a failed and begins again" in caplog.text


class Looked:
    """Health checks that are told of looks at one endpoint's page."""

    def __init__(self, config: HealthCheckConfig | None = None) -> None:
        self.verdicts: list[bool | None] = []
        self.unreached = False
        self.heard_at: float | None = None
        self.checks = HealthChecks(
            lambda _name, *, is_up: self.verdicts.append(is_up),
            config,
            Tasks(),
            lambda _: self.heard_at,
            lambda _: self.unreached,
        )
        self.checks.put("a", "127.0.0.1:1")
        self.now = 0.0
        del self.verdicts[:]

    def look(self, *, is_there: bool, after_s: float = 1.0) -> list[bool | None]:
        self.now += after_s
        self.checks.page("a", self.now, is_there=is_there)
        return self.verdicts


def test_who_refuses_requests_and_its_page_is_down_until_its_page_is_there_again():
    one = Looked()
    assert one.look(is_there=True) == []
    one.unreached, one.heard_at = True, 0.5
    assert one.look(is_there=True) == [], "the page is there: its answers tell"
    assert one.look(is_there=False) == [False]
    assert one.look(is_there=False) == [False]
    assert one.look(is_there=True) == [False, None]
    one.unreached = False
    assert one.look(is_there=False) == [False, None], "a page alone is no reason"


def test_a_page_that_was_never_reached_from_here_says_nothing_of_one_that_answers():
    one = Looked()
    one.unreached, one.heard_at = True, 0.5
    assert one.look(is_there=False) == []
    one.heard_at = None
    assert one.look(is_there=False) == [False], "nobody ever got there: not from here, nor from Envoy"


def test_who_is_down_by_its_page_is_tried_now_and_then_where_nothing_checks_it():
    one = Looked()
    one.unreached = True
    one.look(is_there=False)
    for _ in range(int(TRIAL_S) - 1):
        assert one.look(is_there=False) == [False]
    assert one.look(is_there=False) == [False, None], "Envoy may reach it"
    assert one.look(is_there=False) == [False, None, False]


def test_with_checks_a_page_takes_one_out_and_a_check_brings_it_back():
    one = Looked(HealthCheckConfig.model_validate({"unhealthy_threshold": 3}))
    one.unreached = True
    assert one.look(is_there=False) == [False]
    assert one.look(is_there=True) == [False]
    one.look(is_there=False)
    assert one.look(is_there=False, after_s=2 * TRIAL_S) == [False]
