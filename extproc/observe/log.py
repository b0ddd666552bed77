"""What the log says: requests that were refused or moved, and endpoints that go out and come back.

One line for each of them would be a flood just when a person reads the log, so lines are rated: a few a second for each
outcome, and then how many were left out. `/metrics` counts them all.

What a client wrote (its request id) is cut short, and cannot begin a line of its own or steer a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING

from extproc.admission.health import EJECTED
from extproc.admission.outcome import Outcome
from extproc.admission.refusals import words_of
from extproc.admission.servers import MOST as MOST_SERVERS
from extproc.admission.values import Dispatch
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, Reject
    from extproc.observe.served import Served

log = logging.getLogger("extproc.queue")

_AT_WORK = {"up", "unknown"}
_REFUSING = (EJECTED, "failing")
_WELL = (Outcome.DISPATCHED, Outcome.PASSED)
_EXPIRED = (Outcome.BUDGET_EXPIRED, Outcome.NO_ENDPOINT)
CAME_LATE = "over before anybody could decide: a sidecar that held it, or was to decide, is gone or was stopped"
LINES = 5
PERIOD_S = 1.0
LOOK_S = 0.5
SAME_S = 0.03
"""Waits that differ by less are the same."""
MANY_SAME = 10
SAID_AGAIN_S = 10.0
"""So often, at most, that a streak of requests given up after the same wait began: causes don't change in seconds."""
GOES_ON_S = 60.0
"""So often that it goes on, and how many they are."""
OVER_S = 15.0
"""A streak of which there was no more for so long is over."""
MOST_STREAKS = 3
"""Streaks that are followed at once: there are so many timeouts, and clients may make up more."""
MOST_NAMED = 10
"""Endpoints that became the same between two looks and have a line each; more have one, and theirs at level debug."""
MOST_TEXT = 128
"""Characters of a client's text in a line."""
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up(level: str, log_format: str = "text") -> None:
    """Let this process log to stderr; `log_format`: "text", or "json" for one object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def printable(text: str) -> str:
    """Return a client's text as a line may show it: at most MOST_TEXT characters, control characters escaped."""
    shown = "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in text[:MOST_TEXT]
    )
    return shown if len(text) <= MOST_TEXT else shown + "..."


class JsonLines(logging.Formatter):
    """One JSON object per line, in ASCII: time (UTC), level, logger, message, what the line is about, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "about", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Rate:
    """How many lines of one outcome were written, and left out, since `since`."""

    __slots__ = ("left_out", "since", "written")

    def __init__(self, since: float) -> None:
        self.since = since
        self.written = 0
        self.left_out = 0


class _Streak:
    """Requests given up after the same wait, of which the log has told: how many until now, and when told last."""

    __slots__ = ("began", "count", "last", "said", "said_at", "wait_s")

    def __init__(self, wait_s: float, count: int, now: float) -> None:
        self.wait_s = wait_s
        self.count = self.said = count
        self.began = self.last = self.said_at = now


class QueueLog:
    """An observer of decisions that writes what a person on call wants to read."""

    def __init__(self, controller: Controller, clock: Callable[[], float]) -> None:
        """Write about `controller`; `clock` tells monotonic seconds."""
        self._controller = controller
        self._clock = clock
        self._rates: dict[Outcome, _Rate] = {}
        self._states: dict[str, str] = {}
        self._same_s, self._same = 0.0, 0  # the wait after which the last were given up, and how many they are
        self._said_same_at: float | None = None
        self._streaks: list[_Streak] = []
        self._served: Served | None = None
        self._several: dict[str, int] = {}  # endpoints whose address is several servers', and of how many
        self._unserved: dict[str, bool] = {}  # of each pool, whether nobody served it at the last look

    def follow(self, served: Served) -> None:
        """Tell of models that nobody serves any more, and of their first server, too."""
        self._served = served

    def decided(self, decision: Decision) -> None:
        """Write a line for a refusal or a reroute. Everything else is in the metrics."""
        outcome = decision.outcome
        if outcome in _WELL or not self._may_write(outcome):
            return
        ticket = decision.ticket
        request_id = printable(ticket.request.id)
        about: dict[str, object] = {
            "outcome": outcome.value,
            "request_id": request_id,
            "class": ticket.request_class.name,
            "wait_s": round(decision.wait_s, 3),
            "position": ticket.position,
            **ticket.why(),
        }
        model = printable(ticket.request.model or "")
        if model:
            about["model"] = model
        tenant = printable(ticket.request.tenant)
        if tenant:
            about["tenant"] = tenant
        if isinstance(decision, Dispatch):
            what, reason = f"to {decision.endpoint}", ""
            about["endpoint"] = decision.endpoint
        else:
            what = "refused"
            reason = _reason(ticket, is_dead=outcome is Outcome.NO_ENDPOINT)
            if came_late(decision):
                reason += f", {CAME_LATE}"
            if decision.crowd is not None:
                reason = f": {decision.crowd.words}"
                about["in_flight"], about["max_in_flight"] = decision.crowd.in_flight, decision.crowd.most
        if ticket.home is not None:
            about["home"] = ticket.home.name
        log.info(
            "%s: request %s, class %s%s%s, %s after %.3f s%s",
            outcome.value,
            request_id or "without an id",
            ticket.request_class.name,
            f", model {model}" if model else "",
            f", tenant {tenant}" if tenant else "",
            what,
            decision.wait_s,
            reason,
            extra={"about": about},
        )

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Write nothing, as clients leave all the time; but many after the same wait have one cause."""
        del ticket
        for streak in self._streaks:
            if abs(wait_s - streak.wait_s) <= SAME_S:
                streak.count, streak.last = streak.count + 1, self._clock()
                return
        if abs(wait_s - self._same_s) > SAME_S:
            self._same_s, self._same = wait_s, 0
        self._same += 1
        if self._same == MANY_SAME and wait_s > 2 * SAME_S:
            now = self._clock()
            self._same = 0  # if it goes on, it is said then
            is_soon = self._said_same_at is not None and now - self._said_same_at < SAID_AGAIN_S
            if is_soon or len(self._streaks) == MOST_STREAKS:
                return
            self._said_same_at = now
            self._streaks.append(_Streak(wait_s, MANY_SAME, now))
            log.warning(
                "%d waiting requests in a row were given up %.2f s after they came: by one client that closed them "
                "together, or by a timeout of the clients or of Envoy (message_timeout, 0.2 s where none is set; "
                "stream_idle_timeout; a route's)",
                MANY_SAME,
                wait_s,
                extra={"about": {"wait_s": round(wait_s, 3)}},
            )

    def look(self) -> None:
        """Tell of endpoints that went out or came back since the last look, and of lines left out; call it often."""
        for outcome, rate in self._rates.items():
            self._settle(outcome, rate)
        self._follow_streaks()
        endpoints = self._controller.endpoints
        # Who waits for its first check did not go down.
        states = {name: "unknown" if one.health.awaits_check else one.condition for name, one in endpoints.items()}
        changed: dict[tuple[str, str], list[str]] = {}
        for name, state in states.items():
            before = self._states.get(name, "unknown")  # what came and was judged between two looks is told, too
            if state != before:
                changed.setdefault((before, state), []).append(name)
        self._states = states
        for (before, state), names in changed.items():
            # That it is back is as loud as that it went: who was told of the one looks for the other.
            level = logging.INFO if {before, state} <= _AT_WORK else logging.WARNING
            if len(names) > MOST_NAMED:
                log.log(
                    *(level, "%d endpoints: %s (were %s): %s", len(names), state, before, some_of(names, MOST_NAMED)),
                    extra={"about": {"endpoints": len(names), "state": state}},
                )
                level = logging.DEBUG
            if log.isEnabledFor(level):
                for name in names:
                    self._tell_of(endpoints[name], before, state, level)

        self._look_at_servers()
        self._look_at_pools()

    def _look_at_servers(self) -> None:
        """Say once that an endpoint is several servers, and once more if it is another number of them."""
        endpoints = self._controller.endpoints.values()
        before, self._several = self._several, {one.name: n for one in endpoints if (n := one.servers.count) > 1}
        for name, count in self._several.items():
            if before.get(name) == count:
                continue
            if count < MOST_SERVERS:
                text = (
                    "endpoint %s: its metrics page shows a part of the requests that we have there: its address seems "
                    f"to stand for {count} servers (a Service, a load balancer). Name each of them, or have them "
                    "discovered: the page of one is taken for all, and nobody can choose between them"
                )
            else:
                text = (
                    "endpoint %s: its metrics page shows next to none of the requests that we have there, and is not "
                    "believed: another server has it, or a balancer before very many"
                )
            log.warning(text, name, extra={"about": {"endpoint": name, "servers": count}})

    def _look_at_pools(self) -> None:
        """Say once that the last endpoint of a model went, and once that one is back."""
        if self._served is None:
            return
        before, self._unserved = self._unserved, {}
        for group in self._served.groups():
            down = self._unserved[group.name] = not group.is_served
            if down is before.get(group.name, down):
                continue
            waiting = self._served.waiting(group)
            about = {"pool": group.name, "endpoints": len(group.members), "waiting": waiting}
            if down:
                text, level = "no endpoint left for %s, of %d: %d wait", logging.WARNING
            else:
                text, level = "an endpoint for %s is up again, of %d: %d wait", logging.INFO
            log.log(level, text, group.words, len(group.members), waiting, extra={"about": about})

    @staticmethod
    def _tell_of(endpoint: Endpoint, before: str, state: str, level: int) -> None:
        words = _ejection(endpoint) if state == EJECTED else state
        refused_by = endpoint.health.refused_by
        if refused_by is not None and state in _REFUSING:
            words += f"; its latest bad answer ({refused_by.value}): {words_of(refused_by, endpoint.spec)}"
        about = {"endpoint": endpoint.name, "state": state}
        log.log(level, "endpoint %s: %s (was %s)", endpoint.name, words, before, extra={"about": about})

    def _follow_streaks(self) -> None:
        """Say now and then that requests are given up still, and once that they are no more."""
        now = self._clock()
        for streak in list(self._streaks):
            about = {"wait_s": round(streak.wait_s, 3), "given_up": streak.count}
            if now - streak.last >= OVER_S:
                self._streaks.remove(streak)
                text = "no more waiting requests are given up %.2f s after they came: %d were, within %.0f s"
                told: tuple[float, ...] = streak.wait_s, streak.count, max(streak.last - streak.began, 1.0)
            elif now - streak.said_at >= GOES_ON_S:  # there were more: else it is over
                text = "waiting requests are given up %.2f s after they came still: %d more in %.0f s"
                told = streak.wait_s, streak.count - streak.said, now - streak.said_at
                streak.said, streak.said_at = streak.count, now
            else:
                continue
            log.warning(text, *told, extra={"about": about})

    def _may_write(self, outcome: Outcome) -> bool:
        rate = self._rates.get(outcome)
        if rate is None:
            rate = self._rates[outcome] = _Rate(self._clock())
        self._settle(outcome, rate)
        if rate.written < LINES:
            rate.written += 1
            return True
        rate.left_out += 1
        return False

    def _settle(self, outcome: Outcome, rate: _Rate) -> None:
        """Begin a new period if the last one is over, and say what was left out of it."""
        now = self._clock()
        if now - rate.since < PERIOD_S:
            return
        if rate.left_out:
            about = {"outcome": outcome.value, "left_out": rate.left_out}
            text = "%s: and %d more such lines in the last %.0f s"
            log.info(text, outcome.value, rate.left_out, now - rate.since, extra={"about": about})
        rate.since, rate.written, rate.left_out = now, 0, 0


def came_late(decision: Reject) -> bool:
    """Tell whether a refused request's budget was over when our core heard of it: it did not wait in its lines."""
    ticket = decision.ticket
    expired = decision.outcome in _EXPIRED and ticket.waited_for is None and ticket.pool is not None
    return expired and ticket.request.arrived < ticket.wait_until <= ticket.request.arrived + decision.wait_s


def _reason(ticket: Ticket, *, is_dead: bool) -> str:
    """Say what a refused request waited for, or would have, and how long it might."""
    why = ticket.why()
    parts = [f"of a budget of {why['budget_s']:g} s"] if "budget_s" in why else []
    if "predicted_wait_s" in why:
        parts.append(f"predicted {why['predicted_wait_s']:g} s")
    if ticket.waited_for is not None:
        held = f"held by {ticket.waited_for.value}"
        parts.append(f"{held} when it came, and no endpoint for it is up now" if is_dead else held)
    return (" " if parts else "") + ", ".join(parts)


def _ejection(endpoint: Endpoint) -> str:
    """Say for how long it is out, and why: only the first ejection needs several refusals, then one trial is enough."""
    count = f"{endpoint.health.refusals} requests in a row failed there, which its peers serve"
    if endpoint.health.refusals == 1:
        count = "one request that failed there as the next one would"
    why = count if endpoint.health.ejections == 1 else "a failed trial"
    return f"ejected for {endpoint.health.ejection_s:g}s after {why}"
