"""`extproc serve`, but SIGUSR1 blocks its event loop for some seconds: what a bug or a busy machine can do to us all.

Only the loop stands still: gRPC's own threads go on and accept streams, which is what makes it dangerous.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

from extproc.app import App
from extproc.cli import run_loop
from extproc.config import load_config

STALL_S = 4.0


async def serve(path: Path) -> int:
    """Serve the config at `path`."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: time.sleep(STALL_S))
    await App(load_config(path), loop).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_loop(serve(Path(sys.argv[1]))))
