"""`extproc top`: the queues in a terminal, from the admin port of a running sidecar. The demo shows the same lines."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import aiohttp

from extproc.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Mapping

REFRESH_S = 0.5
WIDTH = 24
"""Characters of a bar, for limits above it."""


def lines(state: Mapping[str, Any]) -> list[str]:
    """Describe `state`, as /queues has it, in a line per endpoint and two more."""
    described = []
    widest = max((len(endpoint["name"]) for endpoint in state["endpoints"]), default=0)
    for endpoint in state["endpoints"]:
        in_flight, limit = endpoint["in_flight"], endpoint["limit"]
        text = f"{endpoint['name']:<{widest}}  [{_bar(in_flight, limit)}] {in_flight}/{limit} in flight"
        if endpoint["waiting"]:
            text += f", {endpoint['waiting']} at home"
        described.append(text if endpoint["up"] else f"{text}  DOWN")
    described.append("waiting   " + _pairs(state["waiting_by_class"]))
    described.append("outcomes  " + (_pairs(state["outcomes"]) or "none yet"))
    return described


class Screen:
    """Draws lines over the ones drawn before, or, where that is no terminal, one line after the other."""

    def __init__(self) -> None:
        """Draw on stdout."""
        self._height = 0
        self.redraws = sys.stdout.isatty()

    def draw(self, rows: list[str]) -> None:
        """Show `rows`."""
        if not self.redraws:
            print(" | ".join(rows), flush=True)
            return
        print(f"\x1b[{self._height}A\x1b[J" if self._height else "", end="")
        print("\n".join(rows), flush=True)
        self._height = len(rows)


async def top(admin: str, *, once: bool) -> int:
    """Show the sidecar whose admin port is `admin` until interrupted. Raises StartError if it can't be reached."""
    screen = Screen()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as client:
        while True:
            try:
                async with client.get(f"http://{admin}/queues") as response:
                    state = await response.json()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise StartError(f"no sidecar's admin port at {admin}: {error or type(error).__name__}") from None
            screen.draw(lines(state))
            if once:
                return 0
            await asyncio.sleep(REFRESH_S)


def _bar(in_flight: int, limit: int) -> str:
    width = min(max(limit, in_flight), WIDTH)
    full = round(width * in_flight / max(limit, in_flight, 1))
    return "#" * full + "." * (width - full)


def _pairs(counts: Mapping[str, int]) -> str:
    return "  ".join(f"{name} {count}" for name, count in counts.items())
