"""`extproc schema`: an editor says no sooner than `extproc check`, and finds the usual mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from extproc import stability
from extproc.commands import cli
from extproc.config import Config, parse_config, sections
from extproc.config.schema import EXPERIMENTAL, schema
from extproc.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = schema()
WHOLE = Draft202012Validator(SCHEMA)
LINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)
EXAMPLES = [path for pattern in ("examples/*.yaml", "k8s/*/sidecar.yaml") for path in ROOT.glob(pattern)]
BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in sorted(ROOT.glob("docs/*.md"))
    for number, (name, text) in enumerate(
        re.findall(r"^```yaml file: (\S+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    )
    if "kustomization" not in name
]
SECTIONS: dict[str, type[BaseModel]] = {"": Config, **dict(sections())}
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 100, 432, 660, 1_000_000, 10**7, 0.5, -0.5, 1.5, 1e300),
    *("", "x", "a-b", "A b", "5s", " 5s ", "1.5m", "2d", "adaptive", "inherit", "auto", "h2", "json", "late", "0660"),
    *(
        "unix:/run/x.sock",
        "127.0.0.1:80",
        "[::1]:080000",
        "host",
        "http://h:1/x",
        "HTTP://h",
        "valkey://h",
        "/x",
        "/x*",
    ),
    *("/x.yaml", "GET", "10.0.0.0/8", "fd00::/8", "x-a", "X-A", "text", "completion_queue"),
    *([], [1], ["x"], ["GET"], ["10.0.0.0/8"], ["x-a", "x-b"], [8000, 8001], {}, {"x-a": "b"}, {"x": 1}),
    *([{"name": "a"}], [{"path": "/x"}], [{"name": "a", "address": "h:1"}], {"path": "/health"}, {"start": 8}),
]
STAND_INS = {"name": "a", "address": "h:1", "path": "/x", "url": "valkey://h", "server_name": "h"}


def required(section: type[BaseModel]) -> dict[str, Any]:
    fields = section.model_fields.items()
    return {field.alias or name: STAND_INS.get(name, "/x") for name, field in fields if field.is_required()}


def test_it_is_a_schema_and_the_file_in_docs_is_what_the_command_prints():
    Draft202012Validator.check_schema(SCHEMA)
    done = subprocess.run([sys.executable, "-m", "extproc", "schema"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/config.schema.json").read_text() == done.stdout, "run `make reference`"


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top")
def test_it_takes_every_value_that_the_sidecar_takes(path):
    """Never stricter: an editor that underlines what works is switched off."""
    section = SECTIONS[path]
    where = SCHEMA if not path else {"$ref": f"#/$defs/{section.__name__}", "$defs": SCHEMA["$defs"]}
    validator, base, taken = Draft202012Validator(where), required(section), 0
    for name, field in section.model_fields.items():
        for value in VALUES:
            data = {**base, field.alias or name: value}
            try:
                section.model_validate(data)
            except ValidationError:
                continue
            taken += 1
            assert validator.is_valid(data), (path, name, value)
    assert taken >= len(section.model_fields)


@pytest.mark.parametrize(
    "mistake",
    [
        "enable_qeue: true",
        "enable_queue: 'yes'",
        "endpoints: [{name: a}]",
        "endpoints: [{name: a, address: 'http://h:1'}]",
        "endpoints: [{name: a, address: h}]",
        "endpoints: [{name: a, address: 'h:1', engine: vlm}]",
        "endpoints: [{name: a, address: 'h:1', max_running_requests: 0}]",
        "classes: []",
        "classes: [{name: a, budget: soon}]",
        "classes: [{name: a, priority: high}]",
        "scrape_interval: -1",
        "max_gpu_perc: 101",
        "socket_mode: '0777'",
        "log_format: yaml",
        "headers: {model: 'x model'}",
        "envoy_clusters_file: clusters.json",
    ],
)
def test_it_finds_the_usual_mistakes(mistake):
    with pytest.raises(ConfigError):
        parse_config(mistake, "file", {})
    assert not WHOLE.is_valid(yaml.safe_load(mistake))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_example_leads_an_editor_to_the_schema_and_fits_it(path):
    (target,) = LINE.findall(path.read_text())
    assert (path.parent / target).resolve() == ROOT / "docs/config.schema.json"
    assert [error.message for error in WHOLE.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize("text", BLOCKS)
def test_a_configuration_in_the_documents_fits_it(text):
    assert [error.message for error in WHOLE.iter_errors(yaml.safe_load(text))] == []


def test_it_says_what_is_experimental_and_durations_as_people_write_them():
    shown = SCHEMA["properties"]
    marked = {name for name, one in shown.items() if EXPERIMENTAL in one["description"]}
    assert marked == {name for name in Config.model_fields if stability.of_key(name) == "experimental"}
    assert shown["drain_timeout"]["default"] == "30s"
    assert shown["socket_mode"]["default"] == "0660"


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_a_shell_completes_commands_and_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("envoy-config", "simulate", "fail-open"))


def test_check_tells_a_pipeline_where_each_problem_is(tmp_path, capsys):
    path = tmp_path / "sidecar.yaml"
    path.write_text("endpoints: [{name: a, address: 'http://h:1'}]\nlistn: 1\n")
    assert cli.main(["check", str(path), "--output", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert {(one["severity"], one["at"]) for one in report["findings"]} == {
        ("error", "endpoints[0].address"),
        ("error", "listn"),
    }
    path.write_text("endpoints: [{name: a, address: 'h:1'}]\nclasses: [{name: a, budget: 5}]\n")
    assert cli.main(["check", str(path), "--output", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    doubt, clusters = report["findings"]
    assert (clusters["severity"], clusters["message"][:30]) == ("info", "Envoy needs a cluster for each")
    assert (report["ok"], doubt["file"], doubt["severity"]) == (True, str(path), "warning")
    assert (doubt["at"], doubt["message"]) == ("classes[0].budget", "5 is read as 5s; write the unit")
