"""A recording of the core's events: a file that anybody can run again, and get the same decisions.

One line of JSON each: first what it is, the version, and the state that the core was in, then each event with what was
decided on it. Nothing is recorded unless somebody asks, and then so many events at the most. How the state is packed,
so that who reads a stranger's recording runs none of his code: `packing.py`.

It holds what requests say of themselves in headers (ids, tenants, models), and no header or body besides; sessions are
replaced by numbers that nobody can turn back.
"""

from __future__ import annotations

import ast
import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from extproc import __version__
from extproc.admission import events
from extproc.admission.applying import apply
from extproc.admission.sessions import Home
from extproc.admission.tenants import NO_RULES, TenantRules
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Dispatch, Request
from extproc.observe.packing import RecordingError, freeze, is_of_core, source_of, thaw, without_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from extproc.admission.controller import Controller
    from extproc.admission.events import Event
    from extproc.admission.values import Decision

FORMAT = 18
MOST_EVENTS = 200_000
"""Events of one recording: some 40 MB. Then it ends, since only what follows on its beginning can be run again."""
ABOUT = (
    "a line for each event of the core follows, with what was decided on it; this one has the state it began in, "
    "packed; `extproc simulate --replay FILE` runs it all again"
)
"""What a recording begins with, for people: the state is a long word that says nothing to them."""
_KINDS: dict[str, type[Event]] = {
    name: kind for name, kind in vars(events).items() if isinstance(kind, type) and issubclass(kind, events.Event)
}


class Recorder:
    """Records a core from now on. Hand `happened` to its `watch`."""

    def __init__(
        self, core: Controller, is_full: Callable[[], object] = lambda: None, most_events: int = MOST_EVENTS
    ) -> None:
        """Begin with the state that `core` is in. `is_full` is called when it recorded as much as it may."""
        self._is_full = is_full
        self._most_events = most_events
        self._end = ""  # why it ended
        self._lines: list[str] = []
        self._salt = secrets.token_bytes(16)
        state, self._numbers, self._next = freeze(core, self._hidden)
        about = f"{ABOUT}; it began with {core.waiting} waiting and {len(core.endpoints)} endpoints"
        head = {"about": about, "extproc": __version__, "format": FORMAT, "state": base64.b64encode(state).decode()}
        self._head = json.dumps(head)

    def happened(self, event: Event, decisions: Sequence[Decision]) -> None:
        """Note an event. A bug in here ends the recording, and nothing else."""
        if self._end:
            return
        try:
            self._note(event, decisions)
        except Exception as error:
            self._end = f"{type(event).__name__} could not be recorded: {error!r}: please report it"
        if len(self._lines) >= self._most_events:
            self._end = f"{self._most_events} events are the most of one recording"
        if self._end:
            self._is_full()

    def _note(self, event: Event, decisions: Sequence[Decision]) -> None:
        line: dict[str, Any] = {"event": type(event).__name__}
        for name in _names(type(event)):
            line[name] = self._plain(getattr(event, name), line)
        if decisions:
            line["decisions"] = [self._told(decision) for decision in decisions]
        self._lines.append(json.dumps(line))
        for ticket in [getattr(event, "ticket", None), *(decision.ticket for decision in decisions)]:
            if ticket is not None and ticket.state in (State.DONE, State.LEFT):
                self._numbers.pop(ticket, None)

    def text(self) -> str:
        """Return what was recorded so far."""
        end = json.dumps({"end": self._end or "as long as was asked for"})
        return "\n".join([self._head, *self._lines, end, ""])

    def _plain(self, value: object, line: dict[str, Any]) -> object:
        if isinstance(value, Ticket):
            if value not in self._numbers:
                line["request"] = _plain(without_session(value.request, self._hidden))
            return self._number(value)
        if isinstance(value, Home):
            value = value._replace(session=self._hidden(value.session))
        return _plain(value)

    def _hidden(self, session: str) -> str:
        """Return what stands for a session: its id may be somebody's secret."""
        return blake2b(session.encode(errors="replace"), key=self._salt, digest_size=12).hexdigest()

    def _number(self, ticket: Ticket) -> int:
        number = self._numbers.get(ticket)
        if number is None:
            number = self._numbers[ticket] = self._next
            self._next += 1
        return number

    def _told(self, decision: Decision) -> list[object]:
        number = self._numbers.get(decision.ticket)
        return [number, *_words(decision)]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a run again decided otherwise: at which event, what was recorded, what came out."""

    number: int
    event: Event
    recorded: list[list[object]]
    now: list[list[object]]


class Recording:
    """A recording that was read. Runs once: what happens to its core stays."""

    def __init__(self, text: Iterable[str]) -> None:
        """Read it. Raises RecordingError."""
        self._lines = iter(text)
        try:
            head = json.loads(next(self._lines))
            if head["format"] != FORMAT:
                raise RecordingError(f"line 1: format {head['format']!r}, this version reads {FORMAT}")
            self.version = str(head["extproc"])
            self.core, tickets = thaw(base64.b64decode(head["state"], validate=True))
        except (StopIteration, KeyError, TypeError, ValueError) as error:
            if isinstance(error, RecordingError):
                raise
            raise RecordingError(f"line 1: no recording of the core's events ({error!r})") from None
        self._tickets: dict[int, Ticket] = tickets
        self.numbers: dict[Ticket, int] = {ticket: number for number, ticket in tickets.items()}

    def steps(self) -> Iterator[tuple[Event, list[list[object]]]]:
        """Walk its events, each with what was decided then. Raises RecordingError."""
        for number, line in enumerate(self._lines, 2):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if "end" in entry:
                    return
                kind = _KINDS[entry["event"]]
                hints = _hints(kind)
                event = kind(*[self._shaped(hints[name], entry[name], entry) for name in _names(kind)])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RecordingError(f"line {number}: no event of the core ({error!r})") from None
            yield event, entry.get("decisions", [])

    def run(self, told: Callable[[list[list[object]]], None] = lambda _: None) -> Iterator[Difference | None]:
        """Make it all happen again; for each event, how it went otherwise than recorded, or None.

        `told` is called with what is decided now: for each decision a ticket's number, outcome, where to or when again
        (Retry-After), and the wait.
        """
        for number, (event, recorded) in enumerate(self.steps(), 1):
            decisions = apply(self.core, event)
            now = [[self.numbers.get(decision.ticket), *_words(decision)] for decision in decisions]
            told(now)
            yield None if now == recorded else Difference(number, event, recorded, now)

    def _shaped(self, hint: Any, value: Any, entry: dict[str, Any]) -> Any:
        if hint is not Ticket:
            return _shaped(hint, value)
        ticket = self._tickets.get(value)
        if ticket is None:
            ticket = self._tickets[value] = Ticket(_shaped(Request, entry["request"]))
            self.numbers[ticket] = value
        return ticket


def _words(decision: Decision) -> list[object]:
    where = decision.endpoint if isinstance(decision, Dispatch) else decision.retry_after_s
    return [decision.outcome.value, where, decision.wait_s]


# ---- values as JSON


def _names(kind: type[Event]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a value's fields, as its source has them: compiled, a class does not tell them whole."""
    if kind in _HINTS:
        return _HINTS[kind]
    hints = _HINTS[kind] = {}
    for base in reversed(kind.__mro__):
        if is_of_core(base):
            said = {"__module__": base.__module__, "__annotations__": _written(base)}
            hints |= get_type_hints(type(base.__name__, (), said))
    return hints


def _written(kind: type) -> dict[str, str]:
    """Return the annotations of a class of the core, as written."""
    written = [one for one in source_of(kind).body if isinstance(one, ast.AnnAssign)]
    return {ast.unparse(one.target): ast.unparse(one.annotation) for one in written}


def _shaped(hint: Any, value: Any) -> Any:  # noqa: C901 - a case for each kind of value
    """Return a value of the type `hint` from its JSON."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if origin is UnionType:
        return _shaped(next(one for one in inner if one is not type(None)), value)
    if origin is tuple:
        return tuple(_shaped(inner[0], item) for item in value)
    if origin is frozenset:
        return frozenset(value)
    if origin is Mapping:
        return {key: _shaped(inner[1], item) for key, item in value.items()}
    if hint is TenantRules and value == _plain(NO_RULES):
        return NO_RULES  # itself: it is asked for by identity
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(hint, type) and is_dataclass(hint):
        return hint(**{name: _shaped(kind, value[name]) for name, kind in _hints(hint).items()})
    if isinstance(hint, type) and issubclass(hint, tuple):
        return hint(*value)
    if not isinstance(value, (int, float) if hint is float else hint):
        raise TypeError(f"must be {hint.__name__}, not {value!r}")
    return value
