"""The constants of what is learned and judged of engines and lines, beside a limit's own (`limit.py`): the config's
`learning`.

What a change of one is judged by: `python -m bench.matrix --gate`. A bound that keeps a lie or a flood small, a memory
that must not grow, a grid, exactness given up for time are no laws; docs/tuning.md names them.
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
class PaceLaw:
    """How fast a line is taken to move, and how sure a refusal by that must be.

    Attributes:
        memory_s: what is longer ago weighs less than a third ...
        gaps: ... in a pool that sends so many meanwhile; a slower one remembers for longer.
        enough: dispatches from a backlog that make a rate worth believing ...
        enough_slow: ... or so few, in a backlog as long as `memory_s`: large answers leave seldom.
        least_busy_s: how long the backlog must have lasted: the first moments of a burst say little of what follows.
        sure: refuse at once what would wait so many times its budget: a prediction after a burst is off by as much,
            and what might make it waits its budget out. Goodput at 120% load over 1.0: +0.5 to +1 points, under bursts
            +2 to +3. Higher classes are taken to make a wait so many times as long at the most.
    """

    memory_s: float = 10.0
    gaps: float = 16.0
    enough: float = 8.0
    enough_slow: float = 3.0
    least_busy_s: float = 1.0
    sure: float = 2.0


@dataclass(frozen=True, slots=True)
class GuardLaw:
    """What a request that fits nowhere has to let pass.

    Attributes:
        passes: how often it may be passed over by later ones that fit, until room is kept for it.
    """

    passes: int = 64


MOST_DOUBLINGS = 1000
"""A float holds no power of two above 2 ** 1023. Whoever is tried as often for nothing waits the longest by then."""


@dataclass(frozen=True, slots=True)
class HealthLaw:
    """When an endpoint is doubted or ejected, and how it comes back.

    Attributes:
        eject_after: refusals in a row that bring an endpoint into doubt: fewer are everyday's bad luck. Where its peers
            refuse some all the time, so many as come to one like them by a chance of `chance`.
        chance: an endpoint is ejected when its refusals in a row would come to one that is as its peers are by a
            smaller chance.
        eject_s, eject_most_s: the first ejection; each one that follows without a good answer between lasts twice as
            long, up to the latter.
        full_s: how long an endpoint that refused a request as full is left alone.
        few: requests that one is sent at first that nobody has heard of: with the next one a dead endpoint costs
            `eject_after`. So many good answers are assumed before what peers refuse makes a refusal usual.
        quiet_s: an idle endpoint that showed no sign of life for so long, by an answer or its page, gets a few at
            first: it may have died. Above the default scrape_interval and scrape_timeout together: who has a page that
            is read is not meant. So may the only one that cuts answers off and showed none for so long.
        step_s: in doubt, a few are sent in a step; when it passes without a refusal, twice as many in the next. A dead
            endpoint shows within 30 ms (Envoy connects again after up to 25 ms); an engine with 64 slots whose answers
            don't stream, and so show nothing for long, is filled in half a second.
        step_most_s: each refusal makes the wait for the next try twice as long, at most this: how late the end of an
            outage is seen.
    """

    eject_after: int = 5
    chance: float = 1e-5
    eject_s: float = 5.0
    eject_most_s: float = 60.0
    full_s: float = 0.25
    few: int = 4
    quiet_s: float = 3.0
    step_s: float = 0.1
    step_most_s: float = 1.0

    def ejection_s(self, number: int) -> float:
        """Return how long the `number`th ejection in a row lasts, in seconds."""
        return min(self.eject_s * 2.0 ** min(number - 1, MOST_DOUBLINGS), self.eject_most_s)


@dataclass(frozen=True, slots=True)
class ForeignLaw:
    """Whose requests an engine's are.

    Attributes:
        arrived_s: a lease as old as this has reached its engine, and of an end as long ago we are told: the longest
            that Envoy's ways may take. What begins or ends in so long may be others', as long as there are any
            (`looks.py`), and for a hundred times as long after the last (`MOST_HIDDEN`): simulated, of 96 places 11
            stay empty for these ten seconds where answers take 1 s, and 22 where they take .3 s.
        steady_s: foreign requests that don't get fewer for so long are somebody's steady traffic, not answers that run
            out: from then on fewer of them are counted, since nobody who fills an engine steadily may keep us out of
            it for ever.
        each: for so many of others' requests that an engine holds, one of ours goes there whatever was learned, one at
            least: where nearly all comes past the queue, holding back ours helps nobody. Sidecars that share
            nothing are others to each other: with 4, six of them would hold nothing back any more (.34 in place of
            .69 answered in time at 120 %), with 8 nine. From a ninth of the traffic down ours fare as with least
            request; docs/how-it-works.md has where we lose.
        alone: share of what an engine holds that must be ours for its counters to say something of our requests.
    """

    arrived_s: float = 0.1
    steady_s: float = 30.0
    each: int = 8
    alone: float = 0.8


@dataclass(frozen=True, slots=True)
class AdapterLaw:
    """What a loaded LoRA adapter is worth.

    Attributes:
        below: under this pressure an endpoint that has the adapter goes before emptier ones. Loading takes a part of a
            second, once; a full batch slows each token.
        times: where it would have to wait for a slot elsewhere: one that has it may be so many times as pressed as the
            emptiest.
    """

    below: float = 0.5
    times: float = 2.0


@dataclass(frozen=True, slots=True)
class Laws:
    """All of them."""

    kv: KvLaw = KvLaw()
    prompts: PromptLaw = PromptLaw()
    answers: AnswerLaw = AnswerLaw()
    counters: CounterLaw = CounterLaw()
    steps: StepLaw = StepLaw()
    tokens: TokenLaw = TokenLaw()
    pace: PaceLaw = PaceLaw()
    guard: GuardLaw = GuardLaw()
    health: HealthLaw = HealthLaw()
    foreign: ForeignLaw = ForeignLaw()
    adapters: AdapterLaw = AdapterLaw()


LAWS = Laws()
"""The defaults."""
