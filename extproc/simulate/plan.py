"""What to simulate, and doing it: every contender against the same demands, at every load and seed.

Load 1.0 is what the engines finish per second when there is always another request of the same mix, measured on the
preset as it is. Runs are independent, so several processes may share them.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.engine.params import PRESETS, EngineParams
from extproc.simulate.contenders import contender
from extproc.simulate.fronts import Group
from extproc.simulate.report import Figures, figures
from extproc.simulate.traces import read_trace
from extproc.simulate.workload import Demand, Workload
from extproc.simulate.world import Faults, Run, World, saturation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

REFERENCE_SEED = 0
REFERENCE_REQUESTS = 10_000
"""Requests of the mix on which saturation is measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One question.

    Attributes:
        contenders: as `contenders.contender` reads them.
        changes: `key=value` for every `ours`.
        loads: shares of what the engines can do; empty, with a trace only: as recorded.
        trace: a recorded file instead of `workload`, whose classes still hold.
        engine: instead of what the preset has.
        best_limit: the fixed limit per engine of the tuned baselines; None: the preset's own.
    """

    preset: str = "a100-8b"
    engines: int = 4
    contenders: tuple[str, ...] = ("least_request", "circuit_breaker", "tuned_engine", "ours")
    changes: tuple[str, ...] = ()
    loads: tuple[float, ...] = (1.2,)
    seeds: tuple[int, ...] = (11,)
    duration_s: float = 240.0
    workload: Workload = Workload()  # noqa: RUF009 - frozen
    trace: Path | None = None
    faults: Faults = Faults()  # noqa: RUF009 - frozen
    best_limit: int | None = None
    engine: EngineParams | None = None

    @property
    def params(self) -> EngineParams:
        """Return what each engine is made of."""
        return PRESETS[self.preset] if self.engine is None else self.engine

    def tasks(self) -> list[Task]:
        """Return all runs. Raises ConfigError for a contender, a setting or a trace that can't be."""
        for text in self.contenders:
            contender(text, self.preset, self.workload.classes, self.changes, best=self.best_limit)
        loads = self.loads or (recorded_load(self),)
        return [Task(self, load, seed, text) for load in loads for seed in self.seeds for text in self.contenders]


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a plan."""

    plan: Plan
    load: float
    seed: int
    contender: str

    def run(self, progress: Callable[[float], None] | None = None) -> Run:
        """Play it; `progress` hears which share of it is done."""
        plan = self.plan
        demands = demands_for(plan, self.load, self.seed)
        duration_s = plan.duration_s if plan.trace is None else max(demands[-1].at if demands else 0.0, 1.0)
        who = contender(self.contender, plan.preset, plan.workload.classes, plan.changes, best=plan.best_limit)
        world = World([Group(plan.params, plan.engines)], who, self.seed, plan.faults)
        total = max(sum(1 for demand in demands for _ in demand.chain()), 1)
        ended = 0

        def note(more: int) -> None:
            nonlocal ended
            ended += more
            if progress is not None:
                progress(ended / total)

        world.run(demands, duration_s, note)
        return world.result(self.load, self.seed, duration_s)


@lru_cache(maxsize=4)
def capacity(
    preset: str, engines: int, workload: Workload, trace: Path | None, engine: EngineParams | None = None
) -> float:
    """Return the requests per second at load 1.0; `engine`: instead of what the preset has."""
    if trace is not None:
        demands = list(_recorded(trace, workload)[:REFERENCE_REQUESTS])
    else:
        calm = replace(workload, process="poisson", noise=None)
        demands = calm.demands(10.0, REFERENCE_REQUESTS / 10.0, REFERENCE_SEED)
    return saturation(PRESETS[preset] if engine is None else engine, engines, demands)


@lru_cache(maxsize=2)
def demands_for(plan: Plan, load: float, seed: int) -> list[Demand]:
    """Return what every contender gets at `load` with `seed`."""
    rate = load * capacity(plan.preset, plan.engines, plan.workload, plan.trace, plan.engine)
    if plan.trace is None:
        return plan.workload.demands(rate, plan.duration_s, seed)
    recorded = _recorded(plan.trace, plan.workload)
    if not plan.loads:
        return list(recorded)
    stretch = _rate(recorded) / rate
    return [replace(demand, at=demand.at * stretch) for demand in recorded]


def recorded_load(plan: Plan) -> float:
    """Return the load of the plan's trace as it was recorded."""
    assert plan.trace is not None  # noqa: S101 - the command line sees to it
    most = capacity(plan.preset, plan.engines, plan.workload, plan.trace, plan.engine)
    return _rate(_recorded(plan.trace, plan.workload)) / most


def run(plan: Plan, workers: int = 1, progress: Callable[[float], None] | None = None) -> list[Figures]:
    """Run a plan and return its figures, in the order of its loads and contenders. Raises ConfigError."""
    tasks = plan.tasks()
    runs: dict[tuple[float, str], list[Run]] = defaultdict(list)
    for done, (task, result) in enumerate(_play(tasks, workers, progress), 1):
        runs[task.load, task.contender].append(result)
        if progress is not None:
            progress(done / len(tasks))
    return [figures(some) for some in runs.values()]


def _play(tasks: Sequence[Task], workers: int, progress: Callable[[float], None] | None) -> list[tuple[Task, Run]]:
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = []
            for task, result in zip(tasks, pool.imap(Task.run, tasks), strict=True):
                results.append((task, result))
                if progress is not None:
                    progress(len(results) / len(tasks))
            return results
    results = []
    for number, task in enumerate(tasks):

        def part(share: float, number: int = number) -> None:
            if progress is not None:
                progress((number + share) / len(tasks))

        results.append((task, task.run(part)))
    return results


@lru_cache(maxsize=1)
def _recorded(trace: Path, workload: Workload) -> tuple[Demand, ...]:
    return tuple(read_trace(trace, workload.classes))


def _rate(demands: Sequence[Demand]) -> float:
    return len(demands) / max(demands[-1].at, 1.0)
