"""Descriptors: the soft limit is raised to the hard one at a start."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from extproc.commands.descriptors import raise_limit
print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits(soft: int, hard: int) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(soft=soft, hard=hard)], capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


def test_the_soft_limit_becomes_the_hard_one_and_one_that_is_as_high_stays():
    assert limits(256, 900) == [900, 900, 900]
    assert limits(900, 900) == [900, 900, 900]
