"""What an answer tells: whether its endpoint works, and what the request really cost its tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.lanes import correct
from extproc.admission.missing import Tallies
from extproc.admission.values import TELLS_NOTHING, Answer, Binding

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.estimate import TokenEstimate
    from extproc.admission.fleet import Fleet
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket


_OK: Final = Answer.OK
_UNKNOWN: Final = Answer.UNKNOWN
_UNASKED: Final = Answer.UNASKED
_BOUND: Final = Binding.BOUND
_CERTAIN: Final = (Answer.NO_CLUSTER, Answer.NO_ADDRESS)
"""Envoy's own word that no request gets there."""
_OWN_FAULTS: Final = (Answer.FAILED, Answer.DROPPED, *_CERTAIN)
"""The request can't be to blame."""
_FULL: Final = (Answer.SATURATED, Answer.BREAKER)


class Answers:
    """Judges answers, each once."""

    __slots__ = ("_books", "_fleet", "_tallies", "_tokens")

    def __init__(self, books: Books, fleet: Fleet, tokens: TokenEstimate) -> None:
        """Tell `fleet` whose answers are good or bad, and `tokens` how long they were."""
        self._books = books
        self._fleet = fleet
        self._tokens = tokens
        self._tallies: Tallies | None = None  # as long as nobody refuses, nothing is counted

    def began(self, ticket: Ticket) -> None:
        """Note a good answer, long before it ends: a trial need not last as long."""
        endpoint, pool = ticket.endpoint, ticket.pool
        if not ticket.is_answered and endpoint is not None and pool is not None:
            self._served(ticket, endpoint, _company(pool, endpoint))

    def ended(self, ticket: Ticket, endpoint: Endpoint, pool: Pool, answer: Answer) -> None:
        """Judge a whole answer, and charge what it cost beyond its estimate: how long it was written, at what pace."""
        writing_s = endpoint.writing_s(ticket, self._books.now)
        if answer is _UNKNOWN and not ticket.is_answered and writing_s < endpoint.strangers.law.arrived_s:
            answer = _UNASKED  # a client that left at once: there was no time for any of the answer
        is_whole = answer is _OK or answer is _UNKNOWN  # as far as one can tell
        if is_whole or ticket.is_answered:
            endpoint.completed += ticket.sequences  # a connection that failed at once had no answer
            if not endpoint.counters.doubted:
                endpoint.expected += ticket.output_tokens
        if not ticket.is_answered and answer not in TELLS_NOTHING:
            self._judge(answer, ticket, endpoint, _company(pool, endpoint))
        if is_whole or answer is _UNASKED:
            tokens = 0.0
            if answer is not _UNASKED:
                tokens = self._tokens.tokens_of(ticket, writing_s, endpoint.steps.pace, learn=answer is _OK)
            surplus = OUTPUT_WEIGHT * (tokens - ticket.output_tokens)
            if pool is not pool.base:
                correct(pool, ticket, surplus)
            if ticket.flow is not None:
                cost = surplus if ticket.account is None else surplus / ticket.account.rule.weight
                ticket.flow.finish += cost
                if ticket.turns is not None:
                    ticket.turns.correct(ticket.tenant, cost)

    def _served(self, ticket: Ticket, endpoint: Endpoint, pool: Pool) -> None:
        ticket.is_answered = True
        is_led = ticket.home is not None and self._is_led(ticket, endpoint)
        pool.tally.served += 1
        if is_led:
            pool.tally.led += 1
        if self._tallies is not None:
            self._tallies.served(ticket.request.model, is_led=is_led)
            endpoint.missing.served(ticket.request.model)
        if endpoint.health.answered(self._books.now):
            self._fleet.changed(endpoint)

    def _judge(self, answer: Answer, ticket: Ticket, endpoint: Endpoint, pool: Pool) -> None:
        """Note how an answer ended. One that began well has told what it can before: if it was cut, nobody knows."""
        if answer is _OK:
            self._served(ticket, endpoint, pool)
            return
        now, has_peers = self._books.now, _has_peers(pool, endpoint)
        has_died = answer is Answer.BROKE_OFF and not has_peers and not endpoint.is_heard(now)  # as far as one can tell
        is_own_fault = has_died or answer in _OWN_FAULTS
        if answer is Answer.BREAKER and endpoint.sequences:
            endpoint.health.met_breaker(now, endpoint.sequences)
            return
        if answer in _FULL:
            endpoint.health.saturated(now)
            if endpoint.is_at_work(now):
                return
            is_own_fault = True  # full of nothing: it loads, or is broken
        model = ticket.request.model
        if answer is Answer.TIMEOUT and not has_peers:
            return  # a long answer or a server that hangs: with nobody to compare it with, nobody can tell
        if not is_own_fault and has_peers and self._is_led(ticket, endpoint):
            self._tallies = self._tallies or Tallies()
            if endpoint.missing.refused_led(model):
                self._fleet.lead_nobody(endpoint)
            return
        health = endpoint.health
        health.refused_by = answer
        is_certain = answer in _CERTAIN and _is_only_one(endpoint, pool)
        health.refused(ticket, pool.tally, now, is_own_fault=is_own_fault, has_peers=has_peers, is_certain=is_certain)
        if is_own_fault or answer is Answer.TIMEOUT or model is None or not has_peers:
            return
        self._tallies = self._tallies or Tallies()
        tally = self._tallies.of(model)
        if endpoint.missing.refused(model, tally, now, endpoint.health.in_a_row):
            self._fleet.regroup()

    def _is_led(self, ticket: Ticket, endpoint: Endpoint) -> bool:
        """Tell whether its client had it go there, by a name or its session: this may be why it was refused."""
        pool = ticket.pool
        if ticket.home is not endpoint or pool is None or self._books.policy.binding is _BOUND:
            return False
        return len(pool.members) > 1  # else it is the home of all


def _has_peers(pool: Pool, endpoint: Endpoint) -> bool:
    """Tell whether others may be sent requests, and not all of them fail: else nobody is better than it is."""
    if pool.usable <= endpoint.counted:
        return False
    return any(one.counted and not one.health.is_failing for one in pool.members if one is not endpoint)


def _is_only_one(endpoint: Endpoint, pool: Pool) -> bool:
    """Tell whether Envoy says of no other that requests don't get there.

    It may lack all: one Envoy of several whose file is old, or its name service is away. Closed one by one all but the
    last would be lost to the others, and to all when that is over. So peers must serve meanwhile.
    """
    return not any(one.health.refused_by in _CERTAIN for one in pool.members if one is not endpoint)


def _company(pool: Pool, endpoint: Endpoint) -> Pool:
    """Return those whom an endpoint is judged against: who serves a request's model, not a gateway's few."""
    return pool if pool.base.names else endpoint.peers() or pool
