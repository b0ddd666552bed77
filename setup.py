"""Only for compiled wheels: EXTPROC_COMPILE=1 has mypyc compile the core (`make compiled`). Else: nothing."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

COMPILER = "mypy==2.4.1"
"""Machine code is of the version that the tests ran with. pip gets it for the build; nothing needs it later."""
INTERPRETED = {  # tables and values: no line of them runs for a request
    "held",  # an Enum whose members are made by __new__
    "outcome",  # likewise
}
STREAM = (
    *("again", "ages", "answer", "bodies", "by_age", "dialect", "gate", "reception"),
    *("replays", "replies", "request", "routes", "session", "silence", "wire"),
)
REPLICAS = ("forwarded", "gate", "leading", "looks")  # subclasses of what is compiled must be, too
TRANSPORT = ("completion/door", "completion/events", "completion/stream")
OBSERVE = ("log", "metrics", "stories", "waits")  # are told of every decision


def modules() -> list[str]:
    """Return the files to compile."""
    core = sorted(path for path in Path("extproc/admission").glob("*.py") if path.stem not in INTERPRETED)
    rest = [f"extproc/stream/{name}.py" for name in STREAM] + [f"extproc/replicas/{name}.py" for name in REPLICAS]
    rest += [f"extproc/transport/{name}.py" for name in TRANSPORT] + [f"extproc/observe/{name}.py" for name in OBSERVE]
    return [*map(str, core), *rest]


def compiled() -> dict[str, object]:
    """Return what setuptools needs to compile; without the compiler, that it needs it: pip asks for that first."""
    try:
        from mypyc.build import mypycify
    except ImportError:
        return {"setup_requires": [COMPILER]}
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    return {"ext_modules": mypycify([*options, *modules()], opt_level="2", multi_file=True, group_name="extproc")}


setup(**compiled() if os.environ.get("EXTPROC_COMPILE") else {})
