"""Who serves what: pools come and go with the endpoints that list their models.

Models that the same endpoints serve share one pool, its lines and its tenants' shares: however many models an endpoint
lists, a request costs the same, and naming another model gains nobody a place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.endpoint import Endpoint

MOST_MODELS = 20_000
"""Names of models that are remembered though nobody serves them any more; the oldest are forgotten first."""


class Pools:
    """The pools of all endpoints.

    Attributes:
        any_model: the endpoints that list no models.
        every: all endpoints: for requests without a model where every endpoint lists its own.
        by_model: the pool of each model that was ever named, also while nobody serves it.
        models_differ: endpoints list different models: nobody may guess one then.
    """

    __slots__ = ("_all", "any_model", "by_model", "every", "models_differ")

    def __init__(self) -> None:
        """Start without endpoints: all who come wait in one pool."""
        self.any_model = self.every = Pool()
        self.by_model: dict[str, Pool] = {}
        self.models_differ = False
        self._all: tuple[Pool, ...] = (self.any_model,)

    def __iter__(self) -> Iterator[Pool]:
        """Walk them, each once."""
        return iter(self._all)

    def find(self, model: str | None) -> Pool | None:
        """Return the pool that serves `model`. An endpoint that lists models gets only requests for those."""
        pool = self.by_model.get(model) if model is not None else None
        if pool is not None:
            return pool
        if self.any_model.members or not self.every.members:
            return self.any_model
        return self.every if model is None else None

    def misses_model(self, model: str | None) -> bool:
        """Tell whether a request for `model` must say more: it names none, and endpoints list different ones."""
        return model is None and self.models_differ and not self.any_model.members

    def know(self, models: Iterable[str]) -> bool:
        """Note names of models; tell whether any is new."""
        fresh = [model for model in models if model not in self.by_model]
        for model in fresh:
            self.by_model[model] = self.any_model
        return bool(fresh)

    def regroup(self, present: list[Endpoint]) -> tuple[Pool, ...]:
        """Follow the endpoints that are there now. Return the pools that were: whoever waits there may have to move.

        A set of endpoints is a number with a bit for each. A pool lives on while one of its models keeps it.
        """
        self.models_differ = len({endpoint.spec.models for endpoint in present}) > 1
        served: dict[str, int] = {}
        lists_none = 0
        for number, endpoint in enumerate(present):
            endpoint.pools = []
            for model in endpoint.spec.models:
                served[model] = served.get(model, 0) | 1 << number
            if not endpoint.spec.models:
                lists_none |= 1 << number
        self.know(served)
        self._forget_models(served)
        before = self._all
        for pool in before:
            pool.forget_endpoints()
        kept: dict[int, Pool] = {}
        every, any_model = (1 << len(present)) - 1, lists_none
        self.every = self._keep(kept, every, self.every, present)
        self.any_model = self._keep(kept, any_model, self.any_model, present)
        for model, pool in self.by_model.items():
            self.by_model[model] = self._keep(kept, served.get(model, 0) | lists_none, pool, present)
        self._all = tuple(kept.values())
        return before

    @staticmethod
    def _keep(kept: dict[int, Pool], members: int, pool: Pool, present: list[Endpoint]) -> Pool:
        """Return the pool of `members`: the first that was for any of their models, if no other set has it."""
        found = kept.get(members)
        if found is None:
            found = kept[members] = Pool() if pool in kept.values() else pool
            found.members = [endpoint for number, endpoint in enumerate(present) if members >> number & 1]
            for endpoint in found.members:
                endpoint.pools.append(found)
        return found

    def _forget_models(self, served: dict[str, int]) -> None:
        surplus = len(self.by_model) - len(served) - MOST_MODELS
        if surplus > 0:
            for model in [model for model in self.by_model if model not in served][:surplus]:
                del self.by_model[model]
