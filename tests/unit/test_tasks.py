"""Tasks that are kept: what becomes of one that fails, that ends, that is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from extproc import tasks
from tests.e2e.kit.processes import PATIENCE_S


def test_a_task_that_fails_is_told_counted_and_begun_again(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "RESTART_S", 0.0)
    begun = []

    async def work() -> None:
        begun.append(1)
        if len(begun) < 3:
            raise ValueError(f"number {len(begun)}")

    async def main() -> dict[str, int]:
        kept = tasks.Tasks()
        await asyncio.wait_for(kept.keep("kind", "work", work), PATIENCE_S)
        return kept.restarts

    assert asyncio.run(main()) == {"kind": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "work failed and begins again in 0s: please report it"
    ] * 2
    assert "number 2" in caplog.text


def test_a_cancelled_task_ends():
    async def main() -> None:
        kept = tasks.Tasks()
        task = kept.keep("kind", "work", asyncio.Event().wait)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE_S)
        assert kept.restarts == {"kind": 0}

    asyncio.run(main())
