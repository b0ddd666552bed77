"""Who serves what: pools come and go with the endpoints that list their models.

Models that the same endpoints serve share one pool, its lines and its tenants' shares: however many models an endpoint
lists, a request costs the same, and naming another model gains nobody a place.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.laws import Laws

MOST_SUBSETS = 64
"""Sets of allowed endpoints that are remembered, besides those that somebody waits for."""
LOOKED_AT = 4
"""Remembered sets that are looked at for each new one: those without a waiter are forgotten, the oldest first."""
NAMELESS = "\0"
"""Stands for every model that no endpoint names: made-up names are one, so that they make no pools."""
MOST_MODELS = 20_000
"""Names of models that are remembered though nobody serves them any more; the oldest are forgotten first."""


class Pools:
    """The pools of all endpoints.

    Attributes:
        any_model: the endpoints that list no models.
        every: all endpoints: for requests without a model where every endpoint lists its own.
        by_model: the pool of each model that was ever named, also while nobody serves it.
        expects_any: somebody who lists no models may come, and so serve whatever is asked for.
        awaited: pools to which some who wait are about to move: see settling.py.
        subsets: the pool of those that serve a model and that a request allows, for each two that were named lately.
    """

    __slots__ = (
        "_all",
        "_expected_any",
        "_is_whole",
        "_left",
        "_listed_by",
        "any_model",
        "awaited",
        "by_model",
        "every",
        "expects_any",
        "subsets",
    )

    def __init__(self, laws: Laws = LAWS) -> None:
        """Start without endpoints: all who come wait in one pool."""
        self.any_model = self.every = Pool(laws=laws)
        self.by_model: dict[str, Pool] = {}
        self.any_model.names = 1
        self._listed_by: dict[frozenset[str], Endpoint] = {}  # for each list of models an endpoint that has it
        self._is_whole = True  # no endpoint is left out for a model
        self.expects_any = False
        self._expected_any = False  # likewise, when pools were grouped last
        self.subsets: dict[tuple[str | None, frozenset[str]], Pool] = {}
        self.awaited: Container[Pool] = ()
        self._all: tuple[Pool, ...] = (self.any_model,)
        self._left: list[Pool] = []  # of no models any more: who waits there is yet to be settled

    def __iter__(self) -> Iterator[Pool]:
        """Walk them, each once, and the lanes of their weighted classes."""
        for pool in self._all:
            yield from pool.with_lanes()
        yield from self._left

    def forget_left(self) -> None:
        """Forget pools that are for no models, and where nobody waits any more."""
        if self._left:
            self._left = [pool for pool in self._left if pool.waiting_total]

    def find(self, model: str | None, allowed: frozenset[str] | None = None) -> Pool | None:
        """Return the pool that serves `model`. An endpoint that lists models gets only requests for those.

        `allowed`: of a request that may go to these endpoints alone, once they are known.
        """
        if allowed is not None:
            return self.subsets.get(self._subset_key(model, allowed))
        pool = self.by_model.get(model) if model is not None else None
        if pool is not None:
            return pool
        if self.any_model.members or not self.every.members:
            return self.any_model
        if model is None and len(self._listed_by) <= 1:
            return self.every
        if self.expects_any:
            return self.any_model
        return self.every if model is None else None

    def is_awaited(self, model: str | None) -> bool:
        """Tell whether requests for `model` wait although nobody serves it yet."""
        whole = self.find(model)
        return whole is not None and not whole.members

    @property
    def misses_model(self) -> bool:
        """Whether a request that names no model must: endpoints list different ones."""
        return len(self._listed_by) > 1 and not self.any_model.members and not self.expects_any

    def know(self, models: Iterable[str]) -> bool:
        """Note names of models; tell whether any is new.

        Their order decides which model a pool lives on for. It is that of their names: a set's is another in each run.
        """
        fresh = sorted({model for model in models if model not in self.by_model})
        for model in fresh:
            self.by_model[model] = self.any_model
        self.any_model.names += len(fresh)
        return bool(fresh)

    def know_subset(self, model: str | None, allowed: frozenset[str], *, is_awaited: bool = False) -> None:
        """Note a set of allowed endpoints, of those that serve `model`. A new one costs nobody else's pool anything.

        `is_awaited`: one waits already that may go to no others, whoever serves its model, and it is not the only one
        that is about to stand in the line of such a set: no other set is forgotten.
        """
        key, whole = self._subset_key(model, allowed), self.find(model)
        if whole is None and is_awaited:
            whole = self.any_model
        if whole is None or key in self.subsets:
            return
        if not is_awaited:
            self._forget_subsets()
        members = self._allowed(key, whole)
        near = members[0].pools if members else (self.every, self.any_model)
        pool = next((pool.base for pool in near if pool.base.members == members), None)
        if pool is None:
            pool = whole.part(members)
            pool.is_part = True
            self._all += (pool,)
        self.subsets[key] = pool

    def _subset_key(self, model: str | None, allowed: frozenset[str]) -> tuple[str | None, frozenset[str]]:
        return (model if model is None or model in self.by_model else NAMELESS), allowed

    def _allowed(self, key: tuple[str | None, frozenset[str]], whole: Pool | None) -> list[Endpoint]:
        """Return who is in a subset; if all of these are left out for its model, they stay: they are the last ones."""
        model, allowed = key
        members = [] if whole is None else [one for one in whole.members if one.name in allowed]
        if not members and model is not None:
            left_out = [one for one in self.every.members if one.name in allowed and model in one.missing.models]
            members = [one for one in left_out if not one.spec.models or model in one.spec.models]
        return members

    def _forget_subsets(self) -> None:
        """Make room for one more among those that are remembered, of which nobody waits for most."""
        for key in list(islice(self.subsets, LOOKED_AT if len(self.subsets) >= MOST_SUBSETS else 0)):
            pool = self.subsets.pop(key)
            if any(one.waiting_total or one in self.awaited for one in pool.with_lanes()):
                self.subsets[key] = pool  # looked at again when all others were
                continue
            if pool.is_part and pool not in self.subsets.values():
                self._all = tuple(one for one in self._all if one is not pool)
                for one in pool.with_lanes():
                    one.leave()
                self._keep_shares()
            if len(self.subsets) < MOST_SUBSETS:
                return

    def _keep_shares(self) -> None:
        here = (one for pool in self._all for one in pool.with_lanes())
        self.every.tenants.keep(share for pool in here for share in pool.shares.values())
        self.every.tenants.keep_turns(turns for one in self.every.members for turns in one.turns.values())

    def join(self, endpoint: Endpoint) -> list[Pool] | None:
        """Follow an endpoint that is new. Return the pools that were split: who waits there may have to move.

        A pool all of whose models it serves gains a member; else those models part from the others. What that costs
        does not grow with the number of endpoints. None: it changes more, and only `regroup` can follow.
        """
        if self.subsets or not self._is_whole:
            return None
        models = endpoint.spec.models
        twin = self._listed_by.get(models)
        if twin is not None:
            for pool in twin.pools:
                pool.enter(endpoint)
            return []
        if not models or not self.every.members or len(self.by_model) > MOST_MODELS:
            return None
        nameless = self.find(None)
        self.know(models)
        self._listed_by[models] = endpoint
        serves: dict[Pool, set[str]] = {self.every: set()}
        for model in sorted(models):
            serves.setdefault(self.by_model[model], set()).add(model)
        split: list[Pool] = []
        for pool, its in serves.items():
            gains = pool
            if len(its) != pool.names:
                gains = self._part(pool, its)
                split += pool.with_lanes()
            for one in gains.with_lanes():
                one.enter(endpoint)
        if (
            nameless is not None and self.find(None) is not nameless
        ):  # a second list: who names no model waits elsewhere
            split += nameless.with_lanes()
        return split

    def leave(self, endpoint: Endpoint) -> list[Pool] | None:
        """Follow an endpoint that is gone. Return the pools that are no more, or for less: who waits there may move.

        Its pools lose a member. One that has the same ones as another then becomes that one: what nobody serves any
        more is all in one. None: it changes more, and only `regroup` can follow.
        """
        if self.subsets or not self._is_whole or len(self.by_model) > MOST_MODELS:
            return None
        models, nameless = endpoint.spec.models, self.find(None)
        pools = [pool for pool in endpoint.pools if pool.base is pool]
        least = min(pools, key=lambda pool: len(pool.members))
        twin = next((one for one in least.members if one is not endpoint and one.spec.models == models), None)
        becomes: dict[Pool, Pool] = {}
        if twin is not None:  # it stays wherever `endpoint` was, so all pools differ as before
            self._listed_by[models] = twin
        elif models:
            del self._listed_by[models]
            becomes = {pool: same for pool in pools if (same := self._same_without(pool, endpoint)) is not None}
        else:
            return None
        for pool in endpoint.pools:
            if pool.base not in becomes:
                pool.members.remove(endpoint)
        for pool, same in becomes.items():
            same.names += pool.names
        self.every = becomes.get(self.every, self.every)
        self.by_model.update({model: becomes[pool] for model in models if (pool := self.by_model[model]) in becomes})
        self._all = tuple(pool for pool in self._all if pool not in becomes)
        left = [one for pool in becomes for one in pool.with_lanes()]
        for pool in left:
            pool.leave()
        self._left += [pool for pool in left if pool.waiting_total]
        if nameless is not None and nameless not in left and self.find(None) is not nameless:
            left += nameless.with_lanes()
        self._keep_shares()
        return left

    def _same_without(self, pool: Pool, endpoint: Endpoint) -> Pool | None:
        """Return another pool of all members of `pool` but `endpoint`."""
        rest = [one for one in pool.members if one is not endpoint]
        return next((one.base for one in rest[0].pools if one.members == rest), None) if rest else self.any_model

    def _part(self, pool: Pool, models: Iterable[str]) -> Pool:
        """Give `models` a pool of their own; and what is for every endpoint whatever it serves, if it was in `pool`."""
        part = pool.part()
        for model in models:
            self.by_model[model] = part
            part.names += 1
        if pool is self.every:
            self.every = part
        pool.names -= part.names
        self._all += (part,)
        return part

    def regroup(self, present: list[Endpoint], lanes: Container[str] = ()) -> tuple[tuple[Pool, ...], list[Pool]]:
        """Follow the endpoints that are there now. Return the pools that were, and where who waits may have to move.

        `lanes`: the weighted classes of the rules; another's lane goes when nobody waits there. A set of endpoints is
        a number with a bit for each. A pool lives on while one of its models keeps it.
        """
        before, were = tuple(self), self._places()
        lists: dict[frozenset[str], int] = {}
        missing = _missing(present)
        self._listed_by = {}
        for number, endpoint in enumerate(present):
            endpoint.pools = []
            self._listed_by[endpoint.spec.models] = endpoint
            lists[endpoint.spec.models] = lists.get(endpoint.spec.models, 0) | 1 << number
        served: dict[str, int] = {}
        for models, listed_by in lists.items():
            for model in models:
                served[model] = served.get(model, 0) | listed_by
        lists_none = lists.get(frozenset(), 0)
        self.know((*served, *missing))
        self._is_whole = not missing
        self._forget_models(served)
        for pool in before:
            pool.forget_endpoints()
        kept: dict[int, Pool] = {}
        taken: set[Pool] = set()
        self.any_model = _keep(kept, taken, lists_none, self.any_model, present)
        self.any_model.names += 1
        for model, pool in self.by_model.items():
            members = served.get(model, 0) | lists_none
            members = members & ~missing.get(model, 0) or members  # the last ones stay
            self.by_model[model] = found = _keep(kept, taken, members, pool, present)
            found.names += 1
        # The last to choose: hardly anybody waits for any endpoint whatever it serves.
        self.every = _keep(kept, taken, (1 << len(present)) - 1, self.every, present)
        self._keep_subsets(kept, taken, present)
        self._all = tuple(kept.values())
        here = {one for pool in self._all for one in pool.with_lanes()}
        self._left = [pool for pool in before if pool.waiting_total and pool not in here]
        for pool in self._all:
            for name, lane in list(pool.lanes.items()):
                if name in lanes or lane.waiting_total:
                    for endpoint in pool.members:
                        lane.enter(endpoint)
                else:
                    del pool.lanes[name]
        self._keep_shares()
        all_may_move = bool(self.subsets) or self._expected_any is not self.expects_any
        self._expected_any = self.expects_any
        return before, list(before) if all_may_move else self._parted(were)

    def _places(self) -> dict[str | None, Pool]:
        """Return where requests wait, by model: for each known one, for any other, and for none."""
        unknown = self.find(NAMELESS) or self.any_model
        places: dict[str | None, Pool] = dict(self.by_model.items())
        places[NAMELESS], places[None] = unknown, self.find(None) or self.any_model
        return places

    def _parted(self, were: dict[str | None, Pool]) -> list[Pool]:
        """Return the pools that are no more for all that they were for, and the lanes of these."""
        are = self._places()
        parted = {pool: None for model, pool in were.items() if are.get(model, are[NAMELESS]) is not pool}
        if are.keys() - were.keys():
            parted[were[NAMELESS]] = None  # a model got its name
        return [one for pool in parted for one in pool.with_lanes()]

    def _keep_subsets(self, kept: dict[int, Pool], taken: set[Pool], present: list[Endpoint]) -> None:
        """Follow the endpoints with the pools of those that requests allow; one that is all who serve has no own."""
        wholes = set(kept)
        bits = {endpoint: 1 << number for number, endpoint in enumerate(present)}
        for key, pool in self.subsets.items():
            number = sum(bits[one] for one in self._allowed(key, self.find(key[0])))
            self.subsets[key] = part = _keep(kept, taken, number, pool, present)
            part.is_part = number not in wholes

    def _forget_models(self, served: dict[str, int]) -> None:
        surplus = len(self.by_model) - len(served) - MOST_MODELS
        if surplus > 0:
            for model in [model for model in self.by_model if model not in served][:surplus]:
                del self.by_model[model]


def _missing(present: list[Endpoint]) -> dict[str, int]:
    """Return the sets of endpoints that are left out for a model, by model."""
    missing: dict[str, int] = {}
    for number, endpoint in enumerate(present):
        for model in endpoint.missing.models:
            missing[model] = missing.get(model, 0) | 1 << number
    return missing


def _numbers(members: int) -> Iterator[int]:
    """Walk the numbers of the bits that are set: few of many cost what few do."""
    while members:
        lowest = members & -members
        yield lowest.bit_length() - 1
        members ^= lowest


def _keep(kept: dict[int, Pool], taken: set[Pool], members: int, pool: Pool, present: list[Endpoint]) -> Pool:
    """Return the pool of `members`: the first that was for any of their models, if no other set has it."""
    found = kept.get(members)
    if found is None:
        found = kept[members] = Pool(pool.tenants, pool.laws) if pool in taken else pool
        taken.add(found)
        found.members = [present[number] for number in _numbers(members)]
        for endpoint in found.members:
            endpoint.pools.append(found)
    return found
