"""What an engine says of itself, and what people see of it in /queues and in metrics."""

from __future__ import annotations

import asyncio

from extproc.app import App
from extproc.config import Config
from extproc.endpoints.telemetry import facts
from extproc.endpoints.telemetry.target import Target
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.pages import Pages, Wire, until

# ---- what people see


async def shown() -> tuple[list[dict[str, object]], dict[tuple[str, ...], float]]:
    """Run a sidecar with a good endpoint and a bad one; return its /queues rows and its /metrics samples."""
    async with Pages() as pages:
        endpoints = [
            {"name": name, "address": address, "metrics_url": pages.url(path)}
            for name, path, address in (("a", "good", pages.address), ("b", "broken", "127.0.0.1:9"))
        ]
        here = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "drain_timeout": 0.0}
        app = App(Config.model_validate({**here, "endpoints": endpoints}), asyncio.get_running_loop())
        await app.start()
        try:
            await until(lambda: app.scraper.age_s("a") is not None and list(app.scraper.errors()))
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for family in app.metrics.collect()
                for sample in family.samples
            }
            rows = (await app.admin.snapshot())["endpoints"]
            assert isinstance(rows, list)
            return rows, samples
        finally:
            await app.drain(asyncio.Event())


def test_queues_and_metrics_show_load_and_age_and_leave_out_what_is_unknown():
    (first, second), samples = asyncio.run(shown())
    assert first["load"] == {"running": 3.0, "waiting": 1.0, "context_tokens": 4096.0}
    assert 0 <= first["telemetry_age_s"] < PATIENCE_S
    assert second["load"] == {}
    assert "telemetry_age_s" not in second
    assert samples["extproc_endpoint_load", "a", "running"] == 3.0
    assert samples["extproc_endpoint_load", "a", "waiting"] == 1.0
    assert ("extproc_endpoint_load", "a", "kv_usage") not in samples
    assert samples["extproc_telemetry_age_seconds", "a"] < PATIENCE_S
    assert ("extproc_telemetry_age_seconds", "b") not in samples
    assert samples["extproc_scrape_errors_total", "b", "status"] >= 1


# ---- what an engine says of itself


def test_an_engine_is_asked_for_its_limits_before_its_first_load_is_told_and_then_once_a_minute():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: len(wire.seen) >= 5)
        assert all(load.context_tokens == 4096 for _, load in wire.seen)
        assert pages.hits["v1/models"] == 1

    asyncio.run(main())


def test_an_engine_that_does_not_say_its_limits_is_scraped_all_the_same():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02, timeout_s=2.0) as wire:
            pages.models = None
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: len(wire.seen) >= 3)
            assert wire.errors() == {}
        assert all((load.running, load.context_tokens) == (3.0, None) for _, load in wire.seen)

    asyncio.run(main())


def test_limits_that_cant_be_had_now_stay_and_those_that_are_gone_go(monkeypatch):
    monkeypatch.setattr(facts, "EVERY_S", 0.0)

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02, timeout_s=0.1) as wire:
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: pages.hits.get("v1/models", 0) >= 2)
            pages.models = b'{"data": [{"max_model_len": 8192}]}'
            await until(lambda: wire.seen[-1][1].context_tokens == 8192)
            pages.models, asked, seen = None, pages.hits["v1/models"], len(wire.seen)
            await until(lambda: pages.hits["v1/models"] >= asked + 3 and len(wire.seen) >= seen + 3)
            assert wire.seen[-1][1].context_tokens == 8192
            pages.models = b'{"data": []}'
            await until(lambda: wire.seen[-1][1].context_tokens is None)

    asyncio.run(main())
