"""What a request costs, in machine instructions: valgrind counts them, so a busy machine changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tool

ROOT = Path(__file__).parents[2]


def test_a_request_costs_no_five_percent_more_instructions_than_it_did():
    tool("valgrind", "valgrind")
    counted = [sys.executable, "-m", "bench.instructions"]
    done = subprocess.run(counted, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if "nothing to compare" in done.stdout:
        pytest.skip(f"bench/instructions.json has no figure for this build of Python: {done.stdout.strip()}")
