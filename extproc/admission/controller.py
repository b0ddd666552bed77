"""The admission core: the one place where a request changes its state.

Rules of this room:
* No I/O, no clock, no randomness, no logging. The driver passes `now`; the same events give the same decisions.
* Every event ends in the same dispatch pass and returns the decisions that the driver must deliver.
* Reserve at pick: the lease exists before the driver hears of the decision.
* After each event: no lease beyond a limit, and no endpoint with room for a request that may go there.

    new ──offer──▶ waiting ──dispatch──▶ leased ──release──▶ done
     │                └──cancel, refuse──▶ left
     └──offer, while there is room──▶ leased

Where several sidecars share endpoints, a lease may also come from elsewhere (adopt: new → leased) or be left to
telemetry (disown: leased → done), and who waits may be taken back to be decided elsewhere (withdraw: waiting → new).
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeVar

from extproc.admission.alarms import NEVER, Alarms
from extproc.admission.endpoint import Endpoint
from extproc.admission.estimate import TokenEstimate
from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.held import HeldBy
from extproc.admission.outcome import Outcome
from extproc.admission.pool import most_room, seniority
from extproc.admission.pools import Pools
from extproc.admission.queue import GUARD, WINDOW
from extproc.admission.sessions import Sessions
from extproc.admission.ticket import Key, State, Ticket
from extproc.admission.values import Answer, Binding, Decision, Dispatch, EndpointSpec, Policy, Reject
from extproc.errors import TransitionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.load import Load
    from extproc.admission.pool import Pool
    from extproc.admission.queue import Queue
    from extproc.admission.values import Request, RequestClass

RETRY_AFTER_MAX_S = 60
SURE = 2.0
"""Refuse at once what would wait so many times its budget: a prediction after a burst is off by as much, and what might
make it waits its budget out. Goodput at 120% load over shedding at 1.0: +0.5 to +1 points, under bursts +2 to +3."""
CACHED_AT_MOST = 7 / 8
"""Share of a prompt that is taken as cached at its session's home: the guess may be wrong."""


class Controller:
    """Queues, leases and limits of all endpoints.

    Every public method that takes `now` (seconds, monotonic) is an event and returns the decisions that follow from
    it, each for a ticket that was offered earlier or in this event.

    Attributes:
        endpoints: by name; a removed one stays until its last lease is back.
        waiting: how many requests wait.
        draining: after `drain`, nothing waits any more.
        is_shared: other sidecars may dispatch to the same endpoints: a new one stays closed until `set_quota`.
    """

    def __init__(self, policy: Policy) -> None:
        """Start without endpoints; `put_endpoint` brings them."""
        self.endpoints: dict[str, Endpoint] = {}
        self.waiting = 0
        self.draining = False
        self.is_shared = False
        self._pools = Pools()
        self._alarms: Alarms[Ticket] = Alarms(_is_waiting)
        self._changes: Alarms[Endpoint] = Alarms()  # endpoints that time alone will open: closed gates, ejections
        self._sessions = Sessions()
        self._tokens = TokenEstimate()
        self._sequence = 0
        self._picks = 0
        self._now = 0.0
        self._arrived: list[tuple[Key, int, Ticket]] = []  # a heap: tickets that may go where they could not before
        self._arrivals = 0
        self._stale_at: float | None = None  # not before this can any telemetry have become stale
        self._freed: dict[Endpoint, None] = {}  # endpoints that may have room they did not have before this event
        self._decisions: list[Decision] = []
        self._adopt(policy)

    # ---- events: requests

    def offer(self, ticket: Ticket, now: float) -> list[Decision]:
        """Take a new request in. It is dispatched or refused at once, or it waits."""
        self._expect(ticket, State.NEW, "offered")
        self._now = now
        request, policy = ticket.request, self.policy
        ticket.request_class = klass = self.class_of(request)
        pool = self._pools.find(request.model)
        if pool is None or self._pools.misses_model(request.model):
            ticket.state = State.LEFT
            outcome = Outcome.UNKNOWN_MODEL if pool is None else Outcome.MODEL_MISSING
            self._decisions.append(Reject(ticket, outcome, 0.0, None))
            return self._dispatch()
        budget_s = klass.budget_s if request.budget_s is None else min(request.budget_s, klass.budget_s)
        ticket.pool = pool
        ticket.wait_until = request.arrived + budget_s
        ticket.position = pool.ahead_of(klass.priority)
        self._tokens.estimate(ticket, pool.longest)
        self._sequence += 1
        ticket.key = (-klass.priority, self._tag(ticket, pool), self._sequence)
        pool.pace.arrived(klass.priority, now)
        ticket.home = home = self._home_of(ticket, pool)
        if home is not None and not home.available:
            home = None
        if home is not None:
            # At least half of its budget is left for any endpoint: else it would be refused while others have room.
            ticket.patience_until = now + min(policy.patience_s, (ticket.wait_until - now) / 2)
        target = self._place_for(ticket, pool, home)
        if target is not None:
            self._lease(ticket, target)
            return self._dispatch()
        self._join(ticket, pool.shared if home is None else pool.queue_of(home))
        self._pass()
        if ticket.state is State.WAITING and ticket.queue is not pool.shared and ticket.patience_until <= now:
            self._go_anywhere(ticket)  # no time to wait for its home
            self._pass()
        if ticket.state is State.WAITING:
            self._may_wait(ticket, pool)
        return self._dispatch()

    def send(self, ticket: Ticket, now: float) -> list[Decision]:
        """Let a new request that asks for no tokens go at once, to an endpoint that serves its model: it takes no slot.

        To its home if that is up, else to each in turn. No limit counts it, and its end is no event.
        """
        self._expect(ticket, State.NEW, "sent")
        self._now = now
        ticket.state = State.LEFT
        ticket.request_class = self.class_of(ticket.request)
        pool = self._pools.find(ticket.request.model)
        if pool is None:
            self._decisions.append(Reject(ticket, Outcome.UNKNOWN_MODEL, 0.0, None))
            return self._dispatch()
        target = self._home_of(ticket, pool)
        if target is None or not target.available:
            target = pool.next_in_turn(doubtful=not self.policy.enable_queue)
        if target is None:
            self._decisions.append(Reject(ticket, Outcome.NO_ENDPOINT, 0.0, 1))
        else:
            self._decisions.append(Dispatch(ticket, Outcome.PASSED, target.name, 0.0))
        return self._dispatch()

    def cancel(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a waiting request whose client left."""
        self._expect(ticket, State.WAITING, "cancelled")
        self._now = now
        self._leave(ticket)
        return self._dispatch()

    def first_token(self, ticket: Ticket, now: float) -> list[Decision]:
        """Note that an answer's first token came: the engine has computed the prompt. Late or repeated: no-op."""
        self._now = now
        if ticket.state is State.LEASED and ticket.endpoint is not None:
            ticket.endpoint.first_token(ticket, now)
            if not ticket.is_answered:
                self._served(ticket, ticket.endpoint, _placed(ticket.pool))
            self._changed(ticket.endpoint)
        return self._dispatch()

    def answered(self, ticket: Ticket, now: float) -> list[Decision]:
        """Note that an answer began well, long before it ends: a trial need not last as long as an answer."""
        self._now = now
        if ticket.state is State.LEASED and not ticket.is_answered:
            self._served(ticket, _placed(ticket.endpoint), _placed(ticket.pool))
        return self._dispatch()

    def release(self, ticket: Ticket, now: float, answer: Answer = Answer.UNKNOWN) -> list[Decision]:
        """Give a lease back: the request is over. `answer` says what is known of how.

        What the answer really cost is charged to its tenant: how long it was written, at the pace of its engine.
        """
        self._expect(ticket, State.LEASED, "released")
        self._now = now
        pool, endpoint = _placed(ticket.pool), ticket.endpoint
        assert endpoint is not None  # noqa: S101 - LEASED means that there is one
        ticket.state = State.DONE
        endpoint.release(ticket, now, served=answer is Answer.OK, wanted=pool.waiting_total > 0)
        self._judge(answer, ticket, endpoint, pool)
        if answer in (Answer.OK, Answer.UNKNOWN):
            writing_s, pace = endpoint.writing_s(ticket, now), endpoint.steps.pace
            tokens = self._tokens.tokens_of(ticket, writing_s, pace, learn=answer is Answer.OK)
            if ticket.charge is not None:
                surplus = OUTPUT_WEIGHT * (tokens - ticket.output_tokens)
                pool.share(ticket.request_class.priority).correct(ticket.request.tenant, surplus)
        if endpoint.removed and not endpoint.leases:
            del self.endpoints[endpoint.name]
        self._changed(endpoint)
        return self._dispatch()

    # ---- events: endpoints

    def put_endpoint(self, spec: EndpointSpec, now: float) -> list[Decision]:
        """Add an endpoint, change one, or bring a removed one back with the leases it still has."""
        self._now = now
        endpoint = self.endpoints.get(spec.name)
        if endpoint is None:
            endpoint = self.endpoints[spec.name] = Endpoint(spec, self.policy)
            endpoint.quota = 0 if self.is_shared else None
        elif not endpoint.removed and endpoint.spec.models == spec.models:
            endpoint.respec(spec, self.policy)
            self._changed(endpoint)
            return self._dispatch()
        else:
            endpoint.respec(spec, self.policy)
            endpoint.removed = False
        self._regroup()
        return self._dispatch()

    def know_models(self, models: Iterable[str], now: float) -> list[Decision]:
        """Note which models the configuration names: requests for them wait even while nobody serves them."""
        self._now = now
        if self._pools.know(models):
            self._regroup()
        return self._dispatch()

    def remove_endpoint(self, name: str, now: float) -> list[Decision]:
        """Send nothing more to an endpoint: its leases run out, those at home there go anywhere. Unknown: no-op."""
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            endpoint.removed = True
            if not endpoint.leases:
                del self.endpoints[name]
            self._regroup()
        return self._dispatch()

    def set_up(self, name: str, now: float, *, is_up: bool | None) -> list[Decision]:
        """Follow health checks; None: nothing is known, as of a new endpoint. Unknown endpoint: no-op."""
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None and (is_up is None or endpoint.health.is_up is not is_up):
            endpoint.health.check(is_up=is_up)
            self._changed(endpoint)
        return self._dispatch()

    def observe(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow an endpoint's telemetry. Unknown: no-op."""
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            wanted = any(pool.waiting_total for pool in endpoint.pools)
            counted = endpoint.observe(load, now, self.policy, wanted=wanted)
            if counted and load.prompt_tokens:
                self._tokens.learn_prompts(load.prompt_tokens, counted)
            if load.context_tokens:
                for pool in endpoint.pools:
                    pool.longest = max(pool.longest or 0, load.context_tokens)
            if load.output_tokens is not None:
                endpoint.produced += load.output_tokens
                if load.output_tokens:
                    endpoint.health.heard_at = now
                if endpoint.completed:
                    self._tokens.learn(endpoint.produced, endpoint.completed)
                    endpoint.produced = endpoint.completed = 0
            if self._stale_at is None:
                self._stale_at = now + self.policy.stale_after_s
            self._changed(endpoint)
        return self._dispatch()

    def report(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow what an endpoint's answer says of its load. Unknown: no-op."""
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            endpoint.merge(load, now, self.policy)
            if self._stale_at is None:
                self._stale_at = now + self.policy.stale_after_s
            self._changed(endpoint)
        return self._dispatch()

    # ---- events: everything else

    def tick(self, now: float) -> list[Decision]:
        """Let time pass: budgets, patience and ejections end. Needed at `next_deadline()`, harmless at any time."""
        self._now = now
        for ticket in self._alarms.due(now):
            if now >= ticket.wait_until:
                self._expire(ticket)
            else:
                self._go_anywhere(ticket)
                self._set_alarm(ticket)
        if self._stale_at is not None and now >= self._stale_at:
            self._forget_stale_loads()
        for endpoint in self._changes.due(now):
            endpoint.pass_time(now)
            self._changed(endpoint)
        return self._dispatch()

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, never before the last event; None: nothing is due."""
        due = self._stale_at
        for at in (self._alarms.next(), self._changes.next()):
            if at is not None and (due is None or at < due):
                due = at
        return due if due is None or due > self._now else self._now

    def set_policy(self, policy: Policy, now: float) -> list[Decision]:
        """Replace the rules. Waiting requests keep the class, the place and the budget they came with."""
        self._now = now
        reorder = (policy.fair, policy.short_first) != (self.policy.fair, self.policy.short_first)
        self._adopt(policy)
        if reorder:
            for pool in self.pools():
                self._reorder(pool)
        for endpoint in self.endpoints.values():
            endpoint.apply(policy)
            self._changed(endpoint)
        self._forget_stale_loads()
        if not policy.enable_queue:
            self._let_all_go()
        return self._dispatch()

    def drain(self, now: float) -> list[Decision]:
        """Refuse everything that waits, and from now on everything that would have to."""
        self._now = now
        self.draining = True
        for ticket in list(self.waiting_tickets()):
            self._refuse(ticket, Outcome.DRAINING)
        return self._dispatch()

    # ---- events: several sidecars that share endpoints

    def adopt(
        self, ticket: Ticket, name: str, now: float, *, held_s: float = 0.0, begun: bool = False
    ) -> list[Decision]:
        """Take over a lease that another sidecar's core gave `held_s` ago, whatever the limits say.

        `begun`: its first token was seen. An unknown endpoint: no-op, and the ticket stays new.
        """
        self._expect(ticket, State.NEW, "adopted")
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            request = ticket.request
            ticket.request_class = self.class_of(request)
            ticket.pool = self._pools.find(request.model) or self._pools.every
            self._tokens.estimate(ticket, ticket.pool.longest)
            ticket.state, ticket.endpoint = State.LEASED, endpoint
            endpoint.lease(ticket, now)
            ticket.leased_at = now - held_s
            if begun:
                endpoint.first_token(ticket, now)
            if request.session is not None:
                self._sessions.remember(request.session, endpoint, ticket.kv_tokens, self.policy.session_memory)
            self._changed(endpoint)
        return self._dispatch()

    def disown(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a lease that another sidecar holds and that we can't follow any more: it counts as foreign."""
        self._expect(ticket, State.LEASED, "disowned")
        self._now = now
        endpoint = _placed(ticket.endpoint)
        ticket.state = State.DONE
        endpoint.disown(ticket, now)
        if endpoint.removed and not endpoint.leases:
            del self.endpoints[endpoint.name]
        self._changed(endpoint)
        return self._dispatch()

    def withdraw(self, ticket: Ticket, now: float) -> list[Decision]:
        """Take a waiting request back without an outcome: another sidecar's core will decide, or this one later."""
        self._expect(ticket, State.WAITING, "withdrawn")
        self._now = now
        self._leave(ticket)
        ticket.state, ticket.passed_over, ticket.charge, ticket.alarm = State.NEW, 0, None, NEVER
        ticket.home = None
        return self._dispatch()

    def set_quota(self, name: str, quota: int | None, now: float) -> list[Decision]:
        """Hold at most `quota` leases at an endpoint, besides its limit; None: the limit alone. Unknown: no-op."""
        self._now = now
        endpoint = self.endpoints.get(name)
        if endpoint is not None and endpoint.quota != quota:
            endpoint.quota = quota
            self._changed(endpoint)
        return self._dispatch()

    # ---- what others may look at

    def class_of(self, request: Request) -> RequestClass:
        """Return a request's class: the one it names, if we have it."""
        return self._classes.get(request.request_class, self.policy.classes[0])

    def pools(self) -> Iterator[Pool]:
        """Walk all pools."""
        return iter(self._pools)

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Walk everything that waits, line by line."""
        return (ticket for pool in self.pools() for queue in pool.queues() for ticket in queue)

    def holds(self) -> dict[Endpoint, HeldBy]:
        """Return for each endpoint that would not take the next request what keeps that one from it.

        The next is the first who waits for it, by class and arrival; where nobody does, one that needs no tokens.
        """
        found: dict[Endpoint, HeldBy | None] = {}
        firsts = [
            (queue.first(), pool, home)
            for pool in self.pools()
            if pool.waiting_total
            for home, queue in ((None, pool.shared), *pool.homes.items())
            if queue
        ]
        for ticket, pool, home in sorted(firsts, key=lambda line: seniority(line[0])):
            if len(found) == len(self.endpoints):
                break
            for endpoint in pool.members if home is None else (home,):
                if endpoint not in found:
                    found[endpoint] = endpoint.held_by(ticket) or HeldBy.GUARD
        for endpoint in self.endpoints.values():
            if endpoint not in found:
                found[endpoint] = endpoint.held_by()
        return {endpoint: held for endpoint, held in found.items() if held is not None}

    def __repr__(self) -> str:
        """Show the state that tests, logs and people read."""
        return f"<Controller waiting={self.waiting} {list(self.endpoints.values())}>"

    # ---- the dispatch pass

    def _dispatch(self) -> list[Decision]:
        """End an event: run the dispatch pass and return all decisions that the event led to."""
        if self._freed or self._arrived:
            self._pass()
        decisions, self._decisions = self._decisions, []
        return decisions

    def _pass(self) -> None:
        """Hand every room that this event made to the request that should have it.

        Only what changed is looked at: endpoints that may have gained room, and tickets that may go somewhere new.
        Whatever else waits did not fit before this event, and so does not fit now.
        """
        freed, arrived = self._freed, self._arrived
        while freed or arrived:
            if not self.waiting:  # nobody waits: nobody takes room, and endpoints need not be put in order
                freed.clear()
                arrived.clear()
            elif freed:
                endpoint = min(freed, key=most_room) if len(freed) > 1 else next(iter(freed))
                best = self._best_for(endpoint) if endpoint.is_open else None
                if best is None:
                    del freed[endpoint]
                else:
                    self._lease(best, endpoint)
            else:
                ticket = heappop(arrived)[2]
                if ticket.state is State.WAITING:
                    pool = _placed(ticket.pool)
                    target = self._place_for(ticket, pool, None if ticket.queue is pool.shared else ticket.home)
                    if target is not None:
                        self._lease(ticket, target)

    def _arrive(self, ticket: Ticket) -> None:
        """Have the dispatch pass look at a ticket, in the order of keys."""
        self._arrivals += 1
        heappush(self._arrived, (ticket.key, self._arrivals, ticket))

    def _best_for(self, endpoint: Endpoint) -> Ticket | None:
        """Return who goes to `endpoint` next: between pools class decides, then arrival; inside a pool its order."""
        best = guard = None
        for pool in endpoint.pools:
            if pool.waiting_total:
                ticket, its_guard = pool.best_for(endpoint)
                if ticket is not None and (best is None or seniority(ticket) < seniority(best)):
                    best = ticket
                if its_guard is not None and (guard is None or seniority(its_guard) < seniority(guard)):
                    guard = its_guard
        if best is not None and guard is not None and seniority(guard) < seniority(best):
            return None
        return best

    def _place_for(self, ticket: Ticket, pool: Pool, home: Endpoint | None) -> Endpoint | None:
        """Return the endpoint with the most room among those that `ticket` may take now: `home` alone, or any."""
        queue = pool.shared if home is None else pool.homes.get(home)
        if self.policy.enable_queue and not (pool.open and (queue is None or queue.in_window(ticket))):
            return None
        if home is not None:
            return home if home.has_room_for(ticket) and not self._is_guarded(home) else None
        best: Endpoint | None = None
        for endpoint in pool.open:
            if (
                (best is None or endpoint.crowding < best.crowding)
                and endpoint.lacks(ticket) is None
                and not self._is_guarded(endpoint)
            ):
                best = endpoint
        if best is None and not self.policy.enable_queue:
            best = min(pool.present(), key=most_room, default=None)  # nothing is held: better a doubtful endpoint
        return best

    def _is_guarded(self, endpoint: Endpoint) -> bool:
        """Tell whether somebody keeps room at `endpoint` for himself; if so, its next request is found in order."""
        if not self.waiting or not self.policy.enable_queue:
            return False
        guarded = any(pool.has_guards_for(endpoint) for pool in endpoint.pools)
        if guarded:
            self._freed[endpoint] = None
        return guarded

    def _lease(self, ticket: Ticket, endpoint: Endpoint) -> None:
        """Dispatch: from here on the slot is taken."""
        pool, now, request = _placed(ticket.pool), self._now, ticket.request
        ticket.state = State.LEASED
        ticket.endpoint = endpoint
        if request.session is not None:
            cached = min(self._sessions.cached(request.session, endpoint), int(CACHED_AT_MOST * ticket.prompt_tokens))
            ticket.work_tokens = ticket.prompt_tokens - cached
        endpoint.lease(ticket, now)
        self._watch(endpoint)
        self._picks += 1
        endpoint.picked = self._picks
        self._list(endpoint)
        if ticket.queue is not None:
            self._quit(ticket, pool, ticket.queue)
        if self.waiting:
            for other in endpoint.pools:
                if other.waiting_total:
                    other.pass_over_before(ticket, endpoint)
        if ticket.charge is not None:
            pool.share(ticket.request_class.priority).served(request.tenant, ticket.key[1])
        if ticket.alarm or pool.waiting_total:
            pool.pace.dispatched(now)
        if request.session is not None:
            self._sessions.remember(request.session, endpoint, ticket.kv_tokens, self.policy.session_memory)
        moved = ticket.home is not None and ticket.home.name != endpoint.name  # it may have gone and come back
        outcome = Outcome.REROUTED if moved else Outcome.DISPATCHED
        wait_s = now - request.arrived
        self._decisions.append(Dispatch(ticket, outcome, endpoint.name, wait_s if wait_s > 0.0 else 0.0))

    # ---- waiting and leaving

    def _home_of(self, ticket: Ticket, pool: Pool) -> Endpoint | None:
        """Return the endpoint it prefers: the one named upstream, its session's last one, the pool's only one."""
        request = ticket.request
        home = self.endpoints.get(request.home) if request.home is not None else None
        if home is not None and pool in home.pools:
            return home
        home = self._sessions.recall(request.session) if request.session is not None else None
        if home is not None and pool in home.pools:
            return home
        if len(pool.members) == 1:
            return pool.members[0]
        if self.policy.binding is Binding.BOUND:
            up = [endpoint for endpoint in pool.members if endpoint.available]
            return min(up, key=pool.backlog_of, default=None)
        return None

    def _tag(self, ticket: Ticket, pool: Pool) -> float:
        """Return the request's place inside its class."""
        if self.policy.short_first:
            return float(ticket.prompt_tokens)
        if not self.policy.fair:
            return 0.0
        ticket.charge = ticket.prompt_tokens + OUTPUT_WEIGHT * ticket.output_tokens
        return pool.share(ticket.request_class.priority).tag(ticket.request.tenant, ticket.charge)

    def _join(self, ticket: Ticket, queue: Queue) -> None:
        ticket.state = State.WAITING
        pool = _placed(ticket.pool)
        queue.add(ticket)
        if queue.exhausted and (pool.homes or queue.has_guard_after_window()):
            self._freed.update(pool.open)  # a guard that is pushed out of the window keeps no room any more
        pool.note_waiting(ticket.request_class, 1)
        self.waiting += 1

    def _quit(self, ticket: Ticket, pool: Pool, queue: Queue) -> None:
        """Take a ticket out of its line, and note who may go somewhere now because of that."""
        was_guard = ticket.passed_over >= GUARD
        shifts = pool.open and pool.waiting_total > WINDOW and queue.in_window(ticket)
        queue.remove(ticket)
        if was_guard:
            self._freed.update(pool.open)
        elif shifts:
            entrant = queue.entrant()
            if entrant is not None:
                self._arrive(entrant)
            if pool.homes:  # an endpoint looks at its home's line and the shared one as one: others may have moved up
                self._freed.update((endpoint, None) for endpoint in pool.open if endpoint in pool.homes)
        if queue is not pool.shared and not queue and ticket.home is not None:
            del pool.homes[ticket.home]
        pool.note_waiting(ticket.request_class, -1)
        self.waiting -= 1

    def _leave(self, ticket: Ticket) -> None:
        """End a wait without a dispatch."""
        pool = _placed(ticket.pool)
        self._quit(ticket, pool, _placed(ticket.queue))
        ticket.state = State.LEFT
        self._refund(ticket, pool)

    @staticmethod
    def _refund(ticket: Ticket, pool: Pool) -> None:
        if ticket.charge is not None:
            pool.share(ticket.request_class.priority).left(ticket.request.tenant, ticket.charge)

    def _go_anywhere(self, ticket: Ticket) -> None:
        """Move a request from its home's line to the shared one; its place in the order stays."""
        pool, queue = _placed(ticket.pool), _placed(ticket.queue)
        if queue is not pool.shared:
            self._quit(ticket, pool, queue)
            self._join(ticket, pool.shared)
            self._freed.update(pool.open)

    def _may_wait(self, ticket: Ticket, pool: Pool) -> None:
        """Decide whether a request that found no room may wait for it."""
        ticket.waited_for = pool.held_by(ticket)
        if self.draining:
            self._refuse(ticket, Outcome.DRAINING)
        elif not self.policy.enable_queue:
            self._refuse(ticket, Outcome.NO_ENDPOINT)
        elif self._now >= ticket.wait_until:
            self._expire(ticket)
        elif self.policy.shed and self._is_doomed(ticket, pool):
            self._refuse(ticket, Outcome.BUDGET_PREDICTED)
        else:
            if pool.waiting_total == 1:
                pool.pace.backlog_began(self._now)
            self._set_alarm(ticket)
            if self.waiting > self.policy.max_queued_requests:
                self._refuse(self._last_of_all(), Outcome.QUEUE_FULL)

    def _set_alarm(self, ticket: Ticket) -> None:
        at = ticket.wait_until
        if ticket.queue is not _placed(ticket.pool).shared:
            at = min(at, ticket.patience_until)
        self._alarms.set(ticket, at, self.waiting)

    def _let_all_go(self) -> None:
        """Empty all lines because the queue was switched off: nothing is held any more."""
        for ticket in list(self.waiting_tickets()):
            self._go_anywhere(ticket)
            self._arrive(ticket)
        self._pass()
        for ticket in list(self.waiting_tickets()):
            self._refuse(ticket, Outcome.NO_ENDPOINT)

    # ---- refusing

    def _is_doomed(self, ticket: Ticket, pool: Pool) -> bool:
        """Predict whether `ticket` would wait longer than its budget."""
        budget_s = SURE * (ticket.wait_until - self._now)
        priority = ticket.request_class.priority
        ticket.predicted_s = wait_s = pool.pace.wait_s(ticket.position, priority, self._now)
        if wait_s is None or wait_s <= budget_s or not pool.usable:
            return False
        # `position` counts a noisy tenant's whole backlog; fairness may put this one before it. Now look closely.
        ahead = sum(queue.rank(ticket) for queue in pool.queues())
        ticket.predicted_s = exact_s = pool.pace.wait_s(ahead, priority, self._now)
        return exact_s is not None and exact_s > budget_s

    def _expire(self, ticket: Ticket) -> None:
        self._refuse(ticket, Outcome.BUDGET_EXPIRED if _placed(ticket.pool).usable else Outcome.NO_ENDPOINT)

    def _refuse(self, ticket: Ticket, outcome: Outcome) -> None:
        pool = _placed(ticket.pool)
        drain = pool.pace.drain_rate()
        ahead = pool.ahead_of(ticket.request_class.priority)
        seconds = 1 if drain is None else math.ceil(ahead / drain)
        self._leave(ticket)
        wait_s = max(self._now - ticket.request.arrived, 0.0)
        self._decisions.append(Reject(ticket, outcome, wait_s, min(max(seconds, 1), RETRY_AFTER_MAX_S)))

    def _last_of_all(self) -> Ticket:
        """Return the waiting request that goes last: of the lowest class, the one that came last."""
        lines = (queue for pool in self.pools() for queue in pool.queues() if queue)
        return max((queue.last() for queue in lines), key=seniority)

    # ---- what answers tell

    def _served(self, ticket: Ticket, endpoint: Endpoint, pool: Pool) -> None:
        """Note a good answer, once."""
        ticket.is_answered = True
        pool.record.served += 1
        was_doubted = endpoint.health.is_doubted
        endpoint.health.answered(self._now)
        if was_doubted:
            self._changed(endpoint)

    def _judge(self, answer: Answer, ticket: Ticket, endpoint: Endpoint, pool: Pool) -> None:
        """Note how an answer ended. One that began well has told what it can: whether it was cut, nobody knows."""
        if ticket.is_answered or answer is Answer.UNKNOWN:
            return
        if answer is Answer.OK:
            self._served(ticket, endpoint, pool)
            return
        is_own_fault = answer is Answer.FAILED
        if answer is Answer.SATURATED:
            endpoint.health.saturated(self._now)
            if endpoint.is_at_work(self._now):
                return
            is_own_fault = True  # full of nothing: it loads, or is broken
        has_peers = pool.usable > endpoint.counted
        endpoint.health.refused(ticket, pool.record, self._now, is_own_fault=is_own_fault, has_peers=has_peers)

    # ---- endpoints

    def _regroup(self) -> None:
        """Recompute who belongs to which pool, after endpoints came, changed or went."""
        present = [endpoint for endpoint in self.endpoints.values() if not endpoint.removed]
        unserved = [pool for pool in self._pools if not pool.members]
        before = self._pools.regroup(present)
        pools = dict.fromkeys((*before, *self._pools))
        for pool in unserved:
            if pool.members and pool.waiting_total:
                pool.pace.backlog_began(self._now)  # what nobody served says nothing of those who do
        for pool in pools:
            for home in [home for home in pool.homes if home not in pool.members]:
                self._evict(pool, home)
        for endpoint in present:
            endpoint.listed = False
            self._changed(endpoint)
        self._spare_the_last(self._pools)
        joined: dict[Pool, None] = {}
        for ticket in sorted((ticket for pool in pools for queue in pool.queues() for ticket in queue), key=_place):
            target = self._pools.find(ticket.request.model) or self._pools.any_model
            if target is not ticket.pool:
                self._resettle(ticket, target)
                joined[target] = None
        for pool in joined:
            self._reorder(pool)

    def _resettle(self, ticket: Ticket, pool: Pool) -> None:
        """Move a waiting request to the pool that it would join now."""
        before = _placed(ticket.pool)
        self._quit(ticket, before, _placed(ticket.queue))
        self._refund(ticket, before)
        ticket.pool = pool
        ticket.key = (ticket.key[0], self._tag(ticket, pool), ticket.key[2])
        self._join(ticket, pool.shared)
        if pool.waiting_total == 1:
            pool.pace.backlog_began(self._now)
        self._set_alarm(ticket)
        self._freed.update(pool.open)

    def _reorder(self, pool: Pool) -> None:
        """Give those who wait new places: the rules of order changed, or others joined, and tags can't be compared."""
        for ticket in sorted((ticket for queue in pool.queues() for ticket in queue), key=_arrival):
            queue = _placed(ticket.queue)
            queue.remove(ticket)
            self._refund(ticket, pool)
            ticket.charge = None
            ticket.key = (ticket.key[0], self._tag(ticket, pool), ticket.key[2])
            queue.add(ticket)
        self._freed.update(pool.open)

    def _forget_stale_loads(self) -> None:
        ages: list[float] = []
        for endpoint in self.endpoints.values():
            if endpoint.forget_stale(self._now, self.policy):
                self._changed(endpoint)
            ages += endpoint.reading.told_at
        self._stale_at = min(ages) + self.policy.stale_after_s if ages else None

    def _changed(self, endpoint: Endpoint) -> None:
        """Follow whatever changed an endpoint's room."""
        is_usable = endpoint.available
        if is_usable is not endpoint.counted:
            endpoint.counted = is_usable
            for pool in endpoint.pools:
                pool.usable += 1 if is_usable else -1
            if not is_usable:
                self._spare_the_last(endpoint.pools)
        self._list(endpoint)
        self._watch(endpoint)
        if endpoint.listed:
            self._freed[endpoint] = None
        elif not is_usable:
            for pool in endpoint.pools:
                self._evict(pool, endpoint)

    def _spare_the_last(self, pools: Iterable[Pool]) -> None:
        """End the ejections in pools that nobody is left to serve: they were made because others did."""
        for pool in pools:
            if not pool.usable:
                for endpoint in pool.members:
                    if endpoint.health.ejected_until is not None:
                        endpoint.health.take_back(self._now)
                        self._changed(endpoint)

    def _watch(self, endpoint: Endpoint) -> None:
        """Follow when time alone will change an endpoint's room."""
        at = endpoint.next_change()
        if at is None:
            endpoint.alarm = NEVER
        else:
            self._changes.set(endpoint, at, len(self.endpoints))

    def _evict(self, pool: Pool, home: Endpoint) -> None:
        """Let those at home at an endpoint that is gone go anywhere."""
        queue = pool.homes.get(home)
        for ticket in list(queue or ()):
            self._go_anywhere(ticket)
            self._set_alarm(ticket)

    def _list(self, endpoint: Endpoint) -> None:
        """Keep each pool's list of open endpoints true, and who has the most room."""
        endpoint.crowding = (endpoint.pressure, endpoint.picked)
        endpoint.listed = is_open = endpoint.is_open
        for pool in endpoint.pools:
            kept = pool.list_open(endpoint, is_open=is_open)
            if kept is not None:
                self._freed[kept] = None

    def _adopt(self, policy: Policy) -> None:
        self.policy = policy
        self._classes = {klass.name: klass for klass in policy.classes}

    @staticmethod
    def _expect(ticket: Ticket, state: State, event: str) -> None:
        if ticket.state is not state:
            raise TransitionError(
                f"{ticket!r} can't be {event}: it is {ticket.state.name.lower()}, not {state.name.lower()}"
            )


T = TypeVar("T")


def _placed(part: T | None) -> T:
    """Return what a WAITING or LEASED ticket always has: its pool, and its queue while it waits."""
    assert part is not None  # noqa: S101 - the controller's own invariant
    return part


def _is_waiting(ticket: Ticket) -> bool:
    return ticket.state is State.WAITING


def _arrival(ticket: Ticket) -> int:
    return ticket.key[2]


def _place(ticket: Ticket) -> tuple[int, float, int]:
    return ticket.key
