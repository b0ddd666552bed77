"""The same cells on a virtual clock: sweeps that would take hours, and a check of the real runs.

The simulator of `extproc simulate`, its HAProxy included: real runs are what they are compared with.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from extproc.engine.params import PRESETS
from extproc.simulate.contenders import BEST_FIXED, contender
from extproc.simulate.fronts import Group
from extproc.simulate.studies.experiments import Cell, Experiment, Times
from extproc.simulate.studies.figures import Record, Run
from extproc.simulate.workload import CLASSES, Sessions, Workload
from extproc.simulate.world import Faults, World

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.simulate.fronts import Job
    from extproc.simulate.workload import Demand

ORIGINAL = "original,scrape_interval=30s,stale_after_s=90s,max_queue_wait_time=10s"
LONG = Times(60.0, 300.0, math.inf)


def play(cell: Cell, name: str, times: Times) -> Run:
    """Run one contender, with settings of its own after commas: `haproxy,limit=16,queue=3s`."""
    experiment, classes = cell.experiment, cell.experiment.workload.classes
    best = experiment.limit or BEST_FIXED[experiment.preset]
    who = contender(ORIGINAL if name == "original" else name, experiment.preset, classes, best=best)
    speeds = (experiment.slow,) if experiment.slow != 1.0 else ()
    dies = None if experiment.dies is None else (0, *experiment.dies)
    world = World([Group(PRESETS[experiment.preset], experiment.engines)], who, cell.seed, Faults(speeds, dies))
    jobs = world.run(cell.demands(times), times.end_s)
    result = world.result(cell.load, cell.seed, times.end_s)
    return Run(
        experiment=experiment.name,
        contender=name,
        load=cell.load,
        seed=cell.seed,
        window=times.window,
        records=[_record(job) for job in jobs],
        wasted=result.wasted,
        preemptions=result.preemptions,
        peak_waiting=result.peak_waiting,
        virtual=True,
    )


def _record(job: Job) -> Record:
    demand: Demand = job.demand
    outcome = job.outcome if job.outcome in ("finished", "abandoned", "failed") else "refused"
    assert job.ended is not None
    record = Record(
        at=job.arrived,
        klass=demand.klass.name,
        tenant=demand.tenant,
        prompt=demand.prompt,
        output=demand.output if outcome == "finished" else 0,
        outcome=outcome,
        first_s=None if job.first_token is None else job.first_token - job.arrived,
        end_s=job.ended - job.arrived,
    )
    record.judge(demand.klass)
    return record


# ---- what is swept

CHATTY = Workload(
    classes=tuple(replace(klass, share=share) for klass, share in zip(CLASSES, (0.8, 0.13, 0.07), strict=True)),
    sessions=Sessions(think_s=30.0, system_prompt=3000),
)
LIMITS = {"h100-32b": (4, 8, 12, 16, 24, 32, 64), "a100-8b": (8, 16, 32, 64, 96, 128, 192, 256)}


SESSIONS_LIMIT = {"h100-32b": 6, "a100-8b": 56}
"""The best for conversations, by the same seeds as the others: their prompts are longer."""
SCRAPES_S = (1, 5, 30)


def sweeps(experiments: Iterable[Experiment], preset: str) -> list[Experiment]:
    """Return what is swept on a preset: the real experiments again, longer, and those that have no real runs."""
    again = [one if one.dies is None else replace(one, dies=(90.0, 180.0)) for one in experiments]
    chat = ("least_request", "circuit_breaker", "tuned_engine", "haproxy", "ours,session_homes=false", "ours")
    talk = Experiment("sessions", "conversations", "Conversations and prefix caches", chat, (1.1, 1.4, 1.8), CHATTY)
    limited = [(f"haproxy,limit={limit}", f"ours,max_running_requests={limit}") for limit in LIMITS[preset]]
    scraped = [(f"ours,scrape_interval={s}s", f"ours,own_books=false,scrape_interval={s}s") for s in SCRAPES_S]
    added = (
        replace(talk, limit=SESSIONS_LIMIT[preset]),
        Experiment("limits", "limits", "A fixed limit per engine", (*chain(*limited), "ours"), (0.9, 1.2)),
        Experiment("telemetry", "stale metrics", "Stale telemetry", tuple(chain(*scraped)), (0.9, 1.2)),
    )
    return [replace(one, preset=preset) for one in (*again, *added) if one.name != "stale"]


def _task(task: tuple[Cell, str, Times]) -> tuple[str, Run]:
    cell, name, times = task
    return cell.experiment.preset, play(cell, name, times)


def run(tasks: Sequence[tuple[Cell, str, Times]], workers: int) -> list[tuple[str, Run]]:
    """Play tasks in some processes; each one's preset and run, in order."""
    if workers == 1:
        return [_task(task) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(_task, tasks, chunksize=4)
