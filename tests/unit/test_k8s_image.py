"""The Dockerfile, without Docker: its steps make a sidecar that runs as nobody, from what a clean copy holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from extproc import __version__
from tests.e2e.kit.processes import Child, http_ok, run
from tests.unit.k8s.pod import Pod
from tests.unit.k8s.rendering import (
    ROOT,
    containers,
    gateway,
    rendered,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rendered"]  # a fixture


def _dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def test_the_image_is_pinned_runs_as_nobody_and_says_what_the_manifests_count_on(rendered):
    instructions = _dockerfile()
    last = instructions[max(index for index, (word, _) in enumerate(instructions) if word == "FROM") :]
    assert all(word != "RUN" for word, _ in last), "what is shipped is copied, not made in place"
    given = dict(rest.split("=") for word, rest in instructions if word == "ARG")
    assert re.fullmatch(r"3\.\d+-slim-\w+", given["PYTHON"])
    assert given["COMPILING"] == given["PYTHON"].replace("slim-", ""), "machine code is of one Python and one libc"
    said = dict(last)
    context = containers(gateway(rendered("base")))["extproc"]["securityContext"]
    assert said["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert json.loads(said["ENTRYPOINT"]) == ["extproc"]
    assert json.loads(said["CMD"]) == containers(gateway(rendered("base")))["extproc"]["args"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    wanted = {
        source.lstrip("./")
        for word, rest in instructions
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert wanted == {line[1:] for line in ignored if line.startswith("!")}


def _build_context(directory: Path) -> None:
    """What Docker would send: what .dockerignore lets through, without what git ignores."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "extproc", directory / "extproc", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_wheel_from_a_clean_copy_holds_all_that_the_sidecar_reads(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    _build_context(source)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = run([sys.executable, "-W", "ignore", "-c", build, str(tmp_path)], cwd=source, timeout_s=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "extproc").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    studies = {name for name in wanted if name.startswith("extproc/simulate/studies/")}
    assert studies, "what our own pages are written with is not asked of a sidecar"
    assert wanted - inside == studies
    (metadata,) = (name for name in inside if name.endswith("dist-info/METADATA"))
    said = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in said
    assert "\nLicense-Expression: Apache-2.0\n" in said
    assert {f"{metadata.removesuffix('METADATA')}licenses/{name}" for name in ("LICENSE", "NOTICE")} <= inside


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users get at; pytest's own they don't."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.skipif(not os.environ.get("EXTPROC_LONG"), reason="installs everything anew: `make image-check`")
def test_the_dockerfiles_steps_make_a_sidecar_that_runs_as_nobody(rendered, open_path):
    nobody = ["setpriv", "--reuid", "65532", "--regid", "65532", "--clear-groups", "--no-new-privs"]
    nobody += ["--bounding-set=-all", "--inh-caps=-all", "env", "-i", "PYTHONDONTWRITEBYTECODE=1"]
    recent = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    pythons = [
        path
        for path in (sys._base_executable, "/usr/bin/python3")
        if run([*nobody, path, "-c", recent]).returncode == 0
    ]
    if not pythons:
        pytest.skip("no Python here that another user may run (and only root can become one)")
    open_path.chmod(0o755)
    source, image, commands = open_path / "src", open_path / "opt/extproc", open_path / "commands"
    source.mkdir()
    commands.mkdir()
    _build_context(source)
    # Debian's Python comes without pip and headers; ours has both, and installs into the other's environment.
    shim = f'#!/bin/sh\ncase "$*" in "-m pip"*) exec {sys.executable} "$@";; *) exec {pythons[0]} "$@";; esac\n'
    (commands / "python").write_text(shim)
    (commands / "python").chmod(0o755)
    clean = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(open_path)}
    clean |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
    clean["CPATH"] = sysconfig.get_path("include")
    for word, rest in _dockerfile():
        if word == "ARG":
            clean.update([rest.split("=")])
        if word == "RUN":
            step = rest.replace("/opt/extproc", str(image))
            subprocess.run(["/bin/sh", "-ec", step], cwd=source, env=clean, check=True, timeout=600)
    shutil.rmtree(source)
    shipped = {path.name for path in (image / "bin").iterdir()}
    assert not shipped & {"pip", "pytest", "mypy", "ruff", "gcc"}
    assert "compiled" in run([*nobody, str(image / "bin/extproc"), "--version"]).stdout
    documents = rendered("base")
    pod = Pod(documents, open_path)
    os.chown(open_path, 65532, 65532)
    checked = run([*nobody, str(image / "bin/extproc"), "check", str(open_path / "sidecar.yaml")])
    assert checked.returncode == 0, checked.stderr
    arguments = pod.sidecar.argv[3:]
    with Child([*nobody, str(image / "bin/extproc"), *arguments], open_path / "image.log") as child:
        child.wait_ready(lambda: http_ok(f"127.0.0.1:{pod.admin}", "/readyz"), what="/readyz")
        assert (open_path / "sidecar.sock").stat().st_uid == 65532
        child.stop()
        assert child.returncode == 0, child.output()
