"""`make bench-replicas`, without Envoy: who gets which request, what its settings mean, and what its page says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.proof import gateways, gateways_page
from bench.proof.fronts import Front
from bench.proof.stacks import dealt
from extproc.config import load_config
from extproc.simulate.replicas import FAULTS
from extproc.simulate.studies.experiments import EXPERIMENTS, SEVERAL, Cell, Times
from extproc.simulate.studies.figures import Record, Run
from extproc.simulate.workload import CLASSES

DEMANDS = Cell(SEVERAL[0], 1.2, 71).demands(Times(0.0, 5.0, 6.0))
FACTS = {
    "date": "2026-01-01",
    "duration_s": 60,
    "command": "it",
    "seeds": [1],
    "times": [15.0, 70.0, 86.0],
    "machine": "a machine",
    "versions": {"Envoy": "1.40.0", "HAProxy": "3"},
}


def test_each_request_goes_to_one_gateway_and_the_same_one_each_time():
    shares = dealt(DEMANDS, 8, 71)
    assert sorted(map(id, DEMANDS)) == sorted(id(one) for some in shares for one in some)
    assert shares == dealt(DEMANDS, 8, 71)
    assert all(shares)
    assert dealt(DEMANDS, 1, 71) == [DEMANDS]


def test_make_bench_needs_no_store():
    assert not [name for one in EXPERIMENTS for name in one.contenders if "replicas" in name]


def test_faults_are_those_that_the_simulation_has():
    assert set(gateways.FAULTS) < set(FAULTS)


@pytest.mark.parametrize(
    "setting", ["replicas=0", "replicas=many", "replicas_fault=fire", "replicas_fault=store-gone", "share=false"]
)
def test_settings_that_can_not_be_are_refused(setting):
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        gateways.among([setting, *(["replicas=2", "replicas_fault=leader-killed"] if setting == "share=false" else [])])


def files(contender, tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "STORE", "redis-server")
    front = Front(contender, "h100-32b", ["127.0.0.1:1"], CLASSES, tmp_path)
    return front, [load_config(path, {}) for path in sorted(tmp_path.glob("sidecar*.yaml"))]


def test_gateways_that_share_have_one_store_and_an_address_of_their_own_each(tmp_path, monkeypatch):
    front, configs = files("ours,max_running_requests=96,replicas=3", tmp_path, monkeypatch)
    assert [name.partition("#")[0] for name in front.children] == ["store", *["sidecar", "front"] * 3]
    assert len({one.replicas.listen for one in configs}) == len(set(front.gateways)) == 3
    assert len({one.replicas.valkey.url for one in configs}) == 1
    assert {one.max_running_requests for one in configs} == {96}


def test_gateways_that_share_nothing_know_of_nobody(tmp_path, monkeypatch):
    front, configs = files("ours,replicas=2,share=false", tmp_path, monkeypatch)
    assert [one.replicas for one in configs] == [None, None]
    assert "store" not in front.children
    assert front.events() == []


@pytest.mark.parametrize(("fault", "back_s"), [("leader-killed", 33.0), ("store-gone", 40.0)])
def test_what_is_killed_in_the_middle_is_started_again(fault, back_s, tmp_path, monkeypatch):
    front, _ = files(f"ours,replicas=2,replicas_fault={fault}", tmp_path, monkeypatch)
    assert [when for when, _ in front.events()] == [30.0, back_s]


def run(contender: str, seed: int, after: bool, **changes: object) -> Run:
    """Two requests that were served in time, and one at the moment of the fault, which was if `after`."""
    values = ("std", "t", 100, 10, "finished", 200, 0.001, 0.5, 1.0, 0.05)
    records = [Record(20.0, *values, True), Record(30.0, *values, after), Record(50.0, *values, True)]
    return Run(
        "gateways_faults",
        contender,
        1.2,
        seed,
        (15.0, 70.0),
        records,
        cpu_s={"front": 0.03, "sidecar": 0.006},
        **changes,
    )


def test_the_page_tells_how_several_fare_beside_one_and_after_the_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "STORE", "/usr/bin/redis-server")
    several = "ours,replicas=8,replicas_fault=leader-killed"
    late = run("ours", 3, True)
    late.records[0].lag_s = 1.0
    runs = [
        run("ours", 1, True),
        run("ours", 2, True),
        run(several, 1, True),
        run(several, 2, False, peak_held=9),
        late,
    ]
    rows = [
        {"load": "64 at once", "followers": 1, "per_s": 7000.0, "p50_ms": 1.0, "p99_ms": 2.0}
        | {"follower_us": 31.0, "leader_us": 45.0, "leader_busy": 0.5}
    ]
    text = gateways_page.write(runs, rows, FACTS, tmp_path).read_text()
    assert "| one | 1.000 ±.000 | 1.00 | 1.00 | 1.00 | 1.000 |" in text
    assert "| **8**, leader killed | .833 ±.236 | .83 | .83 | .67 | .500 |" in text
    assert "real Redis tells" in text
    assert "HAProxy 3" not in text
    assert "rejected: gateways_faults 120% #3 ours: the sender was late" in text
    assert "8, leader killed 10.0 + 2.0" in text
    assert "One leader carried 7,000 requests a second. Of a commit that is not on record, no date." in text
    rows[0] |= {"commit": "abc", "date": "2026-01-01"}
    text = gateways_page.write(runs, rows, FACTS, tmp_path).read_text()
    assert "a second. Of abc, 2026-01-01." in text


def test_the_front_tells_how_several_fare_and_of_which_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "STORE", "/usr/bin/redis-server")
    assert gateways_page.short(tmp_path) == []
    runs = [replace(run(who, 1, True), experiment="gateways", commit="abc") for who in ("ours,replicas=8", "ours")]
    runs.append(replace(run("ours,replicas=8,share=false", 1, False), experiment="gateways", commit="abd"))
    gateways_page.write(runs, [], FACTS, tmp_path)
    (told,) = gateways_page.short(tmp_path)
    assert told.startswith(
        "- Several gateways (120% load, 1 seeds, commit abc and abd): one 1.000; 8 1.000; 8, nothing"
    )


def test_a_page_made_in_pieces_says_what_was_run_when_and_beside_what(tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "STORE", "/usr/bin/redis-server")
    call = "python -m bench.proof --replicas --seeds 1 --out /a/b --lock c"
    piece = {"began": "2026-01-01 05:11", "experiments": ["gateways_faults"], "seeds": [1], "commit": "abc"}
    piece |= {"command": call, "note": "nothing"}
    other = piece | {"seeds": [2, 3], "took_s": 300, "note": "other work", "commit": "abd"}

    def page(*pieces: dict[str, object]) -> str:
        facts = FACTS | {"pieces": pieces}
        return gateways_page.write([run("ours", 1, True)], [], facts, tmp_path).read_text()

    text = page(piece, other)
    bare = "`python -m bench.proof --replicas --seeds 1`"
    assert f"| 2026-01-01 05:11 | 5 | gateways faults | 2, 3 | abd | {bare} | other work |" in text
    assert "| 2026-01-01 05:11 | not known | gateways faults | 1 | abc |" in text  # it was stopped
    assert "2 calls, below (2026-01-01, 1 minutes where known, seeds 1)" in text
    assert "seeds 1 are of commit abc, run beside nothing; seeds 2, 3 are of commit abd, run beside other work." in text
    assert "Not all of one kind" not in page(piece, piece)
    assert "in pieces" not in page(piece)
    assert "`it` (2026-01-01, 1 minutes, seeds 1)" in page(piece)
