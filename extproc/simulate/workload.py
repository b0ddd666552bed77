"""What clients ask for: classes with their objectives, synthetic arrivals, tenants, sessions.

Values and random draws only. The same seed gives the same demands, whatever serves them. The standing mix is chat turns
with history, conversations with the lengths of Azure's public trace (AzurePublicDataset, LLM inference 2023), and long
batch prompts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

BUDGET_MARGIN_S = 0.4
"""A class may wait in the queue for its TTFT objective less this, which is left to the engine."""
LONGEST_PROMPT = 16_000
LONGEST_OUTPUT = 2_000
TENANT_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)
ESTIMATE_NOISE = 0.2
"""Sigma of the lognormal error of a prompt's length when it is told from content-length."""
ANSWER_S = 8.0
"""How long an answer takes when nobody waits, about: it spaces the turns of sessions that began before the run."""
BURST = ((2.0, 20.0), (2 / 3, 60.0))
"""The two states of the bursty process: rate as a multiple of the mean, and mean time in the state."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal number of tokens."""

    median: float
    sigma: float

    def draw(self, draw: random.Random, most: int) -> int:
        """Draw a length from 1 to `most`."""
        return min(max(round(self.median * math.exp(draw.gauss(0.0, self.sigma))), 1), most)


@dataclass(frozen=True, slots=True)
class Klass:
    """A service class: its place, its objectives, and what its requests look like.

    Attributes:
        share: of all synthetic arrivals.
        ttft_s, tpot_s: objectives for the first token, and for the mean time of the tokens after it.
        patience_s: how long a client waits for the first token before it leaves.
        turns: mean number of earlier turns whose text comes along as history.
    """

    name: str
    priority: int
    share: float
    prompt: Lengths
    output: Lengths
    ttft_s: float
    tpot_s: float
    patience_s: float
    turns: float = 0.0

    @property
    def budget_s(self) -> float:
        """Return the longest wait that leaves the engine time to meet the objective."""
        return max(self.ttft_s - BUDGET_MARGIN_S, 0.1)


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

    def chain(self) -> Iterator[Demand]:
        """Walk this turn and those after it."""
        turn: Demand | None = self
        while turn is not None:
            yield turn
            turn = turn.then


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations, each turn with all earlier ones as its prompt's beginning, and time to think between."""

    system_prompt: int = 1500
    turns: float = 6.0  # mean, geometric
    think_s: float = 12.0  # mean, exponential


@dataclass(frozen=True, slots=True)
class Noise:
    """One tenant sends `times` as much from `begin_s` to `end_s`, on top of all else."""

    tenant: int
    times: float
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Synthetic traffic.

    Attributes:
        process: `poisson`; `gamma`, clumped with coefficient of variation `cv`; `bursty`, two rates in turn (MMPP).
        sessions: None, or what the conversations of the first class look like.
        tenants: their shares of the arrivals.
    """

    process: Literal["poisson", "gamma", "bursty"] = "poisson"
    cv: float = 4.0
    classes: tuple[Klass, ...] = CLASSES
    tenants: tuple[float, ...] = TENANT_SHARES
    sessions: Sessions | None = None
    noise: Noise | None = None

    def demands(self, rate: float, duration_s: float, seed: int) -> list[Demand]:
        """Draw `duration_s` seconds of arrivals, `rate` requests per second in the mean."""
        return _Draw(self, seed).demands(rate, duration_s)


@dataclass(slots=True)
class _Draw:
    """A workload with its random numbers: lengths and arrival times come from separate streams."""

    workload: Workload
    seed: int
    times: random.Random = field(init=False)
    sizes: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.times = random.Random(f"{self.seed} times")  # noqa: S311 - a workload, not a secret
        self.sizes = random.Random(f"{self.seed} sizes")  # noqa: S311

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
        if workload.noise is not None and known:
            noise = workload.noise
            extra = (noise.times - 1.0) * workload.tenants[noise.tenant] / tenants[-1] * rate
            for at in self._arrivals(extra, noise.end_s - noise.begin_s):
                klass = self.sizes.choices(known, cum_weights=weights)[0]
                demands.append(self.one(noise.begin_s + at, klass, names[noise.tenant]))
        demands.sort(key=lambda demand: demand.at)
        return demands

    def one(self, at: float, klass: Klass, tenant: str) -> Demand:
        """Draw one request with the lengths of its class."""
        sizes = self.sizes
        prompt = klass.prompt.draw(sizes, LONGEST_PROMPT)
        if klass.turns:
            for _ in range(_geometric(sizes, klass.turns)):
                prompt += klass.prompt.draw(sizes, LONGEST_PROMPT) + klass.output.draw(sizes, LONGEST_OUTPUT)
        prompt = min(prompt, LONGEST_PROMPT)
        return Demand(at, klass, prompt, klass.output.draw(sizes, LONGEST_OUTPUT), guess(sizes, prompt), tenant)

    def _session(self, klass: Klass, sessions: Sessions, name: str, tenant: str) -> list[Demand]:
        sizes = self.sizes
        turns: list[Demand] = []
        history = sessions.system_prompt
        for _ in range(1 + _geometric(sizes, sessions.turns - 1.0)):
            prompt = min(history + klass.prompt.draw(sizes, LONGEST_PROMPT), LONGEST_PROMPT)
            output = klass.output.draw(sizes, LONGEST_OUTPUT)
            think_s = sizes.expovariate(1.0 / sessions.think_s)
            turns.append(Demand(think_s, klass, prompt, output, guess(sizes, prompt), tenant, name))
            history = prompt + output
        return turns

    def _arrivals(self, rate: float, duration_s: float) -> Iterator[float]:
        """Draw arrival times from 0 to `duration_s`."""
        if rate <= 0:
            return
        draw, workload, now = self.times, self.workload, 0.0
        match workload.process:
            case "poisson":
                while (now := now + draw.expovariate(rate)) < duration_s:
                    yield now
            case "gamma":
                shape = 1.0 / workload.cv**2
                while (now := now + draw.gammavariate(shape, 1.0 / (rate * shape))) < duration_s:
                    yield now
            case "bursty":
                state = draw.choices((0, 1), (BURST[0][1], BURST[1][1]))[0]
                ends = draw.expovariate(1.0 / BURST[state][1])
                while now < duration_s:
                    step_s = draw.expovariate(rate * BURST[state][0])
                    if now + step_s < ends:
                        now += step_s
                        if now < duration_s:
                            yield now
                    else:  # an exponential wait has no memory: start again at the change of state
                        now, state = ends, 1 - state
                        ends = now + draw.expovariate(1.0 / BURST[state][1])


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
