"""`make bench`: its arithmetic, what it rejects, its model of HAProxy, and a tiny slice of it on real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import xml.sax
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from bench.proof import load, page, rival, shapes_page
from bench.proof.fronts import HAPROXY, balancer_config, haproxy_config, sidecar_config
from bench.proof.stacks import run_round
from bench.proof.words import collect, summary
from extproc.config import parse_config
from extproc.engine.openai import Answer, read_ask
from extproc.simulate import plots
from extproc.simulate.contenders import BEST_FIXED, HAPROXY_QUEUE_S
from extproc.simulate.fronts import Haproxy, Job
from extproc.simulate.report import goodput
from extproc.simulate.studies import search, settings, shapes, virtual
from extproc.simulate.studies.experiments import BY_NAME, EXPERIMENTS, Cell, Experiment, Times, cells, pack
from extproc.simulate.studies.figures import Record, Run, figures, from_json, ratio, streamed, to_json, waste
from extproc.simulate.workload import BATCH, CLASSES, INTERACTIVE, STANDARD, Demand
from tests.e2e.kit.envoy import validate

FACTS = {
    "date": "2026-01-01",
    "duration_s": 60,
    "command": "python -m bench.proof",
    "seeds": [1],
    "times": [0.0, 1.0, 2.0],
    "stacks": 1.0,
    "virtual_s": 10.0,
    "machine": "a machine",
    "versions": {"Envoy": "1.40.0"},
}


def record(at: float = 1.0, **changes: object) -> Record:
    """One that was answered in time, unless changed."""
    values = {"klass": "std", "tenant": "tenant-0", "prompt": 100, "output": 11, "outcome": "finished", "status": 200}
    values |= {"lag_s": 0.001, "first_s": 0.5, "end_s": 1.0} | changes
    one = Record(at, **values)
    one.judge(STANDARD)
    return one


def run(records: list[Record], contender: str = "ours", seed: int = 1, **changes: object) -> Run:
    """A run of the ramp at 120 %, counted from 0 to 10 s."""
    return Run("ramp", contender, changes.pop("load", 1.2), seed, (0.0, 10.0), records, **changes)


# ---- goodput


def test_an_answer_counts_if_both_objectives_of_its_class_are_met():
    assert record(first_s=2.0, end_s=3.0).met
    assert not record(first_s=2.01, end_s=3.0).met
    assert record(first_s=0.5, end_s=1.5).met  # 10 tokens after the first in 1 s: 100 ms each
    assert not record(first_s=0.5, end_s=1.51).met


@pytest.mark.parametrize("outcome", ["refused", "abandoned", "failed"])
def test_what_was_not_answered_missed_and_is_in_the_denominator(outcome):
    assert goodput([record(), record(outcome=outcome)]) == 0.5


def test_an_answer_that_was_cut_off_is_judged_by_the_tokens_that_came():
    assert record(outcome="running", output=6, first_s=0.5, end_s=1.0).met
    assert not record(outcome="running", output=6, first_s=0.5, end_s=1.1).met


def test_only_requests_planned_inside_the_window_count():
    some = [record(at) for at in (-1.0, 0.0, 9.9, 10.0)]
    assert [one.at for one in run(some).counted] == [0.0, 9.9]


def test_figures_have_every_class_percentiles_of_the_answered_and_the_spread_of_the_seeds():
    good = [record(at / 100, first_s=at / 100, end_s=1.0) for at in range(100)]
    bad = [record(outcome="refused", first_s=None, klass="batch") for _ in range(100)]
    found = figures([run(good), run(good + bad, seed=2)])
    assert found.each == (1.0, 0.5)
    assert found.spread == pytest.approx(math.sqrt(0.125))
    assert found.all.goodput == pytest.approx(200 / 300)
    assert [line.klass for line in found.lines] == ["batch", "std", "all"]
    assert found.of_class(("batch",)).refused == 1.0
    assert found.all.ttft == (0.5, 0.95, 0.99)
    assert found.tokens_per_s == pytest.approx(2 * 100 * 11 / 20)


def test_an_answers_tokens_count_as_far_as_they_came_inside_the_window():
    across = [record(at, first_s=1.0, end_s=3.0) for at in (-2.0, 8.0)]  # half of each
    one_token = record(4.0, output=1, first_s=0.5, end_s=0.5)
    others = [record(outcome="abandoned", first_s=None), record(outcome="failed"), record(20.0)]
    assert figures([run([*across, one_token, *others])]).tokens_per_s == pytest.approx((11 / 2 * 2 + 1) / 10)


def test_fairness_is_one_when_tenants_fare_alike_and_victims_are_all_but_the_noisy_one():
    alike = figures([run([record(tenant="tenant-0"), record(tenant="tenant-1")])])
    assert alike.fairness == 1.0
    torn = figures([run([record(tenant="tenant-0"), record(tenant="tenant-1", outcome="refused")])])
    assert torn.fairness == 0.5
    assert (torn.victims, torn.loud) == (1.0, 0.0)


def test_wasted_work_is_what_was_computed_for_who_left_and_for_answers_that_missed():
    some = [record(prompt=89), record(prompt=89, first_s=3.0, end_s=3.1), record(outcome="abandoned", prompt=10_000)]
    assert waste([run(some, wasted=200)]) == (200 / 400, 100 / 400)
    assert waste([run([])]) == (0.0, 0.0)


def test_ratios_pair_the_seeds():
    ours = figures([run([record()]), run([record(), record(outcome="refused")], seed=2)])
    other = figures([run([record(), record(outcome="refused")], "other", seed) for seed in (2, 1)])
    assert ratio(ours, other) == (1.5, 1.0)
    nothing = figures([run([record(outcome="refused")], "other")])
    assert all(map(math.isnan, ratio(ours, nothing)))


# ---- rejection


def test_a_run_with_a_late_sender_is_rejected():
    on_time = [record(lag_s=0.01) for _ in range(200)]
    assert run(on_time).problem() == ""
    assert "p99" in run([*on_time, *(record(lag_s=0.06) for _ in range(4))]).problem()
    assert run([*on_time, record(lag_s=0.2)]).problem() == ""
    assert "at most 260 ms" in run([*on_time, record(lag_s=0.26)]).problem()
    assert "inf" in run([*on_time, record(lag_s=None)]).problem()


def test_a_run_with_late_engines_or_without_requests_is_rejected():
    assert "step was 500 ms late" in run([record()], step_lag_s=0.5).problem()
    assert run([]).problem() == "no requests"


def test_a_run_that_was_not_set_up_right_is_rejected_unless_an_engine_was_killed():
    some = [record() for _ in range(90)] + [record(outcome="failed", status=0) for _ in range(10)]
    assert "10% got no answer" in run(some).problem()
    assert run(some, dies=True).problem() == ""


def test_rejected_runs_are_named_on_the_page_and_not_counted(tmp_path):
    bad = run([record(lag_s=1.0)], seed=7)
    found = collect([run([record()]), bad])
    assert found["ramp", 1.2, "ours"].seeds == (1,)
    text = page.write([run([record()]), bad], [], FACTS, tmp_path).details
    assert "rejected: ramp 120% #7 ours: the sender was late" in text


def test_an_expectation_that_does_not_hold_is_said(tmp_path):
    half = [record(), record(outcome="refused")]
    written = page.write([run(half), run(half, "haproxy"), run([record()], "tuned_engine")], [], FACTS, tmp_path)
    assert [holds for holds, _ in written.expectations] == [False, False]
    missed = "120 % load: .500 against .500 of HAProxy, 1.00 times (1.1 expected)"
    assert f"; {missed}. [How much" in written.text
    assert f"- {missed}: **missed**, [how much" in written.details
    assert "- 120% load: is worse, .500 against 1.000 of the tuned stack." in written.text
    assert "**It is worse** at 120% load: .500 against 1.000 of the tuned stack" in written.text


def test_the_front_has_one_table_one_picture_and_losses_before_the_picture(tmp_path):
    runs = [run([record()], who, load=load) for who in ("round_robin", "haproxy", "ours") for load in (0.7, 1.2)]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / shapes_page.FILE).write_text(json.dumps([shape(0.6, 0.6)]))
    written = page.write(runs, [], FACTS, tmp_path)
    assert (written.text.count("\n| --- |"), written.text.count("![")) == (1, 1)
    places = [written.text.index(one) for one in ("| --- |", "## Where it does not help", "![", "## Don't believe it")]
    assert places == sorted(places)
    losing = written.text[places[1] : places[2]]
    assert "simulated, HAProxy: four slots, like llama.cpp (the standing mix .60 and .60)." in losing
    assert "**No** at 70% load: 1.000 against 1.000 of" in written.text
    assert "| Envoy round robin |" not in written.text
    assert "| Envoy round robin | 1.000" in written.details


def test_the_page_says_of_which_commit_each_experiment_is(tmp_path):
    runs = [run([record()], who, commit="abc") for who in ("ours", "haproxy")]
    runs += [run([record()], who, load=0.7) for who in ("ours", "haproxy", "original")]
    runs += [run([record()], "original")]
    runs.append(replace(run([record()], commit="abd"), experiment="dies"))
    facts = FACTS | {"versions": {"commit": "old"}}
    row = {"commit": "abd", "preset": "h100-32b", "kind": "check", "experiment": "ramp", "load": 1.2, "seed": 1}
    text = page.write(runs, [row | {"contender": "ours", "goodput": 1.0}], facts, tmp_path).text
    assert (
        "commit abc: the ramp at 120%; commit old: the ramp at 70% (original at 70%, 120%); commit abd: one dies, all"
        in text
    )


def test_a_front_that_was_run_in_pieces_sends_its_reader_to_the_call_and_the_note_of_each(tmp_path):
    piece = {"began": "2026-01-01 10:00", "took_s": 60, "experiments": ["ramp"], "seeds": [1], "commit": "abc"}
    piece |= {"command": "python -m bench.proof", "note": "not literally this call"}
    written = page.write([run([record()])], [], FACTS | {"pieces": [piece, piece]}, tmp_path)
    assert "In 2 pieces: [how each was run](benchmarks-details.md)" in written.text
    assert written.details.count("not literally this call") == 2
    assert "pieces" not in page.write([run([record()])], [], FACTS | {"pieces": [piece]}, tmp_path).text


def test_a_run_survives_json():
    one = run([record(), record(outcome="refused", status=429, first_s=None)], commit="abc", cpu_s={"front": 0.5})
    assert from_json(to_json(one)) == one


# ---- what is run


def test_cells_are_packed_once_each_and_no_round_is_overfull():
    wanted = cells(EXPERIMENTS, (1, 2, 3))
    rounds = pack(wanted, 17.0)
    assert sorted(map(str, wanted)) == sorted(str(cell) for some in rounds for cell in some)
    assert max(sum(cell.weight for cell in some) for some in rounds) <= 17.0
    assert [len(some) for some in pack(wanted[:1], 1.0)] == [1]


def test_untagged_requests_say_nothing_of_themselves():
    cell = Cell(BY_NAME["one_class"], 1.2, 1)
    demands = cell.demands(Times(0.0, 10.0, 10.0))
    assert {demand.tenant for demand in demands} == {""}
    assert b"x-request-class" not in load.request(demands[0], "a:1", tagged=False)
    assert b"x-request-class: std" in load.request(demands[0], "a:1", tagged=True)


def test_a_body_is_as_long_as_the_estimate_says():
    head, _, body = load.request(Demand(0.0, BATCH, 900, 5, 1000), "a:1", tagged=True).partition(b"\r\n\r\n")
    assert len(body) == 4000
    assert b"x-sim-prompt-tokens: 900" in head


# ---- the contenders


@pytest.mark.parametrize("name", ["round_robin", "least_request", "circuit_breaker", "tuned_engine"])
def test_envoy_takes_the_balancers_bootstraps(name, tmp_path):
    bootstrap = balancer_config(name, "127.0.0.1:1", "127.0.0.1:2", ["127.0.0.1:3", "127.0.0.1:4"], "h100-32b")
    taken, said = validate(yaml.safe_dump(bootstrap), tmp_path)
    assert taken, said


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
@pytest.mark.parametrize("classes", [CLASSES, CLASSES[:1]])
def test_haproxy_takes_its_configuration(classes, tmp_path):
    path = tmp_path / "haproxy.cfg"
    path.write_text(haproxy_config("127.0.0.1:1", ["127.0.0.1:2"], classes, "h100-32b"))
    done = subprocess.run([str(HAPROXY), "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ours_is_told_its_classes_and_endpoints_and_the_original_its_old_limits():
    ours = sidecar_config("ours", ["127.0.0.1:3"], CLASSES)
    assert set(ours) == {"listen", "admin", "enable_queue", "classes", "endpoints"}
    original = parse_config(yaml.safe_dump(sidecar_config("original", ["127.0.0.1:3"], CLASSES)), "test", {})
    assert (original.binding, original.max_running_requests, original.scrape_interval) == ("bound", 10, 30.0)


def job(number: int, demand: Demand, at: float = 0.0) -> Job:
    """A request as the simulator has it."""
    return Job(number, demand, at)


def test_modelled_haproxy_keeps_to_maxconn_and_lets_the_urgent_class_go_first():
    front = Haproxy(engines=1, limit=1, wait_s=5.0)
    batch, urgent = Demand(0.0, BATCH, 1, 1, 1), Demand(0.0, INTERACTIVE, 1, 1, 1)
    first, second, third = job(1, batch), job(2, batch), job(3, urgent)
    assert [verdict.engine for verdict in front.arrive(first, 0.0)] == [0]
    assert front.arrive(second, 0.1) == []
    assert front.arrive(third, 0.2) == []
    first.engine = 0
    assert [verdict.job for verdict in front.end(first, 1.0, None)] == [third]


def test_modelled_haproxy_turns_away_who_waited_too_long_and_forgets_who_left():
    front = Haproxy(engines=1, limit=1, wait_s=5.0)
    jobs = [job(number, Demand(0.0, BATCH, 1, 1, 1), float(number)) for number in range(3)]
    for one in jobs:
        front.arrive(one, one.arrived)
    front.leave(jobs[1], 2.5)
    assert front.next_deadline() == 7.0
    assert front.tick(6.9) == []
    assert [(verdict.job, verdict.engine) for verdict in front.tick(7.0)] == [(jobs[2], None)]
    assert front.next_deadline() is None


def test_the_virtual_clock_gives_every_contender_the_same_requests():
    times = Times(2.0, 20.0, math.inf)
    cell = Cell(BY_NAME["ramp"], 1.2, 5)
    runs = [virtual.play(cell, name, times) for name in BY_NAME["ramp"].contenders]
    first, *others = ([(one.at, one.klass, one.prompt) for one in sorted(r.records, key=lambda r: r.at)] for r in runs)
    assert all(other == first for other in others)
    assert len(first) > 50
    rows = [{"kind": kind, "preset": "h100-32b"} | summary(one) for one in runs for kind in ("check", "sweep")]
    assert {row["contender"] for row in rows} == set(BY_NAME["ramp"].contenders)


def test_haproxy_is_told_a_limit_and_a_wait_for_all_or_for_each_class_by_its_place():
    config = partial(haproxy_config, "127.0.0.1:1", ["127.0.0.1:2"], CLASSES, "h100-32b")
    assert "maxconn 10\n" in config(["limit=10"])
    assert "timeout queue 1600ms" in config(["limit=10"])
    assert "set-timeout" not in config(["queue=980ms"])
    backend = config(["queue=1ms:2ms:3ms"]).partition("backend engines")[2]
    rules = [line.split() for line in backend.splitlines() if "set-timeout" in line]
    assert [(rule[3], rule[-2]) for rule in rules] == [("1ms", "int"), ("2ms", "std"), ("3ms", "batch")]
    with pytest.raises(ValueError, match="one for each class"):
        config(["queue=1ms:2ms"])


# ---- rivals at their best, and yours


def test_a_search_plays_the_whole_grid_and_the_best_wins():
    waits = search.waits(CLASSES)
    assert waits[0] < 0.6 < 1.6 < 14.6 < waits[-1]
    texts = search.grid("haproxy", 10, waits)
    found = search.best("haproxy", 10, waits, lambda text: float(text == texts[7]))
    assert (found.text, found.goodput, found.tried) == (texts[7], 1.0, len(search.SHARES) * len(waits))
    with pytest.raises(ValueError, match="nothing to search"):
        search.grid("least_request", 10, waits)


def test_the_real_rivals_have_the_settings_that_the_recorded_search_found():
    for preset, rivals in settings.recorded().items():
        assert set(rivals) == set(search.SEARCHED)
        for rival_name, found in rivals.items():
            assert found["won"] == max(found["tried"], key=found["tried"].__getitem__)
            _, limit, *queue = found["won"].split(",")
            assert int(limit.removeprefix("limit=")) == pytest.approx(BEST_FIXED[preset], rel=0.05)
            assert queue == (["queue=1600ms"] if rival_name == "haproxy" else [])
    assert HAPROXY_QUEUE_S == 1.6


def test_a_recorded_hour_is_cut_into_parts_that_begin_at_0_and_have_all_of_it(tmp_path):
    lines = [f"{at},10,10" for at in range(100)]
    trace = tmp_path / "azure_conv.csv"
    trace.write_text("\n".join(["time,prompt_tokens,output_tokens", *lines]))
    (tmp_path / "azure_code.csv").write_text(trace.read_text())
    traffic = shapes.with_traces(tmp_path)["azure-conv"]
    scenes = shapes.parts(shapes.stage("llama-cpp", traffic, 80, shapes.SEEDS))
    assert [next(iter(scene.demands)) for scene in scenes] == list(shapes.SEEDS)
    played = [one for scene in scenes for demands in scene.demands.values() for one in demands]
    assert len(played) in (99, 100)  # the very last may arrive at the end itself
    assert all(0 <= one.at < scene.duration_s for scene in scenes for one in next(iter(scene.demands.values())))


def test_a_recorded_hour_has_the_images_and_whole_answers_that_its_traffic_is_about(tmp_path):
    lines = [f"{at},10,10" for at in range(200)]
    (tmp_path / "azure_conv.csv").write_text("\n".join(["time,prompt_tokens,output_tokens", *lines]))
    traffic = shapes.with_traces(tmp_path)

    def played(kind: str) -> list:
        (demands,) = shapes.stage("a100-8b", traffic[kind], 80, (1,)).demands.values()
        return demands

    assert {one.prompt for one in played("azure-conv")} == {10}
    assert 2 <= sum(one.prompt > 1000 and one.estimate > 100_000 for one in played("conv-images")) <= 24
    assert 40 <= sum(not one.streamed for one in played("unstreamed")) <= 80


def shape(ours: float, rival: float, load: int = 120, tokens: float = 90.0) -> dict:
    """A row of shapes.json."""
    shares = [
        {"text": "haproxy,limit=4,queue=1s", "tried": 40, "goodput": [rival] * 2, "tokens_per_s": [100.0] * 2},
        {"text": "ours", "tried": 1, "goodput": [ours] * 2, "tokens_per_s": [tokens] * 2},
    ]
    return {"engine": "llama-cpp", "traffic": "standing", "load": load, "date": "2026-01-01", "shares": shares}


def test_the_page_says_where_a_rival_with_its_number_is_better_and_what_tokens_are_lost():
    (worse, tokens) = shapes_page.losses([shape(0.5, 0.6)])
    assert "is worse, .50" in worse
    assert "HAProxy (limit=4,queue=1s)" in worse
    assert "10% fewer output tokens" in tokens
    assert "gains nothing" in shapes_page.losses([shape(0.6, 0.6)])[0]
    assert not any("gains" in line for line in shapes_page.losses([shape(0.6, 0.6, load=80)]))
    assert not any("worse" in line for line in shapes_page.losses([shape(0.7, 0.6)]))
    assert "is worse" in shapes_page.losses([shape(0.5, 0.6, load=80)])[0]


def test_the_front_says_in_a_line_how_many_rows_are_lost_and_how_many_tokens():
    (told,) = shapes_page.tokens([shape(0.6, 0.6), shape(0.7, 0.6, load=80, tokens=80.0)])
    assert told.startswith("up to 20% than HAProxy simulated (four slots, like llama.cpp, the standing mix, 80%)")
    assert told.endswith("in 2 of [2 rows](benchmarks-shapes.md)")
    assert shapes_page.as_good([shape(0.6, 0.6, load=80), shape(0.7, 0.6)]) == []
    (line,) = shapes_page.summary([shape(0.5, 0.6), shape(0.9, 0.6), shape(0.6, 0.6, load=80)])
    assert "within .01 of it in 2 of 3 rows; overloaded, 0.83 to 1.50 times the best rival, 1.17 in the middle" in line


def recipe(folder: Path) -> Path:
    """The whole file of docs/benchmarks-yours.md."""
    text = (Path(__file__).parents[2] / "docs/benchmarks-yours.md").read_text()
    path = folder / "yours.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("processes: []", "processes: List should have at least 1 item"),
        ("processes: [{name: a, command: [b], ready: c}]\nenvoy: x", "envoy: Extra inputs are not permitted"),
        ("[", "while parsing"),
    ],
)
def test_a_contenders_file_that_cannot_be_used_is_refused_with_the_place(text, says, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(rival.RivalError, match=says):
        rival.read(path)


def test_a_name_that_nothing_has_and_a_file_outside_the_folder_are_refused(tmp_path):
    process = {"name": "a", "command": ["$nobody"], "ready": "$listen"}
    with pytest.raises(rival.RivalError, match=r"processes.0.command: 'nobody': known are \$directory"):
        rival.prepare(rival.Recipe(processes=[process]), "127.0.0.1:1", [], CLASSES, tmp_path)
    outside = rival.Recipe(processes=[process], files={"../x": ""})
    with pytest.raises(rival.RivalError, match="must be a name without a folder"):
        rival.prepare(outside, "127.0.0.1:1", [], CLASSES, tmp_path)


def test_urls_of_endpoints_become_arguments_of_their_own(tmp_path):
    process = {"name": "a", "command": ["$python", "$endpoint_urls", "--at=$listen_port"], "ready": "$listen"}
    made = rival.prepare(rival.Recipe(processes=[process]), "127.0.0.1:1", ["h:2", "h:3"], CLASSES, tmp_path)
    assert made == [("a", [sys.executable, "http://h:2", "http://h:3", "--at=1"], "127.0.0.1:1")]


# ---- the sender


class Answers:
    """A server that answers by the prompt's length: 1 whole, 2 with 503, 3 half, 4 never."""

    def __init__(self) -> None:
        self.left_at: list[float] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        kind = int(head.partition(b"x-sim-prompt-tokens: ")[2].partition(b"\r\n")[0])
        if kind == 2:
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
        elif kind == 4:
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the client leaves
            self.left_at.append(asyncio.get_running_loop().time())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in (b'data: {"text": "a "}\n\n', b'data: {"text": "b "}\n\n'):
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            if kind == 1:
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def test_the_sender_tells_whole_answers_from_refusals_halves_and_silence():
    hasty = replace(STANDARD, patience_s=0.5)
    demands = [Demand(0.05 * kind, hasty, kind, 2, 100, "tenant-0") for kind in (1, 2, 3, 4)]
    demands.append(Demand(0.3, STANDARD, 4, 2, 100, "tenant-0"))

    async def play() -> list[Record]:
        answers = Answers()
        server = await asyncio.start_server(answers, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            target = load.Target(f"127.0.0.1:{port}", demands)
            played = load.Round([target], cut_s=2.0)
            await played.run()
            impatient, cut = (at - played.begin for at in answers.left_at)
            assert impatient < 2.0 <= cut
            return target.records

    records = asyncio.run(play())
    assert [one.outcome for one in records] == ["finished", "refused", "failed", "abandoned", "abandoned"]
    assert [one.met for one in records] == [True, False, False, False, False]
    assert [one.status for one in records] == [200, 503, 200, 0, 0]
    assert all(one.lag_s is not None and one.lag_s >= 0 for one in records)


@pytest.mark.parametrize("size", [1, 3, 7, 50, 10_000])
def test_tokens_are_counted_alike_however_an_answer_is_cut_into_events_and_reads(size):
    demand = Demand(0.0, STANDARD, 1, 7, 100, "tenant-0")
    asked = read_ask(
        "text", load.request(demand, "a:1", tagged=True).partition(b"\r\n\r\n")[2], {}, ("sim",), 10_000, any_model=True
    )
    told = Answer(replace(asked, output_tokens=7), "1")

    async def play() -> tuple[list[int], Record]:
        target = load.Target("127.0.0.1:1", [])
        exchange = load.Exchange(target, demand, lambda *_: None)
        exchange.plan(asyncio.get_running_loop().time(), 0.0)
        counts = []
        for part in (
            b"HTTP/1.1 200 OK\r\n\r\n" + told.chunk(0, 1),
            told.chunk(1, 4),
            told.chunk(4, 6),
            told.chunk(6, 7),
        ):
            for at in range(0, len(part), size):
                exchange.data_received(part[at : at + size])
            counts.append(target.records[0].output)
        return counts, target.records[0]

    counts, one = asyncio.run(play())
    assert counts == [1, 4, 6, 7]
    assert one.outcome == "finished"


# ---- plots, and all of it


def test_plots_are_well_formed_and_say_their_names():
    curve = plots.curves("a < b", {"ours": [(0.7, 1.0, 0.01), (1.2, 0.9, math.nan)]}, x_label="load")
    bar = plots.bars("bars", {"group": {"ours": (0.5, 0.1), "haproxy": (math.nan, math.nan)}})
    for svg in (curve, bar):
        xml.sax.parseString(svg.encode(), xml.sax.ContentHandler())  # noqa: S317 - our own
        assert "ours" in svg
    assert ">HAProxy</text>" in bar


def test_a_tiny_slice_runs_on_real_processes_from_the_arrivals_to_the_page(tmp_path):
    yours = f"yours={recipe(tmp_path)}"
    contenders = ("least_request", "ours", yours, *(["haproxy"] if HAPROXY else []))
    experiment = Experiment("ramp", "the ramp", "Overload ramp", contenders, (1.2,), engines=2)
    times = Times(0.0, 1.5, 2.0)
    runs, _ = run_round([Cell(experiment, 1.2, 3)], times)
    assert [one.contender for one in runs] == list(contenders)
    for one in runs:
        assert len(one.records) >= 4
        assert any(record.outcome in ("finished", "running") and record.status == 200 for record in one.records)
        assert all(record.lag_s is not None for record in one.records)
        assert streamed(one) > 0
        assert one.cpu_s["engines"] > 0
    assert len({tuple((r.at, r.prompt) for r in one.records) for one in runs}) == 1
    text = page.write([replace_lags(one) for one in runs], [], FACTS, tmp_path).text
    assert "**ours, defaults**" in text
    assert "| yours |" in text
    assert (tmp_path / "benchmarks/classes.svg").exists()


def replace_lags(one: Run) -> Run:
    """As if the machine had been quiet: here it may not be."""
    one.step_lag_s = 0.0
    for some in one.records:
        some.lag_s = 0.0
    return one
