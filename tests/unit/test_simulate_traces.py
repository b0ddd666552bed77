"""Recorded traffic: what is read, and what is said of what can't be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from extproc.errors import ConfigError
from extproc.simulate.cli import add_arguments, plan_from
from extproc.simulate.cli import run as simulate
from extproc.simulate.plan import Plan, run
from extproc.simulate.traces import Look, look, read_trace
from extproc.simulate.workload import CLASSES


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_csv_is_read_with_its_classes_tenants_and_sessions_in_the_order_of_time(tmp_path: Path) -> None:
    text = "time,prompt_tokens,output_tokens,class,tenant,session\n12.5,100,20,batch,a,s1\n10,200,30,,b,\n"
    first, second = read_trace(written(tmp_path, text), CLASSES)
    assert (first.at, first.prompt, first.output, first.klass.name, first.tenant) == (0.0, 200, 30, "int", "b")
    assert (second.at, second.klass.name, second.session) == (2.5, "batch", "s1")
    assert first.session is None


def test_azures_public_trace_is_read_as_it_is(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,0\n"
    )
    first, second = read_trace(written(tmp_path, "\ufeff" + text), CLASSES)
    assert (first.prompt, first.output, second.output) == (4808, 10, 1)
    assert second.at == pytest.approx(0.052)


def line(**changes: object) -> str:
    entry: dict[str, object] = {
        "time": "2026-01-31T12:00:00.250Z",
        "request_id": "r",
        "code": 200,
        "duration_ms": 5000,
        "queue": {"outcome": "dispatched", "class": "std", "wait_ms": 1000.0, "endpoint": "a"},
    }
    return json.dumps(entry | changes)


def test_our_access_log_is_read_and_the_wait_is_no_part_of_the_answer(tmp_path: Path) -> None:
    text = "\n".join((line(), line(time="2026-01-31T12:00:03Z", bytes_received=4000), line(queue=None, code=503), ""))
    demands = read_trace(written(tmp_path, text), CLASSES)
    assert [demand.at for demand in demands] == [0.0, 0.0, 2.75]
    assert (demands[0].output, demands[0].klass.name) == (100, "std")
    assert demands[2].prompt == 1000
    assert demands[1].klass.name == "int"


def test_a_trace_drives_the_contenders_as_recorded_or_at_a_load(tmp_path: Path) -> None:
    rows = "".join(f"{number / 10},{500 + number},{50 + number % 60},std\n" for number in range(300))
    path = written(tmp_path, "time,prompt_tokens,output_tokens,class\n" + rows)
    (as_recorded,) = run(Plan(contenders=("ours",), loads=(), trace=path))
    (loaded,) = run(Plan(contenders=("ours",), loads=(2.0,), trace=path))
    assert as_recorded.all.arrivals == loaded.all.arrivals == 300
    assert as_recorded.load < 0.5
    assert as_recorded.all.goodput > loaded.all.goodput


ENVOY_TEXT = (
    '[2026-01-31T12:00:00.250Z] "POST /v1/chat/completions HTTP/1.1" 200 - 4000 5678 5000 4990 "-" "OpenAI/Python" '
    '"1c3f" "llm.example" "10.0.0.1:8000"'
)
ISTIO_TEXT = ENVOY_TEXT.replace("200 - 4000", '200 - via_upstream - "-" 4000').replace("00.250Z", "02.250Z")
OTLP = {
    "resourceSpans": [
        {
            "scopeSpans": [
                {
                    "spans": [
                        {"name": "http", "startTimeUnixNano": "1769860800000000000", "attributes": []},
                        {
                            "startTimeUnixNano": "1769860801500000000",
                            "attributes": [
                                {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "700"}},
                                {"key": "gen_ai.usage.output_tokens", "value": {"intValue": "80"}},
                            ],
                        },
                    ]
                }
            ]
        }
    ]
}
CONSOLE_SPAN = {
    "name": "chat m",
    "start_time": "2026-01-31T12:00:03.000000Z",
    "attributes": {"gen_ai.usage.input_tokens": 900, "gen_ai.usage.output_tokens": 90, "gen_ai.conversation.id": "c"},
}


BURST_GPT = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,,1.5,ChatGPT,472,18,490,Conversation log
45,7,9,GPT-4,1087,230,1317,API log
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 7319, "output_length": 490, "hash_ids": [0]}
"""
SERVEGEN = """\
request_id,timestamp,input_tokens,output_tokens
0,0.25,812,97
1,1.5,40,350
"""
LITELLM = """\
[{"request_id": "x", "startTime": "2026-01-31T12:00:00.250000+00:00", "endTime": "2026-01-31T12:00:09+00:00",
  "prompt_tokens": 30, "completion_tokens": 40, "end_user": "u"}]
"""
NGINX = """\
{"ts": "31/Jan/2026:12:00:00 +0000", "status": 200, "request_length": 400, "request_time": 2.0}
{"ts": "31/Jan/2026:12:00:04 +0000", "status": 200, "request_length": 800, "request_time": "0.4"}
"""


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        (
            f"{ENVOY_TEXT}\n{ENVOY_TEXT.replace('POST', 'GET')}\n{ISTIO_TEXT}\n",
            [(0.0, 1000, 125), (2.0, 1000, 125)],
        ),
        (BURST_GPT, [(0.0, 472, 18), (40.0, 1087, 230)]),
        (MOONCAKE, [(0.0, 6755, 500), (3.0, 7319, 490)]),
        (SERVEGEN, [(0.0, 812, 97), (1.25, 40, 350)]),
        (LITELLM, [(0.0, 30, 40)]),
        (json.dumps(OTLP) + "\n" + json.dumps(CONSOLE_SPAN) + "\n", [(0.0, 700, 80), (1.5, 900, 90)]),
        (NGINX, [(0.0, 100, 50), (4.0, 200, 10)]),
        ('{"@timestamp": 1769860800123, "usage": {"prompt_tokens": 5, "completion_tokens": 6}}\n', [(0.0, 5, 6)]),
    ],
    ids=[
        *("envoy-and-istio-text", "burstgpt", "mooncake", "servegen", "litellm", "opentelemetry", "nginx-json"),
        "nested-usage",
    ],
)
def test_what_others_record_is_read_as_it_is(tmp_path: Path, text: str, requests: list[tuple[float, int, int]]) -> None:
    demands = read_trace(written(tmp_path, text), CLASSES)
    found = [(pytest.approx(demand.at, abs=1e-6), demand.prompt, demand.output) for demand in demands]
    assert requests == found


def test_ones_own_class_names_need_no_flag_and_a_configuration_tells_more(tmp_path: Path) -> None:
    rows = "".join(f"{number},10,20,{'vip' if number % 2 else 'rest'}\n" for number in range(4))
    trace = written(tmp_path, "time,prompt_tokens,output_tokens,class\n" + rows)
    assert look(trace) == Look(("rest", "vip"), entries=4, skipped=0)
    config = tmp_path / "sidecar.yaml"
    config.write_text("classes: [{name: vip, priority: 9, budget: 3s}, {name: rest, budget: 1m}]")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    guessed = plan_from(parser.parse_args(["--trace", str(trace)])).workload.classes
    assert [(klass.name, klass.ttft_s) for klass in guessed] == [("rest", 2.0), ("vip", 2.0)]
    told = plan_from(parser.parse_args(["--trace", str(trace), "--config", str(config)])).workload.classes
    assert [(klass.name, klass.priority, klass.budget_s) for klass in told] == [("vip", 9, 3.0), ("rest", 0, 60.0)]
    assert len(read_trace(trace, told)) == 4
    with pytest.raises(ConfigError, match="--class and --config both tell"):
        plan_from(parser.parse_args(["--config", str(config), "--class", "a=1/1"]))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: no column time, prompt_tokens, output_tokens"),
        ("time,prompt_tokens,output_tokens\n", "has no requests"),
        ("a,b\n1,2\n", "line 1: no column time, prompt_tokens, output_tokens; needed are"),
        ("time,prompt_tokens,output_tokens\n1,2\n", "line 2: has 2 fields, the header has 3"),
        ("time,prompt_tokens,output_tokens\nnoon,2,3\n", "line 2: time: must be seconds or like 2026"),
        ("time,prompt_tokens,output_tokens\nnan,2,3\n", "line 2: time: must be a finite number"),
        ("time,prompt_tokens,output_tokens\n1,-2,3\n", "line 2: prompt_tokens: must be a whole number of tokens"),
        ("time,prompt_tokens,output_tokens\n1,2,9999999999\n", "line 2: output_tokens: must be"),
        ("time,prompt_tokens,output_tokens,class\n1,2,3,vip\n", "line 2: class: unknown class 'vip'; known are int"),
        ('{"time": 1, "duration_ms": 5}\n{"time": \n{\n', "line 2: is no JSON"),
        ('{"time": 1}\n[]\n', "line 2: must be a JSON object"),
        ('{"code": 200, "duration_ms": 5}\n', "line 1: time: must be seconds"),
        ('{"time": 1, "duration_ms": 5, "queue": {"class": "vip"}}\n', "line 1: class: unknown class 'vip'"),
        ('{"time": 1, "duration": "5ms"}\n', "line 1: tells nothing of how long its request is"),
        (
            '{"time": 1, "model": "m"}\n',
            "tells nothing of how long its request is: needed are time and either prompt_tokens",
        ),
        ('{"time": 1, "model": "m"}\n', "found are time, model"),
        ("[1, 2", "line 1: no column time"),
        (ENVOY_TEXT + "\nsomething else\nand more\n", "line 2: is no line of Envoy's default access log"),
        (b"\xff\xfe\x00", "is no UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_bad_input_is_named_with_its_line_and_what_would_be_right(
    tmp_path: Path, text: str | bytes, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(written(tmp_path, text), CLASSES)
    assert problem in str(caught.value)


ENVOYS_OWN = "[2026-01-31 12:00:00.123][1][info][main] [source/server/server.cc:1009] starting main dispatch loop"
JSON_ENTRY = '{"time": 1, "duration_ms": 400, "bytes_received": 40}'


@pytest.mark.parametrize(
    "text",
    [
        f"{ENVOYS_OWN}\n{ENVOY_TEXT}\n{ENVOYS_OWN}\n{ENVOY_TEXT}\n",
        f"{ENVOYS_OWN}\n{JSON_ENTRY}\n" + '{"level": "info", "time": 2, "message": "ready"}\n' + f"{JSON_ENTRY}\n",
    ],
    ids=["text", "json"],
)
def test_lines_of_a_log_that_are_no_requests_are_skipped_and_counted(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = written(tmp_path, text)
    assert look(trace) == Look((), entries=2, skipped=2)
    assert len(read_trace(trace, CLASSES)) == 2
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert simulate(parser.parse_args(["--trace", str(trace), "--engines", "1", "--contender", "ours", "--quiet"])) == 0
    assert "skipped lines of the trace, which are no requests: 2; requests: 2\n" in capsys.readouterr().out


def test_each_class_says_the_objectives_that_the_verdict_goes_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, page = tmp_path / "sidecar.yaml", tmp_path / "out.html"
    config.write_text("classes: [{name: vip, budget: 3s}]")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    simulate(
        parser.parse_args(
            [
                "--config",
                str(config),
                "--html",
                str(page),
                "--engines",
                "1",
                "--duration",
                "5",
                "--load",
                ".2",
                "--quiet",
            ]
        )
    )
    told = (
        "vip: judged by a first token in 3.4 s and 100 ms a token after it; "
        "its budget in our queue is 3 s, and its clients leave after 30 s"
    )
    assert told in capsys.readouterr().out
    assert told in page.read_text()


def test_all_problems_come_at_once_and_not_more_than_a_page(tmp_path: Path) -> None:
    text = "time,prompt_tokens,output_tokens\n" + "x,y,z\n" * 20
    with pytest.raises(ConfigError) as caught:
        read_trace(written(tmp_path, text), CLASSES)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == "and 50 more problems like these"
