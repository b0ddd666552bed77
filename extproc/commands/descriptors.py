"""How many files and sockets this process may have open."""

from __future__ import annotations

import contextlib
import resource

MOST = 1_048_576
"""Where the hard limit is none at all: this is Linux' own default for it (fs.nr_open)."""


def raise_limit() -> int:
    """Raise the soft limit of descriptors to the hard one, which needs no right, and return it.

    The soft one is 1,024 in most shells and unit files, for the sake of programs that use select(2). We don't.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # as it is, then
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft
