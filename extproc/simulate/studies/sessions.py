"""Would it help to admit fewer sessions where caches lose what agents need? docs/adr/0012 has the answer and why.

    python -m bench.sessions          # about a minute on one core

Agents on the shipped core, simulated: turns with 1 to 30 s of tool time between them, and a context that grows. Beside
it the same with a gate before the core that refuses new sessions: above a number that somebody knew, or above one that
follows what engines find in their caches. Nothing of the gate is in the product.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.engine.params import PRESETS
from extproc.simulate.contenders import Core, contender
from extproc.simulate.fronts import Group, Verdict
from extproc.simulate.plan import Plan, demands_for
from extproc.simulate.studies.matrix.traffic import AGENTS
from extproc.simulate.workload import CLASSES, STANDARD, Demand, Lengths, Sessions, Workload, guess
from extproc.simulate.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.load import Load
    from extproc.admission.values import Answer
    from extproc.simulate.fronts import Job

AGENT = replace(STANDARD, share=1.0)
IDLE_S = 45.0
"""A session that was silent for so long is over: no header says so."""
ENGINES = 4


def agents(count: int, span_s: float, first: int, grows: int) -> list[Demand]:
    """Draw `count` agents that begin within `span_s`: some 15 turns each, from `first` tokens on, `grows` a turn."""
    draw = random.Random(1)
    begun = []
    for number in range(count):
        history = max(Lengths(first, 0.4).draw(draw, 60_000), 300)
        turns: list[Demand] = []
        for _ in range(max(int(draw.gauss(15, 4)), 2)):
            output = Lengths(150, 0.7).draw(draw, 2000)
            turn = Demand(draw.uniform(1, 30), AGENT, history, output, guess(draw, history), session=f"agent-{number}")
            if turns:
                turns[-1].then = turn
            turns.append(turn)
            history = min(history + output + Lengths(grows, 0.8).draw(draw, 20_000), 60_000)
        turns[0].at = draw.uniform(0, span_s)
        begun.append(turns[0])
    return sorted(begun, key=lambda turn: turn.at)


class SessionGate(Core):
    """The core, with a gate before it that refuses requests of new sessions above `most` active ones."""

    most: float | None = None
    follows = False
    now = 0.0

    def __init__(self, *arguments: object) -> None:
        """Start without sessions."""
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._active: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._left = self._found = self._pressed = self._readings = 0
        self._judged_at = 0.0
        self._refused = False

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Let active sessions in, and new ones while there is room."""
        session = job.demand.session
        while self._active and next(iter(self._active.values()))[0] < now - IDLE_S:
            self._active.popitem(last=False)
        is_new = session is not None and session not in self._active
        if is_new and self.most is not None and len(self._active) >= self.most:
            self._refused = True
            return [Verdict(job, None, "session_limit")]
        if session is not None:
            before = self._active.get(session)
            self._left += min(before[1], job.demand.estimate) if before is not None else 0
            self._active[session] = now, job.demand.prompt + job.demand.output
            self._active.move_to_end(session)
        return super().arrive(job, now)

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:
        """Keep its session active for a while."""
        session = job.demand.session
        if session is not None and session in self._active:
            self._active[session] = now, self._active[session][1]
            self._active.move_to_end(session)
        return super().end(job, now, answer)

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        """Fewer while requests wait and engines find little of what turns had left there; else slowly more."""
        self._found += load.cached_tokens or 0
        self._readings += 1
        self._pressed += self.controller.waiting > 0
        if self.follows and self._left > 20_000 and now > self._judged_at + 5.0:
            active = len(self._active)
            if self._found < 0.8 * self._left and 2 * self._pressed > self._readings:
                if self.most is None or active <= self.most:
                    self.most = max(0.7 * active, 4.0)
            elif self.most is not None and self._refused:
                self.most += max(0.02 * self.most, 1.0)
            self._left = self._found = self._pressed = self._readings = 0
            self._judged_at, self._refused = now, False
        return super().observe(engine, load, now)


def play(preset: str, demands: Sequence[Demand], workload: Workload, most: float | None, *, follows: bool) -> str:
    """Return goodput, and the share of prompt tokens that caches had."""
    groups, who = [Group(PRESETS[preset], ENGINES)], contender("ours", preset, workload.classes)
    world = World(groups, who, 1)
    front = SessionGate(groups, who.setting)
    front.most, front.follows = most, follows
    world.front = front
    world.run(demands, 1e5)
    run = world.result(1.0, 1, 1e5)
    met = sum(record.met for record in run.records) / len(run.records)
    return f"{met:.3f} ({run.hits:.2f})"


def main() -> None:
    """Print the table of docs/adr/0012."""
    lone = Workload(classes=(AGENT,))
    chat = Workload(
        classes=tuple(replace(klass, share=share) for klass, share in zip(CLASSES, (0.8, 0.13, 0.07), strict=True)),
        sessions=Sessions(),
    )
    rows: list[tuple[str, str, list[Demand], Workload]] = []
    for preset, count, span_s, first, grows in (
        ("a100-8b", 150, 600.0, 3000, 900),
        ("a100-8b", 500, 1000.0, 3000, 900),
        ("a100-8b", 1000, 1000.0, 3000, 900),
        ("h100x4-70b", 500, 1000.0, 3000, 900),
        ("h100-32b", 200, 600.0, 1000, 200),
    ):
        text = f"{count} agents in {span_s:.0f} s, {first} tokens and {grows} a turn"
        rows.append((preset, text, agents(count, span_s, first, grows), lone))
    for name, workload, load in (("chat", chat, 2.2), ("chat", chat, 2.6), ("`agents` of the matrix", AGENTS, 1.6)):
        plan = Plan(preset="a100-8b", engines=ENGINES, duration_s=150.0, workload=workload)
        rows.append(("a100-8b", f"{name} at {load:.0%}", demands_for(plan, load, 11), workload))
    print("| engines | traffic | shipped | at most 90 | follows the caches |\n| --- | --- | --- | --- | --- |")
    for preset, text, demands, workload in rows:
        told = [
            play(preset, demands, workload, most, follows=follows)
            for most, follows in ((None, False), (90.0, False), (None, True))
        ]
        print(f"| {ENGINES} x {preset} | {text} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
