"""Playing a cell: ours, and every rival at the best of its settings for that cell.

The search is a small grid around N, the most that an engine can run of this traffic within its objectives: by its
batch, its KV cache, and its time per token. Fixed limits: .4, .6, .8, 1 and 1.3 N, and beyond the ends of these while
that is better. HAProxy's `timeout queue`: the budgets of the classes; a third, once and three times the budget where
there is one. First the best limit at the middle timeout, then the best timeout at that limit, then limits near it
again. The best is that of all seeds that are scored, so rivals know the future.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import mean
from typing import TYPE_CHECKING

from extproc.simulate.contenders import Contender, contender
from extproc.simulate.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.simulate.studies.matrix.cells import Stage
    from extproc.simulate.world import Page

SHARES_OF_N = (0.4, 0.6, 0.8, 1.0, 1.3)
BEYOND, MOST_BEYOND, PERFECT = (0.65, 1.4), 4, 0.995
RIVALS = ("least_request", "breaker", "haproxy", "tuned_engine")
FIXED = "ours-fixed"


@dataclass(frozen=True, slots=True)
class Score:
    """One contender in one cell, the mean of the seeds. Shares are 0..1.

    Attributes:
        text: the contender with its settings, as `extproc simulate --contender` reads it.
        refused: of all requests, those that the front or the engine turned away.
        late: of all requests, those that came to nothing otherwise: abandoned, failed.
    """

    text: str
    goodput: float
    refused: float
    late: float
    tokens_per_s: float


def play(text: str, stage: Stage, page: Page = "vllm", *, says_batch: bool = False) -> Score:
    """Play one contender on all seeds of a stage."""
    who = contender(text, "", stage.classes)
    return play_as(who, stage, page, says_batch=says_batch)


def play_as(who: Contender, stage: Stage, page: Page = "vllm", *, says_batch: bool = False) -> Score:
    """Play a contender that is no text."""
    groups = [replace(group, says_batch=says_batch) for group in stage.groups]
    goodput, refused, late, tokens = [], [], [], []
    for seed, demands in stage.demands.items():
        world = World(groups, who, seed, stage.traffic.faults(stage.duration_s), page)
        world.run(demands, stage.duration_s)
        run = world.result(0.0, seed, stage.duration_s)
        count = max(len(run.records), 1)
        lost = sum(record.outcome in ("abandoned", "failed") for record in run.records)
        finished = sum(record.outcome == "finished" for record in run.records)
        goodput.append(sum(record.met for record in run.records) / count)
        late.append(lost / count)
        refused.append((count - lost - finished) / count)
        tokens.append(run.generated / stage.duration_s)
    return Score(who.name, mean(goodput), mean(refused), mean(late), mean(tokens))


def limits(stage: Stage) -> list[int]:
    """Return the fixed limits to try."""
    natural = stage.natural_limit
    return sorted({max(round(share * natural), 1) for share in SHARES_OF_N})


def queues(stage: Stage) -> list[float]:
    """Return HAProxy's queue timeouts to try, seconds; the middle one first."""
    budgets = sorted({klass.budget_s for klass in stage.classes})
    if len(budgets) == 1:
        budgets = [budgets[0] / 3, budgets[0], budgets[0] * 3]
    middle = budgets[len(budgets) // 2]
    return [middle, *(budget for budget in budgets if budget != middle)]


def best(scores: Sequence[Score]) -> Score:
    """Return the one with the most goodput, then the most tokens."""
    return max(scores, key=lambda score: (round(score.goodput, 4), score.tokens_per_s))


def climb(limits: Sequence[int], score: Callable[[int], Score]) -> Score:
    """Return the best score over `limits`, and beyond their ends as long as that is better."""
    known = {limit: score(limit) for limit in limits}
    for factor in BEYOND:
        for _ in range(MOST_BEYOND):
            top = best(list(known.values()))
            limit = next(limit for limit, one in known.items() if one is top)
            further = max(round(limit * factor), 1)
            at_the_end = limit == (min(known) if factor < 1 else max(known))
            if not at_the_end or further in known or top.goodput >= PERFECT:
                break
            known[further] = score(further)
    return best(list(known.values()))


def rival(name: str, stage: Stage) -> Score:
    """Play a rival at the best of its settings."""
    match name:
        case "least_request":
            return play(name, stage)
        case "breaker":
            return climb(limits(stage), lambda limit: play(f"circuit_breaker,limit={limit}", stage))
        case "tuned_engine":
            return climb(limits(stage), lambda limit: play(f"tuned_engine,limit={limit}", stage))
        case "haproxy":
            return _best_haproxy(stage)
    raise ValueError(f"{name!r} is no rival; they are {', '.join(RIVALS)}")


def _best_haproxy(stage: Stage) -> Score:
    @cache
    def at(limit: int, queue_ms: int) -> Score:
        return play(f"haproxy,limit={limit},queue={queue_ms}ms", stage)

    waits_ms = [round(queue_s * 1000) for queue_s in queues(stage)]
    first = climb(limits(stage), lambda limit: at(limit, waits_ms[0]))
    limit = int(first.text.partition("limit=")[2].partition(",")[0])
    wait_ms = max(waits_ms, key=lambda wait_ms: at(limit, wait_ms).goodput)
    return climb(sorted({max(round(limit * factor), 1) for factor in (0.8, 1.0, 1.25)}), lambda one: at(one, wait_ms))


def fixed_on(page: str) -> str:
    """Return the name under which its score is remembered: unlike rivals' it depends on the page."""
    return f"{FIXED} on {page}"


def fixed(stage: Stage, page: Page, *, says_batch: bool = False) -> Score:
    """Play ours at the best fixed limit."""

    def at(limit: int) -> Score:
        return play(f"ours,max_running_requests={limit}", stage, page, says_batch=says_batch)

    return climb(limits(stage), at)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether ours keeps up in a cell, and why not."""

    ratio: float
    problems: tuple[str, ...]


LEAST_GOODPUT, LEAST_TOKENS, MOST_REFUSED, EASY_LOAD, ALL_IN_TIME = 0.97, 0.95, 0.01, 80, 0.99


def judge(ours: Score, others: Sequence[Score], load: int) -> Verdict:
    """Hold ours against the best of the others."""
    strongest = max(score.goodput for score in others)
    most = max(score.tokens_per_s for score in others)
    calm = next((score for score in others if score.text == "least_request"), None)
    ratio = ours.goodput / strongest if strongest else 1.0
    problems = []
    if ratio < LEAST_GOODPUT:
        problems.append(f"goodput {ratio:.2f} of the best")
    if load <= EASY_LOAD and calm and calm.goodput >= ALL_IN_TIME and ours.refused > MOST_REFUSED:
        problems.append(f"refuses {ours.refused:.1%} where least request serves all")
    if ours.tokens_per_s < LEAST_TOKENS * most:
        problems.append(f"tokens {ours.tokens_per_s / most:.2f} of the most")
    return Verdict(ratio, tuple(problems))


def as_row(score: Score) -> dict[str, object]:
    """Return a score for a file."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(score).items()}
