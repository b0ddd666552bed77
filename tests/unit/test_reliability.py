"""docs/reliability.md names tests: they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
NAMED = re.findall(r"`([a-z0-9_/]+\.py)::([a-z0-9_]+)`", PAGE)


def test_every_test_that_the_reliability_page_names_exists():
    assert len(NAMED) > 30
    for path, name in NAMED:
        source = ROOT / "tests" / path
        assert source.exists(), path
        assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_item_of_the_promise_has_a_row_and_every_row_a_test():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d", line)]
    assert {int(row.split("|")[1].strip().split(".")[0]) for row in rows} == set(range(1, 11))
    for row in rows:
        assert re.search(r"\.py::test_", row), row
