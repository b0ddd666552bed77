"""What the sidecar's queues look like now, as plain values: /queues, and the view that the live page and `top` show.

Ten thousand requests may wait and two hundred endpoints exist: lists are capped, counts are of all, and what must look
at every waiting request gives way to the event loop every few hundred.
"""

from __future__ import annotations

from collections import Counter
from heapq import nsmallest
from itertools import chain, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from extproc import __version__
from extproc.admin import walks
from extproc.admin.history import STEP_S, History, outcome_totals, waiting_by_class
from extproc.admin.tenants import MOST, busiest
from extproc.admission.health import EJECTED
from extproc.admission.held import HeldBy
from extproc.admission.outcome import Outcome
from extproc.admission.refusals import words_of
from extproc.admission.ticket import State
from extproc.observe.endpoints import known_signals, oldest_lease_s
from extproc.observe.metrics import SHARED
from extproc.observe.paces import SEVERAL, SILENT_S, Paces
from extproc.observe.served import Served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Answer, Request
    from extproc.observe.capacity import Capacity
    from extproc.observe.metrics import Metrics
    from extproc.observe.stories import Stories
    from extproc.stream.gate import Gate
    from extproc.turns import Turns

Values = dict[str, Any]

WAITING_LISTED = 200
"""Waiting requests listed by /queues unless it is asked for another number."""
MOST_WAITING = 500
"""The most it lists: each hundred takes the event loop half a millisecond (`make bench-turns`)."""
MOST_BARS = 120
"""Waiting requests of a class that the view tells apart."""
ROWS = 40
"""Waiting requests that the view lists by name."""
ENDPOINTS_TURN = 50
"""Endpoints described in one turn."""
ROWS_TURN = 100
"""Waiting requests described in one turn."""
MOST_CHARACTERS = 96
"""Of a text that a client sent; a header may be 60 KiB long."""
MOST_MODELS = 8
"""Models listed of an endpoint in the view."""
REFUSING = ("ejected", "failing", "on trial")
"""States that an endpoint's refusals brought it to."""
FEW_FAILED = 2
"""Requests that an endpoint failed in two minutes from which it is told: one alone may be a connection's blink."""
MOST_NAMED = 2
"""Endpoints that are named where a request may go to some alone."""

WORDS = {
    Outcome.DISPATCHED: "Sent",
    Outcome.REROUTED: "Sent to another endpoint",
    Outcome.QUEUE_FULL: "Refused: queue full",
    Outcome.BUDGET_PREDICTED: "Refused: would wait too long",
    Outcome.BUDGET_EXPIRED: "Refused: waited too long",
    Outcome.TENANT_LIMIT: "Refused: tenant at its limit",
    Outcome.NO_ENDPOINT: "Refused: no endpoint up",
    Outcome.NONE_ALLOWED: "Refused: no allowed endpoint up",
    Outcome.PASSED: "Sent on without a slot",
    Outcome.MODEL_MISSING: "Refused: no model named",
    Outcome.UNKNOWN_MODEL: "Refused: unknown model",
    Outcome.ENDLESS: "Refused: gateway tells no ends",
    Outcome.DRAINING: "Refused: shutting down",
    Outcome.CANCELLED: "Given up by client or Envoy",
}
"""Outcomes for people who have not read the documents."""


class FileState(NamedTuple):
    """How the configuration file differs from what is in use."""

    refused: bool = False
    """It has mistakes since its last change."""
    restart_needed: tuple[str, ...] = ()
    """Keys with values there that only a restart brings into use."""


class Others(Protocol):
    """The sidecars that share our endpoints."""

    def described(self) -> Values:
        """Return who we are among them."""

    async def whole(self, what: str, limit: int) -> Values:
        """Return what the one shows (`what`: queues, view) that decides for us, too; empty: that is we, or unknown."""

    def whose(self, ticket: Ticket) -> str | None:
        """Return which of them holds a request; None: we do."""

    def bad_answers(self) -> Mapping[str, Mapping[Answer, int]]:
        """Return how many requests of theirs each endpoint gave no good answer while we decided, by kind."""


OF_ALL = (
    *("endpoints", "waiting_total", "waiting_by_class", "waiting", "running", "scanned_all"),
    *("classes", "capacity", "pools", "pools_down"),
)
"""What whoever decides knows for all sidecars; the rest is each one's own, but of tenants what they have in flight."""


def merged(own: Values, whole: Values, refused: Mapping[str, int]) -> Values:
    """Return what one sidecar shows, with what the one told that decides for it, too; `whole` may be empty.

    `refused`: how many of its own clients' requests were refused of each tenant, which nobody else knows.
    """
    told = {key: whole[key] for key in OF_ALL if key in own and key in whole}
    if "tenants" in own and "tenants" in whole:
        rows = {row["tenant"]: row | {"refused": refused.get(row["tenant"], 0)} for row in whole["tenants"]}
        rows = {row["tenant"]: row for row in own["tenants"]} | rows
        told["tenants"] = sorted(rows.values(), key=lambda row: -(row["in_flight"] + row["refused"]))[:MOST]
    leader = whole.get("replicas")
    if own["replicas"] is not None and isinstance(leader, dict):
        told["replicas"] = own["replicas"] | {key: leader.get(key, []) for key in ("followers", "missing")}
    return own | told


class Viewer:
    """Describes one sidecar."""

    def __init__(
        self,
        gate: Gate,
        metrics: Metrics,
        file_state: Callable[[], FileState] = FileState,
        others: Others | None = None,
        capacity: Capacity | None = None,
        stories: Stories | None = None,
        paces: Paces | None = None,
        served: Served | None = None,
        *,
        turns: Turns,
    ) -> None:
        """Describe what `gate` drives, `metrics` counted, `file_state` tells of the configuration file, `others` of
        other sidecars, `capacity` of the engines that the traffic needs, `paces` of those that are slow, `served` of
        models without any, and `stories` of what was decided last; some in each of the `turns` that we are given."""
        self._stories = stories
        self._turns = turns
        self._paces = paces if paces is not None else Paces(gate.controller)
        self._served = served if served is not None else Served(gate.controller)
        self._capacity = capacity
        self._others = others
        self._gate = gate
        self._file_state = file_state
        self._metrics = metrics
        self.history = History(gate.controller, metrics, dict if others is None else others.bad_answers)
        self.sample()  # counts from the first second are news
        self._began = gate.now()

    def sample(self) -> None:
        """Note a moment for the history."""
        for _ in self.samples():
            pass

    def samples(self) -> Iterator[None]:
        """Do so in pieces, some turns of the loop apart; to be taken each STEP_S."""
        self.history.sample(self._gate.now())
        yield
        if self._capacity is not None:
            for _ in self._capacity.samples(self._gate.now()):
                yield
        self._paces.sample(self._gate.now())

    async def queues(self, *, ready: bool, limit: int = WAITING_LISTED) -> Values:
        """Return the state with the first `limit` waiting requests, and the `limit` that have run longest.

        Its parts may be some ms apart.
        """
        await self._turns.take()
        controller, now = self._gate.controller, self._gate.now()
        mode = self._mode(ready=ready)
        counted = {
            "waiting_total": controller.waiting,
            "waiting_by_class": waiting_by_class(controller),
            "outcomes": outcome_totals(self._metrics),
        }
        waiting: list[Values] = []
        first = list(islice(controller.waiting_tickets(), limit))
        for start in range(0, len(first), ROWS_TURN):
            await self._turns.take()
            some = [ticket for ticket in first[start : start + ROWS_TURN] if ticket.state is State.WAITING]
            waiting += self._rows(some, now)
        running = await self._running(limit, now)
        tenants = await self._tenants(await _by_tenant(walks.waiting(controller, self._turns)))
        rest = {"waiting": waiting, "running": running, "tenants": tenants}
        return {**mode, "endpoints": await self._endpoints(now), **self._pools(), **rest, **counted}

    async def _running(self, limit: int, now: float) -> list[Values]:
        """Describe the `limit` oldest leases: one moved or adopted is the last of its endpoint, and may be old."""
        oldest: list[Ticket] = []
        async for some in walks.leases(self._gate.controller, self._turns):
            oldest = nsmallest(limit, chain(oldest, some), key=attrgetter("leased_at"))
        return [_running_row(ticket, now) for ticket in oldest if ticket.state is State.LEASED]

    def refused(self) -> dict[str, int]:
        """Count the requests of our own clients that were refused lately, by the tenant as pages name it."""
        return {_short(tenant): count for tenant, count in self._refused().items()}

    def _refused(self) -> Counter[str]:
        return Counter() if self._stories is None else self._stories.refused_by_tenant()

    async def _tenants(self, waiting: Counter[str]) -> list[Values]:
        controller = self._gate.controller
        running = await _by_tenant(walks.leases(controller, self._turns))
        await self._turns.take()
        rows = busiest(controller.policy.tenants, waiting, running, self._refused())
        return [row | {"tenant": _short(row["tenant"])} for row in rows]

    async def view(self, *, ready: bool) -> Values:
        """Return what the page and `top` show. Its parts may be some milliseconds apart."""
        controller = self._gate.controller
        by_class, by_tenant, scanned = await self._oldest()
        now, counts = self._gate.now(), waiting_by_class(controller)
        everyone = [ticket for waiting in by_class.values() for ticket in waiting[:ROWS]]
        oldest = self._rows(sorted(everyone, key=_arrival)[:ROWS], now)
        endpoints = await self._endpoints(now, MOST_MODELS)
        classes = await self._classes(by_class, counts, now)
        rates = self.history.rates(now)
        totals = outcome_totals(self._metrics)
        return {
            **self._mode(ready=ready),
            "version": __version__,
            "up_s": round(now - self._began),
            "quiet_s": self.history.quiet_s(now),
            "patience_s": controller.policy.patience_s,
            "step_s": STEP_S,
            "endpoints": endpoints,
            "waiting_total": sum(counts.values()),
            "scanned_all": scanned < walks.MOST_SCANNED,
            "classes": classes,
            "waiting": oldest,
            "outcomes": [
                {
                    "outcome": outcome.value,
                    "words": words,
                    "status": outcome.status,
                    "total": totals.get(outcome.value, 0),
                    "per_s": round(rates.get(outcome.value, 0.0), 2),
                }
                for outcome, words in WORDS.items()
            ],
            "rehearsed": _rehearsed(self._metrics),
            "limits": {held.value: held.words for held in HeldBy},
            "capacity": self._full(),
            **self._pools(),
            "tenants": await self._tenants(by_tenant),
        }

    def _full(self) -> list[Values]:
        answers = {} if self._capacity is None else self._capacity.answers()
        return [{"pool": pool, "load": answer.load, "words": answer.words} for pool, answer in answers.items()]

    def _pools(self) -> Values:
        """Tell how many pools there are, by who serves which models, and which of them nobody serves now."""
        groups = self._served.groups()
        down = [group for group in groups if not group.is_served][:MOST_MODELS]
        rows = [
            {"pool": _short(one.name), "endpoints": len(one.members), "waiting": self._served.waiting(one)}
            for one in down
        ]
        return {"pools": len(groups), "pools_down": rows}

    async def _oldest(self) -> tuple[dict[str, list[Ticket]], Counter[str], int]:
        """Walk those who wait, some in a turn: return the oldest of each class, MOST_BARS at most, how many each tenant
        has, and how many were looked at."""
        controller, by_tenant = self._gate.controller, Counter[str]()
        by_class: dict[str, list[Ticket]] = {name: [] for name in waiting_by_class(controller)}
        async for some in walks.waiting(controller, self._turns):
            by_tenant.update(ticket.request.tenant for ticket in some)
            for ticket in some:
                by_class.setdefault(ticket.request_class.name, []).append(ticket)
            for waiting in by_class.values():
                waiting.sort(key=_arrival)
                del waiting[MOST_BARS:]
        await self._turns.take()
        oldest = {
            name: [ticket for ticket in waiting if ticket.state is State.WAITING] for name, waiting in by_class.items()
        }
        return oldest, by_tenant, by_tenant.total()

    def _rows(self, tickets: Iterable[Ticket], now: float) -> list[Values]:
        present = sum(not endpoint.removed for endpoint in self._gate.controller.endpoints.values())
        return [self._row(ticket, now, present) for ticket in tickets]

    def _row(self, ticket: Ticket, now: float, present: int) -> Values:
        sidecar = None if self._others is None else self._others.whose(ticket)
        return _row(ticket, now, present) | ({} if sidecar is None else {"sidecar": sidecar})

    def _mode(self, *, ready: bool) -> Values:
        controller, file = self._gate.controller, self._file_state()
        return {
            "enable_queue": controller.policy.enable_queue,
            "dry_run": self._metrics.rehearsed is not None,
            "draining": controller.draining or not ready,
            "config_refused": file.refused,
            "restart_needed": list(file.restart_needed),
            "replicas": None if self._others is None else self._others.described(),
        }

    async def _classes(
        self, by_class: Mapping[str, list[Ticket]], counts: Mapping[str, int], now: float
    ) -> list[Values]:
        known = {klass.name: klass for klass in self._gate.controller.policy.classes}
        curves = self.history.curves(by_class)
        classes = []
        for name, waiting in by_class.items():
            klass = known.get(name) or (waiting[0].request_class if waiting else None)
            if klass is None:  # a former class, and those who waited in it have just left
                continue
            await self._turns.take()  # thousands of waits are sorted
            p50_s, p95_s = self.history.percentiles(name, now)
            classes.append(
                {
                    "name": name,
                    "priority": klass.priority,
                    "budget_s": klass.budget_s,
                    "waiting": counts.get(name, 0),
                    "oldest_s": round(now - waiting[0].request.arrived, 2) if waiting else None,
                    "p50_s": p50_s,
                    "p95_s": p95_s,
                    # The sequence number tells a bar from its neighbours; the share of the budget is its height.
                    "bars": [[ticket.key[2], _budget_used(ticket, now)] for ticket in waiting],
                    "history": curves[name],
                }
            )
        return sorted(classes, key=lambda one: -int(one["priority"]))

    async def _endpoints(self, now: float, most_models: int | None = None) -> list[Values]:
        """Describe all endpoints as they are, some at a time."""
        controller = self._gate.controller
        await self._turns.take()
        preferring, holds, rows = _preferring(controller), controller.holds(), []
        await self._turns.take()
        slow = {name: ratio for name, ratio in self._paces.slowness().items() if ratio >= SEVERAL}
        silent, failures = self._paces.silent(), self.history.failures(now)
        for number, endpoint in enumerate(list(controller.endpoints.values())):
            if number % ENDPOINTS_TURN == 0:
                await self._turns.take()
            row = self._endpoint(endpoint, preferring, holds, now, most_models)
            if endpoint.name in slow:
                row["times_slower"] = round(slow[endpoint.name], 1)
            if silent.get(endpoint.name, 0.0) >= SILENT_S:
                row["no_token_for_s"] = round(silent[endpoint.name], 1)
            if sum(failures.get(endpoint.name, {}).values()) >= FEW_FAILED:
                row["failed_lately"] = failures[endpoint.name]
            rows.append(row)
        return rows

    def _endpoint(
        self,
        endpoint: Endpoint,
        preferring: Mapping[str, int],
        holds: Mapping[Endpoint, HeldBy],
        now: float,
        most_models: int | None,
    ) -> Values:
        models = sorted(endpoint.spec.models)
        age_s = self._metrics.age_s(endpoint.name)
        held = holds.get(endpoint)
        row: Values = {
            "name": endpoint.name,
            "cluster": endpoint.spec.cluster,
            "models": models[:most_models],
            "up": endpoint.available and endpoint.health.is_known and not endpoint.health.is_failing,
            "state": _state(endpoint),
            "in_flight": len(endpoint.leases),
            "foreign": endpoint.strangers.takes,
            "limit": endpoint.limit.value,
            "limit_by": endpoint.limit.why,
            "adaptive": endpoint.spec.max_running_requests is None,
            "held_back": endpoint.closed_until is not None or endpoint.health.held_back_by is not None,
            "held_by": None if held is None else held.value,
            "kv_tokens": _kv_tokens(endpoint),
            "kv_capacity_tokens": endpoint.kv.capacity,
            "waiting": preferring.get(endpoint.name, 0),
            "dispatched": endpoint.dispatched,
            "counters_doubted": endpoint.counters.doubted,
            "servers": endpoint.servers.count,
            "load": known_signals(endpoint.known),
        }
        if endpoint.sequences != len(endpoint.leases):  # what the limit counts: n, best_of and lists take several
            row["sequences"] = endpoint.sequences
        oldest_s = oldest_lease_s(endpoint, now)
        if oldest_s is not None:
            row["oldest_s"] = round(oldest_s, 1)
        if len(models) > len(row["models"]):
            row["more_models"] = len(models) - len(row["models"])
        if endpoint.missing.models:
            row["left_out_for"] = sorted(endpoint.missing.models)[:MOST_MODELS]
        row |= _refusal(endpoint, row["state"])
        if endpoint.health.ejected_until is not None:
            row["ejected_for_s"] = round(max(endpoint.health.ejected_until - now, 0.0), 1)
        if endpoint.limit_since is not None:
            row["limit_by_for_s"] = round(max(now - endpoint.limit_since, 0.0), 1)
        if held is not None and endpoint.held_since is not None:
            row["held_for_s"] = round(max(now - endpoint.held_since, 0.0), 1)
        if age_s is not None:
            row["telemetry_age_s"] = round(age_s, 3)
        silence = self._metrics.silence(endpoint.name)
        if silence is not None:  # what `load` says is of before
            row["telemetry_silent"] = silence
        return row


def _refusal(endpoint: Endpoint, state: str) -> Values:
    """What brought an endpoint to its `state`, if its refusals did: the latest, and what would be right."""
    refused_by = endpoint.health.refused_by
    if refused_by is None or state not in REFUSING:
        return {}
    return {"refusal": {"answer": refused_by.value, "what": words_of(refused_by, endpoint.spec)}}


def _kv_tokens(endpoint: Endpoint) -> int:
    if endpoint.keeps_tokens:
        return int(endpoint.kv.tokens)
    return sum(ticket.kv_tokens for ticket in endpoint.leases)


def _state(endpoint: Endpoint) -> str:
    """Whether it may be used, in a word or two."""
    if endpoint.removed:
        return "removed"
    return "ejected" if endpoint.health.condition == EJECTED else endpoint.health.condition


def _preferring(controller: Controller) -> dict[str, int]:
    """Count the requests that wait for one endpoint, their home, by its name."""
    counts: dict[str, int] = {}
    for pool in controller.pools():
        for home, queue in pool.homes.items():
            counts[home.name] = counts.get(home.name, 0) + len(queue)
    return counts


def _rehearsed(metrics: Metrics) -> dict[str, int]:
    """Count what a dry run would have done, by outcome; empty without one."""
    counts: dict[str, int] = {}
    for (what, _), count in (metrics.rehearsed or {}).items():
        counts[what] = counts.get(what, 0) + count
    return counts


def _row(ticket: Ticket, now: float, present: int) -> Values:
    pool = ticket.pool
    shared = pool is None or ticket.queue is pool.shared
    request = ticket.request
    members = [] if pool is None else pool.members
    queue = SHARED if shared or ticket.home is None else ticket.home.name
    return {
        "id": _short(request.id),
        "model": None if request.model is None else _short(request.model),
        "class": ticket.request_class.name,
        "tenant": _short(request.tenant),
        "age_s": round(now - request.arrived, 3),
        "budget_left_s": round(ticket.wait_until - now, 3),
        "home": ticket.home.name if ticket.home is not None else None,
        "queue": queue,
        "may_go_to": _may_go_to(request, queue, members, present),
        "position": ticket.position,
        "held_by": None if pool is None else pool.held_by(ticket).value,
    }


def _running_row(ticket: Ticket, now: float) -> Values:
    model = ticket.request.model
    return {
        "id": _short(ticket.request.id),
        "model": None if model is None else _short(model),
        "class": ticket.request_class.name,
        "tenant": _short(ticket.request.tenant),
        "endpoint": "" if ticket.endpoint is None else ticket.endpoint.name,
        "for_s": round(now - ticket.leased_at, 3),
        "answered": ticket.is_answered,
    }


def _may_go_to(request: Request, queue: str, members: Sequence[Endpoint], present: int) -> str:
    """Tell where a request may go, in words: others may be idle, and lack its model.

    What tells most comes first, since a narrow screen cuts the rest. What it costs does not grow with the endpoints.
    """
    names = [] if len(members) > MOST_NAMED else [endpoint.name for endpoint in members]
    later = "any"
    if len(members) != present:
        model = "" if request.model is None else f" with {_short(request.model)}"
        allowed = "" if request.allowed is None else " that its gateway allows"
        later = f"{len(members) or 'none'} of {present}{model}{allowed}" + (f": {', '.join(names)}" if names else "")
    return later if queue == SHARED or names == [queue] else f"first {queue}, later {later}"


async def _by_tenant(walk: AsyncIterator[list[Ticket]]) -> Counter[str]:
    found = Counter[str]()
    async for some in walk:
        found.update(ticket.request.tenant for ticket in some)
    return found


def _arrival(ticket: Ticket) -> float:
    return ticket.request.arrived


def _budget_used(ticket: Ticket, now: float) -> float:
    budget_s = ticket.wait_until - ticket.request.arrived
    return round(min((now - ticket.request.arrived) / budget_s, 1.0), 2) if budget_s > 0 else 1.0


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
