"""Tasks that run for as long as the sidecar does: a bug in one of them is told, and it begins again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger("extproc.tasks")

RESTART_S = 1.0
"""How long a task rests after an exception that nobody expected."""


class Tasks:
    """Starts tasks that are begun again when they fail.

    Attributes:
        restarts: how often that was, by kind of task.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.restarts: dict[str, int] = {}

    def keep(self, kind: str, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run `work` until it returns or is cancelled; an exception is logged and counted, and it begins again."""
        self.restarts.setdefault(kind, 0)
        return asyncio.get_running_loop().create_task(self._run(kind, name, work), name=name)

    async def _run(self, kind: str, name: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                self.restarts[kind] += 1
                log.exception("%s failed and begins again in %gs: please report it", name, RESTART_S)
                await asyncio.sleep(RESTART_S)
            else:
                return
