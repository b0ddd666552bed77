"""How much goodput is there to be had at all? A bound, a front that sees the future, and where requests miss.

    python -m bench.ceiling                         # `make bench-ceiling`: half a minute on one core
    python -m bench.ceiling --preset h100-32b --load 1.5
    python -m bench.ceiling --one-class             # nobody says what he is

The same simulated cells as in `bench.proof`: three engines, 300 s, of which the first 60 don't count. The front that
sees the future knows every request's true lengths, refuses the costliest share of them at arrival, as large a share as
proves best for that seed afterwards, and is ours otherwise. No real front can know any of this.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import mean, stdev
from typing import TYPE_CHECKING

from extproc.engine.params import PRESETS
from extproc.simulate.contenders import BEST_FIXED, HAPROXY_QUEUE_S, Contender, contender
from extproc.simulate.fronts import Group, Haproxy
from extproc.simulate.studies.experiments import BY_NAME, Cell
from extproc.simulate.studies.virtual import LONG
from extproc.simulate.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.engine.params import EngineParams
    from extproc.simulate.fronts import Job
    from extproc.simulate.workload import Demand

ENGINES = 3
REFUSED = [share / 100 for share in range(11)]
"""Shares of the costliest requests that the front that sees the future tries."""
MET = "met"
PATIENT_LIMIT = {"h100-32b": 10, "a100-8b": 80}
"""The best limits for HAProxy with a timeout per class, on seeds 51 to 53: of 10, 12, 14 and 16; of 80, 96 and 112."""


class PatientHaproxy(Haproxy):
    """As if `timeout queue` were a class's own, its budget: Debian's 2.6 has one per backend."""

    def _wait_of(self, job: Job) -> float:
        return job.demand.klass.budget_s


class PatientHaproxyContender(Contender):
    """HAProxy with a timeout per class."""

    def front(self, groups: Sequence[Group], seed: int) -> Haproxy:  # noqa: ARG002
        """Build it."""
        return PatientHaproxy(sum(group.engines for group in groups), self.limit, self.queue_s)


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one run: causes by class, and goodput over all that arrived in the window."""

    goodput: float
    causes: Counter[tuple[str, str]]


def work_s(demand: Demand, params: EngineParams) -> float:
    """Return the engine seconds that a request costs beyond the fixed part of each step."""
    context = demand.output * (demand.prompt + demand.output / 2)
    return (
        params.prefill_token_s * demand.prompt + params.decode_seq_s * demand.output + params.context_token_s * context
    )


def cost_s(demand: Demand, params: EngineParams) -> float:
    """Return the same with its part in the steps that are needed because the KV cache holds only so many at once."""
    context = demand.output * (demand.prompt + demand.output / 2)
    return work_s(demand, params) + params.step_base_s * context / params.kv_tokens


def bounds(demands: Sequence[Demand], params: EngineParams) -> tuple[float, float]:
    """Return the goodput that nobody can exceed for long: class by class whatever its length, and the cheapest first.

    Two budgets of time: with the fixed part of steps of 100 ms, the slowest that the TPOT objective allows on average;
    and with the steps that the KV cache forces. Lulls, order and first tokens cost nothing here; the idle time after
    a run's last arrival, worth up to .003, is not in it.
    """
    seconds = ENGINES * (LONG.window[1] - LONG.window[0])
    working_s = seconds * (1 - params.step_base_s / min(demand.klass.tpot_s for demand in demands))
    works = [work_s(demand, params) for demand in demands]
    costs = [cost_s(demand, params) for demand in demands]
    cheapest, blind = [], []
    for each, most in ((works, working_s), (costs, seconds)):
        cheapest.append(sum(total <= most for total in accumulate(sorted(each))))
        served, left = 0.0, most
        for priority in sorted({demand.klass.priority for demand in demands}, reverse=True):
            own = [one for one, demand in zip(each, demands, strict=True) if demand.klass.priority == priority]
            served += len(own) * min(left / sum(own), 1.0)
            left = max(left - sum(own), 0.0)
        blind.append(served)
    return min(blind) / len(demands), min(cheapest) / len(demands)


def play(who: Contender, preset: str, demands: Sequence[Demand], seed: int, arrived: int) -> Played:
    """Run `demands`; `arrived` counts all that came in the window, those left out of `demands` too."""
    world = World([Group(PRESETS[preset], ENGINES)], who, seed)
    jobs = [job for job in world.run(demands, LONG.end_s) if counts(job.demand)]
    causes = Counter((job.demand.klass.name, cause(job)) for job in jobs)
    return Played(sum(n for (_, why), n in causes.items() if why == MET) / arrived, causes)


def counts(demand: Demand) -> bool:
    """Tell whether it is planned in the window."""
    return LONG.window[0] <= demand.at < LONG.window[1]


def cause(job: Job) -> str:
    """Return why a request missed, or MET."""
    klass = job.demand.klass
    if job.outcome != "finished" or job.first_token is None or job.ended is None:
        return job.outcome
    if job.first_token - job.arrived > klass.ttft_s:
        return "first token late in the engine"
    late = (job.ended - job.first_token) / max(job.demand.output - 1, 1) > klass.tpot_s
    return "tokens slow" if late else MET


def foresee(who: Contender, preset: str, demands: Sequence[Demand], seed: int, arrived: int) -> float:
    """Return the best goodput over REFUSED of the front that sees the future."""
    params = PRESETS[preset]
    known = [replace(demand, estimate=demand.prompt) for demand in demands]
    costs = sorted(cost_s(demand, params) for demand in known)
    limits = [costs[int((1 - share) * (len(costs) - 1))] for share in REFUSED]
    kept = ([demand for demand in known if cost_s(demand, params) <= limit] for limit in limits)
    return max(play(who, preset, some, seed, arrived).goodput for some in kept)


def show(name: str, values: Sequence[float], note: str = "") -> None:
    """Print a mean and its spread."""
    spread = f" ±{stdev(values):.3f}" if len(values) > 1 else ""
    print(f"  {name:46} {mean(values):.3f}{spread}{note}")


def misses(name: str, runs: Sequence[Played]) -> None:
    """Print goodput and the causes of all misses, in % of all arrivals, by class."""
    causes: Counter[tuple[str, str]] = sum((run.causes for run in runs), Counter())
    everything = causes.total()
    show(name, [run.goodput for run in runs], "   misses in % of all arrivals:")
    whys = Counter(why for klass, why in causes.elements() if why != MET)
    for why, count in whys.most_common():
        classes = sorted({klass for klass, _ in causes}, key=("int", "std", "batch").index)
        split = ", ".join(f"{klass} {causes[klass, why] / everything:.2%}" for klass in classes)
        print(f"    {why:32} {count / everything:6.2%}  ({split})")


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(BEST_FIXED), action="append")
    parser.add_argument("--load", type=float, default=1.2)
    parser.add_argument("--one-class", action="store_true", help="no classes, no tenants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[71, 72, 73], help="those of bench.proof")
    flags = parser.parse_args()
    for preset in flags.preset or sorted(BEST_FIXED):
        experiment = replace(BY_NAME["one_class" if flags.one_class else "ramp"], preset=preset, engines=ENGINES)
        ours, short_first = (
            contender(name, preset, experiment.workload.classes) for name in ("ours", "ours,short_first=true")
        )
        drawn = {seed: Cell(experiment, flags.load, seed).demands(LONG) for seed in flags.seeds}
        window = {seed: [demand for demand in demands if counts(demand)] for seed, demands in drawn.items()}
        print(f"{preset}, {flags.load:.0%}, seeds {', '.join(map(str, flags.seeds))}")
        blind, cheapest = zip(*(bounds(some, PRESETS[preset]) for some in window.values()), strict=True)
        show("bound: all that fits, whatever its length", blind)
        show("bound: all that fits, the cheapest first", cheapest)
        show("sees the future", [foresee(ours, preset, drawn[seed], seed, len(window[seed])) for seed in drawn])
        for who in (short_first, ours):
            misses(who.name, [play(who, preset, drawn[seed], seed, len(window[seed])) for seed in drawn])
        haproxy = Contender("haproxy", "haproxy", limit=BEST_FIXED[preset], queue_s=HAPROXY_QUEUE_S)
        misses("HAProxy", [play(haproxy, preset, drawn[seed], seed, len(window[seed])) for seed in drawn])
        for limit in sorted({PATIENT_LIMIT[preset], BEST_FIXED[preset]}):
            patient = PatientHaproxyContender("haproxy", "haproxy", limit=limit)
            name = f"HAProxy with {limit}, were its timeout per class"
            misses(name, [play(patient, preset, drawn[seed], seed, len(window[seed])) for seed in drawn])


if __name__ == "__main__":
    main()
