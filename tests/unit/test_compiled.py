"""The compiled core: what setup.py compiles, and, by `make compiled`, the core's tests on it in a clean environment."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import extproc
from extproc.pure import is_compiled
from tests.conftest import tool

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.skipif(not os.environ.get("EXTPROC_LONG"), reason="EXTPROC_LONG is not set: `make compiled`")
TESTS = (
    *(
        "admission",
        "replicas",
        "test_admin.py",
        "test_admin_asked.py",
        "test_completion.py",
        "test_dry_run.py",
        "test_metrics.py",
        "test_queue_log.py",
        "test_replays.py",
        "test_second_try.py",
    ),
    *("test_session_and_gate.py", "test_session_plays.py", "test_silent_streams.py", "test_stories.py", "test_wire.py"),
)


@pytest.fixture
def compiled_modules(monkeypatch):
    """The files that setup.py compiles."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("EXTPROC_COMPILE", raising=False)
    return runpy.run_path("setup.py")["modules"]()


def test_what_is_compiled_is_there_and_the_core_is_most_of_it(compiled_modules):
    assert all((ROOT / path).exists() for path in compiled_modules)
    core = {path.stem for path in (ROOT / "extproc/admission").glob("*.py")}
    left = core - {Path(path).stem for path in compiled_modules if "/admission/" in path}
    assert left == {"held", "outcome"}


def test_nobody_who_is_interpreted_is_a_subclass_of_who_is_compiled(compiled_modules):
    compiled = {path.removesuffix(".py").replace("/", ".") for path in compiled_modules}
    for file in (ROOT / "extproc").rglob("*.py"):
        if str(file.relative_to(ROOT)) in compiled_modules:
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        came_from = {
            name.name: node.module for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names
        }
        bases = [ast.unparse(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
        assert not [base for base in bases if came_from.get(base) in compiled], file


def test_no_compiled_dataclass_has_a_field_of_a_compiled_class_that_is_imported_for_types_alone(compiled_modules):
    """Compiled, the class is looked for when its module begins, and if it is not there yet the process crashes."""
    compiled = {path.removesuffix(".py").replace("/", ".") for path in compiled_modules}
    for path in compiled_modules:
        tree = ast.parse((ROOT / path).read_text())
        for_types = {
            name.name
            for block in tree.body
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
            if isinstance(node, ast.ImportFrom) and node.module in compiled
            for name in node.names
        }
        fields = {
            ast.unparse(line.annotation)
            for node in tree.body
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list)
            for line in node.body
            if isinstance(line, ast.AnnAssign)
        }
        assert not fields & for_types, path


def test_a_copy_to_work_on_is_pure():
    assert not is_compiled() or "site-packages" in str(extproc.__file__)


@LONG
def test_the_wheel_has_machine_code_and_its_source(compiled_modules):
    (wheel,) = (ROOT / "build/compiled").glob("*.whl")
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for path in compiled_modules:
        stem = path.removesuffix(".py")
        assert path in names
        assert any(name.startswith(f"{stem}.cpython") and name.endswith(".so") for name in names), path


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs the Python of an environment that the wheel is installed in, compiled or pure, where no other copy is."""
    base = ROOT / "build/compiled"
    python = base / "venv/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(base / "venv")], check=True)
        (wheel,) = base.glob("*.whl")
        needs = [f"{wheel}[otel,uvloop,valkey]", "pytest>=8.3,<10", "hypothesis>=6.130,<7", "pytest-xdist>=3.6,<4"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *needs], check=True)
    where = tmp_path_factory.mktemp("elsewhere")
    for folder in ("tests", "bench"):  # no `extproc` beside them: the installed one is imported
        (where / folder).symlink_to(ROOT / folder)

    def run(*arguments: str, pure: bool) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "EXTPROC_LONG": "", "EXTPROC_PURE": "1"}
        if not pure:
            del environ["EXTPROC_PURE"]
        return subprocess.run([str(python), *arguments], cwd=where, env=environ, capture_output=True, text=True)

    said = run("-c", "import extproc; print(extproc.__file__)", pure=False).stdout
    assert said.startswith(str(base)), said
    return run


@LONG
@pytest.mark.parametrize("pure", [False, True], ids=["compiled", "pure"])
def test_the_core_s_tests_pass_on_the_installed_wheel(installed, pure):
    said = installed("-c", "import extproc, extproc.pure as pure; print(pure.is_compiled())", pure=pure).stdout
    assert said.strip() == str(not pure)
    how = ("-q", "-n", "2", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider")
    done = installed("-m", "pytest", *how, *(f"tests/unit/{name}" for name in TESTS), pure=pure)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


RECORD = """
import sys
from tests.unit.admission.test_recording import recorded
open(sys.argv[1], "w").write(recorded(1, 2000, 1000)[0])
"""


@LONG
@pytest.mark.parametrize("pure", [False, True], ids=["compiled", "pure"])
def test_what_either_core_recorded_the_other_one_decides_alike(installed, pure, tmp_path):
    file = str(tmp_path / "recording.jsonl")
    done = installed("-c", RECORD, file, pure=pure)
    assert done.returncode == 0, done.stderr
    again = installed("-m", "extproc", "simulate", "--replay", file, pure=not pure)
    assert again.returncode == 0, again.stdout[-1000:] + again.stderr
    assert "the same decisions as recorded" in again.stdout


@LONG
def test_a_request_costs_the_compiled_core_no_five_percent_more_instructions_than_it_did(installed):
    tool("valgrind", "valgrind")
    done = installed("-m", "bench.instructions", pure=False)
    assert done.returncode == 0, done.stdout + done.stderr
