"""Which endpoints there are: what all sources see, merged, and every change carried out in an order that costs nobody.

A new endpoint gets requests only when Envoy knows its cluster. One that is gone gets none from the moment we hear of
it, but Envoy keeps its cluster until its leases are back and a while longer. An endpoint whose address changed is both:
a new cluster beside the old one, so that no request can reach the wrong server. Whom the file replaces stays until
Envoy knows who comes in its place, if nobody else serves its models.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from extproc.admission.ticket import State
from extproc.config.types import is_ours
from extproc.endpoints.names import may_be_found
from extproc.envoy.clusters import GIVE_UP_S, SETTLE_S
from extproc.errors import StartError
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec
    from extproc.config import Config, EndpointConfig
    from extproc.envoy.clusters import ClustersFile, EnvoyAdmin
    from extproc.stream.gate import Gate
    from extproc.stream.reception import Reception
    from extproc.tasks import Tasks

log = logging.getLogger("extproc.discovery")

FILE = "endpoints"
"""The source that is the configuration file."""
LINGER_S = 2.0
"""How long Envoy keeps a cluster after its last lease: for answers to Envoy that are still on their way."""
FOUND_S = 30.0
"""The same for clusters that a sidecar before us wrote: sources may take a while to see their endpoints again."""
TICK_S = 0.05
PUT_IN_A_TURN = 25
"""Endpoints that come, or have another limit, in one turn of the loop: a millisecond or two of the core."""
LOOKED_AT_AT_ONCE = 100
"""Endpoints of the file that are looked at in the very turn in which it is taken over: a millisecond."""
TOLD_IN_A_TURN = 20
"""Endpoints of which those who follow, and the log, are told in one turn of the loop: a millisecond's worth."""
LOGGED_EACH = 10
"""Endpoints that change in one moment and have a line each in the log; of more there is one line, and theirs are at
level debug."""


@dataclass(slots=True, eq=False)
class _Route:
    """An Envoy cluster in the file.

    Attributes:
        written: version and time of the write that brought it; None: it waits to be written.
        known: Envoy has it.
        until: None while it is wanted, else when it goes, if its leases are back.
        leases: of requests that may have been steered there, to an endpoint that is there no more.
    """

    address: str
    written: tuple[int, float] | None = None
    known: bool = False
    until: float | None = None
    leases: tuple[Ticket, ...] = ()


class Roster:
    """Merges what sources see, and tells the gate, the reception, Envoy and the followers."""

    def __init__(
        self,
        gate: Gate,
        reception: Reception,
        config: Config,
        *,
        file: ClustersFile | None,
        envoy: EnvoyAdmin | None,
        put: Callable[[EndpointConfig, bool], None],
        remove: Callable[[str], None],
        tasks: Tasks,
    ) -> None:
        """Tell `gate` and `reception`; `put` and `remove` follow the endpoints that requests may be sent to.

        `put` is told, too, whether one gets nothing before its first health check.
        """
        self._gate = gate
        self._reception = reception
        self._config = config
        self._file = file
        self._envoy = envoy
        self._put = put
        self._remove = remove
        self._tasks = tasks
        self._seen: dict[str, tuple[EndpointConfig, ...]] = {FILE: tuple(config.endpoints)}
        self._placed: dict[str, tuple[EndpointConfig | None, EndpointSpec]] = {}  # None: in doubt, after a fault
        self._by_address: dict[str, str] = {}  # who was placed there last
        self._routes: dict[str, _Route] = {}
        self._from_file: set[str] = set()  # names that the file has, or had: whom it replaces may well be alive
        self._gone: dict[str, float] = {}  # names whose answers are kept a while: a decision may be on its way
        self._written: object = None
        self._problem: str | None = None
        self._doubted = False
        self._refused: set[str] = set()
        self._pieces: deque[Callable[[], None]] = deque()  # of a change that is carried out, one in a turn of the loop
        # Models of those that are up, and stay so through the change under way.
        self._served: set[frozenset[str]] = set()
        self._goes_on = False  # with a piece in a turn that is to come
        self._fault: Exception | None = None  # what one of these could not be carried out for
        self._knows_models = False  # the core was told of all that the configuration names
        self._untold: deque[Callable[[], None]] = deque()  # what those who follow, and the log, are yet to be told
        self._level = logging.INFO  # of their lines in the log
        self._is_telling = False  # they are told now, or in a turn that is to come
        self.left_out = 0  # found endpoints that were not taken
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # ---- life

    def start(self) -> None:
        """Place the endpoints seen so far. Raises StartError if the clusters file can't be written."""
        if self._file is not None:
            before = self._file.read()
            until = self._gate.now() + FOUND_S
            for cluster, address in (before or {}).items():
                self._routes[cluster] = _Route(address, (0, 0.0), known=True, until=until)
            self._aim()
            try:
                self._write()
            except OSError as error:
                right = "; create the directory" if isinstance(error, FileNotFoundError) else ""
                raise StartError(
                    f"envoy_clusters_file: can't write {error.filename}: {error.strerror}{right}"
                ) from None
            if before is None:  # Envoy does not start without the file: whichever comes will read all of it first
                for route in self._routes.values():
                    route.known = True
        self._know_models()
        self._reconcile()
        while self._pieces:
            self._pieces.popleft()()
        self._tell(len(self._untold))  # nobody waits yet, and whoever follows begins with all of them
        self._task = self._tasks.keep("roster", "roster", self._keep)

    async def stop(self) -> None:
        """Stop following; the clusters file stays."""
        self._pieces.clear()
        self._untold.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ---- what changes

    def report(self, source: str, endpoints: Sequence[EndpointConfig] | None) -> None:
        """Take over all endpoints that `source` sees; None: it sees nothing more and is gone."""
        if endpoints is None:
            self._seen.pop(source, None)
        else:
            self._seen[source] = tuple(endpoints)
        if self._task is not None:
            self._reconcile()

    def configure(self, config: Config) -> None:
        """Take over changed endpoints of the file, and changed common limits."""
        self._config = config
        self._fault = None
        self._knows_models = False
        self._from_file |= {endpoint.name for endpoint in self._seen[FILE]}
        self._seen[FILE] = tuple(config.endpoints)
        if self._task is None:
            return
        if len(config.endpoints) <= LOOKED_AT_AT_ONCE:
            self._reconcile()
            return
        self._pieces.clear()
        self._pieces.append(self._look)  # in a turn of its own: the rules of the file were one
        self._go_on_soon()

    async def settled(self) -> None:
        """Wait until what was reported so far is carried out, as far as Envoy knows it, and who follows was told.

        Raises what a part of it failed for, the first if several did; the other parts are carried out.
        """
        while self._pieces or self._untold:  # noqa: ASYNC110 - some is done in each turn of the loop
            await asyncio.sleep(0)
        if self._fault is not None:
            raise self._fault

    def _know_anew(self) -> None:
        """Tell the core what the configuration names, behind its endpoints: of names that these list nothing is new."""
        if not self._knows_models:
            self._know_models()

    def _know_models(self) -> None:
        self._knows_models = True
        self._gate.know_models(self._config.models, expects_any=self._config.expects_any)
        self._reception.named_models = self._config.models

    # ---- carrying it out

    def _wanted(self) -> Iterator[EndpointConfig]:
        """Walk all endpoints seen, each name once; the file wins. A found address that is there already is skipped."""
        names: set[str] = set()
        addresses: set[str] = set()
        refused = set()
        in_file = {endpoint.name for endpoint in self._seen.get(FILE, ())}
        for source, endpoints in self._seen.items():
            for seen in endpoints:
                endpoint, why = seen, None
                if source != FILE and not may_be_found(seen.address, self._config.allowed_addresses):
                    why = "its address is not in allowed_addresses"
                elif source != FILE and seen.address in addresses:
                    why = "another endpoint has its address"
                elif seen.name in names:  # another port of a pod, from another item
                    endpoint = seen.model_copy(update={"name": f"{seen.name}-{seen.address.rpartition(':')[2]}"})
                    if source == FILE or seen.name in in_file or endpoint.name in names:
                        why = "another source has its name"
                if why is not None:
                    refused.add(f"{source}: {seen.name} at {seen.address} is left out: {why}")
                    continue
                names.add(endpoint.name)
                addresses.add(endpoint.address)
                yield endpoint
        for line in sorted(refused - self._refused):
            log.warning("%s", line)
        self.left_out += len(refused - self._refused)
        self._refused = refused

    def _look(self) -> None:
        """Look at who is wanted, and in the next turn at what that changes."""
        self._pieces.append(partial(self._carry_out, self._aim()))
        self._go_on_soon()

    def _reconcile(self) -> None:
        self._carry_out(self._aim())

    def _carry_out(self, aims: list[tuple[EndpointConfig, EndpointSpec]]) -> None:
        """Do at once what can be done at once; the rest waits for Envoy.

        A change of few is one moment. Of many, those who come, or have another limit, follow some in each turn of the
        loop; then, in one moment, those of other models or addresses change and those who are wanted no more go. So
        requests always have somewhere to go, a model that moves is served all the time, and nobody is asked for a model
        who need name none before or after. Who follows is told in turns of its own. What the core can't take over is
        tried again with the change that follows.
        """
        self._pieces.clear()  # of a change before this one, which is in it
        wanted = {endpoint.name for endpoint, _ in aims}
        moved = {
            endpoint.name
            for endpoint, spec in aims
            if self._file is not None
            and endpoint.name in self._placed
            and self._placed[endpoint.name][1].cluster != spec.cluster
            and not self._routes[spec.cluster].known
        }
        up = {name for name, one in self._gate.controller.endpoints.items() if one.health.is_up and not one.removed}
        self._served = {spec.models for endpoint, spec in aims if endpoint.name in up and not self._comes(endpoint)}
        known = [aim for aim in aims if self._file is None or self._routes[aim[1].cluster].known]
        news = [aim for aim in known if self._placed.get(aim[0].name) != aim]
        gone = [name for name in self._placed if name not in wanted or name in moved]
        if len(known) < len(aims):
            replaced = self._replaced(aims)
            gone = [name for name in gone if name not in replaced]
        self._announce(news, gone)
        if len(news) <= PUT_IN_A_TURN:
            self._finish(news, gone)
            self._know_anew()
            return
        # Where some go, models that nobody lists so come in the moment in which they go.
        lists = {spec.models for _, spec in (self._placed.values() if gone else news)}
        alone = [aim for aim in news if self._changes_alone(aim, lists)]
        begins = range(0, len(alone), PUT_IN_A_TURN)
        self._pieces.extend(partial(self._place, alone[begin : begin + PUT_IN_A_TURN]) for begin in begins)
        self._pieces.append(partial(self._finish, [aim for aim in news if not self._changes_alone(aim, lists)], gone))
        self._pieces.append(self._know_anew)
        self._go_on_soon()

    def _replaced(self, aims: list[tuple[EndpointConfig, EndpointSpec]]) -> set[str]:
        """Return of whom the file had those who stay until Envoy knows who comes in their place: nobody else serves.

        Whoever a source no longer sees may be dead, and goes at once.
        """
        there = self._gate.controller.endpoints
        coming = {spec.models for _, spec in aims if not self._routes[spec.cluster].known}
        stay = {spec.models for one, spec in aims if not self._comes(one) and there[one.name].available}
        return {
            name
            for name in self._from_file & self._placed.keys()
            if not _serve(stay, models := self._placed[name][1].models)
            and any(not models or not its or models & its for its in coming)
        }

    def _announce(self, news: list[tuple[EndpointConfig, EndpointSpec]], gone: list[str]) -> None:
        """Log what a change of many is in one line, and what is to be done by hand."""
        come = [endpoint.name for endpoint, _ in news if endpoint.name not in self._placed]
        self._level = logging.INFO if len(news) + len(gone) <= LOGGED_EACH else logging.DEBUG
        if self._level == logging.DEBUG:
            log.info(
                "endpoints: %d come, %d change, %d go: %s",
                len(come),
                len(news) - len(come),
                len(gone),
                some_of(come + gone, LOGGED_EACH),
            )
        by_hand = [spec.cluster for endpoint, spec in news if self._comes(endpoint)]
        # A gateway is told addresses, and knows them itself; at a start Envoy's own file has what ours has.
        if by_hand and self._task is not None and self._file is None and not self._config.picks:
            log.warning(
                "Envoy's own cluster %s decides where requests go, and must be changed by hand: envoy_clusters_file is "
                "not set",
                some_of(by_hand, LOGGED_EACH),
            )

    def _changes_alone(self, aim: tuple[EndpointConfig, EndpointSpec], lists: set[frozenset[str]]) -> bool:
        """Tell whether nothing hangs on when an endpoint becomes `aim`: it has another limit, or is new, with models
        as in `lists`."""
        endpoint, spec = aim
        placed = self._placed.get(endpoint.name)
        if placed is None:
            return spec.models in lists
        before = placed[1]
        return placed[0] is not None and (before.models, before.cluster) == (spec.models, spec.cluster)

    def _go_on_soon(self) -> None:
        if self._task is not None and not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Carry out the next piece of a change of many, and come again for the rest."""
        self._goes_on = len(self._pieces) > 1
        if self._goes_on:
            asyncio.get_running_loop().call_soon(self._go_on)
        try:
            if self._pieces:  # else a change of few took its place
                self._pieces.popleft()()
        except Exception as fault:
            self._note(fault)
            raise
        finally:
            self._tell_soon()

    def _note(self, fault: Exception) -> None:
        """Keep what went wrong in a turn in which nobody waits for it: it is told to who waits for all."""
        if self._fault is None:
            self._fault = fault

    def _finish(self, news: list[tuple[EndpointConfig, EndpointSpec]], gone: list[str]) -> None:
        """In one moment, let endpoints be as they are now, and send nothing more to those that are gone."""
        try:
            self._place(news)  # first those who come, so that requests always have somewhere to go
            if gone:
                with self._tried({name: self._placed[name][1] for name in gone}):
                    self._gate.remove_endpoints(gone)
            for name in gone:
                self._displace(name)
        finally:
            self._wake.set()
            self._tell_soon()

    def _aim(self) -> list[tuple[EndpointConfig, EndpointSpec]]:
        """Return who is wanted, and at which cluster; keep `_routes` in step."""
        if self._file is None:
            return [(endpoint, self._config.spec_of(endpoint)) for endpoint in self._wanted()]
        aims: list[tuple[EndpointConfig, EndpointSpec]] = []
        used: set[str] = set()
        for endpoint in self._wanted():
            own = endpoint.cluster or endpoint.name
            candidates = (own, f"{own}@{endpoint.address}")[is_ours(own) :]  # a pod may have the name of our cluster
            fitting = [name for name in candidates if name in self._routes and self._at(name) == endpoint.address]
            cluster = fitting[0] if fitting else next(name for name in candidates if name not in self._routes)
            route = self._routes.setdefault(cluster, _Route(endpoint.address))
            route.until = None
            used.add(cluster)
            aims.append((endpoint, replace(self._config.spec_of(endpoint), cluster=cluster)))
        for cluster, route in self._routes.items():
            if cluster not in used and route.until is None:
                route.until = self._gate.now() + LINGER_S
        return aims

    def _at(self, cluster: str) -> str:
        return self._routes[cluster].address

    def _leave(self, name: str) -> None:
        """Have the cluster of an endpoint stay for those who may have been steered there: no more of them will be."""
        route, endpoint = self._routes.get(self._placed[name][1].cluster), self._gate.controller.endpoints.get(name)
        if route is not None and endpoint is not None:
            route.leases = tuple(ticket for ticket in (*route.leases, *endpoint.leases) if ticket.state is State.LEASED)

    def _place(self, news: list[tuple[EndpointConfig, EndpointSpec]]) -> None:
        """Let requests go to endpoints, as these are now: all in one moment."""
        for endpoint, spec in news:
            placed = self._placed.get(endpoint.name)
            self._gone.pop(endpoint.name, None)
            is_elsewhere = placed is not None and placed[1].cluster != spec.cluster
            former = self._by_address.get(spec.address, spec.name)
            if former != spec.name:  # its leases are to be the newcomer's
                self._leave(former)
            if is_elsewhere:
                self._leave(spec.name)
            if (
                placed is None or is_elsewhere or self._comes(endpoint)
            ):  # what it failed at another address is no news of this one
                self._reception.put_cluster(spec.name, spec.cluster)
        waits = self._wait_for_check(news)
        if news:
            with self._tried({spec.name: spec for _, spec in news}):
                specs = [spec for _, spec in news]
                self._gate.put_endpoints(
                    [replace(spec, awaits_check=True) if spec.name in waits else spec for spec in specs]
                )
        for endpoint, spec in news:
            placed = self._placed.get(endpoint.name)
            before = None if placed is None else placed[0]
            self._placed[endpoint.name] = (endpoint, spec)
            if placed is not None:
                self._part(spec.name, placed[1].address)
            self._by_address[spec.address] = spec.name
            follow = partial(self._follow, endpoint, spec.cluster, before, self._level)
            self._untold.append(partial(follow, waits=endpoint.name in waits))

    def _wait_for_check(self, news: list[tuple[EndpointConfig, EndpointSpec]]) -> set[str]:
        """Return which of `news` come, and get nothing before their first check: who stays up serves their models.

        It comes in a moment, from who follows; until then they would be sent requests that it may show to be lost. At
        a start, alone for a model, or where all are replaced, any endpoint is better than none.
        """
        if self._task is None or self._config.health_check is None:
            return set()
        return {spec.name for one, spec in news if self._is_served(spec.models) and self._comes(one)}

    def _is_served(self, models: frozenset[str]) -> bool:
        """Tell whether those that stay up serve all of `models`; none: whatever is asked for."""
        return _serve(self._served, models)

    def _comes(self, endpoint: EndpointConfig) -> bool:
        """Tell whether nothing is known yet of what runs there: it is new, or at another address."""
        before, _ = self._placed.get(endpoint.name, (None, None))
        if before is not None:
            return before.address != endpoint.address
        there = self._gate.controller.endpoints.get(endpoint.name)  # also of one in doubt
        return there is None or there.removed

    @contextmanager
    def _tried(self, specs: dict[str, EndpointSpec]) -> Iterator[None]:
        """After a fault it is open whether the core took these over: the next change puts all of them again, or
        removes them."""
        try:
            yield
        except BaseException:
            self._placed |= {name: (None, spec) for name, spec in specs.items()}
            raise

    def _displace(self, name: str) -> None:
        self._leave(name)
        self._from_file.discard(name)
        self._part(name, self._placed.pop(name)[1].address)
        self._gone[name] = self._gate.now() + LINGER_S
        self._untold.append(partial(self._unfollow, name, self._level))

    def _part(self, name: str, address: str) -> None:
        if self._by_address.get(address) == name:
            del self._by_address[address]

    # ---- telling who follows

    def _tell_soon(self) -> None:
        """Tell what is untold once a change is carried out: few at once, many in turns of their own."""
        if self._is_telling or self._pieces or self._task is None:
            return
        if len(self._untold) <= TOLD_IN_A_TURN:
            self._tell(TOLD_IN_A_TURN)
        else:
            self._is_telling = True
            asyncio.get_running_loop().call_soon(self._tell, TOLD_IN_A_TURN)

    def _tell(self, most: int) -> None:
        """Tell up to `most` of what is untold, in the order in which it happened, and come again for the rest."""
        untold, told = self._untold, 0
        self._is_telling = True  # what follows from telling one joins the others
        try:
            while untold and told < most:
                told += 1
                untold.popleft()()
        except Exception as fault:
            self._note(fault)
            raise
        finally:
            self._is_telling = bool(untold)
            if untold:
                asyncio.get_running_loop().call_soon(self._tell, TOLD_IN_A_TURN)

    def _follow(
        self, endpoint: EndpointConfig, cluster: str, before: EndpointConfig | None, level: int, *, waits: bool
    ) -> None:
        what = "comes" if before is None else "changes"
        log.log(level, "endpoint %s at %s %s, Envoy cluster %s", endpoint.name, endpoint.address, what, cluster)
        if endpoint != before:
            self._put(endpoint, waits)

    def _unfollow(self, name: str, level: int) -> None:
        log.log(level, "endpoint %s goes; what runs there may end", name)
        self._remove(name)

    def _write(self) -> None:
        """Write the clusters file if it would change. Raises OSError."""
        if self._file is None:
            return
        routes = {cluster: route.address for cluster, route in self._routes.items()}
        addresses = {route.address for route in self._routes.values() if route.until is None}
        wanted = (routes, addresses, self._config.health_check)
        if wanted == self._written:
            return
        version = self._file.write(routes, addresses, self._config)
        self._written = wanted
        for route in self._routes.values():
            if route.written is None:
                route.written = (version, self._gate.now())

    # ---- waiting for Envoy, and for leases

    async def _keep(self) -> None:
        while True:
            if not self._gone and all(route.known and route.until is None for route in self._routes.values()):
                await self._wake.wait()
            self._wake.clear()
            if not self._pieces:  # requests may be steered yet to what a change under way takes away
                self._forget()
            self._write_or_say()
            if await self._ask_envoy():
                self._reconcile()
            await asyncio.sleep(TICK_S)

    def _write_or_say(self) -> None:
        problem = None
        try:
            self._write()
        except OSError as error:
            problem = f"can't write {error.filename}: {error.strerror}"
        if problem is not None and problem != self._problem:
            log.error("envoy_clusters_file: %s; trying on, new endpoints wait", problem)
        self._problem = problem

    async def _ask_envoy(self) -> bool:
        """Mark the clusters that Envoy knows by now; tell whether any is new."""
        pending = [route for route in self._routes.values() if not route.known and route.written is not None]
        if not pending:
            return False
        version = await self._envoy.version() if self._envoy is not None else None
        patience_s = SETTLE_S if self._envoy is None else GIVE_UP_S
        learnt = False
        for route in pending:
            since = route.written
            assert since is not None  # noqa: S101 - pending ones were written
            late = self._gate.now() >= since[1] + patience_s
            if late or (version is not None and version >= since[0]):
                route.known = learnt = True
                if late and self._envoy is not None and not self._doubted:
                    self._doubted = True
                    log.warning("envoy_admin: no word in %gs that Envoy knows a new cluster; using it", GIVE_UP_S)
        return learnt

    def _forget(self) -> None:
        """Drop clusters that nobody can need any more, and kept answers."""
        now = self._gate.now()
        in_use = {spec.cluster for _, spec in self._placed.values()}
        for cluster, route in list(self._routes.items()):
            if route.until is None:
                continue
            if route.leases or cluster in in_use:
                route.leases = tuple(ticket for ticket in route.leases if ticket.state is State.LEASED)
                route.until = now + LINGER_S
            elif now >= route.until:
                del self._routes[cluster]
        for name in [name for name, at in self._gone.items() if now >= at]:
            del self._gone[name]
            if name not in self._gate.controller.endpoints:
                self._reception.drop_cluster(name)
            else:
                self._gone[name] = now + LINGER_S


def _serve(lists: set[frozenset[str]], models: frozenset[str]) -> bool:
    """Tell whether those with these lists of models serve all of `models`; none: whatever is asked for."""
    return frozenset() in lists or (bool(models) and models <= frozenset[str]().union(*lists))
