"""The documents as a site: every page is on it, every link leads somewhere, and a machine finds the list."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with `strict`: a link or an anchor that leads nowhere ends it."""
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_page_of_the_documents_is_in_the_list_for_machines(site):
    listed = re.findall(r"^- \[.+\]\((.+)\)$", (site / "llms.txt").read_text(), re.MULTILINE)
    wanted = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert wanted <= set(listed)
    for name in listed:
        assert (site / name).read_text().strip()
        assert (site / name).with_suffix(".html").exists()


def test_every_page_has_a_place_in_the_sites_menu():
    """In mkdocs.yml, under `nav`: a page that is not there is found by nobody who did not know of it."""
    placed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - placed == set()


def test_what_pages_link_to_outside_docs_is_there_too(site):
    text = (site / "index.html").read_text()
    assert 'href="project/SECURITY.html"' in text
    assert (site / "files/observability/alerts.yaml").read_bytes() == (ROOT / "observability/alerts.yaml").read_bytes()


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?:)?//[^\"]+\"", page.read_text())
        assert loaded == [], page.name


def test_blocks_of_commands_are_blocks(site):
    """Their first line says more than the language, which Markdown readers don't know."""
    assert "```" not in re.sub(r"<code>.*?</code>", "", (site / "getting-started.html").read_text(), flags=re.DOTALL)
