"""What tests of endpoints that come and go share: a config, an endpoint of it, and patience."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import yaml

from extproc.config import Config, parse_config
from tests.e2e.kit.processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until `condition` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what changes has no event
            await asyncio.sleep(0.002)


def config(**keys: Any) -> Config:
    return parse_config(yaml.safe_dump(keys), "test", {})


def endpoint(name: str, address: str = "10.0.0.1:8000", **more: Any) -> dict[str, Any]:
    return {"name": name, "address": address, **more}
