"""docs/reliability.md and docs/faults.md name tests: they exist, and no row is without one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
FAULTS = (ROOT / "docs/faults.md").read_text()
NAMED = re.findall(r"`([a-z0-9_/]+\.py)::([a-z0-9_]+)`", PAGE + FAULTS)


def test_every_test_that_the_reliability_page_names_exists():
    assert len(NAMED) > 130
    for path, name in NAMED:
        source = ROOT / "tests" / path
        assert source.exists(), path
        assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_item_of_the_promise_has_a_row_and_every_row_a_test():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d", line)]
    assert {int(row.split("|")[1].strip().split(".")[0]) for row in rows} == set(range(1, 11))
    for row in rows:
        assert re.search(r"\.py::test_", row), row


MEASURED = {"E7"}
"""Held by a figure (`make bench-scrape`): a test of CPU time would be red on a busy machine."""
COUNTS = {"A": 7, "B": 4, "C": 2, "D": 6, "E": 7, "F": 11, "G": 67, "H": 23}


def test_every_fault_has_a_row_and_every_row_a_test():
    rows = re.findall(r"^\| ([A-H]\d+)? *\|.*$", FAULTS, re.MULTILINE)
    assert [row for row in rows if row] == [
        f"{letter}{n}" for letter, most in COUNTS.items() for n in range(1, most + 1)
    ]
    for line in FAULTS.splitlines():
        if re.match(r"\| ([A-H]\d+)? *\|", line):
            assert re.search(r"\.py::test_", line) or line.split("|")[1].strip() in MEASURED, line
