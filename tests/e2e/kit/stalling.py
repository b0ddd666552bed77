"""`extproc serve` with buttons, for what a bug, a busy machine or an administrator can do to us all.

SIGUSR1 blocks the event loop for some seconds. Only the loop stands still: gRPC's own threads go on and accept
streams, which is what makes it dangerous. SIGUSR2 moves the wall clock by the seconds given as second argument; a third
one says how far that clock is ahead of Envoy's from the start.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

from extproc.commands.cli import prepare_grpc, run_loop
from extproc.config import Config, load_config

STALL_S = 4.0


async def serve(config: Config, jump_s: float, ahead_s: float) -> int:
    """Serve this configuration."""
    from extproc.app import App  # it imports gRPC, which is prepared only now

    loop = asyncio.get_running_loop()
    app = App(config, loop)
    wall = app.ages._wall
    app.ages._wall = lambda: wall() + ahead_s
    app.ages._own += ahead_s

    def jump() -> None:
        app.ages._wall = lambda: wall() + ahead_s + jump_s

    loop.add_signal_handler(signal.SIGUSR1, lambda: time.sleep(STALL_S))
    loop.add_signal_handler(signal.SIGUSR2, jump)
    await app.run()
    return 0


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]))
    prepare_grpc(config.transport, config.listen)
    jump_s, ahead_s = (float(text) for text in (*sys.argv[2:], 0, 0)[:2])
    sys.exit(run_loop(serve(config, jump_s, ahead_s), config.transport))
