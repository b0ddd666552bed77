"""The command: plan, run, reject, run again, sweep, write the page.

    python -m bench.proof                      # `make bench`: all of it, five seeds, about 27 minutes
    python -m bench.proof --quick              # `make bench-quick`: one seed of the ramp's ends, four minutes
    python -m bench.proof --peers              # `make bench-peers`: against two routers from PyPI, five minutes
    python -m bench.proof --replicas           # of `make bench-replicas`: several gateways, one queue; 25 minutes
    python -m bench.proof --only ramp noisy --seeds 71 72 --stacks 8
    python -m bench.proof --quick --contender mine=FILE   # a contender of your own beside them (bench/proof/rival.py)
    python -m bench.proof --replicas --seeds 73 --add     # a further piece of it, beside the runs that lie there
    python -m bench.proof --page               # the page again, from the runs that lie in build/bench

Exits 1 if runs were rejected and could not be repeated; an expectation that was not reached is said, on the page too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import extproc
from bench import replicas
from bench.proof import gateways_page, page, peers, peers_page, peers_search, rival, tables
from bench.proof.fronts import HAPROXY
from bench.proof.stacks import run_round
from bench.proof.words import collect, summary
from extproc.simulate.studies import virtual
from extproc.simulate.studies.commit import commit
from extproc.simulate.studies.experiments import BY_NAME, EXPERIMENTS, SEVERAL, WITH_PEERS, Cell, Times, cells, pack
from extproc.simulate.studies.figures import Run, from_json, to_json
from tests.e2e.kit.envoy import envoy_binary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extproc.simulate.studies.experiments import Experiment

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (71, 72, 73, 74, 75)
"""Nothing was tuned on these: prototypes had 1 to 3 and 11 to 18, docs/simulate.md 21 to 35, our tuning 51 to 53."""
STACKS = 21.0
"""Busy stacks of three engines at once: they keep two cores at rest some 70 % busy."""
STACKS_OF_SEVERAL = 5.0
"""A stack with eight gateways is 17 processes, which cost more by starting than by what they do then."""
QUICK = ("ramp", "slow", "noisy", "dies", "abandoned", "one_class")


def main() -> int:
    """Run what the flags say."""
    flags = _flags()
    if os.getsid(0) != os.getpid():
        return _apart()
    with contextlib.suppress(OSError):  # needs root: the sender, which is the clock here, before all that it measures
        Path("/proc/self/autogroup").write_text("-10")
    began = time.monotonic()
    out: Path = flags.out
    left: list[Cell] = []
    if not flags.page:
        own = flags.own
        experiments = [replace(one, contenders=(*one.contenders, *own)) for one in map(BY_NAME.__getitem__, flags.only)]
        if flags.peers:
            peers.install()
            some = (*(flags.contender or peers_search.best(WITH_PEERS.contenders)), *own)
            experiments = [replace(one, contenders=some) for one in experiments]
        if flags.loads:
            experiments = [replace(one, loads=tuple(flags.loads)) for one in experiments]
        if flags.quick:
            experiments = [replace(one, loads=(0.7, 1.2)) if one.name == "ramp" else one for one in experiments]
        if HAPROXY is None:
            print("HAProxy is not installed (apt-get install haproxy): it is left out", flush=True)
            experiments = [without(one, "haproxy") for one in experiments]
        _begin(out, flags)
        left = real(cells(experiments, flags.seeds), flags, out)
        if not flags.no_virtual:
            sweep(experiments, flags, out)
        _took(out, round(time.monotonic() - began))
    runs = load_runs(out)
    facts = json.loads((out / "facts.json").read_text())
    rejected = [run for run in runs if run.problem()]
    if flags.peers or flags.replicas:
        path = _other_page(runs, facts, flags)
        print(f"{time.monotonic() - began:.0f} s; {len(runs)} runs, {len(rejected)} rejected; {path}")
        return 1 if rejected or left else 0
    written = page.write(runs, load_sweeps(out), facts, flags.docs)
    print("\n".join(tables.ramp(collect(runs))))
    print(page.noise(runs))
    for holds, sentence in written.expectations:
        print(f"  {'reached    ' if holds else 'NOT REACHED'} {sentence}")
    print(
        f"{time.monotonic() - began:.0f} s; {len(runs)} runs, {len(rejected)} rejected; {flags.docs / 'benchmarks.md'}"
    )
    return 1 if rejected or left else 0


def _other_page(runs: list[Run], facts: dict[str, Any], flags: argparse.Namespace) -> Path:
    """Write the page of an experiment that has its own."""
    if flags.peers:
        return peers_page.write(runs, facts, flags.docs)
    forwarding: Path = flags.out / replicas.FILE
    rows = json.loads(forwarding.read_text()) if forwarding.exists() else []
    return gateways_page.write(runs, rows, facts, flags.docs)


def _apart() -> int:
    """Run in a session of our own: Linux shares the cores between sessions first, so that what else runs in this one,
    a shell's other jobs, would make our sender late while engines and proxies, each in its own session, are not.
    """
    guard = shutil.which("setpriv")
    argv = [guard, "--pdeathsig", "KILL", "--"] if guard else []
    argv += [sys.executable, "-m", "bench.proof", *sys.argv[1:]]
    return subprocess.run(argv, start_new_session=True, check=False).returncode


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 70 and 120 %% of the ramp, not all else")
    parser.add_argument(
        "--peers", action="store_true", help="that alone, as the search set them; with --contender, any"
    )
    parser.add_argument(
        "--replicas", action="store_true", help="several gateways, alone and sharing one queue; that alone"
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[], help="instead of each experiment's own")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(one.name for one in (*EXPERIMENTS, *SEVERAL)), help="experiments (all)"
    )
    parser.add_argument("--contender", nargs="+", default=[], help="of those (all); NAME=FILE adds one of your own")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"({' '.join(map(str, SEEDS))})")
    parser.add_argument("--stacks", type=float, help=f"busy stacks at once ({STACKS:g})")
    parser.add_argument("--times", type=float, nargs=3, metavar="S", help="seconds: warm, end of arrivals, cut")
    parser.add_argument("--repeats", type=int, default=1, help="how often rejected cells are run again (%(default)s)")
    parser.add_argument("--no-virtual", action="store_true", help="no sweeps on the virtual clock")
    parser.add_argument("--virtual-seconds", type=float, default=300.0, help="of arrivals in sweeps (%(default)g)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of the sweeps (%(default)s)"
    )
    parser.add_argument("--lock", type=Path, metavar="FILE", help="lock it for each round: others measure here too")
    parser.add_argument("--page", action="store_true", help="write the page from earlier runs")
    parser.add_argument("--add", action="store_true", help="keep the earlier runs, whose seeds these are not")
    parser.add_argument("--note", default="", help="what the page says of this piece, with --add: what else ran")
    parser.add_argument("--out", type=Path, help="raw runs (build/bench; build/bench-peers, build/bench-replicas)")
    parser.add_argument("--docs", type=Path, help="where the page goes (docs/; with --quick, --out)")
    flags = parser.parse_args()
    flags.own = [one for one in flags.contender if rival.is_own(one)]
    flags.contender = [one for one in flags.contender if not rival.is_own(one)]
    try:
        for one in flags.own:
            rival.read(Path(one.partition("=")[2]))
    except rival.RivalError as error:
        parser.error(str(error))
    if flags.peers:
        flags.only, flags.no_virtual = [WITH_PEERS.name], True
    several = [one.name for one in SEVERAL]
    if flags.replicas:
        flags.only, flags.no_virtual = flags.only or several, True
    flags.stacks = flags.stacks or (STACKS_OF_SEVERAL if flags.replicas else STACKS)
    kind = "bench-peers" if flags.peers else "bench-replicas" if flags.replicas else "bench"
    flags.out = flags.out or ROOT / "build" / kind
    flags.only = flags.only or (QUICK if flags.quick else [one.name for one in EXPERIMENTS])
    flags.seeds = flags.seeds or SEEDS[: 1 if flags.quick else 3 if flags.peers else None]
    flags.times = Times(*flags.times) if flags.times else Times()
    whole = set(flags.only) == ({*several} if flags.replicas else {one.name for one in EXPERIMENTS})
    whole = whole and not (flags.quick or flags.contender or flags.own)
    flags.docs = flags.docs or (ROOT / "docs" if whole else flags.out)
    return flags


def without(experiment: Experiment, name: str) -> Experiment:
    """Return the experiment without a contender."""
    return replace(experiment, contenders=tuple(one for one in experiment.contenders if one != name))


# ---- real runs


def real(planned: Sequence[Cell], flags: argparse.Namespace, out: Path) -> list[Cell]:
    """Run all cells on real processes, the rejected ones again, a JSON file for each run. Returns what is left."""
    of = commit()
    left, chosen = list(planned), (*flags.contender, *flags.own) if flags.contender else ()
    for attempt in range(1 + flags.repeats):
        again: list[Cell] = []
        rounds = pack(left, flags.stacks if attempt == 0 else flags.stacks * 0.6)
        for number, some in enumerate(rounds, 1):
            began = time.monotonic()
            try:
                with _locked(flags.lock):
                    runs, busy = run_round(some, flags.times, chosen)
            except AssertionError as error:  # a port that somebody else took first, for instance
                print(f"round {number}/{len(rounds)} did not start: {error}", flush=True)
                again += some
                continue
            names = sorted({f"{cell.experiment.name} {cell.load:.0%} #{cell.seed}" for cell in some})
            print(f"round {number}/{len(rounds)}, {len(runs)} stacks, {time.monotonic() - began:.0f} s, ", end="")
            print(f"{busy:.0%} of the cores busy: {', '.join(names)}", flush=True)
            for run in runs:
                run.commit = of
                _save(run, busy, out)
            bad = {(run.experiment, run.load, run.seed): run.problem() for run in runs if run.problem()}
            for (name, load, seed), problem in bad.items():
                print(f"  REJECTED {name} {load:.0%} #{seed}: {problem}", flush=True)
            again += [cell for cell in some if (cell.experiment.name, cell.load, cell.seed) in bad]
        left = again
        if not left:
            break
    return left


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(run: Run, busy: float, out: Path) -> None:
    contender = re.sub(r"[^a-z0-9_.-]+", "-", run.contender)
    path = out / "runs" / f"{run.experiment}-{run.load:.0%}-{run.seed}-{contender}.json"
    path.write_text(json.dumps(to_json(run) | {"machine_busy": round(busy, 3)}))


def load_runs(out: Path) -> list[Run]:
    """Return the runs that lie in `out`, in the order of their names."""
    return [from_json(json.loads(path.read_text())) for path in sorted((out / "runs").glob("*.json"))]


# ---- sweeps


def sweep(experiments: Sequence[Experiment], flags: argparse.Namespace, out: Path) -> None:
    """Run the sweeps, and the real cells again on the virtual clock; one JSON file of figures for each preset."""
    began = time.monotonic()
    for own in flags.own:
        experiments = [without(one, own) for one in experiments]
    long = Times(min(60.0, flags.virtual_seconds / 5), flags.virtual_seconds, 0.0)
    tasks = [
        (cell, name, flags.times)
        for cell in cells(experiments, flags.seeds)
        for name in cell.experiment.contenders
        if cell.experiment.name == "ramp"
    ]
    check = len(tasks)
    for preset in ("h100-32b",) if flags.quick else ("h100-32b", "a100-8b"):
        wanted = virtual.sweeps(experiments, preset)
        tasks += [(cell, name, long) for cell in cells(wanted, flags.seeds) for name in cell.experiment.contenders]
    results = virtual.run(tasks, flags.workers)
    rows, of = [], commit()
    for number, (preset, run) in enumerate(results):
        kind = "check" if number < check else "sweep"
        rows.append({"kind": kind, "preset": preset, "commit": of} | summary(run))
    (out / "sweeps.json").write_text(json.dumps(rows))
    print(f"{len(tasks)} runs on the virtual clock, {time.monotonic() - began:.0f} s", flush=True)


def load_sweeps(out: Path) -> list[dict[str, Any]]:
    """Return the figures of the sweeps; none if they were left out."""
    path = out / "sweeps.json"
    return json.loads(path.read_text()) if path.exists() else []


# ---- what the page says of the machine


def _begin(out: Path, flags: argparse.Namespace) -> None:
    (out / "runs").mkdir(parents=True, exist_ok=True)
    earlier = json.loads((out / "facts.json").read_text()) if flags.add and (out / "facts.json").exists() else {}
    for old in [] if flags.add else [*(out / "runs").glob("*.json"), out / "sweeps.json", out / "facts.json"]:
        old.unlink(missing_ok=True)
    times = flags.times
    piece = {
        "began": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "experiments": list(flags.only),
        "seeds": list(flags.seeds),
        "commit": commit(),
        "command": " ".join(["python -m bench.proof", *sys.argv[1:]]),
        "note": flags.note,
    }
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m bench.proof", *sys.argv[1:]]),
        "seeds": sorted({*earlier.get("seeds", ()), *flags.seeds}),
        "times": [times.warm_s, times.end_s, times.cut_s],
        "stacks": flags.stacks,
        "virtual_s": flags.virtual_seconds,
        "machine": _machine(),
        "versions": _versions(),
        "duration_s": earlier.get("duration_s", 0),
        "pieces": [*earlier.get("pieces", ()), piece],
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1))


def _took(out: Path, took_s: int) -> None:
    path = out / "facts.json"
    facts = json.loads(path.read_text())
    facts["duration_s"] += took_s
    facts["pieces"][-1]["took_s"] = took_s
    path.write_text(json.dumps(facts, indent=1))


def _machine() -> str:
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = models[0] if models else platform.machine()
    return f"{os.cpu_count()} cores ({model}), {gib:.0f} GiB, Linux {platform.release()}"


def _versions() -> dict[str, str]:
    found = {"extproc": extproc.__version__, "Python": platform.python_version()}
    commands = {
        "Envoy": ([str(envoy_binary()), "--version"], r"version: \S+?/(\d+\.\d+\.\d+)"),
        "HAProxy": ([HAPROXY or "haproxy", "-v"], r"version (\S+)"),
    }
    for name, (command, pattern) in commands.items():
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            continue
        match = re.search(pattern, text)
        found[name] = match.group(1) if match else "unknown"
    return found | {"commit": commit()}


if __name__ == "__main__":
    sys.exit(main())
