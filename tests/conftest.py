"""For all tests: what a machine lacks is said, and a CI run that lacks it fails."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator

# How fast inputs are made says how busy the machine is, and nothing about what is tested.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")

# A shell's job in the background ignores SIGINT, and so does every process that it starts: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOOL_MISSING = "tool missing: "
LONGEST = (
    *("e2e/test_broken_endpoints.py", "e2e/test_replicas.py", "unit/test_policy_gate.py", "e2e/test_any_engine.py"),
    *("e2e/test_commands.py", "e2e/test_restart.py", "e2e/test_not_completions.py", "e2e/test_load.py"),
    *("e2e/test_observability.py", "e2e/test_page.py", "e2e/test_endpoints.py", "e2e/test_faults.py"),
)
"""Files that take half a minute and more, the longest first: begun last, they would run on while nothing else does."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests wait where others compute: some of both at all times, and of each the longest files first."""
    longest = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    files = sorted({item.path: None for item in items}, key=lambda file: longest.get(file, len(longest)))
    places: dict[Path, float] = {}
    for waits in (True, False):
        kind = [file for file in files if ("e2e" in file.parts) is waits]
        places |= {file: number / len(kind) for number, file in enumerate(kind)}
    items.sort(key=lambda item: places[item.path])


def tool(name: str, package: str, source: str = "Debian's") -> str:
    """The path of a program that this machine may lack; without it the test is skipped, and under CI it fails."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{TOOL_MISSING}{name}, of {source} {package}; `make tools` installs it")
    return found


@pytest.fixture(scope="session")
def promtool() -> str:
    """Prometheus's own checker."""
    return tool("promtool", "prometheus")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a check that was not made is a failure, not a skip that nobody reads."""
    report = yield
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if report.skipped and TOOL_MISSING in reason and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"CI is set, and so nothing may be left out. {reason}"
    return report
