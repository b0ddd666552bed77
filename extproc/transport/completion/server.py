"""The ext_proc server on a completion queue. Has the interface and the settings of `transport/aio.py`."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from extproc.stream import wire
from extproc.stream.session import Session
from extproc.transport.aio import OPTIONS, SERVICES, server_options
from extproc.transport.completion.door import Door
from extproc.transport.completion.services import Health, Reflection

if TYPE_CHECKING:
    from extproc.stream.reception import Reception
    from extproc.transport.completion.loop import CompletionLoop
    from extproc.transport.listener import Listener

log = logging.getLogger("extproc.server")


class Server:
    """An ext_proc server on one address, and if asked one for probes alone on another."""

    def __init__(
        self,
        reception: Reception,
        listener: Listener,
        loop: CompletionLoop,
        *,
        reflect: bool = False,
        bodies: bool = False,
        probes: Listener | None = None,
    ) -> None:
        """Prepare to serve `reception` at what `listener` binds, on `loop`, and health alone at what `probes` does.

        `bodies`: we are sent those of requests.
        """
        self._listener = listener
        self._probes = probes
        self._health = Health()
        self.port = 0
        methods: dict[bytes, Any] = {
            f"/{wire.SERVICE}/{wire.METHOD}".encode(): partial(Session, reception),
            **self._health.methods(),
        }
        if reflect:
            methods |= Reflection.methods((wire.SERVICE, Health.NAME))
        self._door = Door(loop, methods, server_options(bodies=bodies))
        self._side_door = Door(loop, self._health.methods(), OPTIONS)

    async def start(self) -> None:
        """Bind and serve. Raises StartError if an address can't be had."""
        self.port = self._door.bind(self._listener)
        if self._probes is not None:
            self._side_door.bind(self._probes)
            self._side_door.open()
        self._door.open()
        self._health.put(SERVICES, serving=True)
        log.info("transport completion_queue: in use, grpcio %s", grpc.__version__)

    async def refuse_new(self) -> None:
        """Tell Envoy and Kubernetes to send new requests elsewhere; liveness stays."""
        self._health.put([name for name in SERVICES if name != "liveness"], serving=False)

    async def stop(self, grace_s: float) -> None:
        """Close the port at once, let streams end for `grace_s`, then cut them."""
        await self._door.close(grace_s)
        await self._side_door.close(0)
        self._listener.close()
