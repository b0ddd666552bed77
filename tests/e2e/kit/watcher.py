"""A source of endpoints in a thread of its own, and what it reported."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from extproc.config import InferencePoolConfig, KubernetesConfig
from extproc.endpoints.discovery.inference_pool import InferencePool
from extproc.endpoints.discovery.kubernetes import Kubernetes

from .loops import let_close
from .processes import PATIENCE_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.endpoints.discovery.source import Source


class Watcher:
    """The source, running while `with` lasts.

    reports     every report: name -> address
    priorities  every word of an InferencePool's objectives
    left_out    how many things seen made no endpoint
    """

    def __init__(self, source: type[Kubernetes | InferencePool], **config: Any) -> None:
        self.reports: list[dict[str, str]] = []
        self.priorities: list[Mapping[str, int]] = []
        self.left_out = 0
        self.source: Source
        if source is Kubernetes:
            self.source = Kubernetes(KubernetesConfig.model_validate(config), {}, self._leave_out)
        else:
            pool = InferencePoolConfig.model_validate(config)
            self.source = InferencePool(pool, {}, self._leave_out, self.priorities.append)
        self._loop = asyncio.SelectorEventLoop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self.source.run(self._report))
        self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        let_close(self._loop)
        self._loop.close()

    def _report(self, endpoints) -> None:
        self.reports.append({endpoint.name: endpoint.address for endpoint in endpoints})

    def _leave_out(self, number: int) -> None:
        self.left_out += number

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def sees(self, **pods: str) -> None:
        """Wait until the last report is exactly this: name -> address."""
        expected = {name.replace("_", "-"): address for name, address in pods.items()}
        try:
            wait_until(lambda: self.reports and self.reports[-1] == expected)
        except AssertionError:
            raise AssertionError(f"not {expected}; the reports: {self.reports}") from None
