"""`simulate --engines auto`: the fewest engines for a trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import pytest

from extproc.errors import ConfigError
from extproc.simulate import cli
from extproc.simulate.plan import Plan, run
from extproc.simulate.sizing import fewest
from extproc.simulate.workload import CLASSES


def trace(path: Path, rate: float, seconds: float = 40.0) -> Path:
    """So many requests a second with prompts and answers that vary."""
    random, at, rows = Random(3), 0.0, ["time,prompt_tokens,output_tokens,class"]
    while (at := at + random.expovariate(rate)) < seconds:
        rows.append(f"{at:.3f},{random.randint(200, 1500)},{random.randint(20, 200)},std")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_number_found_is_enough_and_one_less_is_not(tmp_path: Path) -> None:
    plan = Plan("h100-32b", contenders=("ours",), loads=(), trace=trace(tmp_path / "t.csv", 5.0))
    found = fewest(plan, 0.97, 64)
    assert found.engines is not None

    def goodput(engines: int) -> float:
        (figures,) = run(Plan("h100-32b", engines, ("ours",), loads=(), trace=plan.trace))
        return figures.all.goodput

    assert goodput(found.engines) >= 0.97 > goodput(found.engines - 1)
    assert found.stable <= found.engines <= found.stable + 3


def test_a_burst_needs_more_than_the_mean_says_and_the_gap_between_two_doublings_is_halved(tmp_path: Path) -> None:
    burst = trace(tmp_path / "t.csv", 30.0, 4.0)
    burst.write_text(burst.read_text() + "60,300,20,std\n")
    found = fewest(Plan("h100-32b", contenders=("ours",), loads=(), trace=burst), 0.97, 64)
    assert found.engines is not None
    assert found.stable < 1 < found.engines < 8
    assert {1, 2, 4, 8} <= found.tried.keys(), "doubled until it was enough"
    assert found.engines - 1 in found.tried


def test_more_than_may_be_tried_is_said(tmp_path: Path) -> None:
    plan = Plan("h100-32b", contenders=("ours",), loads=(), trace=trace(tmp_path / "t.csv", 8.0, 20.0))
    assert fewest(plan, 0.99, 1).engines is None


def test_the_command_tells_what_it_tried_and_what_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    path = str(trace(tmp_path / "t.csv", 2.0, 20.0))
    assert cli.run(parser.parse_args(["--preset", "h100-32b", "--trace", path, "--engines", "auto"])) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("are enough: 99.0% of the requests of each class meet their objectives")
    assert "x h100-32b: std" in said[len(CLASSES)], "behind what each class is judged by"
    with pytest.raises(ConfigError, match="--engines auto is for a --trace as it was recorded"):
        cli.run(parser.parse_args(["--engines", "auto"]))
