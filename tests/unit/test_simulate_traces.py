"""Recorded traffic: what is read, and what is said of what can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from extproc.errors import ConfigError
from extproc.simulate.plan import Plan, run
from extproc.simulate.traces import read_trace
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
        ('{"time": 1}\n{"time": \n', "line 2: is no JSON"),
        ('{"time": 1}\n[]\n', "line 2: must be a JSON object"),
        ('{"code": 200}\n', "line 1: time: must be seconds"),
        ('{"time": 1, "queue": {"class": "vip"}}\n', "line 1: queue.class: unknown class 'vip'"),
        (b"\xff\xfe\x00", "is no UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_bad_input_is_named_with_its_line_and_what_would_be_right(
    tmp_path: Path, text: str | bytes, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(written(tmp_path, text), CLASSES)
    assert problem in str(caught.value)


def test_all_problems_come_at_once_and_not_more_than_a_page(tmp_path: Path) -> None:
    text = "time,prompt_tokens,output_tokens\n" + "x,y,z\n" * 20
    with pytest.raises(ConfigError) as caught:
        read_trace(written(tmp_path, text), CLASSES)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == "and 50 more problems like these"
