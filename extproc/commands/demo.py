"""The demo of `extproc up --demo`: waves of streaming chat completions, and what happens to them."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from typing import TYPE_CHECKING

import aiohttp

from extproc.commands.top import Screen, line, lines

if TYPE_CHECKING:
    from extproc.admin.http import Admin

WAVE = (("default", 8), ("batch", 18), ("default", 6), ("interactive", 8))
"""Requests of a wave by class, in the order they are sent. The first ones fill the engines, so that nobody goes at once
for being early; of the others the lowest class comes first, so that the order shows."""
CLASSES = ("interactive", "default", "batch")
WAVE_EVERY_S = 8.0
SHOW_EVERY_S = 0.5
LOG_EVERY_S = 2.0
"""Where stdout is no terminal."""
_LEGEND = f"""\
A line every {LOG_EVERY_S:g} s. running: requests at the engines, of the slots there; waiting: here, in front of them;
done: by HTTP status; first token p95: 95 % of a class's requests had their first token by then, or wait so long.
"""


class Demo:
    """Sends traffic to Envoy and prints the state of the queues."""

    def __init__(self, urls: list[str], admin: Admin, page: str) -> None:
        """Send to the Envoys at `urls`; `admin` knows what happens, and shows it at the URL `page`."""
        self._urls = urls
        self._admin = admin
        self._page = page
        self._random = random.Random(1)  # noqa: S311 - a demo
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: set[asyncio.Task[None]] = set()
        self._first_tokens: dict[str, list[float]] = {}
        self._waiting: dict[int, tuple[str, float]] = {}  # who has no first token yet: class, and since when
        self._done: Counter[str] = Counter()
        self._sent = 0

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._send_waves()), asyncio.create_task(self._show())]

    async def stop(self) -> None:
        """Stop sending; requests under way are given up, as clients do."""
        tasks = [*self._tasks, *self._requests]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_waves(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:
            while True:
                for request_class, count in WAVE:
                    for _ in range(count):
                        task = asyncio.create_task(self._send(client, request_class))
                        self._requests.add(task)
                        task.add_done_callback(self._requests.discard)
                    await asyncio.sleep(0.05)
                await asyncio.sleep(WAVE_EVERY_S)

    async def _send(self, client: aiohttp.ClientSession, request_class: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        body = {
            "model": "sim",
            "stream": True,
            "max_tokens": self._random.randint(60, 140),
            "messages": [{"role": "user", "content": "Tell me of waiting rooms. " * self._random.randint(1, 20)}],
        }
        headers = {"x-request-class": request_class}
        self._sent += 1
        number = self._sent
        self._waiting[number] = request_class, began
        try:
            async with client.post(
                f"{self._random.choice(self._urls)}/v1/chat/completions", json=body, headers=headers
            ) as response:
                first = True
                async for _ in response.content:
                    if first and response.status == 200:
                        self._first_tokens.setdefault(request_class, []).append(loop.time() - began)
                        self._waiting.pop(number)
                        first = False
            self._done["ok" if response.status == 200 else str(response.status)] += 1
        except aiohttp.ClientError as error:
            self._done["failed"] += 1
            print(f"request failed: {error}", file=sys.stderr)
        finally:
            self._waiting.pop(number, None)

    async def _show(self) -> None:
        screen = Screen()
        if not screen.redraws:
            print(_LEGEND + f"More is shown at {self._page}, and in a terminal.\n", flush=True)
        while True:
            view = await self._admin.view()
            if screen.redraws:
                width, height = screen.size(taken=2)
                screen.draw([*lines({**view, "waiting": []}, width, height), self._first_token_line()])
                await asyncio.sleep(SHOW_EVERY_S)
            else:
                print(f"{line(view)}  {self._done_words()}  {self._first_token_line()}", flush=True)
                await asyncio.sleep(LOG_EVERY_S)

    def _done_words(self) -> str:
        """Count the answers, refusals by their HTTP status."""
        counts = sorted({"ok": 0, **self._done}.items(), reverse=True)
        named = ", ".join(f"{what} {count}" for what, count in counts)
        return f"done {self._done.total():3} {f'({named})':<8}"

    def _first_token_line(self) -> str:
        """Describe the slow end. Who waits still counts, with what it waited: else a class whose first ones alone were
        served looks like the quickest."""
        now = asyncio.get_running_loop().time()
        times_s: dict[str, list[float]] = {name: list(times) for name, times in self._first_tokens.items()}
        for name, began in self._waiting.values():
            times_s.setdefault(name, []).append(now - began)
        slow = {name: sorted(times)[len(times) * 95 // 100] for name, times in times_s.items()}
        said = {name: f"{seconds:.2f}s" for name, seconds in slow.items()}
        return "first token p95  " + "  ".join(f"{name} {said.get(name, '-'):>6}" for name in CLASSES)
