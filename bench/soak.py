"""A hundred thousand requests of all kinds through real Envoy, and what the sidecar holds meanwhile: `make soak`.

Nine of ten are served, behind a queue that never empties; the others are abandoned while they wait or run, refused, or
come with names that nobody used before. After each batch all books must be empty, and memory, tasks, descriptors and
Python's own blocks are printed. Over the second half they must be flat, or the exit code is 1:

    bytes         at most --bytes-per-request more with each request of what malloc has given out, which is all that is
                  gRPC's: 5, or 120 with `transport: asyncio`, as grpc.aio keeps some bytes of each stream
    blocks        at most 0.05 more with each request: nothing in Python is kept per request
    memory        resident, no more than that beside the 2 MiB by which an allocator's moves by itself; by the median
                  slope or by its floor. It alone can't tell 10 bytes of a request from fragments: that took 600,000
    tasks, files  none more, within 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from tests.e2e.kit.envoy import Envoy
from tests.e2e.kit.load import KEPT_BYTES, SAW_BYTES, Growth, descriptors, memory_bytes
from tests.e2e.kit.mirror import mirror_bootstrap
from tests.e2e.kit.processes import free_port, wait_until
from tests.e2e.kit.stack import Stack, local

CLIENTS = 64
SLOTS = 8


async def batch(url: str, count: int, dice: random.Random) -> dict[str, int]:
    """Send so many requests from CLIENTS clients; how many ended how."""
    ends: dict[str, int] = {}
    left = iter(range(count))

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in left:
            headers, patience_s = {"content-type": "application/json"}, 60.0
            match dice.random():
                case lot if lot < 0.03:
                    patience_s = dice.random() * 0.03
                case lot if lot < 0.06:
                    headers["x-model"] = "nobody's"
                case lot if lot < 0.10:
                    name = f"soak-{dice.randrange(300)}"
                    headers |= {"x-tenant-id": name, "x-session-id": name, "x-request-class": name}
            try:
                async with asyncio.timeout(patience_s), session.post(url, data=b"{}", headers=headers) as answer:
                    await answer.read()
                    end = str(answer.status)
            except TimeoutError:
                end = "left"
            ends[end] = ends.get(end, 0) + 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return ends


class Watch:
    """Reads what the sidecar holds."""

    def __init__(self, stack: Stack, report: Path) -> None:
        self._stack, self._report = stack, report
        self._lines = 0

    def look(self) -> dict[str, int]:
        """All figures, once everything is idle."""
        self._stack.wait_idle(10)
        wait_until(lambda: self._stack.sidecar.metrics()["extproc_streams"] == 0, 10, "all streams gone")
        child = self._stack.sidecar.child
        child.signal(signal.SIGUSR1)
        self._lines += 1
        told = json.loads(wait_until(self._told, 10, "the sidecar tells what it holds"))
        return {"memory": memory_bytes(child.pid), "files": descriptors(child.pid), **told}

    def _told(self) -> str:
        lines = self._report.read_text().splitlines() if self._report.exists() else []
        return lines[-1] if len(lines) == self._lines else ""


def soak(requests: int, batches: int, directory: Path, limit_bytes: float) -> bool:
    """Run it, and tell whether all is flat."""
    engine = f"127.0.0.1:{free_port()}"
    budget = [{"name": "default", "budget": "60s"}]
    config = {"max_running_requests": SLOTS, "classes": budget, "shed": False}
    stack = Stack(directory, upstreams=(), endpoints={"engine": {"address": engine, "models": ["sim"]}}, config=config)
    report = directory / "report.jsonl"
    stack.sidecar.child.argv = [sys.executable, "-m", "tests.e2e.kit.inspected", str(stack.sidecar.path), str(report)]
    growths = {what: Growth() for what in ("bytes", "blocks", "memory", "tasks", "files")}
    dice = random.Random(1)
    size = requests // batches
    with Envoy(mirror_bootstrap(engine, local()), directory, name="engine"), stack:
        watch = Watch(stack, report)
        columns = f"{'bytes':>11} {'files':>6} {'tasks':>6} {'blocks':>8} {'sessions':>9} {'tenants':>8}"
        print(f"{'requests':>9} {'MiB':>7} {columns}  end")
        for number in range(1, batches + 1):
            began = time.monotonic()
            ends = asyncio.run(batch(stack.url, size, dice))
            rate = size / (time.monotonic() - began)
            seen = watch.look()
            print(
                f"{number * size:>9} {seen['memory'] / 2**20:>7.2f} {seen['bytes']:>11,} {seen['files']:>6}"
                f" {seen['tasks']:>6} {seen['blocks']:>8} {seen['sessions']:>9} {seen['tenants']:>8}"
                f"  {ends}, {rate:.0f}/s",
                flush=True,
            )
            if set(ends) - {"200", "404", "left"}:
                print(f"unexpected ends: {ends}")
                return False
            if number > batches // 2:
                for what, growth in growths.items():
                    growth.add(number * size, seen[what])
    resident = growths["memory"]
    flat = {
        "bytes": growths["bytes"].slope <= limit_bytes,
        "blocks": growths["blocks"].slope <= 0.05,
        "memory": resident.kept * resident.units <= limit_bytes * resident.units + SAW_BYTES,
        "tasks": growths["tasks"].spread <= 2,
        "files": growths["files"].spread <= 2,
    }
    for what, growth in growths.items():
        print(f"{what:<7} {'flat' if flat[what] else 'NOT FLAT'}: {growth}")
    return all(flat.values())


def main() -> int:
    """Run the soak; 0 if everything stayed flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--bytes-per-request", type=float, default=KEPT_BYTES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flat = soak(arguments.requests, arguments.batches, Path(directory), arguments.bytes_per_request)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
