"""Models that one endpoint refuses while it serves others and its peers serve them: an adapter that failed to load, a
server that never had the model.

Health judges an endpoint as a whole, and each good answer clears it. Here each model has its own refusals in a row, by
the same measure. An endpoint is left out for that model alone, for as long as an ejection lasts; pools follow.

A request that its client had go there, by a name or its session, says less when it is refused: nobody knows what others
would have said. One client would have whom it likes left out. So such refusals are counted apart. After a few in a row
that model's requests are led there no more, and of whatever model none, until one is answered well: they go anywhere,
and so can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.streak import Streak, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.laws import HealthLaw

MOST_MODELS = 64
"""Models of an endpoint whose refusals are counted; clients may make up names. The oldest are forgotten first."""
MOST_TALLIES = 256
"""The same of all endpoints together."""


class Tallies:
    """What became of requests for models that somebody refused, over all endpoints: the measure for each of them."""

    __slots__ = ("_tallies",)

    def __init__(self) -> None:
        """Start without any."""
        self._tallies: dict[str, Tally] = {}

    def served(self, model: str | None, *, is_led: bool) -> None:
        """Count a good answer; `is_led`: its client had it go where it went."""
        if model is not None:
            tally = self._tallies.get(model)
            if tally is not None:
                tally.served += 1
                tally.led += is_led

    def of(self, model: str) -> Tally:
        """Return what is known of a model, of which a request was refused."""
        tally = self._tallies.get(model)
        if tally is None:
            if len(self._tallies) >= MOST_TALLIES:
                del self._tallies[next(iter(self._tallies))]
            tally = self._tallies[model] = Tally()
        return tally


class _Model:
    __slots__ = ("ejections", "streak", "until")

    def __init__(self) -> None:
        self.streak: Streak | None = None
        self.ejections = 0
        self.until: float | None = None  # it is left out till then


class Missing:
    """One endpoint's models that it refuses.

    Attributes:
        models: those that it is left out for.
        led: how many requests in a row it refused of those that were led there, by model.
        led_in_a_row: how many of whatever model, since its last good answer.
        until: when time alone ends the first of them; None: there is none.
        law: the constants, those of health.
    """

    __slots__ = ("_known", "law", "led", "led_in_a_row", "models", "until")

    def __init__(self, law: HealthLaw = LAWS.health) -> None:
        """Start with nothing against it."""
        self.law = law
        self.models: frozenset[str] = frozenset()
        self.led: dict[str | None, int] = {}
        self.led_in_a_row = 0
        self._known: dict[str, _Model] = {}
        self.until: float | None = None

    def served(self, model: str | None) -> None:
        """Note a good answer: of this model, it is no news that others serve it."""
        self.led_in_a_row = 0
        if self.led:
            self.led.pop(model, None)
        if self._known and model is not None:
            known = self._known.get(model)
            if known is not None and known.until is None:
                del self._known[model]

    def refused_led(self, model: str | None) -> bool:
        """Note that it refused one that was led there; tell whether no others of its `model`, or none, are any more."""
        self.led_in_a_row += 1
        count = self.led.pop(model, 0) + 1
        self.led[model] = count
        if len(self.led) > MOST_MODELS:
            del self.led[next(iter(self.led))]
        return self.law.eject_after in (count, self.led_in_a_row)

    def leads(self, model: str | None) -> bool:
        """Tell whether requests for `model` may be led there."""
        most = self.law.eject_after
        return self.led_in_a_row < most and self.led.get(model, 0) < most

    def refused(self, model: str, tally: Tally, now: float, in_a_row: int) -> bool:
        """Note a refusal, the `in_a_row`th of whatever model; tell whether it is left out for `model` from now on."""
        known = self._known.get(model)
        if known is None:
            if len(self._known) >= MOST_MODELS:
                oldest = next((name for name, one in self._known.items() if one.until is None), None)
                if oldest is None:
                    return False  # it lacks more than anybody should
                del self._known[oldest]
            known = self._known[model] = _Model()
        law, streak = self.law, known.streak
        if streak is None or streak.tally is not tally:
            streak = known.streak = Streak(tally)
        streak.add(now)
        if known.until is not None:
            return False  # it was sent before
        if streak.count < law.eject_after or streak.count <= in_a_row or streak.chance() > law.chance:
            return False  # too few, the endpoint as a whole, or others refuse it, too
        known.ejections += 1
        known.until = now + law.ejection_s(known.ejections)
        self._changed()
        return True

    def leave_out(self, models: Iterable[str], until: float) -> None:
        """Leave these out until then: others serve them, and the endpoint stays for those that it serves alone."""
        for model in models:
            self._known.setdefault(model, _Model()).until = until
        self._changed()

    def forgive(self, models: frozenset[str]) -> None:
        """Try these again now: nobody else is left who serves them."""
        for model in models:
            self._known[model].until = None
        self._changed()

    def pass_time(self, now: float) -> bool:
        """Try again what was left out for long enough; tell whether there was any."""
        if self.until is None or now < self.until:
            return False
        for known in self._known.values():
            if known.until is not None and now >= known.until:
                known.until = None  # one more refusal, of what its peers go on to serve, is enough
        self._changed()
        return True

    def _changed(self) -> None:
        out = {model: known.until for model, known in self._known.items() if known.until is not None}
        self.models = frozenset(out)
        self.until = min(out.values(), default=None)
