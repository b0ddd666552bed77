"""ext_proc served on grpcio's own core, without a thread, task or future per request (docs/adr/0006)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from extproc.transport.aio import Server
    from extproc.transport.completion.server import Server as CompletionServer


def server_on(loop: asyncio.AbstractEventLoop) -> Callable[..., Server | CompletionServer]:
    """Return what makes a server on `loop`: the loop was chosen for its transport (`extproc.commands.cli.run_loop`)."""
    from extproc.transport.completion.loop import CompletionLoop

    if isinstance(loop, CompletionLoop):
        from extproc.transport.completion.server import Server as CompletionServer

        return partial(CompletionServer, loop=loop)
    from extproc.transport.aio import Server

    return Server
