"""The documentation says what the code does: the reference is generated, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from extproc.admission.held import HeldBy

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_reference_is_what_the_code_says():
    script = "import runpy; print(runpy.run_path('docs/generate.py')['reference'](), end='')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs/reference.md").read_text() == done.stdout, "run `make reference`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for words in re.findall(r"`make ([a-z -]+)`", page.read_text()):
            assert set(words.split()) <= targets, f"{page.name}: make {words}"


def test_every_limit_that_can_hold_a_line_is_explained():
    page = (ROOT / "docs/observability.md").read_text()
    assert [held.value for held in HeldBy if f"`{held.value}`" not in page] == []
