"""Which class an InferenceObjective means: a gateway's API knows objectives by name, each with a priority."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from extproc.admission.values import RequestClass


def classes_of(
    priorities: Mapping[str, int], classes: Sequence[RequestClass], listed: Mapping[str, str]
) -> dict[str, str]:
    """Return the class of each objective in `priorities` and in `listed`, by name.

    The class that `listed` says; else the one of the same name, else the first with its priority, else with the next
    lower one, else with the lowest: an objective never goes before those that its own API puts before it.
    """
    named = {klass.name for klass in classes}
    lowest = min(classes, key=lambda klass: klass.priority)
    found = {}
    for name, priority in priorities.items():
        below = [klass for klass in classes if klass.priority <= priority]
        found[name] = name if name in named else max(below, key=lambda klass: klass.priority, default=lowest).name
    return found | dict(listed)
