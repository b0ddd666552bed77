"""Virtual environments beside ours, for what a benchmark alone needs: made on demand, with pinned versions."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextlib.contextmanager
def fresh(venv: Path, pins: Sequence[str], note: str) -> Iterator[list[str]]:
    """Make `venv` anew and give its pip's command line; it counts as made with `pins` if the body succeeds."""
    print(note, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    yield [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _stamp(venv).write_text("\n".join(pins))


def is_made(venv: Path, pins: Sequence[str]) -> bool:
    """Tell whether `venv` is there, with these pins."""
    return _stamp(venv).exists() and _stamp(venv).read_text() == "\n".join(pins)


def _stamp(venv: Path) -> Path:
    return venv / ".installed"
