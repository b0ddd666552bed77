"""What happened to a request, event by event, in words: of those who wait, and of the last that were decided.

Nothing is written down meanwhile: a ticket knows its times and reasons, and the words are made when somebody asks.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from extproc.admission.outcome import Outcome
from extproc.admission.refusals import words_of
from extproc.admission.ticket import State
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Reject
from extproc.observe.log import CAME_LATE, came_late

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extproc.admission.controller import Controller
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision

MOST = 2_000
"""Requests that are remembered; about a kilobyte each."""
MESSAGE_TIMEOUT_S = 0.2
"""Envoy's default for ext_proc's message_timeout."""
LATE_S = 0.03
"""How much later than a timeout we may hear of it."""
_ANSWERS = {
    Answer.OK: "its answer came whole",
    Answer.UNASKED: "a filter or a route of Envoy's answered in its place",
    Answer.UNKNOWN: "its client, or Envoy, ended it, or nobody saw how it ended",
}
"""What else became of it is told as the log tells it."""


_HANGS = (
    ". What a dead server runs ends at once: so this one hangs, or can't be reached. Kill its process, and the clients "
    "of all that it runs get their error; else they wait on, as long as Envoy's stream_idle_timeout"
)


class _Refused(NamedTuple):
    """One that was sent nowhere: refused, or its client left while it waited (no decision), and when."""

    ticket: Ticket
    decision: Reject | None
    at: float


class Stories:
    """Remembers requests. An observer of the gate."""

    def __init__(self, core: Controller, clock: Callable[[], float]) -> None:
        """Tell of the requests of `core`; `clock` returns the core's time, in seconds."""
        self._core = core
        self._clock = clock
        self._kept: deque[Dispatch | _Refused] = deque(maxlen=MOST)  # in a line: nothing is looked up for a request

    def decided(self, decision: Decision) -> None:
        """Remember a request that was dispatched or refused."""
        if isinstance(decision, Dispatch):
            self._kept.append(decision)
        else:
            self._kept.append(_Refused(decision.ticket, decision, self._clock()))

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Remember a request whose client left while it waited."""
        del wait_s
        self._kept.append(_Refused(ticket, None, self._clock()))

    def refused_by_tenant(self) -> Counter[str]:
        """Count the refusals among the last MOST that were decided, by the tenant that each names."""
        refused = (one for one in self._kept if isinstance(one, _Refused) and one.decision is not None)
        return Counter(one.ticket.request.tenant for one in refused)

    def tell(self, request_id: str, wall_s: float) -> list[str] | None:
        """Return the story of the last request of this id, a line for each event; None: it is not known.

        `wall_s`: the time of day now, in seconds since 1970. It looks at everybody who waits: for people, not often.
        """
        found = next((one for one in self._core.waiting_tickets() if one.request.id == request_id), None)
        now = self._clock()
        if found is not None:
            return list(_lines([*_waiting(found), (now, _why_still(found))], found, wall_s - now))
        kept = next((one for one in reversed(self._kept) if one.ticket.request.id == request_id), None)
        if kept is None:
            return None
        ticket = kept.ticket
        events = _waiting(ticket) if _has_waited(ticket) else []
        if isinstance(kept, Dispatch):
            events.append((ticket.request.arrived + kept.wait_s, _dispatched(ticket, kept)))
        else:
            events.append((kept.at, _refused(ticket, kept.decision, kept.at - ticket.request.arrived)))
        events += _afterwards(ticket)
        return list(_lines(events, ticket, wall_s - now))


def _lines(events: list[tuple[float, str]], ticket: Ticket, offset_s: float) -> Iterator[str]:
    arrived = ticket.request.arrived
    for at, text in [(arrived, _arrival(ticket)), *events]:
        time = datetime.fromtimestamp(at + offset_s, UTC)
        yield f"{time:%H:%M:%S}.{time.microsecond // 1000:03}  {at - arrived:+9.3f} s  {text}"


def _arrival(ticket: Ticket) -> str:
    request = ticket.request
    said = [f"class {ticket.request_class.name}"]
    if ticket.request_class.name != request.request_class and request.request_class:
        said.append(f"(it named {request.request_class!r}, which the configuration lacks)")
    said += [f"{what} {value!r}" for what, value in (("model", request.model), ("tenant", request.tenant)) if value]
    said += ["of a session"] if request.session else []  # whose id may be a secret
    if ticket.pool is not None:
        budget_s = ticket.wait_until - request.arrived
        said.append(f"it may wait {budget_s:.1f} s")
        said.append(f"taken for {ticket.prompt_tokens} tokens of prompt and {ticket.output_tokens} of answer")
    return "arrived: " + ", ".join(said)


def _has_waited(ticket: Ticket) -> bool:
    return ticket.waited_for is not None or ticket.state is State.WAITING


def _waiting(ticket: Ticket) -> list[tuple[float, str]]:
    began, events = ticket.request.arrived, []
    why = f"because {ticket.waited_for.words}" if ticket.waited_for is not None else "for room"
    events.append((began, f"waits {why}; {ticket.position} of its class or above were there before it"))
    if ticket.predicted_s is not None:
        events.append((began, f"its wait was predicted to be {ticket.predicted_s:.1f} s"))
    if ticket.home is not None:
        until_s = ticket.patience_until - began  # unset where its home was not up, or another sidecar decided
        until = f": nobody else gets it until {until_s:+.3f} s" if until_s > 0.0 else ""
        events.append((began, f"{ticket.home.name} is its home{until}"))
    return events


def _why_still(ticket: Ticket) -> str:
    pool, queue = ticket.pool, ticket.queue
    if pool is None or queue is None:
        return "waits still"
    text = f"waits still, at place {queue.rank(ticket) + 1} of its line, because {pool.held_by(ticket).words}"
    return text + _passed(ticket)


def _passed(ticket: Ticket) -> str:
    if not ticket.passed_over:
        return ""
    guard = ", so that room is kept for it now" if ticket.is_guard else ""
    return f"; {ticket.passed_over} that fit were let past it{guard}"


def _like_a_timeout(wait_s: float) -> str:
    """Say what a wait reminds of: nobody tells us who ended a stream, but timeouts are round."""
    if 0.0 <= wait_s - MESSAGE_TIMEOUT_S <= LATE_S:
        return ", at 200 ms, Envoy's message_timeout where none is set (`extproc check FILE --envoy BOOTSTRAP`)"
    whole_s = math.floor(wait_s)
    if whole_s and wait_s - whole_s <= LATE_S:
        whose = "of Envoy (message_timeout, stream_idle_timeout, a route's) or the client"
        return f", at {whole_s} s: a timeout, perhaps, {whose}"
    return ""


def _refusal(ticket: Ticket) -> str:
    """Say how it was answered that got no good answer."""
    spec = EndpointSpec("") if ticket.endpoint is None else ticket.endpoint.spec
    return f"it got no good answer ({ticket.answer.value}): {words_of(ticket.answer, spec)}"


def _refused(ticket: Ticket, decision: Reject | None, wait_s: float) -> str:
    if decision is None:
        return f"its client, or Envoy, gave it up while it waited{_like_a_timeout(wait_s)}" + _passed(ticket)
    again = f"; Retry-After {decision.retry_after_s} s" if decision.retry_after_s is not None else ""
    outcome = decision.outcome
    crowd = f" ({decision.crowd.words})" if decision.crowd is not None else ""
    late = f" (its time was {CAME_LATE})" if came_late(decision) else ""
    return f"refused, {outcome.value} ({outcome.status}): {outcome.message}{crowd}{late}{again}" + _passed(ticket)


def _dispatched(ticket: Ticket, decision: Dispatch) -> str:
    if decision.outcome is Outcome.PASSED:
        return f"went to {decision.endpoint} at once: it takes no slot"
    home = ticket.home
    not_home = f", not to its home {home.name}" if decision.outcome is Outcome.REROUTED and home is not None else ""
    beside = f"which held {ticket.beside} with it"
    return f"dispatched to {decision.endpoint}{not_home}, {beside}, after {decision.wait_s:.3f} s" + _passed(ticket)


def _afterwards(ticket: Ticket) -> list[tuple[float, str]]:
    events = []
    if ticket.burst is not None:
        events.append((ticket.burst.seen_at, "its first token was seen"))
    if ticket.state is State.LEASED:
        began = "its answer has begun well" if ticket.is_answered else "no answer was seen yet"
        endpoint = ticket.endpoint
        if endpoint is not None and endpoint.health.shut_by is not None:  # what runs there is waited for all the same
            began += f"; {endpoint.name} is {endpoint.condition} now"
            if endpoint.health.is_up is False:
                began += _HANGS
        events.append(
            (ticket.burst.seen_at if ticket.burst is not None else ticket.leased_at, f"holds its slot: {began}")
        )
    elif ticket.state is State.DONE and ticket.ended_at > 0.0:
        held_s = ticket.ended_at - ticket.leased_at
        end = _ANSWERS.get(ticket.answer) or _refusal(ticket)
        if ticket.is_answered and ticket.answer is Answer.UNKNOWN:
            end = "its answer had begun well; how it ended nobody saw"
        events.append((ticket.ended_at, f"gave its slot back after {held_s:.3f} s: {end}"))
    elif ticket.state is State.DONE:
        events.append((ticket.leased_at, "another sidecar has its lease, and can't be reached"))
    return events
