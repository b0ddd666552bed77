"""Runs one round: starts every stack, sends, reads what the engines counted, ends everything."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.proof import load, peers
from bench.proof.fronts import Front, cpu_s, engine_counts, engine_params
from extproc.simulate.studies.figures import Run
from tests.e2e.kit.processes import Child, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.simulate.studies.experiments import Cell, Times
    from extproc.simulate.workload import Demand


class Stack:
    """One contender of one cell: its engines and its front."""

    def __init__(self, cell: Cell, contender: str, directory: Path) -> None:
        """Write configurations; start nothing."""
        experiment = cell.experiment
        directory.mkdir(parents=True)
        self.cell = cell
        self.contender = contender
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(experiment.engines)]
        params = engine_params(contender, experiment.preset)
        specs = [
            {"name": f"engine-{number}", "port": int(address.rpartition(":")[2]), "params": dict(params)}
            for number, address in enumerate(self.addresses)
        ]
        if experiment.slow != 1.0:
            specs[0]["params"] = params | {"speed": experiment.slow}
        # An engine that will be killed has a process of its own.
        alone = 1 if experiment.dies is not None else 0
        groups = [specs[:1], specs[1:]] if alone else [specs]
        self.hosts = [
            Child(
                [sys.executable, "-m", "bench.proof.engines", json.dumps(group)],
                directory / f"engines-{number}.log",
                name=f"{contender} engines {number}",
            )
            for number, group in enumerate(groups)
        ]
        self.front = Front(contender, experiment.preset, self.addresses, experiment.workload.classes, directory)

    def start(self) -> None:
        """Start its processes; `wait` says when they are ready."""
        for host in self.hosts:
            host.start()
        self.front.start()

    def wait(self) -> None:
        """Wait until it takes requests."""
        for host in self.hosts:
            host.wait_line("^ready", timeout_s=60)
        self.front.wait()

    def events(self) -> list[tuple[float, Callable[[], None]]]:
        """Return what happens to its processes, and when."""
        front = list(self.front.events())
        if self.cell.experiment.dies is None:
            return front
        begin, end = self.cell.experiment.dies
        return [(begin, self._kill), (end, self.hosts[0].start), *front]

    def _kill(self) -> None:
        self.hosts[0].signal(signal.SIGKILL)
        self.hosts[0].stop()

    def read(self, run: Run) -> None:
        """Add what engines and kernel counted. A dead engine's figures are lost."""
        for address in self.addresses:
            with contextlib.suppress(OSError, http.client.HTTPException):
                counts = engine_counts(address)
                run.wasted += counts["wasted_tokens"]
                run.preemptions += counts["preemptions"]
                run.peak_waiting = max(run.peak_waiting, counts["peak_waiting"])
                run.peak_held = max(run.peak_held, counts["peak_running"] + counts["peak_waiting"])
                run.step_lag_s = max(run.step_lag_s, counts["step_lag_max_s"])
        run.cpu_s = self.front.cpu_s()
        run.cpu_s["engines"] = sum(map(cpu_s, self.hosts))

    def stop(self) -> None:
        """End it all, without waiting for anybody."""
        children = [*self.front.children.values(), *self.hosts]
        for child in children:
            child.signal(signal.SIGKILL)
        for child in children:
            child.stop()


@dataclass(frozen=True, slots=True)
class Machine:
    """What the kernel says of all cores together since boot, in ticks."""

    idle: int
    total: int

    @staticmethod
    def now() -> Machine:
        """Read it."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return Machine(ticks[3] + ticks[4], sum(ticks))

    def busy_since(self, before: Machine) -> float:
        """Return which share of the cores was busy."""
        total = self.total - before.total
        return 1.0 - (self.idle - before.idle) / total if total else 0.0


def run_round(cells: Sequence[Cell], times: Times, only: Sequence[str] = ()) -> tuple[list[Run], float]:
    """Run all contenders of these cells at once (or those in `only`); their runs, and how busy the machine was."""
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        stacks = []
        for cell in cells:
            for contender in cell.experiment.contenders:
                if not only or contender in only:
                    stacks.append(Stack(cell, contender, directory / str(len(stacks))))
                    running.callback(stacks[-1].stop)
        for stack in stacks:
            stack.start()
        for stack in stacks:
            stack.wait()
        return _play(stacks, times)


def _play(stacks: Sequence[Stack], times: Times) -> tuple[list[Run], float]:
    targets, runs = [], []
    for stack in stacks:
        cell, experiment = stack.cell, stack.cell.experiment
        marks = peers.marks(stack.contender, experiment.workload.classes)
        gateways = stack.front.gateways
        shares = dealt(cell.demands(times), len(gateways), cell.seed)
        targets.append(
            [
                load.Target(address, demands, experiment.tagged, marks)
                for address, demands in zip(gateways, shares, strict=True)
            ]
        )
        run = Run(experiment.name, stack.contender, cell.load, cell.seed, times.window, [])
        run.dies = experiment.dies is not None
        runs.append(run)

    def read() -> None:
        for stack, run in zip(stacks, runs, strict=True):
            stack.read(run)

    before = Machine.now()
    every = [target for some in targets for target in some]
    load.play(every, times.cut_s, [event for stack in stacks for event in stack.events()], read)
    busy = Machine.now().busy_since(before)
    for run, some in zip(runs, targets, strict=True):
        run.records = [record for target in some for record in target.records]
    return runs, busy


def dealt(demands: Sequence[Demand], gateways: int, seed: int) -> list[list[Demand]]:
    """Deal requests to so many gateways at random, as a balancer in front of them would; one gets all as they are."""
    chance = random.Random(seed)
    shares: list[list[Demand]] = [[] for _ in range(gateways)]
    for demand in demands:
        shares[chance.randrange(gateways)].append(demand)
    return shares
