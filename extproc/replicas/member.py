"""A sidecar among others, with everything that does I/O: the port for others, the store, and the way in and out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from typing import TYPE_CHECKING, Any

from extproc.replicas.links import TcpNetwork
from extproc.replicas.log import SidecarLog
from extproc.replicas.messages import LAST, Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica
from extproc.replicas.stores import StoreError, store_of
from extproc.replicas.tls import MutualTls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from extproc.config import ReplicasConfig
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.messages import Ask

SETTLE_S = 4.0
"""How long a start waits until it is clear who leads; requests that come before would wait as long."""
MOST_HOST = 40
NEVER = "and never has: until it does, or a leader is found, one request at a time goes to each engine"
ASKABLE = ("queues", "view")
ANSWER_S = 1.0
"""How long a page waits for the leader's word before it shows what is known here."""
MOST_LISTED, MOST_ANSWERING = 500, 16


class Membership:
    """Makes a sidecar one of its pool while it runs.

    Attributes:
        replica: its place among the others.
        store_errors: how often the store failed.
    """

    def __init__(self, config: ReplicasConfig, gate: SharedGate, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare. Raises ConfigError for files or packages that are needed and not there."""
        self._config = config
        self._loop = loop
        self._store = store_of(config)
        tls = MutualTls(config.tls) if config.tls is not None else None
        # A name for this life alone: whoever comes back after a restart holds nothing of what it held before.
        name = f"{socket.gethostname()[:MOST_HOST]}-{secrets.token_hex(3)}"
        me = Member(name, config.reached_at, LAST - 1)
        self._network = TcpNetwork(
            loop,
            SidecarLog(me),
            client_tls=None if tls is None else tls.client,
            server_tls=None if tls is None else tls.server,
            server_name=None if tls is None else tls.server_name,
        )
        beat_s = self._store.beat_s
        self.replica = Replica(gate, me, config.pool, self._network, loop, store_beat_s=beat_s)
        gate.watch()
        self.store_errors = 0
        self._problem: str | None = None
        self._asking: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._answering: set[asyncio.Task[None]] = set()
        self._on_role: Callable[[Role], None] = lambda _role: None

    async def start(self, on_role: Callable[[Role], None], on_loss: Callable[[], None]) -> None:
        """Join; `on_role` hears of every change of role, `on_loss` of every sidecar that is gone. Raises StartError."""
        self._on_role = on_role
        await self._network.listen(self._config.listen, self.replica.door)
        await self._ask_store()
        self._asking = self._loop.create_task(self._keep_asking(), name="store of replicas")
        self.replica.begin(self._turned, on_loss)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await self._settled.wait()

    def _turned(self, role: Role) -> None:
        if role is not Role.SEEKING:
            self._settled.set()
        self._on_role(role)

    def answer_with(self, describe: Callable[[str, int], Awaitable[dict[str, Any]]]) -> None:
        """Tell followers that ask, by `describe` of what is asked for and how many waiting requests to list."""

        async def answer(ask: Ask, reply: Callable[[str], None]) -> None:
            if ask.what in ASKABLE:
                reply(json.dumps(await describe(ask.what, min(ask.limit, MOST_LISTED))))

        def tell(ask: Ask, reply: Callable[[str], None]) -> None:
            if len(self._answering) < MOST_ANSWERING:
                task = self._loop.create_task(answer(ask, reply), name="what a follower asked")
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

        self.replica.tell = tell

    async def ask_leader(self, what: str, limit: int) -> dict[str, Any]:
        """Return what the leader shows, if we follow one and it answers soon; else nothing."""
        following = self.replica.following
        if following is None:
            return {}
        heard: asyncio.Future[str] = self._loop.create_future()
        following.ask(what, limit, lambda text: None if heard.done() else heard.set_result(text))
        try:
            async with asyncio.timeout(ANSWER_S):
                told = json.loads(await heard)
        except (TimeoutError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def resign(self) -> None:
        """Be nobody's leader any more: what waits here is decided by others from now on."""
        self.replica.resign()

    async def stop(self) -> None:
        """Say goodbye and close everything."""
        self.replica.end()
        if self._asking is not None:
            await self._stop_asking()
            with contextlib.suppress(StoreError):
                await self._store.leave(self.replica.me)
        await self._network.close()
        await self._store.close()

    async def _stop_asking(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
            self._asking = None

    async def _keep_asking(self) -> None:
        while True:
            began = self._loop.time()
            await self._ask_store()
            await asyncio.sleep(max(self._store.beat_s - (self._loop.time() - began), 0.1))

    async def _ask_store(self) -> None:
        log = self.replica.log
        try:
            asked_at = self._loop.time()
            self.replica.store_says(await self._store.beat(self.replica.me), asked_at)
            problem = None
        except StoreError as error:
            self.store_errors += 1
            problem = str(error)
        except Exception as error:  # a bug there must not end the asking
            self.store_errors += 1
            problem = f"{type(error).__name__}: {error}"
            if problem != self._problem:
                log.exception("the store of replicas could not be asked: please report it")
        if problem is not None and self._problem is None:
            never = self.replica.census.answered_at is None
            log.warning("the store does not answer, %s: %s", NEVER if never else "nothing changes meanwhile", problem)
        elif problem is None and self._problem is not None:
            log.info("the store answers again")
        self._problem = problem
