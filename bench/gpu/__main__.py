"""Two engines on one GPU, real Envoy: least request, fixed limits and the defaults, one after another.

    python -m bench.gpu --out gpu.json                  # on a GPU, under 8 minutes
    python -m bench.gpu --device cpu --seconds 15       # shows that it works; its figures say nothing

Load 100 % is measured first: what the engines finish per second when there is always another request. Each contender
then gets the same requests at the same times, on engines that were just started. Objectives are the standing mix's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.proof import load
from bench.proof.fronts import Front
from extproc.simulate.report import goodput
from extproc.simulate.studies.figures import Run, figures
from extproc.simulate.workload import CLASSES, Workload
from tests.e2e.kit.processes import Child, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extproc.simulate.workload import Demand

ENGINES = 2
FIXED = (8, 16, 32)
CONTENDERS = ("least_request", *(f"ours,max_running_requests={limit}" for limit in FIXED), "ours")
LOADS = {0.7: ("least_request", "ours"), 1.2: CONTENDERS}
READY_S = 120.0
CUT_S = 8.0
SEED = 71


def main() -> int:
    """Run what the flags say."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--slots", type=int, default=64, help="of each engine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals for each contender (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="(%(default)s)")
    flags = parser.parse_args()
    began = time.monotonic()
    longest = 4000 if flags.device == "cuda" else 900
    workload = Workload(context_tokens=longest)
    rate = capacity(workload, flags)
    print(f"100 % is {rate:.2f} requests/s", flush=True)
    rows: list[dict[str, Any]] = []
    for share, contenders in LOADS.items():
        demands = workload.demands(share * rate, flags.seconds, SEED)
        for contender in contenders:
            run = play(contender, demands, flags)
            found = figures([run])
            by_class = {line.klass: round(line.goodput, 3) for line in found.lines}
            rows.append({"load": share, "contender": contender, "goodput": round(goodput(run.counted), 3)})
            rows[-1] |= {"classes": by_class, "tokens_per_s": round(found.tokens_per_s, 1), "waiting": run.peak_waiting}
            print(json.dumps(rows[-1]), flush=True)
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "") if flags.device == "cuda" else "cpu"
    took_s = round(time.monotonic() - began)
    flags.out.write_text(json.dumps({"rate": rate, "device": device, "took_s": took_s, "rows": rows}, indent=1))
    return 0


@contextlib.contextmanager
def engines(flags: argparse.Namespace, directory: Path) -> Iterator[list[str]]:
    """Start the engines; give their addresses."""
    with contextlib.ExitStack() as running:
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(ENGINES)]
        children = []
        for number, address in enumerate(addresses):
            argv = [sys.executable, "-m", "bench.gpu.server", "--port", address.rpartition(":")[2]]
            argv += ["--slots", str(flags.slots), "--device", flags.device]
            child = Child(argv, directory / f"engine-{number}.log", name=f"engine {number}")
            running.callback(child.stop)
            child.start()
            children.append(child)
        for child in children:
            child.wait_line("^ready", timeout_s=READY_S)
        yield addresses


def capacity(workload: Workload, flags: argparse.Namespace) -> float:
    """Measure how many requests per second the engines finish when there is always another one."""
    seconds, count = flags.seconds / 2, 4 * flags.slots * ENGINES
    patient = tuple(replace(klass, patience_s=1e6) for klass in CLASSES)
    drawn = replace(workload, classes=patient).demands(10.0, count / 5, SEED)[:count]
    many = [replace(one, at=0.001 * number) for number, one in enumerate(drawn)]
    run = play("least_request", many, flags, seconds=seconds, cut_s=0.0)
    ended = sorted(record.at + record.end_s for record in run.records if record.outcome == "finished" and record.end_s)
    late = [at for at in ended if at > seconds / 3]
    if len(late) < 2:
        raise SystemExit(
            f"the engines finished {len(ended)} requests in {seconds:g} s: --seconds more, or fewer --slots"
        )
    return len(late) / (seconds - seconds / 3)


def play(
    contender: str, demands: Sequence[Demand], flags: argparse.Namespace, seconds: float = 0.0, cut_s: float = CUT_S
) -> Run:
    """Run one contender on engines of its own, and return what its clients saw."""
    seconds = seconds or flags.seconds
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        addresses = running.enter_context(engines(flags, directory))
        front = Front(contender, "h100-32b", addresses, CLASSES, directory)
        running.callback(front.stop)
        front.start()
        front.wait()
        target = load.Target(front.address, demands)
        load.play([target], seconds + cut_s)
    return Run("gpu", contender, 0.0, SEED, (seconds / 5, seconds), target.records)


if __name__ == "__main__":
    sys.exit(main())
