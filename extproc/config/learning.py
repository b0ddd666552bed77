"""The constants of what is learned of servers, as keys: of the adaptive limit, and of all else.

Those by which servers and lines are judged are in judging.py.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from extproc.admission.laws import LAWS, AnswerLaw, CounterLaw, KvLaw, Laws, PromptLaw, StepLaw, TokenLaw
from extproc.admission.limit import CEILING, DEFAULT_LAW, LimitLaw
from extproc.config.judging import (
    AdapterLearningConfig,
    ForeignLearningConfig,
    GuardLearningConfig,
    HealthLearningConfig,
    PaceLearningConfig,
)
from extproc.config.section import Section
from extproc.config.types import Percent, PositiveDuration

_KV, _PROMPTS, _ANSWERS, _COUNTERS = LAWS.kv, LAWS.prompts, LAWS.answers, LAWS.counters
_STEPS, _TOKENS = LAWS.steps, LAWS.tokens
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Times = Annotated[float, Field(ge=1.0, le=100.0)]
Count = Annotated[float, Field(ge=1.0, le=1e6)]


class LimitConfig(Section):
    """How an adaptive limit follows an endpoint; docs/how-it-works.md has the law."""

    start: Annotated[int, Field(ge=1, le=CEILING)] = Field(
        DEFAULT_LAW.start, description="The first limit. It doubles."
    )
    floor: Annotated[int, Field(ge=1, le=CEILING)] = Field(
        DEFAULT_LAW.floor, description="The least, unless the server itself runs fewer."
    )
    tpot: PositiveDuration = Field(
        DEFAULT_LAW.tpot_s, description="Wanted time per output token where no class has a `tpot`."
    )
    step_factor: Annotated[float, Field(ge=1.0, le=10.0)] = Field(
        DEFAULT_LAW.best_factor,
        description="Where a server's step alone takes long, so many times that is wanted instead.",
    )
    aimed: Share = Field(DEFAULT_LAW.aimed, description="Where a class has a `tpot`: this share of it is aimed at, ...")
    attainable: Times = Field(
        DEFAULT_LAW.attainable, description="... but no less than so many times a server's step alone."
    )
    probe: PositiveDuration = Field(
        DEFAULT_LAW.probe_s,
        description="How long a batch size that was found is believed before more is tried; doubles.",
    )
    longest_probe: PositiveDuration = Field(
        DEFAULT_LAW.probe_most_s, description="... up to this, while it is found again."
    )
    shrink: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        DEFAULT_LAW.shrink, description="A second of answers slower than wanted leaves at least this share of a limit."
    )
    grow: Annotated[float, Field(gt=1.0, le=4.0)] = Field(
        DEFAULT_LAW.grow,
        description="A second in which requests wait for the limit makes it at most so many times more.",
    )
    leap: Annotated[float, Field(gt=1.0, le=4.0)] = Field(
        DEFAULT_LAW.leap, description="The same while answers are much faster than wanted."
    )
    kv_brake: Percent = Field(
        round(100 * DEFAULT_LAW.kv_brake),
        description="Percent of the KV cache in use above which a limit shrinks, where the cache's size is not known.",
    )
    queued: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        DEFAULT_LAW.queued, description="A server queues when more than this share of what it runs waits inside it ..."
    )
    queued_readings: Annotated[int, Field(ge=1, le=100)] = Field(
        DEFAULT_LAW.queued_readings, description="... in so many readings in a row, while it runs no more than before."
    )

    silent_readings: Annotated[int, Field(ge=1, le=1000)] = Field(
        DEFAULT_LAW.silent_readings,
        description="After more readings in a row than this without a word of tokens, answers' times make the limit.",
    )

    def law(self, objective_s: float | None) -> LimitLaw:
        """Return them as admission knows them; `objective_s`: the tightest `tpot` of the classes."""
        return LimitLaw(
            start=self.start,
            floor=self.floor,
            tpot_s=self.tpot,
            best_factor=self.step_factor,
            objective_s=objective_s,
            aimed=self.aimed,
            attainable=self.attainable,
            probe_s=self.probe,
            probe_most_s=max(self.longest_probe, self.probe),
            shrink=self.shrink,
            grow=self.grow,
            leap=max(self.leap, self.grow),
            kv_brake=self.kv_brake / 100,
            queued=self.queued,
            queued_readings=self.queued_readings,
            silent_readings=self.silent_readings,
        )


class KvLearningConfig(Section):
    """How the books of a KV cache follow what a server says of it."""

    fill: Percent = Field(
        round(100 * _KV.share),
        description="Percent of the cache that requests may be booked for: the rest is for answers that get longer.",
    )
    least_real: Share = Field(
        _KV.least_real,
        description="The least share of a booked prompt that is taken to need room, however much requests share.",
    )
    memory: PositiveDuration = Field(
        _KV.memory_s, description="What prompts really took so long ago weighs a third of what they take now."
    )
    enough: Share = Field(
        _KV.enough, description="Share of the cache that must be booked for prompts before a reading says anything."
    )
    pressed: Percent = Field(
        round(100 * _KV.pressed),
        description="Requests that wait inside a server mean that its cache is full if so much of it is in use.",
    )
    doubt: PositiveDuration = Field(
        _KV.doubt_s,
        description="After so long without any such pressure, while requests wait, what it says is in use is ignored.",
    )

    def law(self) -> KvLaw:
        """Return them as admission knows them."""
        return KvLaw(
            share=self.fill / 100,
            least_real=self.least_real,
            memory_s=self.memory,
            enough=self.enough,
            pressed=self.pressed / 100,
            doubt_s=self.doubt,
        )


class PromptLearningConfig(Section):
    """When a prompt counts as computed, and how many may be under way at a server."""

    chunk: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        _PROMPTS.chunk, description="Prompt tokens that a server computes in one step at the most."
    )
    chunks: Annotated[int, Field(ge=1, le=1000)] = Field(
        _PROMPTS.chunks, description="So many chunks may be under way, ..."
    )
    ahead: PositiveDuration = Field(_PROMPTS.ahead_s, description="... or what it computes in this time, ...")
    prompts: Annotated[float, Field(ge=1.0, le=1000.0)] = Field(
        _PROMPTS.prompts, description="... or so many prompts of mean length: what is most."
    )
    caution: Times = Field(
        _PROMPTS.caution, description="How much longer than its costs say a prompt is taken to need ..."
    )
    most_caution: Times = Field(
        _PROMPTS.most_caution, description="... at first; and at the most, at a server that falls behind."
    )
    slower: Times = Field(_PROMPTS.slower, description="What a reading behind the prediction changes that by, ...")
    calmer: Share = Field(_PROMPTS.calmer, description="... and one that is not behind.")
    tolerance: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        _PROMPTS.tolerance, description="It is behind by more than this share of what it can do between two readings."
    )
    first_token: PositiveDuration = Field(
        _PROMPTS.first_token_s, description="What a prompt token takes before anything was seen."
    )
    streamed: Share = Field(
        _PROMPTS.streamed,
        description="An answer whose first byte came this share of its time before its end was streamed.",
    )
    patience: Times = Field(
        _PROMPTS.patience,
        description="With `first_byte_probe`: one that has no first byte after so many times the predicted time ...",
    )
    longest_patience: PositiveDuration = Field(
        _PROMPTS.patience_s, description="... or this time does not stream, and its prompt counts as computed."
    )
    overtaken: Share = Field(
        _PROMPTS.overtaken,
        description="A first byte tells that prompts sent this share of their predicted time before are computed too.",
    )
    nudge: Annotated[float, Field(gt=1.0, le=2.0)] = Field(
        _PROMPTS.nudge,
        description="How much a first byte changes what a prompt token is taken to need, where no counter tells.",
    )
    lengths: Count = Field(_PROMPTS.lengths, description="So many of the last prompts make their mean length.")
    hits: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        _PROMPTS.hits, description="What a reading of hits in the prefix cache keeps of those before it."
    )

    def law(self) -> PromptLaw:
        """Return them as admission knows them."""
        return PromptLaw(
            chunk=self.chunk,
            caution=self.caution,
            slower=self.slower,
            calmer=self.calmer,
            most_caution=max(self.most_caution, self.caution),
            tolerance=self.tolerance,
            first_token_s=self.first_token,
            streamed=self.streamed,
            patience=self.patience,
            patience_s=self.longest_patience,
            nudge=self.nudge,
            lengths=self.lengths,
            hits=self.hits,
            overtaken=self.overtaken,
            chunks=self.chunks,
            ahead_s=self.ahead,
            prompts=self.prompts,
        )


class AnswerLearningConfig(Section):
    """What the times of answers say of a server that counts no tokens."""

    memory: Count = Field(_ANSWERS.memory, description="An answer so many answers ago weighs a third of the last one.")
    noise: Annotated[float, Field(gt=0.0, le=10.0)] = Field(
        _ANSWERS.noise, description="How much answers' times differ by their lengths: of their logarithms."
    )
    farthest: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        _ANSWERS.farthest, description="An answer further from the mean counts as one so far: of the logarithms."
    )
    hope: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        _ANSWERS.hope, description="No more is tried where it would be right by no more than this chance."
    )
    long: PositiveDuration = Field(_ANSWERS.long_s, description="As slow as an answer should become ...")
    most: Times = Field(_ANSWERS.most, description="... but at the most so many times what it takes alone, ...")
    enough: Times = Field(_ANSWERS.enough, description="... and always this many times.")

    def law(self) -> AnswerLaw:
        """Return them as admission knows them."""
        return AnswerLaw(
            memory=self.memory,
            noise=self.noise,
            farthest=self.farthest,
            hope=self.hope,
            long_s=self.long,
            most=max(self.most, self.enough),
            enough=self.enough,
        )


class CounterLearningConfig(Section):
    """When a server's counters are not believed: their mean answer, held against that of its pool."""

    far: Times = Field(_COUNTERS.far, description="So many times longer or shorter, and they are not believed ...")
    near: Times = Field(_COUNTERS.near, description="... until it is at most so many times.")
    memory: Count = Field(_COUNTERS.memory, description="So many of its last answers make the mean.")
    enough: Count = Field(_COUNTERS.enough, description="Answers of a server before it is judged.")

    def law(self) -> CounterLaw:
        """Return them as admission knows them."""
        return CounterLaw(
            far=self.far,
            near=min(self.near, self.far),
            memory=self.memory,
            enough=min(self.enough, self.memory),
        )


class StepLearningConfig(Section):
    """What a step of a server costs, by its counters: itself, for each sequence, for each prompt token."""

    base: PositiveDuration = Field(
        _STEPS.base_s, description="What a step alone takes, before anything was seen; and for a server added later."
    )
    sequence: PositiveDuration = Field(_STEPS.sequence_s, description="What each running sequence adds, ...")
    prompt: PositiveDuration = Field(_STEPS.prompt_s, description="... and each prompt token.")
    base_off: PositiveDuration = Field(_STEPS.base_off_s, description="By how much `base` may be off, ...")
    sequence_off: PositiveDuration = Field(_STEPS.sequence_off_s, description="... and `sequence`, ...")
    prompt_off: PositiveDuration = Field(_STEPS.prompt_off_s, description="... and `prompt`.")
    base_drift: PositiveDuration = Field(
        _STEPS.base_drift_s, description="How far what a step alone takes may move in a second, ..."
    )
    sequence_drift: PositiveDuration = Field(_STEPS.sequence_drift_s, description="... what a sequence adds, ...")
    prompt_drift: PositiveDuration = Field(_STEPS.prompt_drift_s, description="... and what a prompt token adds.")
    noise: Annotated[float, Field(gt=0.0, le=10.0)] = Field(
        _STEPS.noise, description="Share of the time between two readings that these costs may leave unexplained, ..."
    )
    uncounted: Count = Field(
        _STEPS.uncounted, description="... and the prompt tokens that a reading may miss, or count late."
    )
    memory: PositiveDuration = Field(
        _STEPS.memory_s, description="The time per output token so long ago weighs a third of the present one."
    )

    def law(self) -> StepLaw:
        """Return them as admission knows them."""
        return StepLaw(
            base_s=self.base,
            sequence_s=self.sequence,
            prompt_s=self.prompt,
            base_off_s=self.base_off,
            sequence_off_s=self.sequence_off,
            prompt_off_s=self.prompt_off,
            base_drift_s=self.base_drift,
            sequence_drift_s=self.sequence_drift,
            prompt_drift_s=self.prompt_drift,
            noise=self.noise,
            uncounted=self.uncounted,
            memory_s=self.memory,
        )


class TokenLearningConfig(Section):
    """How many tokens a prompt and an answer are taken to have."""

    answer: Count = Field(
        _TOKENS.answer, description="Tokens of an answer before any was counted: at the start of the sidecar."
    )
    memory: Count = Field(_TOKENS.memory, description="So many of the last answers make their mean.")
    own: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        _TOKENS.own,
        description="After so many answers of its own a model and class is judged by these and by all, half and half.",
    )
    first_pace: Count = Field(
        _TOKENS.first_pace, description="Tokens per second of one answer before any was seen: at the start."
    )
    nudge: Annotated[float, Field(gt=1.0, le=2.0)] = Field(
        _TOKENS.nudge, description="What an answer changes the median of that by."
    )
    most_faster: Times = Field(
        _TOKENS.most_faster, description="A server that writes more times as fast as the median is not believed."
    )
    most_step: Times = Field(
        _TOKENS.most_step, description="Prompts counted at more times what was expected are not believed, either."
    )
    untried: Count = Field(
        _TOKENS.untried,
        description="Where a larger prompt was refused for its size, which no server has counted, such are booked as "
        "so many tokens, one at a time, until one is counted; only where all servers count prompts.",
    )
    unsure: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        _TOKENS.unsure,
        description="How far the tokens of prompts of one kind and size may be off at first: variance; ...",
    )
    sure: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        _TOKENS.sure, description="... and at least, for ever: they may change."
    )
    noise: Annotated[float, Field(gt=0.0, le=10.0)] = Field(
        _TOKENS.noise, description="Share of a count of prompts that may be off for other reasons."
    )

    def law(self) -> TokenLaw:
        """Return them as admission knows them."""
        return TokenLaw(
            answer=self.answer,
            memory=self.memory,
            own=self.own,
            untried=self.untried,
            most_step=self.most_step,
            most_faster=self.most_faster,
            first_pace=self.first_pace,
            nudge=self.nudge,
            sure=self.sure,
            unsure=self.unsure,
            noise=self.noise,
        )


class LearningConfig(Section):
    """What is learned of servers beside their limits; docs/adr/0009 has why."""

    kv: KvLearningConfig = Field(KvLearningConfig(), description="Of KV caches.")
    prompts: PromptLearningConfig = Field(PromptLearningConfig(), description="Of prompts under way.")
    answers: AnswerLearningConfig = Field(AnswerLearningConfig(), description="Of servers that count no tokens.")
    counters: CounterLearningConfig = Field(CounterLearningConfig(), description="Of counters that may be wrong.")
    steps: StepLearningConfig = Field(StepLearningConfig(), description="Of what steps cost.")
    tokens: TokenLearningConfig = Field(TokenLearningConfig(), description="Of tokens that requests need.")
    pace: PaceLearningConfig = Field(PaceLearningConfig(), description="Of how fast lines move.")
    guard: GuardLearningConfig = Field(GuardLearningConfig(), description="Of requests that are passed over.")
    health: HealthLearningConfig = Field(HealthLearningConfig(), description="Of servers that refuse requests.")
    foreign: ForeignLearningConfig = Field(ForeignLearningConfig(), description="Of others' requests.")
    adapters: AdapterLearningConfig = Field(AdapterLearningConfig(), description="Of loaded LoRA adapters.")

    def laws(self) -> Laws:
        """Return them as admission knows them."""
        return Laws(
            self.kv.law(),
            self.prompts.law(),
            self.answers.law(),
            self.counters.law(),
            self.steps.law(),
            self.tokens.law(),
            self.pace.law(),
            self.guard.law(),
            self.health.law(),
            self.foreign.law(),
            self.adapters.law(),
        )
