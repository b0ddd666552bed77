"""Of which code a figure is: every table that a benchmark records says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "a commit that is not on record"


def commit() -> str:
    """Return the commit that is checked out, `-dirty` behind it where files differ; "unknown" outside of git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
