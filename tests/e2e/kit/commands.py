"""A command of `extproc` that ends by itself, run in this process: a process of its own costs half a second of CPU.

That the installed program does the same is for tests/e2e/test_commands.py to show.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, NamedTuple

from extproc.commands import cli

if TYPE_CHECKING:
    from pathlib import Path


class Done(NamedTuple):
    """What it answered and said."""

    returncode: int
    stdout: str
    stderr: str


def extproc(*words: str | Path) -> Done:
    """Run `extproc WORDS` to its end. For commands that take nothing but files and print: `check`, `envoy-config`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


def envoy_config(*words: str | Path) -> str:
    """The bootstrap that `extproc envoy-config WORDS` prints; AssertionError when it refuses."""
    done = extproc("envoy-config", *words)
    if done.returncode != 0:
        raise AssertionError(f"extproc envoy-config: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
