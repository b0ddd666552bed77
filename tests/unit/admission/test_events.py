"""An event told as a value can be made to happen again: `apply` does to a core what the method had done."""

from __future__ import annotations

import pytest

from extproc.admission import events
from extproc.admission.applying import apply
from extproc.admission.controller import Controller
from extproc.admission.estimate import Learnt
from extproc.admission.load import Load
from extproc.admission.sessions import Home
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request

AT = 3.0
NEW, WAITS, RUNS = (Ticket(Request(name, 0.0, session=name)) for name in ("new", "waits", "runs"))
"""Stand for a ticket in that state, of the core that the event happens to."""

EVENTS = [
    events.Offered(AT, NEW),
    events.Sent(AT, NEW),
    events.Adopted(AT, NEW, "b", held_s=2.0, begun=True),
    events.Adopted(AT, NEW, "b", held_s=1.0, begun=False),
    events.Cancelled(AT, WAITS),
    events.Withdrawn(AT, WAITS),
    events.FirstToken(AT, RUNS),
    events.Answered(AT, RUNS),
    events.Released(AT, RUNS, Answer.OK),
    events.Moved(AT, RUNS, "b"),
    events.Disowned(AT, RUNS),
    events.EndpointsPut(AT, (EndpointSpec("c", max_running_requests=2), EndpointSpec("a", max_running_requests=1))),
    events.ModelsKnown(AT, ("m", "n"), expects_any=True),
    events.ModelsKnown(AT, (), expects_any=False),
    events.EndpointsRemoved(AT, ("a", "b")),
    events.HealthChecked(AT, "a", is_up=False),
    events.HealthChecked(AT, "a", is_up=None),
    events.Observed(AT, "a", Load(running=1.0)),
    events.Reported(AT, "a", Load(waiting=2.0)),
    events.QuotaSet(AT, "a", 0),
    events.QuotaSet(AT, "a", None),
    events.Ticked(AT),
    events.Woken(AT),
    events.PolicySet(AT, Policy(patience_s=7.0)),
    events.Drained(AT, 1),
    events.Drained(AT, None),
    events.HomeBelieved(AT, Home("s", "a", 10, 0.5)),
    events.LearntBelieved(AT, Learnt("mean", None, "", 0, 50.0, 0.0)),
]


def core_with(*tickets: Ticket) -> Controller:
    """A core whose two slots are taken: `tickets` are offered to it in turn."""
    core = Controller(Policy(shed=False))
    for name in "ab":
        core.put_endpoint(EndpointSpec(name, max_running_requests=1), 1.0)
    for ticket in tickets:
        core.offer(ticket, 2.0)
    core.tick(AT)  # what is believed is told with the time of the last event
    return core


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_made_to_happen_again_is_the_same_one_with_all_that_it_says(event: events.Event) -> None:
    runs, *_, waits = tickets = [Ticket(Request(str(number), 0.0)) for number in range(4)]
    core = core_with(*tickets)
    ticket = {NEW: Ticket(Request("new", 0.0)), WAITS: waits, RUNS: runs}.get(getattr(event, "ticket", None))
    if ticket is not None:
        event = type(event)(**{name: getattr(event, name) for name in event.__match_args__} | {"ticket": ticket})
    told: list[tuple[events.Event, list]] = []
    core.watch(lambda event, decisions: told.append((event, list(decisions))))
    decided = apply(core, event)
    assert told == [(event, decided)]


def test_every_kind_of_event_is_made_to_happen_above() -> None:
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)}
    assert {type(event) for event in EVENTS} == kinds - {events.Event, events.OfTicket, events.OfEndpoint}


def test_an_event_made_to_happen_changes_the_core_as_it_says() -> None:
    tickets = [Ticket(Request(str(number), 0.0)) for number in range(5)]
    core = core_with(*tickets)
    apply(core, events.Drained(AT, 1))
    assert [ticket.state for ticket in tickets[2:]] == [State.LEFT, State.WAITING, State.WAITING]
    new = Ticket(Request("new", 0.0, session="s"))
    apply(core, events.Adopted(AT, new, "b", held_s=2.0, begun=True))
    assert (new.leased_at, new.prompt_pending) == (AT - 2.0, False)
    apply(core, events.HomeBelieved(AT, Home("other", "a", 10, 0.5)))
    assert core.homes(9, AT) == [Home("other", "a", 10, 0.5), Home("s", "b", new.kv_tokens, 2.0)]


def test_what_is_no_event_of_the_core_is_an_error_that_shows_it() -> None:
    with pytest.raises(TypeError, match=r"no event of the core: OfEndpoint\(at=3.0, name='a'\)"):
        apply(core_with(), events.OfEndpoint(AT, "a"))
