"""A cell: an engine, its page, a traffic, a load; its name, its objectives, its demands.

Names are like `step90/seqs256/kv430k/vllm/standing@70`, or with a preset `a100-8b/vllm/standing@120`.

- A made-up engine has `a100-8b`'s constants, its base step as named; what a step does beyond its base (prefill, decode,
  context) is scaled by the square root of how much slower the base is. Measured engines differ so: a model three times
  as slow per step (32B on H100 beside 8B) is about half as fast at prompts.
- Objectives: a class's own, times `slowness`: 1 up to a base step of 45 ms, above that 2.2 base steps are the 100 ms
  per token of the standing mix. Users of a slow engine know it is slow, and wait longer for the first token too.
- Load 100 % is what the engines finish of this traffic when there is always more, with no more at once than the time
  per token allows: on `a100-8b` 5 % less than without that, on slow engines with a large batch much less. Turns of a
  session count as if each found `FOUND` of its history in the cache. A run is as long as `REQUESTS` requests take, at
  least 90 s (a rate that wanders: 300 s).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from statistics import mean
from typing import TYPE_CHECKING, Literal, cast

from extproc.engine.params import A100_8B, PRESETS, EngineParams
from extproc.simulate.fronts import Group
from extproc.simulate.studies.matrix.traffic import TRAFFIC, Traffic, recorded
from extproc.simulate.world import saturation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.simulate.workload import Demand, Klass, Workload
    from extproc.simulate.world import Page

ENGINES = 4
REQUESTS = 1200
REFERENCE_SEED = 0
REFERENCE_REQUESTS = 3000
EASY_STEP_S = 0.045
FOUND = 0.7
"""Share of a session's history that its next turn finds cached, where load is measured."""
TOKENS = {"kv24k": 24_000, "kv200k": 200_000, "kv430k": 430_000}
STEPS_MS, SEQS, KVS = (9, 30, 60, 90, 120), (4, 8, 32, 256), tuple(TOKENS)
LOADS = (50, 80, 100, 120)
PAGES = ("vllm", "gauges", "none")
MADE_UP = re.compile(r"step(\d+)/seqs(\d+)/(kv\w+)")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. `page` may end in `+batch`: the engine says how many it runs at once."""

    engine: str
    page: str
    traffic: str
    load: int

    @property
    def name(self) -> str:
        """Return its name."""
        return f"{self.engine}/{self.page}/{self.traffic}@{self.load}"

    @property
    def duel(self) -> str:
        """Return the name of what rivals see of it: they read no page."""
        return f"{self.engine}/{self.traffic}@{self.load}"

    @property
    def tells(self) -> tuple[Page, bool]:
        """Return its page, and whether that has the size of the batch."""
        page, plus, _ = self.page.partition("+")
        return cast("Literal['vllm', 'gauges', 'none']", page), bool(plus)


def cell(name: str) -> Cell:
    """Read a cell's name. Raises ValueError."""
    match = re.fullmatch(r"(.+)/([\w+]+)/([\w-]+)@(\d+)", name)
    if match is None:
        raise ValueError(f"{name!r} is no cell: must be like step90/seqs256/kv430k/vllm/standing@70")
    found = Cell(match[1], match[2], match[3], int(match[4]))
    params(found.engine)
    if found.tells[0] not in PAGES or found.traffic not in TRAFFIC:
        raise ValueError(f"{name!r}: pages are {', '.join(PAGES)} (and +batch), traffic is {', '.join(TRAFFIC)}")
    return found


def params(engine: str) -> EngineParams:
    """Return the constants of the engine called so. Raises ValueError."""
    match = MADE_UP.fullmatch(engine)
    if match is None:
        if engine not in PRESETS:
            raise ValueError(f"{engine!r} is no engine: must be a preset or like step90/seqs256/kv430k")
        return PRESETS[engine]
    base_s, seqs, kv_tokens = int(match[1]) / 1000, int(match[2]), TOKENS[match[3]]
    slower = (base_s / A100_8B.step_base_s) ** 0.5
    return replace(
        A100_8B,
        step_base_s=base_s,
        prefill_token_s=A100_8B.prefill_token_s * slower,
        decode_seq_s=A100_8B.decode_seq_s * slower,
        context_token_s=A100_8B.context_token_s * slower,
        num_gpu_blocks=kv_tokens // A100_8B.block_size,
        max_num_seqs=seqs,
    )


def slowness(engine: EngineParams) -> float:
    """Return by what objectives are multiplied for the users of an engine."""
    return max(engine.step_base_s / engine.speed / EASY_STEP_S, 1.0)


def _for_users(workload: Workload, engine: EngineParams) -> Workload:
    """Return a workload with the objectives that its users have of such an engine, and prompts that fit into it."""
    times = slowness(engine)
    classes = tuple(
        replace(
            klass,
            ttft_s=klass.ttft_s * times,
            tpot_s=klass.tpot_s * times,
            patience_s=klass.patience_s * times,
            margin_s=klass.margin_s * times,
        )
        for klass in workload.classes
    )
    return replace(workload, classes=classes, context_tokens=engine.longest)


@dataclass(frozen=True, slots=True)
class Stage:
    """What all contenders of a cell get: engines, demands, and the traffic with what goes wrong."""

    groups: tuple[Group, ...]
    classes: tuple[Klass, ...]
    demands: dict[int, list[Demand]]
    traffic: Traffic
    duration_s: float
    rate: float
    natural_limit: int


@lru_cache(maxsize=4)
def stage(engine: str, traffic: Traffic, load: int, seeds: tuple[int, ...]) -> Stage:
    """Return what is played on `engine` at `load` percent."""
    own = params(engine)
    parts = [_for_users(traffic.workload, own)]
    if traffic.beside is not None:
        parts.append(_for_users(traffic.beside, own))
    each = ENGINES // len(parts)
    groups = tuple(Group(own, each, (part.model,) if part.model else ()) for part in parts)
    rates = [load / 100 * _capacity(own, each, part) for part in parts]
    classes = tuple(klass for part in parts for klass in part.classes)
    natural = max(min(min(by_pace(own, one), by_kv(own, one)) for one in map(_sample, parts)), 1)
    demands: dict[int, list[Demand]]
    if traffic.trace is not None:
        hour = recorded(traffic.trace, classes)
        traffic.workload.dress(hour, REFERENCE_SEED)
        hour = [one for one in hour if one.prompt + one.output <= own.longest]
        full = ENGINES * _finished_per_s(own, hour[:REFERENCE_REQUESTS])
        rate = load / 100 * full
        played = [replace(one, at=one.at * len(hour) / hour[-1].at / rate) for one in hour]
        return Stage(groups, classes, dict.fromkeys(seeds, played), traffic, played[-1].at, rate, natural)
    duration_s = max(REQUESTS / sum(rates), traffic.least_s)
    demands = {}
    for seed in seeds:
        drawn = [
            one
            for part, rate in zip(parts, rates, strict=True)
            for one in traffic.during(part, duration_s).demands(rate, duration_s, seed)
        ]
        demands[seed] = sorted(drawn, key=lambda one: one.at)
    return Stage(groups, classes, demands, traffic, duration_s, sum(rates), natural)


@lru_cache(maxsize=64)
def _capacity(engine: EngineParams, engines: int, workload: Workload) -> float:
    return engines * _finished_per_s(engine, _sample(workload))


@lru_cache(maxsize=4)
def _sample(workload: Workload) -> list[Demand]:
    calm = replace(workload, process="poisson", noise=None, surge=None)
    return calm.demands(10.0, REFERENCE_REQUESTS / 10.0, REFERENCE_SEED)


def _finished_per_s(engine: EngineParams, demands: list[Demand]) -> float:
    each = _turns(demands)
    fresh = [replace(turn, prompt=_own(turn, before) + turn.prefix_tokens, then=None) for turn, before in each]
    return saturation(replace(engine, max_num_seqs=by_pace(engine, demands)), 1, fresh)


def _turns(demands: Sequence[Demand]) -> list[tuple[Demand, Demand | None]]:
    """Return all turns, each with the one before it in its session."""
    turns: list[tuple[Demand, Demand | None]] = []
    for demand in demands:
        before = None
        for turn in demand.chain():
            turns.append((turn, before))
            before = turn
    return turns


def _own(turn: Demand, before: Demand | None) -> int:
    """Return the tokens of a prompt that an engine computes: without what all share, and `FOUND` of its history."""
    history = turn.prefix_tokens if before is None else round(FOUND * (before.prompt + before.output))
    return max(turn.prompt - history, 1)


def by_pace(engine: EngineParams, demands: Sequence[Demand]) -> int:
    """Return how many sequences of `demands` run at once at the tightest time per token, and in a batch at most."""
    turns = [turn for one in demands for turn in one.chain()]
    own, output = mean(_own(*turn) for turn in _turns(demands)), mean(turn.output for turn in turns)
    context = mean(turn.prompt + turn.output / 2 for turn in turns)
    each_s = engine.decode_seq_s + engine.context_token_s * context + engine.prefill_token_s * own / output
    objective_s = min(turn.klass.tpot_s for turn in turns)
    return max(int(min((objective_s * engine.speed - engine.step_base_s) / each_s, engine.max_num_seqs)), 1)


def by_kv(engine: EngineParams, demands: Sequence[Demand]) -> int:
    """Return how many sequences of `demands` the KV cache holds at once, on average."""
    turns = [turn for one in demands for turn in one.chain()]
    return int(engine.kv_tokens / mean(turn.prompt - turn.prefix_tokens + turn.output for turn in turns))


# ---- which ones there are

MADE_UP_ENGINES = tuple(f"step{step}/seqs{seqs}/{kv}" for step, seqs, kv in product(STEPS_MS, SEQS, KVS))
TYPICAL = (
    "a100-8b",
    "h100-32b",
    "h100-8b",
    "h100x4-70b",
    "llama-cpp",
    "step90/seqs256/kv430k",
    "step30/seqs8/kv200k",
)
"""Engines on which all traffic is played; the made-up ones play the standing mix."""


def everything() -> list[Cell]:
    """Return all cells of `make bench-matrix`."""
    cells = [Cell(*which) for which in product(MADE_UP_ENGINES, PAGES, ("standing",), LOADS)]
    rest = [Cell(*which) for which in product(TYPICAL, PAGES, TRAFFIC, LOADS)]
    return list(dict.fromkeys(cells + rest))


def matching(patterns: Iterable[str]) -> list[Cell]:
    """Return the cells of names, or of patterns like `a100-8b/*@120` over everything. Raises ValueError."""
    known = everything()
    found: dict[str, Cell] = {}
    for pattern in patterns:
        if "*" in pattern or "?" in pattern:
            some = [one for one in known if fnmatchcase(one.name, pattern)]
            if not some:
                raise ValueError(f"no cell is called like {pattern!r}")
        else:
            some = [cell(pattern)]
        found |= {one.name: one for one in some}
    return list(found.values())
