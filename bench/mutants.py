"""A sample of the core's mutants against its tests: `make mutation-sample SEED=1 COUNT=150` (docs/mutation.md).

`mutmut` makes the mutants, and notes which tests reach which function. It then collects the tests anew for each mutant,
which takes longer than most tests need to notice it. Here they are collected once; each mutant is a fork of that
process, and the tests most likely to notice it run first: those of its room, then the quickest. A run that was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

KILLED, LEFT, UNREACHED = "killed", "survived what there was time for", "no test reaches it"


class Sample:
    """A plugin of pytest that runs the tests of each mutant instead of all tests."""

    def __init__(self, names: list[str], state: Path, most_s: float, until: float) -> None:
        """Try `names`, each with up to `most_s` seconds of tests, until then; what came of it is kept in `state`."""
        self.names, self.state, self.most_s, self.until = names, state, most_s, until
        self.found: dict[str, list[Any]] = json.loads(state.read_text()) if state.exists() else {}
        stats = json.loads(Path("mutmut-stats.json").read_text())
        self.reach: dict[str, list[str]] = stats["tests_by_mangled_function_name"]
        self.took_s: dict[str, float] = stats["duration_by_test"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all that are not decided yet."""
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()
        for name in self.names:
            verdict, most_s = self.found.get(name, (LEFT, 0.0))
            if verdict != LEFT or most_s >= self.most_s or time.monotonic() > self.until:
                continue
            function, own = name.rpartition("__mutmut_")[0], f"test_{name.split('.')[2]}."
            tests = [items[test] for test in self.reach.get(function, ()) if test in items]
            tests.sort(key=lambda item: self.took_s.get(item.nodeid, 0.1) / (5 if own in item.nodeid else 1))
            self.found[name] = self._try(name, tests) if tests else [UNREACHED, ""]
            self.state.write_text(json.dumps(self.found, indent=0))
        return True

    def _try(self, name: str, tests: list[pytest.Item]) -> list[Any]:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            self._be(name, tests, theirs)
        os.close(theirs)
        with os.fdopen(ours) as told:
            verdict = told.read()
        os.waitpid(child, 0)
        return json.loads(verdict) if verdict else [KILLED, "by time or memory"]

    def _be(self, name: str, tests: list[pytest.Item], told: int) -> None:
        """Be the mutant, from here to the end of this process."""
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.environ["MUTANT_UNDER_TEST"] = name
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        verdict: list[Any] = [LEFT, self.most_s]
        for test in tests:
            if time.process_time() > self.most_s:
                break
            most_s = int(time.process_time() + 8 * self.took_s.get(test.nodeid, 5.0) + 10)
            resource.setrlimit(resource.RLIMIT_CPU, (most_s, resource.RLIM_INFINITY))
            if any(report.failed for report in runtestprotocol(test, log=False)):
                verdict = [KILLED, test.nodeid]
                break
        os.write(told, json.dumps(verdict).encode())
        os._exit(0)


def main() -> None:
    """Run a sample and print who is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--most-s", type=float, default=30.0, help="seconds of tests for one mutant")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; the next run goes on")
    options = parser.parse_args()
    config = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    names: list[str] = []
    for room in sorted(Path("mutants/extproc/admission").glob("*.py.meta")):
        names += sorted(json.loads(room.read_text())["exit_code_by_key"])
    print(f"{len(names)} mutants; the first {options.count} of a shuffled order, seed {options.seed}")
    random.Random(options.seed).shuffle(names)
    os.environ |= {"MUTANT_UNDER_TEST": "", "PY_IGNORE_IMPORTMISMATCH": "1"}
    state = Path(f"sample-{options.seed}.json").absolute()
    os.chdir("mutants")
    sys.path.insert(0, str(Path.cwd()))
    sample = Sample(names[: options.count], state, options.most_s, time.monotonic() + options.seconds)
    pytest.main(["-q", "-p", "no:cacheprovider", *config["pytest_add_cli_args_test_selection"]], plugins=[sample])
    for name, (verdict, _) in sample.found.items():
        if verdict != KILLED:
            print(f"{verdict}: {name}")
    print(Counter(verdict for verdict, _ in sample.found.values()))


if __name__ == "__main__":
    main()
