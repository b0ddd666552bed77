"""What a step of an engine costs, learned from its counters.

Continuous batching runs in steps. A step gives each running sequence one token and computes some prompt tokens beside.
So the seconds in which an engine was busy are

    elapsed = base_s x steps + sequence_s x output tokens + prompt_s x prompt tokens

where the steps are output tokens over running sequences (each token of a step belongs to another sequence). Two
readings of the counters give all but the three costs; a Kalman filter follows those. What readings don't tell apart it
leaves as it was: an engine that runs at one concurrency for hours says nothing new about another one.

`base_s` is what a limit must know: no limit, however low, makes answers faster than that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import StepLaw
    from extproc.admission.load import Load

LEAST = (1e-3, 0.0, 1e-6)
"""No engine's three costs are less, in seconds."""
Costs = tuple[float, float, float]
Spread = tuple[float, float, float, float, float, float]
"""How far off the three costs may be, squared, and how they go together: base x base, base x sequence, and so on."""
LONGEST_S = 2.0
"""A reading after a long silence weighs no more than one after this."""
ENOUGH_S = 1.0
"""Running requests x seconds between readings that both saw some run: below that a time per token is chance."""


class StepCost:
    """The costs of one engine's steps.

    Attributes:
        law: the constants.
        base_s: seconds of a step in which nobody runs.
        sequence_s: seconds that each running sequence adds.
        prompt_s: seconds that each prompt token adds.
        readings: how many were followed; before the first the costs are a guess.
        worked: whether the engine made tokens in the last reading.
        pace: tokens per second of one sequence in the last seconds; None: not known.
    """

    __slots__ = (
        "_busy_s",
        "_busy_tokens",
        "_running",
        "_spread",
        "_tokens",
        "base_s",
        "law",
        "pace",
        "prompt_s",
        "readings",
        "sequence_s",
        "worked",
    )

    def __init__(self, law: StepLaw = LAWS.steps) -> None:
        """Start with the law's guess."""
        self.law = law
        self.base_s, self.sequence_s, self.prompt_s = law.base_s, law.sequence_s, law.prompt_s
        self.readings = 0
        self.worked = False
        self.pace: float | None = None
        self._running = 0.0  # running requests x seconds, weighted by age
        self._tokens = 0.0  # output tokens, weighted alike
        self._busy_s = self._busy_tokens = 0.0  # the same where it was busy from end to end
        offs = law.base_off_s, law.sequence_off_s, law.prompt_off_s
        self._spread: Spread = (offs[0] * offs[0], 0.0, 0.0, offs[1] * offs[1], 0.0, offs[2] * offs[2])

    @property
    def tpot_s(self) -> float | None:
        """Return the time per output token of the last seconds, running requests over token rate; None: not known."""
        return self._running / self._tokens if self._running > 0 and self._tokens > 0 else None

    @property
    def busy_tpot_s(self) -> float | None:
        """Return the same of readings between which it was busy, which one engine's can be compared with another's.

        What begins amid a reading seems to write slowly, and what ends amid one is not seen: chance, where answers are
        short. None: too few such readings lately.
        """
        return self._busy_s / self._busy_tokens if self._busy_s >= ENOUGH_S and self._busy_tokens > 0 else None

    def follow(self, load: Load, before: float | None, elapsed_s: float, fresh: float = 1.0) -> None:
        """Follow a reading, `elapsed_s` after one that had `before` running (None: it did not say).

        `fresh`: share of the prompts' tokens that the prefix cache did not have, in the last readings. This reading's
        own count won't do: engines count what they find when a prompt begins, and the prompt when it is computed.
        Both sides of the time per token are sums over the last seconds, so that a reading in the middle of a long step,
        or between two answers, says little.
        """
        share = min(LONGEST_S / elapsed_s, 1.0) if elapsed_s > 0.0 else 1.0
        elapsed_s *= share
        running, rate = load.running, load.tokens_per_s
        self.worked = False
        if not running or not rate or running < 0 or rate < 0:
            return
        self.worked = True
        kept = math.exp(-elapsed_s / self.law.memory_s)
        self._running = self._running * kept + running * elapsed_s
        self._tokens = self._tokens * kept + rate * elapsed_s
        self.pace = self._tokens / self._running if self._running > 0 and self._tokens > 0 else None
        self._busy_s *= kept
        self._busy_tokens *= kept
        if before:  # busy from end to end
            tokens = rate * elapsed_s
            self._busy_s += (running + before) / 2 * elapsed_s
            self._busy_tokens += tokens
            prompts = (load.prompt_tokens or 0) * fresh
            self.learn(elapsed_s, 2 * tokens / (running + before), tokens, prompts * share)

    def learn(self, elapsed_s: float, steps: float, output_tokens: float, prompt_tokens: float) -> None:
        """Follow `elapsed_s` in which the engine was busy from end to end, and what it did in them."""
        law = self.law
        bb, bs, bp, ss, sp, pp = self._spread
        bb += law.base_drift_s * law.base_drift_s * elapsed_s
        ss += law.sequence_drift_s * law.sequence_drift_s * elapsed_s
        pp += law.prompt_drift_s * law.prompt_drift_s * elapsed_s
        base = bb * steps + bs * output_tokens + bp * prompt_tokens
        sequence = bs * steps + ss * output_tokens + sp * prompt_tokens
        prompt = bp * steps + sp * output_tokens + pp * prompt_tokens
        noise = (law.noise * elapsed_s) ** 2 + (law.uncounted * self.prompt_s) ** 2
        total = base * steps + sequence * output_tokens + prompt * prompt_tokens + noise
        explained_s = self.base_s * steps + self.sequence_s * output_tokens + self.prompt_s * prompt_tokens
        missing_s = elapsed_s - explained_s
        self._spread = (
            bb - base * base / total,
            bs - base * sequence / total,
            bp - base * prompt / total,
            ss - sequence * sequence / total,
            sp - sequence * prompt / total,
            pp - prompt * prompt / total,
        )
        share = missing_s / total
        costs = self.base_s + base * share, self.sequence_s + sequence * share, self.prompt_s + prompt * share
        if costs[0] < LEAST[0] or costs[1] < LEAST[1] or costs[2] < LEAST[2]:
            costs = _possible(costs, self._spread)
        self.base_s, self.sequence_s, self.prompt_s = costs
        self.readings += 1


def _possible(costs: Costs, spread: Spread) -> Costs:
    """Return the likeliest costs that an engine can have, where some of `costs` are less than the least.

    It is as if each of these were seen to be the least: the others move with it, as they go together. What a negative
    cost of one had explained of the others' would otherwise stay with them, against all that is seen.
    """
    bb, bs, bp, ss, sp, pp = spread
    found, rows = list(costs), [[bb, bs, bp], [bs, ss, sp], [bp, sp, pp]]
    for one, least in enumerate(LEAST):
        if found[one] < least and (off := rows[one][one]) > 0.0:
            gain, short = [row[one] / off for row in rows], least - found[one]
            found = [cost + part * short for cost, part in zip(found, gain, strict=True)]
            rows = [
                [cell - part * own for cell, own in zip(row, rows[one], strict=True)]
                for row, part in zip(rows, gain, strict=True)
            ]
    base_s, sequence_s, prompt_s = found
    return max(base_s, LEAST[0]), max(sequence_s, LEAST[1]), max(prompt_s, LEAST[2])
