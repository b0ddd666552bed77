"""What a project is judged by before its code: licence, owners, one version, forms that ask what is needed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from extproc import __version__, stability
from extproc.config import Config, sections
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[2]
FORMS = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yaml") if path.name != "config.yml"]


def test_one_place_says_the_version_and_what_names_an_image_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "extproc.__version__"}
    tags = {
        path.relative_to(ROOT).as_posix(): image["newTag"]
        for path in ROOT.glob("k8s/**/kustomization.yaml")
        for image in yaml.safe_load(path.read_text()).get("images", ())
        if image["name"] == "extproc-queue" and "newTag" in image
    }
    assert tags
    assert set(tags.values()) == {__version__}, tags
    assert re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_what_is_called_experimental_is_there():
    """Else a name that was made stable by renaming it would still be marked, or a typo would mark nothing."""
    below = {
        path.replace("[]", "") + "." + (field.alias or name)
        for path, one in sections()
        for name, field in one.model_fields.items()
    }
    assert stability.KEYS - Config.model_fields.keys() - below == set()
    text = (ROOT / "docs/reference.md").read_text()
    for name in stability.METRICS:
        assert f"| `{name}" in text, name
    for name in stability.COMMANDS:
        assert f"### `extproc {name}`" in text, name


@pytest.mark.parametrize(
    ("path", "level"),
    [
        ("replicas.valkey.url", "experimental"),
        ("adaptive_limit", "experimental"),
        ("endpoints[].name", "stable"),
        ("classes", "stable"),
    ],
)
def test_a_key_is_experimental_if_one_above_it_is(path, level):
    assert stability.of_key(path) == level


def test_the_licence_is_whole_and_what_is_published_names_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert set(project["license-files"]) == {"LICENSE", "NOTICE"}
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [int(number) for number in re.findall(r"^   (\d)\. [A-Z]", text, re.MULTILINE)] == list(range(1, 10))


def test_every_owned_path_is_there():
    lines = (ROOT / ".github/CODEOWNERS").read_text().splitlines()
    owned = [line.split() for line in lines if line and not line.startswith("#")]
    assert owned[0][0] == "*", "somebody owns what no line names"
    for pattern, *owners in owned:
        assert owners, pattern
        assert pattern == "*" or (ROOT / pattern.strip("/")).exists(), pattern


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_the_host_wants_of_it(form):
    said = yaml.safe_load(form.read_text())
    assert said.keys() >= {"name", "description", "body"}
    asked = [part for part in said["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert all(part["attributes"]["label"] for part in asked)


def test_whoever_finds_a_vulnerability_is_told_where_to_and_when_they_hear():
    text = (ROOT / "SECURITY.md").read_text()
    section = " ".join(re.search(r"^## Report$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1].split())
    assert "Report a vulnerability" in section
    assert re.search(r"\d+ working days", section)
    assert "SECURITY.md" in (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text()


@pytest.mark.parametrize(
    ("listing", "building", "code", "words"),
    [
        ("exit 1", "exit 0", 0, "skipped, Go's proxy"),
        ("exit 0", "exec sleep 30", 0, "skipped, the API server was not built"),
        ("exit 0", "exit 1", 2, ""),
    ],
    ids=["no modules", "too slow", "does not compile"],
)
def test_only_what_is_not_ours_skips_the_tests_against_kubernetes(tmp_path, listing, building, code, words):
    go = tmp_path / "go"
    go.write_text(f'#!/bin/sh\ncase "$1" in list) {listing};; build) {building};; esac\n')
    go.chmod(0o755)
    old = ["-o", ".venv/.installed", "-o", ".venv/crds/.installed"]
    given = [f"GO={go}", f"APISERVER={tmp_path}/apiserver", "BUILD_S=1"]
    done = subprocess.run(["make", *old, "test-kubernetes", *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
    assert ("skipped" in done.stdout) is bool(words)


def test_the_files_of_tests_that_are_to_come_first_are_there():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
