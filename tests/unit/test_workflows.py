"""The workflows that test and publish: well formed, pinned, with no more rights than they use, naming what is there."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config import parse_config
from tests.conftest import tool

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
RIGHTS = {"id-token", "attestations", "packages"}
"""What nobody may have who runs code of a pull request."""

each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), yaml.BaseLoader)  # noqa: S506 - plain text, so that `on` stays a word


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job.get("steps", [])]


def test_actionlint_finds_nothing():
    actionlint = tool("actionlint", "github.com/rhysd/actionlint", "Go's")
    done = subprocess.run([actionlint, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_what_runs_there_is_pinned_by_commit_and_says_its_version(path):
    for line in re.findall(r"uses: (.*)", path.read_text()):
        if not line.startswith("./.github/"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    for step in steps(path):
        for name, version in re.findall(r"pipx run (?:--spec )?([\w-]+)(\S*)", step.get("run", "")):
            assert re.fullmatch(r"==[\d.]+", version), name


@each
def test_rights_are_asked_for_by_the_job_that_needs_them_and_never_where_a_stranger_s_change_runs(path):
    workflow = read(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        asked = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        assert asked <= RIGHTS, name
        assert not asked or ("environment" in job and set(workflow["on"]) == {"push"}), name
        assert "timeout-minutes" in job or "uses" in job, name
    assert "pull_request_target" not in workflow["on"]
    assert "secrets." not in path.read_text().replace("secrets.GITHUB_TOKEN", "")


@each
def test_a_checkout_leaves_no_token_behind(path):
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


@each
def test_what_a_step_calls_is_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps(path):
        command = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets, command
        for file in re.findall(r"\./(\S+)", command):
            assert (ROOT / file).exists(), file


def test_nothing_is_published_that_was_not_tested_and_all_of_it_is_signed():
    jobs = read(ROOT / ".github/workflows/release.yaml")["jobs"]
    for name, built in (("pypi", {"dist", "wheels"}), ("image", {"dist"})):
        assert set(jobs[name]["needs"]) == {"test", *built}
        used = [step.get("uses", "").partition("@")[0] for step in jobs[name]["steps"]]
        assert "actions/attest-build-provenance" in used
    builds = [s["with"] for s in jobs["image"]["steps"] if s.get("uses", "").startswith("docker/build-push-action@")]
    (push,) = [build for build in builds if "push" in build]
    assert (push["sbom"], push["provenance"], push["platforms"]) == ("true", "mode=max", "linux/amd64,linux/arm64")
    assert any('cosign sign --yes --recursive "$IMAGE@$DIGEST"' in s.get("run", "") for s in jobs["image"]["steps"])


def test_an_image_is_tried_before_it_is_pushed_and_all_that_is_in_it_is_audited():
    steps = read(ROOT / ".github/workflows/release.yaml")["jobs"]["image"]["steps"]
    tried = [index for index, step in enumerate(steps) if "docker run" in step.get("run", "")]
    pushed = [index for index, step in enumerate(steps) if step.get("with", {}).get("push") == "true"]
    assert tried
    assert max(tried) < min(pushed)
    extras = set(re.search(r'"\.\[(.*)\]"', (ROOT / "Dockerfile").read_text())[1].split(","))
    assert extras == {"otel", "picker", "uvloop", "valkey"}, "what the configurations in our documents need"
    audited = re.search(r"'\.\[(.*)\]'", (ROOT / ".github/workflows/scan.yaml").read_text())[1].split(",")
    assert extras <= set(audited)


def test_the_configuration_that_an_image_is_tried_with_is_one():
    text = (ROOT / ".github/workflows/release.yaml").read_text()
    said = re.search(r"<<'EOF'\n(.*?)\n *EOF", text, re.DOTALL)[1]
    config = parse_config(textwrap.dedent(said + "\n"), "release.yaml", {})
    assert (config.picks, config.tracing) == (True, True)


def test_every_python_that_we_say_we_run_on_is_tested():
    said = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert read(ROOT / ".github/workflows/test.yaml")["jobs"]["pythons"]["strategy"]["matrix"]["python"] == said
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^PYTHONS \?= (.*)$", makefile, re.MULTILINE)[1].split() == [f"python{one}" for one in said]
