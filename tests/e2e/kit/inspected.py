"""`extproc serve` that tells what it holds: after SIGUSR1 it adds a line of JSON to the file given as second argument.

tasks     asyncio tasks
blocks    blocks that Python's allocator has given out: rises by one or more with each object that is kept
running, sessions, tenants, alarms    what the sidecar remembers of requests, by where
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from pathlib import Path

from extproc.commands.cli import prepare_grpc, run_loop
from extproc.config import Config, load_config


async def serve(config: Config, report: Path) -> int:
    """Serve this configuration."""
    from extproc.app import App  # it imports gRPC, which is prepared only now

    loop = asyncio.get_running_loop()
    app = App(config, loop)

    def tell() -> None:
        core = app.gate.controller
        gc.collect()
        found = {
            "tasks": len(asyncio.all_tasks(loop)),
            "blocks": sys.getallocatedblocks(),
            "running": len(app.desk.running),
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
