"""The matrix itself: names, engines, objectives, the search for a rival's best, and the gate's complaints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from extproc.config import doubts, load_config
from extproc.engine.params import PRESETS
from extproc.simulate.studies.matrix import contest, gate, page
from extproc.simulate.studies.matrix.cells import by_kv, by_pace, cell, everything, matching, params, slowness, stage
from extproc.simulate.studies.matrix.chosen import chosen, reason
from extproc.simulate.studies.matrix.contest import Score, climb, judge
from extproc.simulate.studies.matrix.runs import run
from extproc.simulate.studies.matrix.traffic import TRAFFIC
from extproc.simulate.workload import CLASSES, STANDARD, Demand

ROOT = Path(__file__).parents[2]
CALM = Score("least_request", 1.0, 0.0, 0.0, 1000.0)
BEST = Score("haproxy,limit=8", 0.9, 0.05, 0.0, 900.0)


def ours(goodput: float, *, refused: float = 0.0, tokens: float = 1000.0) -> Score:
    return Score("ours", goodput, refused, 0.0, tokens)


# ---- cells


def test_every_cell_is_read_back_from_its_name() -> None:
    cells = everything()
    assert len(cells) == len({one.name for one in cells}) > 2000
    assert all(cell(one.name) == one for one in cells)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("standing@70", "is no cell"),
        ("step90/vllm/standing@70", "is no engine"),
        ("a100-8b/prometheus/standing@70", "pages are"),
        ("a100-8b/vllm/nothing@70", "traffic is"),
    ],
)
def test_a_name_that_is_no_cell_says_what_would_be_right(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cell(name)


def test_a_pattern_finds_cells_and_one_that_finds_none_is_a_mistake() -> None:
    assert {one.load for one in matching(["a100-8b/vllm/rag@*"])} == {50, 80, 100, 120}
    with pytest.raises(ValueError, match="no cell is called like"):
        matching(["a100-9b/*"])


def test_a_made_up_engine_is_as_named_and_slower_in_the_rest_by_the_square_root() -> None:
    fast, slow = PRESETS["a100-8b"], params("step36/seqs8/kv24k")
    assert (slow.step_base_s, slow.max_num_seqs, slow.kv_tokens) == (0.036, 8, 24_000)
    assert slow.prefill_token_s / fast.prefill_token_s == pytest.approx(2.0)
    assert slow.decode_seq_s / fast.decode_seq_s == pytest.approx(2.0)


def test_users_of_a_slow_engine_allow_it_more_than_two_of_its_steps_per_token() -> None:
    assert slowness(params("step9/seqs8/kv24k")) == slowness(params("step30/seqs8/kv24k")) == 1.0
    scene = stage("step120/seqs256/kv430k", TRAFFIC["standing"], 50, (1,))
    assert [klass.tpot_s / 0.120 > 2.2 for klass in scene.classes] == [True] * 3
    assert [klass.budget_s / base.budget_s for klass, base in zip(scene.classes, CLASSES, strict=True)] == (
        pytest.approx([slowness(params("step120/seqs256/kv430k"))] * 3)
    )


def test_what_an_engine_can_run_is_bounded_by_its_batch_its_pace_and_its_cache() -> None:
    one = replace(STANDARD, share=1.0, tpot_s=0.1)
    demands = [Demand(0.0, one, 1000, 100, 1000)]
    engine = replace(PRESETS["a100-8b"], step_base_s=0.05, prefill_token_s=1e-5, decode_seq_s=0.0, context_token_s=0.0)
    assert by_pace(replace(engine, max_num_seqs=1000, max_num_batched_tokens=2048), demands) == 500
    assert by_pace(replace(engine, max_num_seqs=8), demands) == 8
    assert by_kv(replace(engine, num_gpu_blocks=1100), demands) == 16


def test_a_load_of_80_percent_is_served_in_time_by_somebody_on_every_kind_of_engine() -> None:
    for engine in ("step9/seqs8/kv24k", "step120/seqs32/kv430k", "llama-cpp"):
        scene = stage(engine, TRAFFIC["standing"], 80, (1,))
        best = contest.rival("haproxy", scene)
        assert best.goodput > 0.9, engine


def test_the_cells_of_the_page_are_some_of_all_and_the_gates_among_them() -> None:
    names = chosen()
    assert set(gate.names()) <= set(names)
    assert len(names) == len(set(names)) < 300
    assert [one.name for one in matching(names)] == names


def test_every_cell_of_the_gate_that_misses_has_a_reason() -> None:
    missing = [name for name, record in gate.read().items() if record.misses]
    assert [name for name in missing if reason(name) is None] == []


def test_what_the_gate_knows_of_rivals_is_not_played_again() -> None:
    duels = gate.duels()
    assert {cell(name).duel for name in gate.names()} == set(duels)
    assert all(set(scores) >= set(contest.RIVALS) for scores in duels.values())
    assert sum(len(set(scores) - set(contest.RIVALS)) for scores in duels.values()) == len(gate.names())


# ---- the search


def test_the_search_goes_beyond_the_grid_while_that_is_better() -> None:
    def score(limit: int) -> Score:
        return Score(f"x,limit={limit}", 0.9 - abs(limit - 3) / 100, 0.0, 0.0, 1.0)

    assert climb([8, 12, 16], score).text == "x,limit=3"
    assert climb([1, 2], score).text == "x,limit=3"


# ---- judging


@pytest.mark.parametrize(
    ("score", "load", "missed"),
    [
        (ours(0.88), 120, ()),
        (ours(0.96), 50, ("goodput",)),
        (ours(0.99, refused=0.02), 80, ("refuses",)),
        (ours(0.99, refused=0.02), 100, ()),
        (ours(0.99, tokens=940.0), 100, ("tokens",)),
    ],
)
def test_the_three_criteria(score: Score, load: int, missed: tuple[str, ...]) -> None:
    others = (CALM, BEST) if load < 120 else (BEST,)
    assert gate.missed(judge(score, others, load)) == missed


def test_the_gate_complains_of_a_fall_a_new_miss_and_a_miss_that_is_none_any_more() -> None:
    name = "a100-8b/vllm/standing@120"
    held = gate.Record((BEST,), ours(0.95), ())
    assert gate.complaints(name, ours(0.94), held) == []
    assert gate.complaints(name, ours(0.90), held) == ["goodput fell from 0.950 to 0.900"]
    assert len(gate.complaints(name, ours(0.80), held)) == 2
    bad = gate.Record((BEST,), ours(0.50), ("goodput",))
    assert gate.complaints(name, ours(0.50), bad) == []
    assert "no longer misses goodput" in gate.complaints(name, ours(0.90), bad)[0]


def test_the_gate_holds_every_cell_that_it_names() -> None:
    assert sorted(gate.read()) == sorted(gate.names())


def test_the_page_in_docs_is_what_the_records_say() -> None:
    further = gate.read(gate.FURTHER)
    assert sorted(gate.names() + list(further)) == sorted(chosen())  # none is left unplayed
    assert (ROOT / "docs/benchmarks-matrix.md").read_text() == page.of_records(gate.read(), further)


def test_cells_that_differ_by_their_page_share_their_rivals_and_the_page_lists_misses() -> None:
    cells = matching(["llama-cpp/vllm/standing@120", "llama-cpp/none/standing@120"])
    rows = list(run(cells, ("ours", "least_request", contest.FIXED), (1,)))
    assert [row["cell"] for row in rows] == [one.name for one in cells]
    scores = [row["scores"] for row in rows]
    assert scores[0]["least_request"] == scores[1]["least_request"]  # type: ignore[index]
    text = page.render(rows, (1,), "command")
    assert "2 cells" in text
    assert text.count("| llama-cpp/") >= sum(bool(row["problems"]) for row in rows)


def test_of_each_cell_that_misses_because_engines_tell_little_check_warns_and_the_reason_names_the_number(
    tmp_path: Path,
) -> None:
    """A page of gauges alone, in the config's words: TensorRT-LLM's."""
    engines, seen = {"none": "none", "gauges": "trtllm"}, 0
    for name, record in (gate.read() | gate.read(gate.FURTHER)).items():
        if record.misses and (engine := engines.get(cell(name).page)):
            file = tmp_path / "config.yaml"
            file.write_text(f"endpoints: [{{name: a, address: 'h:1', engine: {engine}}}]")
            (doubt,) = doubts(load_config(file, {}), file, {})
            assert doubt.startswith("endpoints[0].max_running_requests: nothing tells how full a server is"), name
            assert "max_running_requests" in (reason(name) or "") or "kv_capacity_tokens" in (reason(name) or ""), name
            seen += 1
    assert seen > 10


def test_each_cell_that_misses_has_a_reason() -> None:
    missing = [name for name, record in (gate.read() | gate.read(gate.FURTHER)).items() if record.misses]
    assert [name for name in missing if reason(name) is None] == []
