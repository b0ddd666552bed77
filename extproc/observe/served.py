"""Which models have a server, and which have none left: what a person on call wants to know first.

Models that the same endpoints list are one group, named by them; "*" is any model, at endpoints that list none. Of two
groups one may be dead while endpoints of it serve another: so each is looked at for itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import GaugeMetricFamily

from extproc.observe.endpoints import serves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.values import EndpointSpec

ANY = "*"
"""The name of the group of endpoints that list no models."""
MOST_NAMED = 3
"""Models that the name of a group tells."""


class Group(NamedTuple):
    """Models that the same endpoints serve."""

    name: str
    members: list[Endpoint]

    @property
    def is_served(self) -> bool:
        """Whether one of them may be sent requests, and does not refuse one after the other."""
        return any(map(serves, self.members))

    @property
    def words(self) -> str:
        """Its models in words for people."""
        return "any model" if self.name == ANY else f"model {self.name}"


class Served:
    """A collector for a Prometheus registry, and what the log and pages say of groups that nobody serves."""

    def __init__(self, controller: Controller, decides: Callable[[], bool] = lambda: True) -> None:
        """Look at the endpoints of `controller`. `decides`: it does, and no other sidecar's: else it knows nothing."""
        self._controller = controller
        self._decides = decides
        self._seen: list[tuple[Endpoint, EndpointSpec]] = []
        self._groups: list[Group] = []

    def groups(self) -> list[Group]:
        """Return the groups of the endpoints that are there now."""
        if not self._decides():
            return []
        seen = [(one, one.spec) for one in self._controller.endpoints.values() if not one.removed]
        if seen != self._seen:
            self._seen, self._groups = seen, list(_groups(seen))
        return self._groups

    def waiting(self, group: Group) -> int:
        """Return how many wait for the models of `group`."""
        members = set(group.members)
        return sum(pool.waiting_total for pool in self._controller.pools() if set(pool.members) == members)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric family: prometheus_client asks."""
        family = GaugeMetricFamily(
            "extproc_pool_up",
            "1 while one endpoint at least that serves these models may be sent requests, and does not refuse one "
            'after the other. A pool is named by its models; "*" is any model, where endpoints list none.',
            labels=["pool"],
        )
        for group in self.groups():
            family.add_metric([group.name], int(group.is_served))
        yield family


def _groups(seen: Iterable[tuple[Endpoint, EndpointSpec]]) -> Iterator[Group]:
    """Group models by the lists that have them: as many endpoints may share a list, these are few."""
    lists: dict[frozenset[str], list[Endpoint]] = {}
    for endpoint, spec in seen:
        lists.setdefault(spec.models, []).append(endpoint)
    any_model = lists.pop(frozenset(), [])
    listing: dict[str, list[frozenset[str]]] = {}
    for models in lists:
        for model in sorted(models):
            listing.setdefault(model, []).append(models)
    together: dict[tuple[frozenset[str], ...], set[str]] = {}
    for model, its in listing.items():
        together.setdefault(tuple(its), set()).add(model)
    for its_lists, named in together.items():
        yield Group(name_of(named), [*(one for its in its_lists for one in lists[its]), *any_model])
    if any_model:
        yield Group(ANY, any_model)


def name_of(models: Iterable[str]) -> str:
    """Return a name that no other group has: a model whose own name looks like a list stands in quotes."""
    names = [json.dumps(model) if "," in model or '"' in model else model for model in sorted(models)]
    more = len(names) - MOST_NAMED
    return ",".join(names[:MOST_NAMED]) + (f",+{more}" if more > 0 else "")
