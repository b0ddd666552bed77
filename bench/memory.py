"""What the sidecar keeps of each request, to the byte: `make bench-memory` (3 minutes).

Resident memory goes up and down by two MiB by itself. So here all memory of the sidecar, gRPC's and Python's, is
malloc's (PYTHONMALLOC=malloc), and malloc is asked what it has given out. Requests go through real Envoy, on a unix
socket, to nginx. First come as many as fill what remembers the last ones (stories, waits, tenants); then the rest, in
batches, after each of which everything is idle.

    served   300,000 requests: bytes, Python objects and garbage that reference counts had not freed, for each
    held     1,000 and 5,000 requests that wait at a time: bytes for each
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.transport import CLIENTS, Contender, Site, site, stand_in_line, take_slot, upstreams, wrk
from tests.e2e.kit.load import Growth
from tests.e2e.kit.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS = Contender("sidecar", None, "completion_queue")
MOST_BYTES = 1.0
"""Of each served request, kept. Nothing is: what is seen are caches and free lists, which are bounded."""
MOST_HELD_KIB = 15.5


class Watch:
    """Asks a sidecar what it holds, once it is idle."""

    def __init__(self, where: Site, report: Path) -> None:
        self._where, self._report, self._lines = where, report, 0

    def look(self) -> dict[str, int]:
        """Return all figures."""
        sidecar = self._where.sidecar
        assert sidecar is not None
        sidecar.child.signal(signal.SIGUSR1)
        self._lines += 1
        found: dict[str, int] = json.loads(wait_until(self._told, 20, "the sidecar tells what it holds"))
        return found

    def _told(self) -> str:
        lines = self._report.read_text().splitlines() if self._report.exists() else []
        return lines[-1] if len(lines) == self._lines else ""


def served(directory: Path, requests: int, batches: int, warm: int) -> bool:
    """Serve, and tell whether nothing is kept of a request."""
    report = directory / "served"
    growth = {name: Growth() for name in ("bytes", "objects", "blocks")}
    with contextlib.ExitStack() as running:
        addresses = running.enter_context(upstreams(directory))
        where = running.enter_context(
            site(Contender("sidecar", None, "completion_queue"), directory, addresses, report)
        )
        watch, count, garbage = Watch(where, report), 0, 0
        print("\n| requests | bytes given out | Python objects | garbage |\n| --- | --- | --- | --- |")

        def look() -> dict[str, int]:
            wait_until(lambda: where.sidecar is not None and where.sidecar.metrics()["extproc_streams"] == 0, 20)
            watch.look()  # what asking makes is there the second time, too
            return watch.look()

        while count < warm:
            count += int(wrk(where.address, directory, CLIENTS, 5)["requests"])
        look()
        first = count
        while count - first < requests:
            seconds, before = 5.0, count
            while count - before < requests / batches:
                count += int(wrk(where.address, directory, CLIENTS, seconds)["requests"])
            watch_garbage = watch.look()["garbage"]
            found = look()
            garbage += watch_garbage
            for name, line in growth.items():
                line.add(count, found[name])
            print(f"| {count:,} | {found['bytes']:,} | {found['objects']:,} | {watch_garbage} |", flush=True)
    print(f"\nper request, over {growth['bytes'].units:,.0f}:")
    for name, line in growth.items():
        print(f"  {name}: {line}")
    print(f"  garbage: {garbage / (count - first):.4f} objects")
    return growth["bytes"].kept <= MOST_BYTES


def held(directory: Path, counts: Sequence[int]) -> bool:
    """Hold requests, and tell whether each costs little."""
    worst = 0.0
    print("\n| held | KiB each, all | of them gRPC's and Python's objects |\n| --- | --- | --- |")
    for count in counts:
        report = directory / f"held-{count}"
        with contextlib.ExitStack() as running:
            addresses = running.enter_context(upstreams(directory))
            keys: dict[str, Any] = {
                "classes": [{"name": "batch", "budget": "600s"}],
                "max_running_requests": 1,
                "max_queued_requests": 100_000,
                "shed": False,
            }
            where = running.enter_context(site(OURS, directory, addresses[:1], report, **keys))
            watch = Watch(where, report)
            assert where.sidecar is not None
            take_slot(running, where.address, where.sidecar)
            stand_in_line(running, where.address, where.sidecar, 200)  # fills free lists
            watch.look()
            before = watch.look()
            stand_in_line(running, where.address, where.sidecar, count)
            after = watch.look()
        each = (after["bytes"] - before["bytes"]) / count / 1024
        worst = max(worst, each)
        print(f"| {count:,} | {each:.2f} | {(after['objects'] - before['objects']) / count:.1f} |", flush=True)
    return worst <= MOST_HELD_KIB


def main() -> int:
    """Measure what was asked for; 0 if it is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["held", "served"], metavar="held|served")
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--warm", type=int, default=30_000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--held", type=int, nargs="+", default=[1_000, 5_000])
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)  # nginx' worker is somebody else
        if "held" in arguments.parts:
            good &= held(directory, arguments.held)
        if "served" in arguments.parts:
            good &= served(directory, arguments.requests, arguments.batches, arguments.warm)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
