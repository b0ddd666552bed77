"""`make bench-peers`: what the routers from PyPI are told, and what its page says. It runs without them."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from bench.proof import fronts, load, peers, peers_page, peers_search
from extproc.engine.openai import read_ask
from extproc.simulate.studies.experiments import EXPERIMENTS, WITH_PEERS
from extproc.simulate.studies.figures import Record, Run
from extproc.simulate.workload import BATCH, CLASSES, INTERACTIVE, STANDARD, Demand

ADDRESSES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


def argv(contender: str, at: Path) -> list[str]:
    return peers.argv(contender, "127.0.0.1:9", ADDRESSES, CLASSES, fronts.CHECK, at)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_make_bench_needs_nothing_of_this():
    assert not {name for one in EXPERIMENTS for name in one.contenders} & set(peers.PEERS)
    assert set(peers.PEERS) < set(WITH_PEERS.contenders)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_knows_where_to_listen_whom_to_ask_and_how_to_check(peer, tmp_path):
    words = argv(peer, tmp_path)
    assert (after("--host", words), after("--port", words)) == ("127.0.0.1", "9")
    at = words.index("--worker-urls")
    assert words[at + 1 : at + 4] == [f"http://{address}" for address in ADDRESSES]
    assert (after("--health-check-interval-secs", words), after("--health-check-endpoint", words)) == ("1", "/health")


@pytest.mark.parametrize("name", ["smg,limits=3", "vllm_router,=", "smg,waits=1:2"])
def test_a_setting_that_is_none_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"no setting|one value per class"):
        argv(name, tmp_path)


def test_smg_has_a_place_for_each_class_and_a_wait_for_it(tmp_path):
    words = argv("smg,limit=10,waits=1:2:15", tmp_path)
    assert after("--max-concurrent-requests", words) == "30"
    rules = yaml.safe_load(Path(after("--priority-scheduler-config", words)).read_text())["classes"]
    assert set(rules) == {"bulk", "default", "interactive", "system"}
    names = [peers.smg_class(klass, CLASSES) for klass in (INTERACTIVE, STANDARD, BATCH)]
    assert names == ["interactive", "default", "bulk"]
    assert [rules[name]["queue_timeout_secs"] for name in names] == [1, 2, 15]


def test_what_smg_drops_from_the_headers_the_engine_hears_from_the_body():
    demand = Demand(0.0, BATCH, prompt=900, output=77, estimate=1000)
    head, _, body = load.request(demand, "a:1", tagged=True, marks=peers.marks("smg", CLASSES)).partition(b"\r\n\r\n")
    assert b"x-smg-priority: bulk\r\n" in head + b"\r\n"
    assert len(body) == 4000  # as long as all others' bodies
    ask = read_ask("text", body, {}, ("sim",), 10_000, any_model=True)
    assert (ask.prompt_tokens, ask.output_tokens) == (900, 77)


def test_each_request_is_a_program_of_its_own_to_vllm_router_and_the_urgent_come_first():
    say = peers.marks("vllm_router", CLASSES)
    contexts = []
    for klass in (BATCH, INTERACTIVE):
        demand = Demand(0.0, klass, prompt=9, output=7, estimate=1000)
        body = load.request(demand, "a:1", tagged=True, marks=say).partition(b"\r\n\r\n")[2]
        contexts.append(json.loads(body)["vllm_xargs"]["agentic_context"])
    batch, interactive = contexts
    assert batch["program_id"] != interactive["program_id"]
    assert interactive["priority"] > batch["priority"]


class Router(BaseHTTPRequestHandler):
    """What `ready` asks of smg: two workers, whose labels can be set."""

    labels: ClassVar[dict[str, dict[str, str]]] = {}
    healthy: ClassVar[int] = 2

    def do_GET(self) -> None:
        workers = [{"id": name, "labels": labels} for name, labels in self.labels.items()]
        self.answer({"healthy_workers": self.healthy, "workers": workers})

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.labels[self.path.rpartition("/")[2]] |= body["labels"]
        self.answer({})

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_smg_is_ready_once_it_knows_how_many_requests_each_engine_may_run():
    Router.labels = {"a": {"x": "1"}, "b": {}}
    with ThreadingHTTPServer(("127.0.0.1", 0), Router) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        try:
            Router.healthy = 1
            assert not peers.ready("smg,limit=10", address, 2)
            Router.healthy = 2
            assert peers.ready("vllm_router", address, 2)
            assert not peers.ready("smg,limit=10", address, 2)  # it has been told now, and is asked again
            assert peers.ready("smg,limit=10", address, 2)
        finally:
            server.shutdown()
            thread.join()
    assert Router.labels == {"a": {"x": "1", "max_running_requests": "10"}, "b": {"max_running_requests": "10"}}
    assert not peers.ready("smg", address, 2)  # nobody there


def test_no_other_contender_hears_of_it():
    assert [peers.marks(name, CLASSES) for name in ("haproxy", "ours", "vllm_router,programs=false")] == [None] * 3


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_setting_of_a_grid_is_one_that_the_router_has_and_is_played_once(name, tmp_path):
    grid = peers_search.GRIDS[name]
    for text in grid:
        argv(text, tmp_path)
    dealt = [text for some in peers_search.rounds(grid) for text in some]
    assert sorted(dealt) == sorted(set(grid)) == sorted(grid)
    assert max(map(len, peers_search.rounds(grid))) <= peers_search.ROUND


def test_the_best_of_the_first_seed_play_the_others_and_the_best_mean_of_all_wins():
    tried = {f"smg,limit={number}": {"51": number / 100} for number in range(20)}
    best = peers_search.finalists(tried)
    assert best[0] == "smg,limit=19"
    assert len(best) == peers_search.FINAL
    tried["smg,limit=18"] |= {"52": 0.5, "53": 0.5}
    tried["smg,limit=17"] |= {"52": 0.6, "53": 0.5}
    tried["smg,limit=20"] = {"51": 0.9}  # its other runs were rejected
    assert peers_search.won(tried) == ("smg,limit=17", pytest.approx((0.17 + 0.6 + 0.5) / 3))


def test_a_search_that_goes_on_plays_what_has_no_figure_on_that_seed_yet_and_no_round_is_empty():
    found = {"facts": {}, "smg": {"tried": {"smg,limit=9": {"51": 0.5}}}}
    texts = ["smg,limit=9", "smg,limit=10", "haproxy,limit=3"]
    assert peers_search.unplayed(found, texts, 51) == ["smg,limit=10", "haproxy,limit=3"]
    assert peers_search.unplayed(found, texts, 52) == texts
    assert peers_search.rounds([]) == []


def test_peers_run_as_the_search_set_them_too_and_haproxys_waits_by_class_where_it_knows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(peers_search, "FILE", tmp_path / "peers.json")
    monkeypatch.setattr(peers_search, "_haproxy_version", lambda: "2.6.12")
    assert peers_search.best(("haproxy", "ours", "smg")) == ["haproxy", "ours", "smg"]
    found = {"smg": {"won": "smg,limit=9"}, "haproxy": {"won": "haproxy,queue=1s:2s:3s"}}
    peers_search.FILE.write_text(json.dumps(found))
    assert peers_search.best(("haproxy", "ours", "smg")) == ["haproxy", "ours", "smg", "smg,limit=9"]
    monkeypatch.setattr(peers_search, "_haproxy_version", lambda: "3.10.1-1")
    assert peers_search.best(("haproxy",)) == ["haproxy", "smg,limit=9", "haproxy,queue=1s:2s:3s"]


def run(contender: str, met: dict[str, bool]) -> Run:
    records = [
        Record(1.0, name, "t", 100, 10, "finished", 200, 0.001, 0.5, 1.0, 0.05, good) for name, good in met.items()
    ]
    return Run("peers", contender, 1.2, 1, (0.0, 10.0), records, cpu_s={"front": 0.003})


FACTS = {
    "date": "2026-01-01",
    "duration_s": 60,
    "command": "it",
    "seeds": [1],
    "machine": "a machine",
    "versions": {},
}


def test_the_page_says_where_a_peer_wins(tmp_path):
    runs = [run("ours", {"int": True, "batch": False}), run("smg", {"int": False, "batch": True})]
    runs += [replace(run("haproxy", {"int": True}), load=load) for load in (0.7, 1.2)]
    text = peers_page.write(runs, FACTS, tmp_path).read_text()
    assert "smg 1.13.0" in text
    assert "| HAProxy | 1.000 (1.00), 1 seed | 1.000 (1.00), 1 seed |" in text
    assert "| smg |  | .500 (.00/1.00), 1 seed |" in text  # it did not play the other load
    assert "It does better than ours in: batch 1.000 against .000." in text
    assert "int 1.000" not in text
    assert "whole run in it: HAProxy 3.0, **ours, defaults** 1.5, smg 1.5." in text


def test_a_rival_is_judged_by_its_better_settings_and_the_others_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(peers_search, "FILE", tmp_path / "search.json")
    won = {"won": "smg,limit=9", "goodput": 0.8, "tried": {"smg,limit=9": {"51": 0.7, "52": 0.9}}}
    peers_search.FILE.write_text(json.dumps({"facts": {"seeds": [51, 52]} | SEARCHED, "smg": won}))
    some = {"ours": {"int": True}, "smg": {"int": True, "std": False}, "smg,limit=9": {"int": False}}
    runs = [replace(run(who, met), commit="abc", seed=seed) for who, met in some.items() for seed in (1, 2)]
    runs.append(replace(run("smg,limit=7", {"int": True})))  # on one seed only
    text = peers_page.write(runs, FACTS, tmp_path).read_text()
    answer, _, rest = text.partition("The other settings that ran:")
    assert "| smg | .500" in answer
    assert "`smg,limit=" not in answer.partition("## The answer")[2].partition("- smg is better")[0]
    assert "smg is better here as set by hand than as the search set it, .500 against .000" in answer
    assert "that choice had .800 in the search, but .700 to .900 from seed to seed" in answer
    assert "| `smg,limit=9` | .000" in rest
    assert "| `smg,limit=7` | 1.000 (1.00), 1 seed" in rest
    assert peers_page.best(tmp_path) == ["[Beside routers](benchmarks-peers.md): 1.000 against .500 of smg at 120%."]
    assert "(120% load, 2 seeds, commit abc): ours 1.000; smg .500." in peers_page.short(tmp_path)[0]


def test_the_front_says_nothing_of_routers_that_never_ran(tmp_path):
    assert peers_page.best(tmp_path) + peers_page.short(tmp_path) == []


SEARCHED = {"date": "2026-01-01", "load": 1.2, "times": [8.0, 38.0], "haproxy": "3.4"}
