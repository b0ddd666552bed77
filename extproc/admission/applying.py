"""Events that happen again: to a core that is told of another one's, or to one that runs a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.events import (
    Adopted,
    Answered,
    Cancelled,
    Disowned,
    Drained,
    EndpointsPut,
    EndpointsRemoved,
    FirstToken,
    HealthChecked,
    HomeBelieved,
    LearntBelieved,
    ModelsKnown,
    Moved,
    Observed,
    Offered,
    PolicySet,
    QuotaSet,
    Released,
    Reported,
    Sent,
    Ticked,
    Withdrawn,
    Woken,
)

if TYPE_CHECKING:
    from extproc.admission.controller import Controller
    from extproc.admission.events import Event
    from extproc.admission.values import Decision


def apply(core: Controller, event: Event) -> list[Decision]:  # noqa: C901 - one line for each event
    """Make an event happen to `core`."""
    match event:
        case Offered():
            return core.offer(event.ticket, event.at)
        case Sent():
            return core.send(event.ticket, event.at)
        case Cancelled():
            return core.cancel(event.ticket, event.at)
        case FirstToken():
            return core.first_token(event.ticket, event.at)
        case Answered():
            return core.answered(event.ticket, event.at)
        case Released():
            return core.release(event.ticket, event.at, event.answer)
        case Moved():
            return core.move(event.ticket, event.name, event.at)
        case Adopted():
            return core.adopt(event.ticket, event.name, event.at, held_s=event.held_s, begun=event.begun)
        case Disowned():
            return core.disown(event.ticket, event.at)
        case Withdrawn():
            return core.withdraw(event.ticket, event.at)
        case EndpointsPut():
            return core.put_endpoints(event.specs, event.at)
        case ModelsKnown():
            return core.know_models(event.models, event.at, expects_any=event.expects_any)
        case EndpointsRemoved():
            return core.remove_endpoints(event.names, event.at)
        case HealthChecked():
            return core.set_up(event.name, event.at, is_up=event.is_up)
        case Observed():
            return core.observe(event.name, event.load, event.at, event.unsent)
        case Reported():
            return core.report(event.name, event.load, event.at)
        case QuotaSet():
            return core.set_quota(event.name, event.quota, event.at)
        case Ticked():
            return core.tick(event.at)
        case Woken():
            return core.wake(event.at)
        case PolicySet():
            return core.set_policy(event.policy, event.at)
        case Drained():
            return core.drain(event.at, event.most)
        case HomeBelieved():
            core.believe_home(event.home, event.at)
        case LearntBelieved():
            core.believe(event.learnt)
        case _:
            raise TypeError(f"no event of the core: {event!r}")
    return []
