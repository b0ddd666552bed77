"""Live traffic, and a config that changes under it: what tests of endpoints that come and go share."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from .clients import complete_many
from .processes import PATIENCE_S, wait_until
from .upstream import behave

if TYPE_CHECKING:
    from .clients import Completion
    from .stack import Stack


def header(prefix: str, **more: str):
    return lambda number: {"x-test-id": f"{prefix}-{number}", **more}


def hold(prefix: str):
    return header(prefix, **dict([behave("ok", hold="head")]))


def listed(here: Stack, *names: str, **more: Any) -> list[dict[str, Any]]:
    """What `endpoints` of a config says about these upstreams."""
    return [{"name": name, "address": here.upstreams[name].address, **more} for name in names]


def reload(here: Stack, **changes: Any) -> None:
    """Change the file, send SIGHUP, wait until it was taken over."""
    before = reloads(here, "success")
    here.sidecar.write_config(**changes)
    here.sidecar.child.signal(signal.SIGHUP)
    wait_until(lambda: reloads(here, "success") > before, message="a reload")


def reloads(here: Stack, result: str) -> float:
    return here.sidecar.metrics()[f'extproc_config_reloads_total{{result="{result}"}}']


def names(here: Stack, *, up: bool | None = None) -> set[str]:
    """Endpoints that /queues lists (up: only those that are)."""
    return {one["name"] for one in here.sidecar.queues()["endpoints"] if up is None or one["up"] is up}


class Traffic:
    """Clients that ask one after the other, on connections of their own, until the end of `with`."""

    def __init__(self, here: Stack, clients: int = 6) -> None:
        self.answers: list[Completion] = []
        self._here = here
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self.more(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _ask(self, client: int) -> None:
        turn = 0
        while not self._ending.is_set():
            turn += 1
            ask = header(f"t{client}.{turn}", **dict([behave("sse", events=3, gap_s=0.005)]))
            self.answers += complete_many(self._here.url, 1, ask, timeout_s=PATIENCE_S)

    def more(self, count: int = 30) -> None:
        """Wait for that many further answers."""
        target = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= target, message=f"{count} answers more")

    def check(self) -> None:
        """Every client got a whole 200."""
        bad = [
            (answer.status, answer.headers, answer.error)
            for answer in self.answers
            if answer.status != 200 or answer.error
        ]
        assert not bad, (len(bad), len(self.answers), bad[:3])


def reached(here: Stack, name: str, count: int = 5) -> None:
    """Wait until this upstream got that many requests from now on."""
    target = len(here.upstreams[name].records()) + count
    wait_until(lambda: len(here.upstreams[name].records()) >= target, message=f"{name} gets requests")
