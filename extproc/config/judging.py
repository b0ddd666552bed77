"""The constants of how servers and lines are judged, as keys: whether a server is well, whose its requests are, what a
loaded adapter is worth, how fast a line moves, who may be passed over. They stand in `learning`, beside those of what
servers need (learning.py)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from extproc.admission.laws import LAWS, AdapterLaw, ForeignLaw, GuardLaw, HealthLaw, PaceLaw
from extproc.config.section import Section
from extproc.config.types import PositiveDuration

_PACE, _GUARD, _HEALTH, _FOREIGN, _ADAPTERS = LAWS.pace, LAWS.guard, LAWS.health, LAWS.foreign, LAWS.adapters
Many = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class PaceLearningConfig(Section):
    """How fast a line is taken to move, and what would come too late: for `shed`, and for Retry-After."""

    memory: PositiveDuration = Field(
        _PACE.memory_s, description="What left a line so long ago weighs a third of what leaves now, ..."
    )
    gaps: Many = Field(
        int(_PACE.gaps), description="... or what left it so many requests ago, where these take longer."
    )
    enough: Many = Field(
        int(_PACE.enough), description="Nothing is predicted before so many left it while others waited, ..."
    )
    enough_slow: Many = Field(
        int(_PACE.enough_slow), description="... or so few, where the line has lasted as long as `memory`, ..."
    )
    least_busy: PositiveDuration = Field(_PACE.least_busy_s, description="... and the line has lasted for this long.")
    sure: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        _PACE.sure,
        description="With `shed`, what would wait more than so many times its budget is refused at once. Higher "
        "classes are taken to make a wait so many times as long at the most.",
    )

    def law(self) -> PaceLaw:
        """Return them as admission knows them."""
        return PaceLaw(
            memory_s=self.memory,
            gaps=float(self.gaps),
            enough=float(self.enough),
            enough_slow=float(min(self.enough_slow, self.enough)),
            least_busy_s=self.least_busy,
            sure=self.sure,
        )


class GuardLearningConfig(Section):
    """What a request that fits nowhere yet must let pass."""

    passes: Many = Field(
        _GUARD.passes,
        description="So many later ones that fit may go before it; then room is kept for it at one server.",
    )

    def law(self) -> GuardLaw:
        """Return them as admission knows them."""
        return GuardLaw(passes=self.passes)


class HealthLearningConfig(Section):
    """When a server is doubted, when it is ejected, and how it comes back."""

    eject_after: Many = Field(
        _HEALTH.eject_after,
        description="Refusals in a row that bring a server, or one of its models, into doubt; more where others refuse "
        "some all the time.",
    )
    chance: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        _HEALTH.chance,
        description="It is ejected when they would come to one that is as its peers are by a smaller chance.",
    )
    eject: PositiveDuration = Field(_HEALTH.eject_s, description="The first ejection; the next ones double, ...")
    longest_eject: PositiveDuration = Field(_HEALTH.eject_most_s, description="... up to this.")
    full: PositiveDuration = Field(
        _HEALTH.full_s, description="How long one that refused a request as full is left alone."
    )
    few: Many = Field(_HEALTH.few, description="Requests that one of whom nothing is known gets at first.")
    quiet: PositiveDuration = Field(
        _HEALTH.quiet_s,
        description="One without a health check that was idle, and showed no sign of life, for so long is unknown "
        "again: below `scrape_interval` each server would be.",
    )
    step: PositiveDuration = Field(
        _HEALTH.step_s, description="So long without a refusal, and one in doubt gets twice as many more, ..."
    )
    longest_step: PositiveDuration = Field(
        _HEALTH.step_most_s, description="... while refused ones double the wait for the next try up to this."
    )

    def law(self) -> HealthLaw:
        """Return them as admission knows them."""
        return HealthLaw(
            eject_after=self.eject_after,
            chance=self.chance,
            eject_s=self.eject,
            eject_most_s=max(self.longest_eject, self.eject),
            full_s=self.full,
            few=self.few,
            quiet_s=self.quiet,
            step_s=self.step,
            step_most_s=max(self.longest_step, self.step),
        )


class ForeignLearningConfig(Section):
    """Whose requests a server's are."""

    arrived: PositiveDuration = Field(
        _FOREIGN.arrived_s,
        description="A request is on its server's page at the latest so long after it was sent, and we are told of an "
        "answer's end at the latest so long after it.",
    )
    steady: PositiveDuration = Field(
        _FOREIGN.steady_s, description="Others' requests that don't get fewer for so long count half, and so on."
    )
    each: PositiveInt = Field(
        _FOREIGN.each,
        description="Whatever was learned, for so many of others' on the server's page one of ours may be there.",
    )
    alone: Share = Field(
        _FOREIGN.alone, description="Counters say something of our requests if this share of all there is ours."
    )

    def law(self) -> ForeignLaw:
        """Return them as admission knows them."""
        return ForeignLaw(arrived_s=self.arrived, steady_s=self.steady, each=self.each, alone=self.alone)


class AdapterLearningConfig(Section):
    """What a LoRA adapter that a server has loaded is worth, with `adapter_affinity`."""

    below: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        _ADAPTERS.below, description="A server that has it goes before emptier ones while so much of it is taken, ..."
    )
    times: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        _ADAPTERS.times,
        description="... or so many times as much as of the emptiest, where that has no slot for an adapter.",
    )

    def law(self) -> AdapterLaw:
        """Return them as admission knows them."""
        return AdapterLaw(below=self.below, times=self.times)
