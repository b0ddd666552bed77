"""What clients ask for: classes with their objectives, synthetic arrivals, tenants, sessions.

Values and random draws only. The same seed gives the same demands, whatever serves them. The standing mix is chat turns
with history, conversations with the lengths of Azure's public trace (AzurePublicDataset, LLM inference 2023), and long
batch prompts.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from extproc.simulate.arrivals import Process, arrivals
from extproc.stream.request import BYTES_PER_TOKEN, UNKNOWN_PROMPT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BUDGET_MARGIN_S = 0.4
"""A class may wait in the queue for its TTFT objective less this, which is left to the engine."""
LONGEST_PROMPT = 16_000
LONGEST_OUTPUT = 2_000
TENANT_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)
ESTIMATE_NOISE = 0.2
"""Sigma of the lognormal error of a prompt's length when it is told from content-length."""
ANSWER_S = 8.0
"""How long an answer takes when nobody waits, about: it spaces the turns of sessions that began before the run."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal number of tokens."""

    median: float
    sigma: float

    def draw(self, draw: random.Random, most: int) -> int:
        """Draw a length from 1 to `most`."""
        return min(max(round(self.median * math.exp(draw.gauss(0.0, self.sigma))), 1), most)


@dataclass(frozen=True, slots=True)
class Measured:
    """A number of tokens with quantiles that were measured: (share, tokens), rising; between them it is logarithmic."""

    points: tuple[tuple[float, float], ...]

    def draw(self, draw: random.Random, most: int) -> int:
        """Draw a length from 1 to `most`."""
        share = draw.random()
        at = max(bisect_left(self.points, (share, 0.0)), 1)
        (low, fewer), (high, more) = self.points[at - 1], self.points[min(at, len(self.points) - 1)]
        part = min((share - low) / (high - low), 1.0) if high > low else 1.0
        tokens = fewer * math.exp(part * math.log(more / fewer))
        return min(max(round(tokens), 1), most)


@dataclass(frozen=True, slots=True)
class Klass:
    """A service class: its place, its objectives, and what its requests look like.

    Attributes:
        share: of all synthetic arrivals.
        ttft_s, tpot_s: objectives for the first token, and for the mean time of the tokens after it.
        patience_s: how long a client waits for the first token before it leaves.
        turns: mean number of earlier turns whose text comes along as history.
        margin_s: of the TTFT objective, what is left to the engine.
        longest: the most tokens of an answer.
    """

    name: str
    priority: int
    share: float
    prompt: Lengths | Measured
    output: Lengths | Measured
    ttft_s: float
    tpot_s: float
    patience_s: float
    turns: float = 0.0
    margin_s: float = BUDGET_MARGIN_S
    longest: int = LONGEST_OUTPUT

    @property
    def budget_s(self) -> float:
        """Return the longest wait that leaves the engine time to meet the objective."""
        return max(self.ttft_s - self.margin_s, 0.1)


INTERACTIVE = Klass("int", 2, 0.25, Lengths(60, 1.0), Lengths(200, 0.8), 1.0, 0.100, 15.0, turns=2.0)
STANDARD = Klass("std", 1, 0.50, Lengths(1020, 0.75), Lengths(129, 0.9), 2.0, 0.100, 30.0)
BATCH = Klass("batch", 0, 0.25, Lengths(2500, 0.6), Lengths(150, 0.8), 15.0, 0.200, 120.0)
CLASSES = (INTERACTIVE, STANDARD, BATCH)


@dataclass(slots=True, eq=False)
class Demand:
    """One request as its client knows it.

    Attributes:
        at: when it arrives, in seconds from the start; for a later turn of a session, the think time before it.
        estimate: what content-length says of the prompt's tokens.
        session: the conversation whose earlier turns the engine may still have in its cache.
        then: the next turn of the session, asked `then.at` seconds after the end of this one, however it ended.
        names_session: whether a header tells the front of the session.
        prefix, prefix_tokens: what its prompt begins with, and others' too.
        streamed: False: nothing of the answer comes before all of it. It is judged as if it were streamed.
        sequences: answers to the same prompt (`n`), all of them `output` tokens long.
        sized: False: its body comes without a length.
    """

    at: float
    klass: Klass
    prompt: int
    output: int
    estimate: int
    tenant: str = ""
    session: str | None = None
    then: Demand | None = None
    names_session: bool = True
    model: str | None = None
    prefix: str | None = None
    prefix_tokens: int = 0
    streamed: bool = True
    sequences: int = 1
    sized: bool = True

    def chain(self) -> Iterator[Demand]:
        """Walk this turn and those after it."""
        turn: Demand | None = self
        while turn is not None:
            yield turn
            turn = turn.then


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations, each turn with all earlier ones as its prompt's beginning, and time to think between.

    Attributes:
        named: a header names the session. Engines find what they cached either way.
    """

    system_prompt: int = 1500
    turns: float = 6.0  # mean, geometric
    think_s: float = 12.0  # mean, exponential
    named: bool = True


@dataclass(frozen=True, slots=True)
class Noise:
    """One tenant sends `times` as much from `begin_s` to `end_s`, on top of all else."""

    tenant: int
    times: float
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Surge:
    """A flash crowd: `times` the usual rate from `begin_s` to `end_s`, of everybody."""

    times: float
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Images:
    """A share of the requests carries a picture: many bytes of base64, few tokens."""

    share: float
    size_bytes: int = 200_000
    tokens: int = 1_500


@dataclass(frozen=True, slots=True)
class Workload:
    """Synthetic traffic.

    Attributes:
        process: `poisson`; `gamma`, clumped with coefficient of variation `cv`; `bursty`, two rates in turn (MMPP);
            `waves`, a rate that wanders.
        waves: the rate is the mean times the product of these: each a lognormal with (coefficient of variation, seconds
            in which it forgets). The mean of a run is what was asked for, whatever the waves.
        model: which all requests name; None: none.
        adapters: so many LoRA adapters are named instead, the n-th 1/n as often as the first.
        prefix_tokens: with which all prompts begin, the same ones.
        context_tokens: the longest prompt and answer together that clients try; None: no matter.
        unsized: share of the bodies that come without a length.
        unstreamed: share of the answers that are not streamed.
        several: (share, n): so many requests ask for n answers.
        sessions: None, or what the conversations of the first class look like.
        tenants: their shares of the arrivals.
    """

    process: Process = "poisson"
    cv: float = 4.0
    classes: tuple[Klass, ...] = CLASSES
    tenants: tuple[float, ...] = TENANT_SHARES
    sessions: Sessions | None = None
    noise: Noise | None = None
    waves: tuple[tuple[float, float], ...] = ()
    surge: Surge | None = None
    images: Images | None = None
    model: str | None = None
    adapters: int = 0
    prefix_tokens: int = 0
    context_tokens: int | None = None
    unsized: float = 0.0
    unstreamed: float = 0.0
    several: tuple[float, int] = (0.0, 1)

    def demands(self, rate: float, duration_s: float, seed: int) -> list[Demand]:
        """Draw `duration_s` seconds of arrivals, `rate` requests per second in the mean."""
        return _Draw(self, seed).demands(rate, duration_s)

    def dress(self, demands: Iterable[Demand], seed: int) -> None:
        """Give recorded demands what these have beside times and lengths: images, adapters, answers in one piece."""
        draw = _Draw(self, seed)
        for demand in demands:
            draw.dress(demand)


@dataclass(slots=True)
class _Draw:
    """A workload with its random numbers: lengths and arrival times come from separate streams."""

    workload: Workload
    seed: int
    times: random.Random = field(init=False)
    sizes: random.Random = field(init=False)
    extras: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.times = random.Random(f"{self.seed} times")  # noqa: S311 - a workload, not a secret
        self.sizes = random.Random(f"{self.seed} sizes")  # noqa: S311
        self.extras = random.Random(f"{self.seed} extras")  # noqa: S311 - apart: they change no length and no time

    def demands(self, rate: float, duration_s: float) -> list[Demand]:
        workload = self.workload
        weights = list(accumulate(klass.share for klass in workload.classes))
        tenants = list(accumulate(workload.tenants))
        names = [f"tenant-{number}" for number in range(len(tenants))]
        demands: list[Demand] = []
        sessions = workload.sessions
        chat = workload.classes[0]
        if sessions is not None:
            others = weights[-1] - chat.share
            starts = rate * chat.share / weights[-1] / sessions.turns
            span_s = sessions.turns * (sessions.think_s + ANSWER_S)  # by then the crowd is as large as it gets
            for number, at in enumerate(self._arrivals(starts, span_s + duration_s)):
                tenant = self.sizes.choices(names, cum_weights=tenants)[0]
                turns = self._session(chat, sessions, f"session-{number}", tenant)
                demands += _part(turns, at - span_s, duration_s)
            rate *= others / weights[-1]
            weights = list(accumulate(klass.share for klass in workload.classes[1:]))
        known = workload.classes if sessions is None else workload.classes[1:]
        if known and rate > 0:
            for at in self._arrivals(rate, duration_s):
                klass = self.sizes.choices(known, cum_weights=weights)[0]
                demands.append(self.one(at, klass, self.sizes.choices(names, cum_weights=tenants)[0]))
        demands += self._crowds(rate, known, weights) if known else ()
        demands.sort(key=lambda demand: demand.at)
        for demand in demands:
            for turn in demand.chain():
                self.dress(turn)
        return demands

    def _crowds(self, rate: float, known: tuple[Klass, ...], weights: list[float]) -> Iterator[Demand]:
        """Draw what comes on top: a noisy tenant's, and a flash crowd's."""
        workload, sizes = self.workload, self.sizes
        tenants = list(accumulate(workload.tenants))
        names = [f"tenant-{number}" for number in range(len(tenants))]
        if workload.noise is not None:
            noise = workload.noise
            extra = (noise.times - 1.0) * workload.tenants[noise.tenant] / tenants[-1] * rate
            for at in self._arrivals(extra, noise.end_s - noise.begin_s):
                klass = sizes.choices(known, cum_weights=weights)[0]
                yield self.one(noise.begin_s + at, klass, names[noise.tenant])
        if workload.surge is not None:
            surge = workload.surge
            for at in self._arrivals((surge.times - 1.0) * rate, surge.end_s - surge.begin_s):
                klass = sizes.choices(known, cum_weights=weights)[0]
                yield self.one(surge.begin_s + at, klass, sizes.choices(names, cum_weights=tenants)[0])

    def dress(self, demand: Demand) -> None:
        """Give a demand what its class doesn't say."""
        workload, draw = self.workload, self.extras
        demand.model = workload.model
        if workload.adapters:
            shares = [1.0 / (number + 1) for number in range(workload.adapters)]
            demand.model = f"adapter-{draw.choices(range(workload.adapters), shares)[0]}"
        if workload.prefix_tokens:
            demand.prefix, demand.prefix_tokens = workload.model or "system", workload.prefix_tokens
            demand.prompt += workload.prefix_tokens
            demand.estimate += workload.prefix_tokens
        if workload.images is not None and draw.random() < workload.images.share:
            demand.prompt += workload.images.tokens
            demand.estimate += workload.images.size_bytes // BYTES_PER_TOKEN
        if workload.context_tokens is not None:
            fits = workload.context_tokens * 3 // 4
            if demand.prompt > fits:
                demand.estimate = max(demand.estimate * fits // demand.prompt, 1)
                demand.prompt = fits
            demand.output = min(demand.output, workload.context_tokens - demand.prompt)
        if workload.unsized and draw.random() < workload.unsized:
            demand.estimate, demand.sized = UNKNOWN_PROMPT_TOKENS, False
        if workload.unstreamed and draw.random() < workload.unstreamed:
            demand.streamed = False
        share, sequences = workload.several
        if share and draw.random() < share:
            demand.sequences = sequences

    def one(self, at: float, klass: Klass, tenant: str) -> Demand:
        """Draw one request with the lengths of its class."""
        sizes = self.sizes
        prompt = klass.prompt.draw(sizes, LONGEST_PROMPT)
        if klass.turns:
            for _ in range(_geometric(sizes, klass.turns)):
                prompt += klass.prompt.draw(sizes, LONGEST_PROMPT) + klass.output.draw(sizes, klass.longest)
        prompt = min(prompt, LONGEST_PROMPT)
        return Demand(at, klass, prompt, klass.output.draw(sizes, klass.longest), guess(sizes, prompt), tenant)

    def _session(self, klass: Klass, sessions: Sessions, name: str, tenant: str) -> list[Demand]:
        sizes = self.sizes
        turns: list[Demand] = []
        history = sessions.system_prompt
        for _ in range(1 + _geometric(sizes, sessions.turns - 1.0)):
            prompt = min(history + klass.prompt.draw(sizes, LONGEST_PROMPT), LONGEST_PROMPT)
            output = klass.output.draw(sizes, klass.longest)
            think_s = sizes.expovariate(1.0 / sessions.think_s)
            turn = Demand(think_s, klass, prompt, output, guess(sizes, prompt), tenant, name)
            turn.names_session = sessions.named
            turns.append(turn)
            history = prompt + output
        return turns

    def _arrivals(self, rate: float, duration_s: float) -> Iterator[float]:
        """Draw arrival times from 0 to `duration_s`."""
        workload = self.workload
        return arrivals(self.times, workload.process, rate, duration_s, cv=workload.cv, waves=workload.waves)


def _part(turns: list[Demand], begin_s: float, duration_s: float) -> list[Demand]:
    """Chain the turns of a session begun at `begin_s` that fall into the run: its first one, in a list, or nothing.

    Which ones do is told from a nominal time per answer, so that it does not depend on who serves them.
    """
    kept: list[Demand] = []
    at = begin_s
    for turn in turns:
        think_s = turn.at
        if 0.0 <= at < duration_s:
            if kept:
                kept[-1].then = turn
            else:
                turn.at = at
            kept.append(turn)
        at += ANSWER_S + think_s
    return kept[:1]


def guess(draw: random.Random, prompt: int) -> int:
    """Return what content-length would say of a prompt."""
    return max(round(prompt * math.exp(draw.gauss(0.0, ESTIMATE_NOISE))), 1)


def _geometric(draw: random.Random, mean: float) -> int:
    """Draw a number from 0 with that mean."""
    if mean <= 0:
        return 0
    return int(math.log(1.0 - draw.random()) / math.log(mean / (1.0 + mean)))
