"""The simulator: deterministic, conserving, and driving the core as it is."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from extproc.admission.controller import Controller
from extproc.engine.params import PRESETS
from extproc.errors import ConfigError
from extproc.simulate import cli, report
from extproc.simulate.contenders import NAMES, Core, contender
from extproc.simulate.fronts import Group
from extproc.simulate.plan import Plan, capacity, run
from extproc.simulate.workload import CLASSES, STANDARD, Demand, Noise, Sessions, Workload
from extproc.simulate.world import Faults, World

PRESET = "a100-8b"
CHAT = Workload(sessions=Sessions(turns=4.0, think_s=3.0))


def play(
    name: str,
    workload: Workload | None = None,
    *,
    rate: float = 28.0,
    seconds: float = 30.0,
    seed: int = 5,
    **more: Any,
) -> World:
    workload = workload or Workload()
    who = contender(name, PRESET, workload.classes)
    world = World([Group(PRESETS[PRESET], 4)], who, seed, **more)
    world.run(workload.demands(rate, seconds, seed), seconds)
    return world


# ---- workload


def test_the_same_seed_gives_the_same_demands_and_another_gives_others() -> None:
    def times(seed: int) -> list[tuple[float, int, int, str]]:
        return [(d.at, d.prompt, d.output, d.tenant) for d in Workload().demands(10.0, 20.0, seed)]

    assert times(1) == times(1) != times(2)


@pytest.mark.parametrize("process", ["poisson", "gamma", "bursty"])
def test_every_process_has_the_mean_rate_that_was_asked_for(process: Any) -> None:
    count = len(Workload(process, cv=2.0).demands(20.0, 3000.0, 1))
    assert count == pytest.approx(60_000, rel=0.1)


def test_classes_and_tenants_come_in_their_shares() -> None:
    demands = Workload().demands(50.0, 200.0, 3)
    classes, tenants = Counter(d.klass.name for d in demands), Counter(d.tenant for d in demands)
    assert classes["std"] / len(demands) == pytest.approx(0.5, abs=0.03)
    assert tenants["tenant-0"] / len(demands) == pytest.approx(0.4, abs=0.03)


def test_a_noisy_tenant_sends_its_multiple_and_the_others_what_they_always_send() -> None:
    calm = Counter(d.tenant for d in Workload().demands(50.0, 200.0, 3))
    loud = Counter(d.tenant for d in Workload(noise=Noise(1, 6.0, 0.0, 200.0)).demands(50.0, 200.0, 3))
    assert loud["tenant-1"] / calm["tenant-1"] == pytest.approx(6.0, rel=0.15)
    assert all(loud[name] == calm[name] for name in calm if name != "tenant-1")


def test_a_turn_of_a_session_carries_all_turns_before_it() -> None:
    chains = [list(d.chain()) for d in CHAT.demands(20.0, 60.0, 2) if d.session is not None]
    long = [chain for chain in chains if len(chain) > 2]
    assert long
    for chain in long:
        assert len({turn.session for turn in chain}) == 1
        assert all(later.prompt > earlier.prompt + earlier.output - 1 for earlier, later in pairwise(chain))


def test_load_one_is_what_the_engines_finish_when_there_is_always_more() -> None:
    assert capacity("a100-8b", 4, Workload(), None) == pytest.approx(24.0, rel=0.06)
    assert capacity("h100-32b", 4, Workload(), None) == pytest.approx(6.1, rel=0.06)


# ---- the world


@pytest.mark.parametrize(
    "name", [*NAMES, "ours,first_byte_probe=true", "ours,enable_queue=false", "ours,binding=bound"]
)
@pytest.mark.parametrize("workload", [Workload(), Workload("bursty"), CHAT])
def test_every_demand_ends_exactly_once_and_nothing_is_left(name: str, workload: Workload) -> None:
    demands = sum(1 for demand in workload.demands(28.0, 30.0, 5) for _ in demand.chain())
    world = play(name, workload, faults=Faults(dies=(0, 8.0, 16.0)))
    assert len(world.jobs) == demands
    assert all(job.ended is not None and job.outcome for job in world.jobs)
    assert all(engine.running == engine.waiting == 0 for engine in world.engines)
    assert world.open == 0
    if isinstance(world.front, Core):
        core = world.front.controller
        assert core.waiting == 0
        assert not any(endpoint.leases or endpoint.kv.tokens for endpoint in core.endpoints.values())


def test_ours_is_the_core_itself() -> None:
    front = play("ours", seconds=1.0).front
    assert isinstance(front, Core)
    assert type(front.controller) is Controller


def test_a_run_is_deterministic() -> None:
    one, other = (play("ours").result(1.0, 5, 30.0) for _ in range(2))
    assert one == other


def test_everybody_gets_the_same_demands() -> None:
    runs = [play(name) for name in NAMES]
    seen = [sorted((job.arrived, job.demand.prompt, job.demand.output) for job in world.jobs) for world in runs]
    assert all(arrivals == seen[0] for arrivals in seen)


def test_clients_leave_after_their_patience_and_their_work_is_counted_as_wasted() -> None:
    hurried = Workload(classes=tuple(replace(klass, patience_s=0.5) for klass in CLASSES))
    result = play("least_request", hurried, rate=60.0).result(1.0, 5, 30.0)
    left = [record for record in result.records if record.outcome == "abandoned"]
    assert left
    assert all(record.ended_s == pytest.approx(0.5) and not record.met for record in left)
    assert result.wasted > 0


def test_a_dead_engine_fails_what_it_had_and_health_checks_take_it_out() -> None:
    world = play("least_request", faults=Faults(dies=(0, 5.0, 20.0)))
    failed = [job for job in world.jobs if job.outcome == "failed"]
    assert failed
    assert all(5.0 <= (job.ended or 0.0) <= 8.0 for job in failed if job.engine == 0)
    assert not any(job.engine == 0 for job in world.jobs if 8.5 < job.arrived < 20.0)


def test_the_core_sees_telemetry_like_a_scraper_makes_it() -> None:
    world = play("ours", rate=10.0)
    assert isinstance(world.front, Core)
    endpoint = world.front.controller.endpoints["engine-0"]
    assert endpoint.reading.page is not None
    assert endpoint.reading.page.kv_capacity_tokens == PRESETS[PRESET].kv_tokens
    assert endpoint.reading.page.first_tokens is not None


def test_a_small_overloaded_run_has_sane_figures() -> None:
    plan = Plan(contenders=("least_request", "ours"), loads=(0.5, 1.3), seeds=(1, 2), duration_s=40.0)
    results = {(r.load, r.contender): r for r in run(plan)}
    calm, busy = results[0.5, "ours"], results[1.3, "ours"]
    assert calm.all.goodput > 0.99
    assert calm.all.refused == 0.0
    assert 0.8 < busy.all.goodput < 1.0
    assert busy.all.goodput > results[1.3, "least_request"].all.goodput
    assert busy.of("int").goodput > busy.of("batch").goodput
    assert busy.of("int").ttft[0] <= busy.of("int").ttft[1] <= busy.of("int").ttft[2]
    assert 0.0 < busy.fairness <= 1.0
    assert busy.tokens_per_s > calm.tokens_per_s > 1000


def test_processes_change_nothing_but_the_time_it_takes() -> None:
    plan = Plan(contenders=("round_robin", "ours"), seeds=(1,), duration_s=10.0)
    assert repr(run(plan, workers=2)) == repr(run(plan))  # repr: what could not be measured is nan, and equals nothing


# ---- settings


def test_settings_are_named_as_in_the_config_and_a_contenders_own_win() -> None:
    who = contender(
        "ours,max_running_requests=7", PRESET, CLASSES, ["max_running_requests=3", "max_queue_wait_time=250ms"]
    )
    assert who.setting is not None
    assert (who.setting.max_running_requests, who.setting.policy.patience_s) == (7, 0.25)


def test_budgets_are_the_objectives_less_what_the_engine_needs() -> None:
    who = contender("ours,budget.std=9s", PRESET, CLASSES)
    assert who.setting is not None
    assert [klass.budget_s for klass in who.setting.policy.classes] == pytest.approx([0.6, 9.0, 14.6])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("theirs", "'theirs' is unknown; known are round_robin"),
        ("round_robin,shed=true", "takes no settings"),
        ("ours,shed=maybe", "must be true or false, not 'maybe'"),
        ("ours,patience=1", "unknown key; known are budget.CLASS"),
        ("ours,scrape_interval=soon", "must be a duration like 10s"),
        ("ours,scrape_interval=0", "must be 10ms or more"),
        ("ours,max_gpu_perc=200", "must be 0 to 100"),
        ("ours,max_running_requests=many", "must be a number"),
        ("ours,budget.vip=1s", "there is no such class; classes are int, std, batch"),
        ("ours,shed", "must be key=value"),
        ("ours,binding=early", "must be late or bound"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_what_would_be_right(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        contender(text, PRESET, CLASSES)


# ---- report and command


def test_percentiles_fairness_and_goodput_of_nothing_are_not_numbers() -> None:
    assert report.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report.percentile([1.0], 0.99) == 1.0
    assert report.jain([1.0, 1.0]) == 1.0
    assert report.jain([1.0, 0.0]) == 0.5
    assert all(value != value for value in (report.percentile([], 0.5), report.jain([]), report.goodput([])))


def simulate(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(["--quiet", *flags]))


def test_the_command_prints_a_table_and_writes_a_page_that_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    flags = ("--duration", "10", "--load", "0.6", "1.3", "--contender", "ours,shed=false", "--contender", "round_robin")
    assert simulate(*flags, "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert "ours,shed=false" in out
    assert "load 130%" in out
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert "<script" not in text


def test_engines_of_ones_own_are_the_preset_with_what_is_said_over_it(capsys: pytest.CaptureFixture[str]) -> None:
    rates = []
    for flags in ((), ("--engine", "step_base_s=0.09", "--engine", "kv_tokens=64000", "--engine", "max_num_seqs=32")):
        assert simulate("--duration", "5", "--load", "0.5", "--contender", "ours", *flags) == 0
        rates.append(float(re.search(r"load 100% is ([\d.]+) requests/s", capsys.readouterr().out)[1]))
    assert rates[1] < 0.5 * rates[0]


def test_the_command_says_what_is_wrong_with_its_flags(tmp_path: Path) -> None:
    for flags, problem in (
        (("--class", "chat"), "must be NAME=TTFT/TPOT"),
        (("--engine", "blocks=3"), "unknown constant 'blocks'; known are kv_tokens, step_base_s"),
        (("--engine", "step_base_s=fast"), "--engine step_base_s=fast: could not convert"),
        (("--engine", "max_num_seqs=0"), "max_num_seqs must be at least 1"),
        (("--class", "chat=0/1"), "above 0 s"),
        (("--class", "chat=1/1", "--class", "chat=2/1"), "given once"),
        (("--trace", "x.csv", "--sessions"), "don't go with it"),
        (("--trace", str(tmp_path / "none.csv")), "can't be read: No such file"),
        (("--set", "nonsense"), "must be key=value"),
        (("--duration", "5", "--html", str(tmp_path / "no" / "such" / "dir.html")), "can't be written"),
    ):
        with pytest.raises(ConfigError, match=problem):
            simulate(*flags)


def test_a_request_with_one_token_has_no_time_per_token_to_miss() -> None:
    who = contender("round_robin", PRESET, CLASSES)
    world = World([Group(PRESETS[PRESET], 1)], who)
    world.run([Demand(0.0, STANDARD, 100, 1, 100)], 1.0)
    (record,) = world.result(1.0, 1, 1.0).records
    assert record.met
    assert record.tpot_s == 0.0
