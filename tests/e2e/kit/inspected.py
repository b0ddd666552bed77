"""`extproc serve` that tells what it holds: after SIGUSR1 it adds a line of JSON to the file given as second argument.

tasks     asyncio tasks
blocks    blocks that Python's allocator has given out: rises by one or more with each object that is kept
bytes     what malloc has given out; with PYTHONMALLOC=malloc that is all, gRPC's and Python's, to the byte
objects   Python objects that can be part of a cycle
garbage   how many of those nobody could reach any more, and reference counts had not freed
running, sessions, tenants, alarms    what the sidecar remembers of requests, by where

The live page's history is full at the first look: what is counted are requests, and not how long they took.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import signal
import sys
from pathlib import Path

from extproc.admin.history import SAMPLES
from extproc.commands.cli import prepare_grpc, run_loop
from extproc.config import Config, load_config


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def malloced_bytes() -> int:
    """Return what malloc has given out and not got back, in all its arenas and beside them; 0 where nobody can tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:  # another C library, or glibc before 2.33
        return 0
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


async def serve(config: Config, report: Path) -> int:
    """Serve this configuration."""
    from extproc.app import App  # it imports gRPC, which is prepared only now

    loop = asyncio.get_running_loop()
    app = App(config, loop)

    def tell() -> None:
        history = app.admin.viewer.history
        while len(history) < SAMPLES:  # it fills in five minutes, whether anybody asks for anything or not
            history.sample(loop.time())
        core = app.gate.controller
        garbage = gc.collect()
        found = {
            "tasks": len(asyncio.all_tasks(loop)),
            "blocks": sys.getallocatedblocks(),
            "bytes": malloced_bytes(),
            "objects": len(gc.get_objects()),
            "garbage": garbage,
            "running": len(app.reception.running),
            "sessions": len(core._placing.sessions),
            "tenants": sum(len(share) for pool in core.pools() for share in pool.shares.values()),
            "alarms": len(core._lines.alarms),
        }
        with report.open("a") as out:
            out.write(json.dumps(found) + "\n")

    loop.add_signal_handler(signal.SIGUSR1, tell)
    await app.run()
    return 0


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]))
    prepare_grpc(config.transport, config.listen)
    sys.exit(run_loop(serve(config, Path(sys.argv[2])), config.transport))
