"""What is run: experiments, their contenders, and how they are packed into rounds.

Values only. A cell is one experiment at one load with one seed; all its contenders run in the same round, at the same
time, each with engines and a front of its own: what the machine does to one it does to all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.simulate.plan import capacity
from extproc.simulate.workload import CLASSES, STANDARD, Noise, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.simulate.workload import Demand

ALL = ("round_robin", "least_request", "circuit_breaker", "tuned_engine", "haproxy", "original", "ours")
SOME = ("least_request", "tuned_engine", "haproxy", "ours")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the start of a run: requests count from `warm_s` to `end_s`, when the last is sent; then `cut_s`.

    The cut leaves the slowest class its objective for the first token, so whoever has none by then has missed.
    """

    warm_s: float = 15.0
    end_s: float = 70.0
    cut_s: float = 86.0

    @property
    def window(self) -> tuple[float, float]:
        """Return the part that counts."""
        return self.warm_s, self.end_s


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question.

    Attributes:
        short: its name in plots and sentences.
        slow: speed of the first engine.
        dies: when the first engine is killed, and when it is started again.
        tagged: requests say who they are.
        limit: the rivals' fixed limit per engine, where another than the preset's is best for this workload.
    """

    name: str
    short: str
    title: str
    contenders: tuple[str, ...]
    loads: tuple[float, ...]
    workload: Workload = Workload()  # noqa: RUF009 - frozen
    preset: str = "h100-32b"
    engines: int = 3
    slow: float = 1.0
    dies: tuple[float, float] | None = None
    tagged: bool = True
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One experiment at one load with one seed."""

    experiment: Experiment
    load: float
    seed: int

    def demands(self, times: Times) -> list[Demand]:
        """Draw what every contender gets; the same in every process."""
        return list(_demands(self, times))

    @property
    def weight(self) -> float:
        """Return how busy its stacks keep the machine, 1 for a stack of three busy engines: tokens are what costs."""
        experiment = self.experiment
        load = 1.0 if experiment.workload.noise is not None else min(self.load, 1.0)
        return len(experiment.contenders) * load * experiment.engines / 3


@lru_cache(maxsize=64)
def _demands(cell: Cell, times: Times) -> tuple[Demand, ...]:
    experiment = cell.experiment
    workload = experiment.workload
    if workload.noise is not None:
        workload = replace(workload, noise=replace(workload.noise, begin_s=times.warm_s, end_s=times.end_s))
    reference = replace(workload, noise=None, process="poisson")
    rate = cell.load * capacity(experiment.preset, experiment.engines, reference, None)
    demands = workload.demands(rate, times.end_s, cell.seed)
    if not experiment.tagged:
        demands = [replace(demand, tenant="") for demand in demands]
    return tuple(demands)


IMPATIENT = tuple(
    replace(klass, patience_s=patience) for klass, patience in zip(CLASSES, (3.0, 6.0, 20.0), strict=True)
)
ONE_CLASS = (replace(STANDARD, share=1.0),)

EXPERIMENTS = (
    Experiment("ramp", "the ramp", "Overload ramp", ALL, (0.7, 0.9, 1.2, 1.5)),
    Experiment("slow", "one slow", "One engine of four at half speed, 90 % load", SOME, (0.9,), engines=4, slow=0.5),
    Experiment(
        "dies", "one dies", "One engine of four is dead for 30 s, 80 % load", SOME, (0.8,), engines=4, dies=(25.0, 55.0)
    ),
    Experiment(
        "noisy",
        "noisy tenant",
        "One tenant of five sends six times its share, on top of 70 % load",
        SOME,
        (0.7,),
        workload=Workload(noise=Noise(1, 6.0, 0.0, 0.0)),
    ),
    Experiment(
        "abandoned",
        "impatient clients",
        "Clients leave after 3, 6 and 20 s without a token, 120 % load",
        SOME,
        (1.2,),
        workload=Workload(classes=IMPATIENT),
    ),
    Experiment(
        "one_class",
        "one class",
        "One class, no tags, 120 % load",
        ("circuit_breaker", *SOME),
        (1.2,),
        workload=Workload(classes=ONE_CLASS),
        tagged=False,
    ),
    Experiment("bursts", "bursts", "Bursts (MMPP), mean 80 % load", SOME, (0.8,), workload=Workload("bursty")),
    Experiment(
        "stale",
        "stale metrics",
        "Stale telemetry, 120 % load",
        ("ours,scrape_interval=5s", "ours,scrape_interval=30s"),
        (1.2,),
    ),
)
WITH_PEERS = Experiment(
    "peers",
    "routers from PyPI",
    "Routers from PyPI",
    ("least_request", "haproxy", "ours", "smg", "vllm_router"),
    (0.7, 1.2),
)
"""Not one of EXPERIMENTS: it needs what `make bench-peers` installs."""
FIXED = "ours,max_running_requests=96"
SEVERAL = (
    Experiment(
        "gateways",
        "several gateways",
        "Several gateways, limits that are learned",
        (
            "ours",
            "ours,replicas=2",
            "ours,replicas=8",
            "ours,replicas=2,share=false",
            "ours,replicas=8,share=false",
        ),
        (1.2,),
    ),
    Experiment(
        "gateways_faults",
        "several gateways, faults",
        "Eight gateways, and something dies",
        ("ours", "ours,replicas=8,replicas_fault=leader-killed", "ours,replicas=8,replicas_fault=store-gone"),
        (1.2,),
    ),
    Experiment(
        "gateways_fixed",
        "several gateways, fixed limit",
        "Several gateways, an engine with a big KV cache, a limit of 96",
        (FIXED, f"{FIXED},replicas=2", f"{FIXED},replicas=8", f"{FIXED},replicas=2,share=false"),
        (1.2,),
        preset="a100-8b",
    ),
)
"""Not of EXPERIMENTS either: `make bench-replicas`."""
BY_NAME = {experiment.name: experiment for experiment in (*EXPERIMENTS, WITH_PEERS, *SEVERAL)}


def cells(experiments: Iterable[Experiment], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, seed after seed."""
    experiments = list(experiments)
    return [Cell(one, load, seed) for seed in seeds for one in experiments for load in one.loads]


def pack(cells: Iterable[Cell], most: float) -> list[list[Cell]]:
    """Put cells into rounds of at most this weight each, the heavy ones first; one that is heavier has its own."""
    rounds: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: -cell.weight):
        for some in rounds:
            if sum(one.weight for one in some) + cell.weight <= most:
                some.append(cell)
                break
        else:
            rounds.append([cell])
    return rounds
