"""The constants of what is learned of an engine, beside its limit's own (`limit.py`): the config's `learning`.

What a change of one is judged by: `python -m bench.matrix --gate`. A bound that keeps a lie or a flood small, a memory
that must not grow, a grid, exactness given up for time are no laws; docs/tuning.md has what else has no key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvLaw:
    """The constants of the books.

    Attributes:
        share: how much of the KV cache the books may fill: the rest is for estimates that were too low.
        least_real: the least of a booked prompt that is taken to need room.
        memory_s: what a reading before that showed of shared prompts weighs less than a third.
        enough: share of the cache that computed prompts must be booked for before a reading says anything of them.
        pressed: requests that wait inside an engine say that its cache is full if so much of it is in use.
        doubt_s: so long an engine must show no pressure, while requests wait for it, until its figure is not believed
            at all.
    """

    share: float = 0.92
    least_real: float = 1 / 32
    memory_s: float = 10.0
    enough: float = 0.05
    pressed: float = 0.9
    doubt_s: float = 20.0


@dataclass(frozen=True, slots=True)
class PromptLaw:
    """The constants of the prediction, and of how much may be under way.

    Attributes:
        chunk: prompt tokens that a step computes at the most (vLLM's max_num_batched_tokens was 512 to 8,192 over the
            years).
        caution: how much longer than its costs say a prompt is taken to need: what is sent too early waits inside.
        slower, calmer: what a reading changes that by when the count is behind the prediction, and when it is not: an
            engine may compute less of its prompts in a step than `chunk`.
        most_caution: the most that it becomes.
        tolerance: how far behind the count may be, as a share of what the engine could have done since the last
            reading.
        first_token_s: seconds a prompt token takes before anything was seen.
        streamed: an answer whose first byte came this share of its time before its end was streamed.
        patience, patience_s: a first byte that was to be seen and did not come in so many times the predicted time, or
            so many seconds, is one of an answer that does not stream.
        nudge: how much one first byte moves what a prompt token is taken to need, where nothing else tells: up or down,
            so that it settles at the median.
        lengths: about so many of the last prompts make their mean length.
        hits: what a reading of prefix hits keeps of those before.
        overtaken: a prompt that was sent this share of its predicted time before one whose first byte came is computed
            too.
        chunks, ahead_s, prompts: so many chunks may be under way at an endpoint, or what it computes in `ahead_s`, or
            so many prompts of mean length: what is most. Less leaves steps half empty; more is a line inside the
            engine that nobody can reorder.
    """

    chunk: int = 2048
    caution: float = 1.15
    slower: float = 1.15
    calmer: float = 0.98
    most_caution: float = 20.0
    tolerance: float = 0.25
    first_token_s: float = 1.2e-4
    streamed: float = 0.1
    patience: float = 1.5
    patience_s: float = 2.0
    nudge: float = 1.05
    lengths: float = 50.0
    hits: float = 0.9
    overtaken: float = 0.5
    chunks: int = 2
    ahead_s: float = 0.25
    prompts: float = 3.0


@dataclass(frozen=True, slots=True)
class AnswerLaw:
    """What answers' times are taken to say.

    Attributes:
        memory: what is so many answers ago weighs less than a third.
        noise: the standard deviation of the logarithms of answers' times: a little above that of lengths in public chat
            traces.
        farthest: an answer further from the mean than this, in logarithms, counts as one so far: an endless one says
            little.
        hope: the chance that more would be right at which no more is tried.
        long_s: as slow as an answer should become; 200 tokens at 40 ms.
        most, enough: ... but at the most so many times what it takes alone (more gains little throughput), and always
            `enough`.
    """

    memory: float = 800.0
    noise: float = 1.0
    farthest: float = 3.0
    hope: float = 0.25
    long_s: float = 8.0
    most: float = 8.0
    enough: float = 3.0


@dataclass(frozen=True, slots=True)
class CounterLaw:
    """What makes counters doubtful.

    Attributes:
        far: an engine's mean answer may be so many times longer or shorter than the pool's ...
        near: ... and must come as near as this to be believed again.
        memory: about so many of the last answers make an engine's mean; of the pool's, for each of its engines.
        enough: answers of an engine that say something.
    """

    far: float = 3.0
    near: float = 2.5
    memory: float = 100.0
    enough: float = 30.0


@dataclass(frozen=True, slots=True)
class StepLaw:
    """The constants of the filter that learns what a step costs. A first guess holds for endpoints that come later.

    Attributes:
        base_s, sequence_s, prompt_s: what the three costs are taken to be before anything was seen, in seconds.
        base_off_s, sequence_off_s, prompt_off_s: by how much that may be off.
        base_drift_s, sequence_drift_s, prompt_drift_s: how far each may move in a second: engines change with their
            load and their settings.
        noise: by how much the equation is off, as a share of the elapsed time.
        uncounted: prompt tokens that were computed and are counted with the next reading, or were counted late; more
            than 0, since two readings may come at one instant.
        memory_s: what is longer ago weighs less than a third in the time per token.
    """

    base_s: float = 0.02
    sequence_s: float = 1e-4
    prompt_s: float = 6e-5
    base_off_s: float = 0.05
    sequence_off_s: float = 1.5e-4
    prompt_off_s: float = 7e-5
    base_drift_s: float = 5e-4
    sequence_drift_s: float = 2e-6
    prompt_drift_s: float = 1e-6
    noise: float = 0.12
    uncounted: float = 700.0
    memory_s: float = 4.0


@dataclass(frozen=True, slots=True)
class TokenLaw:
    """The constants of the estimates of what requests need. A first guess holds until something was seen.

    Attributes:
        answer: mean output tokens before anything was seen; public chat traces have means of 130 to 210.
        memory: about so many of the last answers make a mean.
        own: so many answers of its own a model and class must have had to be told from the others by half.
        untried: one prompt at a time, of a kind and size that no engine has counted and that had one refused, is booked
            as no more tokens, where all engines count.
        most_step: by how much one reading of prompts may differ from what was expected: one page that lies must not
            move much.
        most_faster: an engine is taken to write at most so many times as fast as the median of all.
        first_pace, nudge: tokens per second of one sequence, the first median over engines, and what an answer moves
            it by.
        sure, unsure: variance of a scale that has settled (it may still drift), and of one that nobody has seen.
        noise: by how much a sum of prompts may be off for other reasons, as a share of it.
    """

    answer: float = 200.0
    memory: float = 200.0
    own: float = 8.0
    untried: float = 8192.0
    most_step: float = 4.0
    most_faster: float = 2.5
    first_pace: float = 50.0
    nudge: float = 1.01
    sure: float = 0.01
    unsure: float = 1.0
    noise: float = 0.25


@dataclass(frozen=True, slots=True)
class Laws:
    """All of them."""

    kv: KvLaw = KvLaw()
    prompts: PromptLaw = PromptLaw()
    answers: AnswerLaw = AnswerLaw()
    counters: CounterLaw = CounterLaw()
    steps: StepLaw = StepLaw()
    tokens: TokenLaw = TokenLaw()


LAWS = Laws()
"""The defaults."""
