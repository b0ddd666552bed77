"""ext_proc served on grpcio's own core, without a thread, task or future per request (docs/adr/0006)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from extproc.completion.server import Server as CompletionServer
    from extproc.server import Server


def server_on(loop: asyncio.AbstractEventLoop) -> Callable[..., Server | CompletionServer]:
    """Return what makes a server on `loop`: the loop was chosen for its transport (`extproc.cli.run_loop`)."""
    from extproc.completion.loop import CompletionLoop

    if isinstance(loop, CompletionLoop):
        from extproc.completion.server import Server as CompletionServer

        return partial(CompletionServer, loop=loop)
    from extproc.server import Server

    return Server
