"""When requests come: processes of arrivals, drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

Process = Literal["poisson", "gamma", "bursty", "waves"]
Waves = tuple[tuple[float, float], ...]

BURST = ((2.0, 20.0), (2 / 3, 60.0))
"""The two states of the bursty process: rate as a multiple of the mean, and mean time in the state."""
WAVE_STEP_S = 0.5
"""How often the rate of the waves changes."""


def arrivals(
    draw: random.Random, process: Process, rate: float, duration_s: float, *, cv: float = 1.0, waves: Waves = ()
) -> Iterator[float]:
    """Draw times from 0 to `duration_s`, `rate` per second in the mean.

    `poisson`; `gamma`, clumped with coefficient of variation `cv`; `bursty`, two rates in turn (MMPP); `waves`, whose
    rate is the mean times the product of the waves.
    """
    if rate <= 0:
        return iter(())
    match process:
        case "poisson":
            return _poisson(draw, rate, duration_s)
        case "gamma":
            return _gamma(draw, rate, duration_s, cv)
        case "bursty":
            return _bursty(draw, rate, duration_s)
    return _on_waves(draw, rate, duration_s, waves)


def _poisson(draw: random.Random, rate: float, duration_s: float) -> Iterator[float]:
    now = 0.0
    while (now := now + draw.expovariate(rate)) < duration_s:
        yield now


def _gamma(draw: random.Random, rate: float, duration_s: float, cv: float) -> Iterator[float]:
    now, shape = 0.0, 1.0 / cv**2
    while (now := now + draw.gammavariate(shape, 1.0 / (rate * shape))) < duration_s:
        yield now


def _bursty(draw: random.Random, rate: float, duration_s: float) -> Iterator[float]:
    now, state = 0.0, draw.choices((0, 1), (BURST[0][1], BURST[1][1]))[0]
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


def _on_waves(draw: random.Random, rate: float, duration_s: float, waves: Waves) -> Iterator[float]:
    """Draw arrivals whose rate wanders: evenly at random on a clock that runs as fast as the rate is high."""
    heights = _heights(draw, max(round(duration_s / WAVE_STEP_S), 1), waves)
    scale = rate * duration_s / sum(heights)
    step_s = duration_s / len(heights)
    wait = draw.expovariate(1.0)
    for step, height in enumerate(heights):
        area, passed = height * scale, 0.0
        while passed + wait < area:
            passed += wait
            yield (step + passed / area) * step_s
            wait = draw.expovariate(1.0)
        wait -= area - passed


def _heights(draw: random.Random, steps: int, waves: Waves) -> Sequence[float]:
    """Draw products of lognormals, each with (coefficient of variation, seconds in which it forgets)."""
    heights = [1.0] * steps
    for cv, forgets_s in waves:
        sigma = math.sqrt(math.log(1.0 + cv * cv))
        kept = math.exp(-WAVE_STEP_S / forgets_s)
        at = draw.gauss(0.0, sigma)
        for step in range(steps):
            heights[step] *= math.exp(at)
            at = kept * at + draw.gauss(0.0, sigma * math.sqrt(1.0 - kept * kept))
    return heights
