"""Only for compiled wheels: EXTPROC_COMPILE=1 has mypyc compile the core (`make compiled`). Else: nothing."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

INTERPRETED = {
    "controller",  # its subclasses are interpreted, and the dry run reads the signatures of its events
    "decision",  # says why itself
    "held",  # an Enum whose members are made by __new__
    "outcome",  # likewise
    "tenants",  # a dataclass with a field whose type is imported for the type checker alone
}
STREAM = ("ages", "answer", "bodies", "dialect", "gate", "replays", "request", "routes", "session", "silence", "wire")
REPLICAS = ("gate", "leading")  # subclasses of what is compiled must be, too


def modules() -> list[str]:
    """Return the files to compile."""
    core = sorted(path for path in Path("extproc/admission").glob("*.py") if path.stem not in INTERPRETED)
    rest = [f"extproc/stream/{name}.py" for name in STREAM] + [f"extproc/replicas/{name}.py" for name in REPLICAS]
    return [*map(str, core), *rest]


if os.environ.get("EXTPROC_COMPILE"):
    from mypyc.build import mypycify

    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    setup(ext_modules=mypycify([*options, *modules()], opt_level="2", multi_file=True, group_name="extproc"))
else:
    setup()
