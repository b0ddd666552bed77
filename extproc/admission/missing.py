"""Models that one endpoint refuses while it serves others and its peers serve them: an adapter that failed to load, a
server that never had the model.

Health judges an endpoint as a whole, and each good answer clears it. Here each model has its own refusals in a row, by
the same measure. An endpoint is left out for that model alone, for as long as an ejection lasts; pools follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.health import Record, Streak
from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import HealthLaw

MOST_MODELS = 64
"""Models of an endpoint whose refusals are counted; clients may make up names. The oldest are forgotten first."""
MOST_RECORDS = 256
"""The same of all endpoints together."""


class Records:
    """What became of requests for models that somebody refused, over all endpoints: the measure for each of them."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        """Start without any."""
        self._records: dict[str, Record] = {}

    def served(self, model: str | None) -> None:
        """Count a good answer."""
        if model is not None:
            record = self._records.get(model)
            if record is not None:
                record.served += 1

    def of(self, model: str) -> Record:
        """Return what is known of a model, of which a request was refused."""
        record = self._records.get(model)
        if record is None:
            if len(self._records) >= MOST_RECORDS:
                del self._records[next(iter(self._records))]
            record = self._records[model] = Record()
        return record


class _Model:
    __slots__ = ("ejections", "record", "streak", "until")

    def __init__(self, record: Record) -> None:
        self.ejections = 0
        self.until: float | None = None  # it is left out till then
        self.begin(record)

    def begin(self, record: Record, count: int = 0) -> None:
        self.record = record
        self.streak = Streak(record)
        self.streak.count = count
        self.streak.refused -= count  # so many of the record are its own


class Missing:
    """One endpoint's models that it refuses.

    Attributes:
        models: those that it is left out for.
        until: when time alone ends the first of them; None: there is none.
        law: the constants, those of health.
    """

    __slots__ = ("_known", "law", "models", "until")

    def __init__(self, law: HealthLaw = LAWS.health) -> None:
        """Start with nothing against it."""
        self.law = law
        self.models: frozenset[str] = frozenset()
        self._known: dict[str, _Model] = {}
        self.until: float | None = None

    def served(self, model: str | None) -> None:
        """Note a good answer: of this model, it is no news that others serve it."""
        if self._known and model is not None:
            known = self._known.get(model)
            if known is not None and known.until is None:
                del self._known[model]

    def refused(self, model: str, record: Record, now: float, in_a_row: int) -> bool:
        """Note a refusal, the `in_a_row`th of whatever model; tell whether it is left out for `model` from now on."""
        known = self._known.get(model)
        if known is None:
            if len(self._known) >= MOST_MODELS:
                oldest = next((name for name, one in self._known.items() if one.until is None), None)
                if oldest is None:
                    return False  # it lacks more than anybody should
                del self._known[oldest]
            known = self._known[model] = _Model(record)
        elif known.record is not record:
            known.begin(record)
        record.refused += 1
        if known.until is not None:
            return False  # it was sent before
        law, streak = self.law, known.streak
        streak.count += 1
        others_serve_it = record.served > streak.served
        if streak.count < law.eject_after or streak.count <= in_a_row or not others_serve_it:
            return False  # too few, the endpoint as a whole, or nobody's
        if streak.peers_share() ** streak.count > law.chance:
            return False
        known.ejections += 1
        known.until = now + law.ejection_s(known.ejections)
        self._changed()
        return True

    def forgive(self, models: frozenset[str]) -> None:
        """Try these again now: nobody else is left who serves them."""
        for model in models:
            self._try_again(self._known[model])
        self._changed()

    def pass_time(self, now: float) -> bool:
        """Try again what was left out for long enough; tell whether there was any."""
        if self.until is None or now < self.until:
            return False
        for known in self._known.values():
            if known.until is not None and now >= known.until:
                self._try_again(known)
        self._changed()
        return True

    def _try_again(self, known: _Model) -> None:
        known.until = None
        # One more refusal, of what its peers go on to serve, is enough.
        known.begin(known.record, self.law.eject_after - 1)

    def _changed(self) -> None:
        out = {model: known.until for model, known in self._known.items() if known.until is not None}
        self.models = frozenset(out)
        self.until = min(out.values(), default=None)
