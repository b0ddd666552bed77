"""What is counted, and when a run doesn't count: pure functions of records.

Goodput counts ALL requests that were planned in the window: refused, abandoned, failed and unsent ones missed.
Latencies are of the requests that got that far, so read them beside the refusals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from extproc.simulate.report import NAN, Line, goodput, jain, line, percentile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.simulate.workload import Klass

BROKEN = 0.02
"""A run in which a larger share got no answer or half of one, though no engine was killed, was not set up right."""
LAG_P99_S = 0.05
LAG_MAX_S = 0.25
STEP_LAG_S = 0.25
"""A run whose sender was later than these, or an engine's step, says more of the machine than of anybody. They are 5 %
and a quarter of the tightest objective, 1 s; on a machine at rest it is 10, 20 and 10 ms."""
ANSWERED = ("finished", "running")


@dataclass(slots=True)
class Record:
    """One request. Times are seconds from when it was PLANNED to be sent (`at`, from the start); None: never came.

    Attributes:
        outcome: finished; refused (any status but 200); abandoned (its client left); failed (no answer, or half of
            one); running (answering when the run was cut off; judged by the tokens so far).
        lag_s: how much later than planned it was written to the socket.
        prompt, output: tokens; `output` of an answer that is not whole is what came.
    """

    at: float
    klass: str
    tenant: str
    prompt: int
    output: int
    outcome: str = "failed"
    status: int = 0
    lag_s: float | None = None
    first_s: float | None = None
    end_s: float | None = None
    tpot_s: float | None = None
    met: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Return `first_s`, by the name that the simulator has for it."""
        return self.first_s

    def judge(self, klass: Klass) -> None:
        """Set `tpot_s` and `met` from the rest."""
        if self.outcome in ANSWERED and self.first_s is not None and self.end_s is not None:
            self.tpot_s = (self.end_s - self.first_s) / max(self.output - 1, 1)
            self.met = self.first_s <= klass.ttft_s and self.tpot_s <= klass.tpot_s


@dataclass(slots=True)
class Run:
    """One contender in one cell (experiment, load, seed).

    Attributes:
        window: from when to when requests were planned that count, seconds from the start.
        wasted: tokens that engines computed for requests whose client left.
        peak_held: the most that one engine held, running and waiting; a bound, as their peaks may not have met.
        step_lag_s: the worst delay of an engine's step.
        cpu_s: CPU seconds by process kind (front, sidecar, engines), over the whole run.
        dies: an engine was killed, so answers may have failed.
        commit: of which code it is; empty where nobody wrote it down.
    """

    experiment: str
    contender: str
    load: float
    seed: int
    window: tuple[float, float]
    records: list[Record]
    wasted: int = 0
    preemptions: int = 0
    peak_waiting: int = 0
    peak_held: int = 0
    step_lag_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    dies: bool = False
    virtual: bool = False
    commit: str = ""

    @property
    def counted(self) -> list[Record]:
        """Return the records inside the window."""
        begin, end = self.window
        return [record for record in self.records if begin <= record.at < end]

    @property
    def lag(self) -> tuple[float, float]:
        """Return p99 and maximum of the sender's lag; of a request that was never sent it is endless."""
        lags = [math.inf if record.lag_s is None else record.lag_s for record in self.records]
        return percentile(lags, 0.99), max(lags, default=NAN)

    def problem(self) -> str:
        """Return why this run must not count; empty: it may."""
        if self.virtual:
            return ""
        p99, most = self.lag
        if not self.records:
            return "no requests"
        if p99 > LAG_P99_S or most > LAG_MAX_S:
            return f"the sender was late: p99 {p99 * 1000:.0f} ms, at most {most * 1000:.0f} ms"
        if self.step_lag_s > STEP_LAG_S:
            return f"an engine's step was {self.step_lag_s * 1000:.0f} ms late"
        failed = sum(record.outcome == "failed" for record in self.records) / len(self.records)
        if failed > BROKEN and not self.dies:
            return f"{failed:.0%} got no answer, or half of one: something of the stack was not there"
        return ""


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender in one experiment at one load, all seeds together.

    Attributes:
        each: goodput per seed, in the order of `seeds`.
        tokens_per_s: output tokens that reached clients inside the window, of all requests.
        wasted_left: share of the engines' work that was for clients that left.
        wasted_missed: share that was for answers that missed their objective.
        fairness: Jain's index of the tenants' goodputs; 1 is equal.
        victims: goodput of all tenants but tenant-1, the one that is noisy in that experiment.
    """

    experiment: str
    contender: str
    load: float
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    lines: tuple[Line, ...]
    tokens_per_s: float
    wasted_left: float
    wasted_missed: float
    fairness: float
    victims: float
    loud: float
    cpu_ms: dict[str, float]

    @property
    def all(self) -> Line:
        """Return the line of all classes together."""
        return self.lines[-1]

    def of_class(self, names: Sequence[str]) -> Line:
        """Return the line of the first of these classes that came."""
        known = {line.klass: line for line in self.lines}
        return next((known[name] for name in names if name in known), self.all)

    @property
    def spread(self) -> float:
        """Return the standard deviation between seeds; nan with one."""
        return stdev(self.each) if len(self.each) > 1 else NAN


def figures(runs: Sequence[Run]) -> Figures:
    """Put the runs of one contender at one load together. Goodput is the mean of the seeds."""
    counted = [record for run in runs for record in run.counted]
    names = list(dict.fromkeys(record.klass for record in sorted(counted, key=lambda record: record.klass)))
    seconds = sum(run.window[1] - run.window[0] for run in runs)
    by_tenant: dict[str, list[Record]] = defaultdict(list)
    for record in counted:
        by_tenant[record.tenant].append(record)
    left, missed = waste(runs)
    sent = sum(len(run.records) for run in runs)
    kinds = dict.fromkeys(kind for run in runs for kind in run.cpu_s)
    return Figures(
        experiment=runs[0].experiment,
        contender=runs[0].contender,
        load=runs[0].load,
        seeds=tuple(run.seed for run in runs),
        each=tuple(goodput(run.counted) for run in runs),
        lines=(*(line(name, [r for r in counted if r.klass == name]) for name in names), line("all", counted)),
        tokens_per_s=sum(streamed(run) for run in runs) / seconds,
        wasted_left=left,
        wasted_missed=missed,
        fairness=jain(goodput(records) for records in by_tenant.values()),
        victims=goodput(r for r in counted if r.tenant != "tenant-1"),
        loud=goodput(r for r in counted if r.tenant == "tenant-1"),
        cpu_ms={kind: sum(run.cpu_s.get(kind, 0.0) for run in runs) / max(sent, 1) * 1000 for kind in kinds},
    )


def streamed(run: Run) -> float:
    """Return how many output tokens reached clients inside the window: an answer's come evenly from first to last."""
    begin, end = run.window
    tokens = 0.0
    for record in run.records:
        if record.outcome in ANSWERED and record.first_s is not None and record.end_s is not None:
            first, last = record.at + record.first_s, record.at + record.end_s
            inside = max(min(last, end) - max(first, begin), 0.0)
            tokens += record.output * (inside / (last - first) if last > first else float(begin <= first < end))
    return tokens


def waste(runs: Iterable[Run]) -> tuple[float, float]:
    """Return which shares of the engines' work were for clients that left, and for answers that missed.

    Work is prompt and output tokens of what was answered, and what engines counted for requests that were aborted.
    What preemptions computed twice is not in it.
    """
    useful = missed = left = 0
    for run in runs:
        left += run.wasted
        for record in run.records:
            if record.outcome in ANSWERED:
                tokens = record.prompt + record.output
                useful, missed = (useful + tokens, missed) if record.met else (useful, missed + tokens)
    work = useful + missed + left
    return (left / work, missed / work) if work else (0.0, 0.0)


def ratio(one: Figures, other: Figures) -> tuple[float, float]:
    """Return how many times the goodput of `other` that of `one` is: mean of the seeds' ratios, and their least.

    Seeds are paired: both had the same requests. Without a common seed, or where the other has 0, it is nan.
    """
    theirs = dict(zip(other.seeds, other.each, strict=True))
    ratios = [mine / theirs[seed] for seed, mine in zip(one.seeds, one.each, strict=True) if theirs.get(seed)]
    return (mean(ratios), min(ratios)) if ratios else (NAN, NAN)


# ---- to and from JSON


def to_json(run: Run) -> dict[str, Any]:
    """Return a run as JSON takes it: records as rows, their column names beside them."""
    columns = list(Record.__slots__)
    values = {name: getattr(run, name) for name in Run.__slots__ if name != "records"}
    lag = run.lag if run.records and not run.virtual else (0.0, 0.0)
    derived = {"problem": run.problem(), "lag_p99_s": finite(lag[0]), "lag_max_s": finite(lag[1])}
    derived["goodput"] = goodput(run.counted)
    rows = [[rounded(getattr(record, column)) for column in columns] for record in run.records]
    return values | derived | {"columns": columns, "records": rows}


def from_json(values: dict[str, Any]) -> Run:
    """Return the run that `to_json` wrote."""
    fields = {name: values[name] for name in Run.__slots__ if name != "records" and name in values}
    records = [Record(**dict(zip(values["columns"], row, strict=True))) for row in values["records"]]
    return Run(**fields | {"window": tuple(fields["window"]), "records": records})


def finite(value: float) -> float | None:
    """Return `value`, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """Return a time to the 0.1 ms."""
    return round(value, 4) if isinstance(value, float) else value
