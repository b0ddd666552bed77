"""What a source sees becomes endpoints; what makes none is left out, said and counted once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping

    from extproc.config import EndpointConfig

MOST_TOLD = 10
"""Lines about what is left out, at a time; all of it is counted."""


class Maker(Protocol):
    """What a configuration says of all endpoints that one source finds."""

    def endpoint(self, name: str, address: str) -> EndpointConfig:
        """Return a found endpoint as if the file had listed it. Raises ValueError."""


class Findings:
    """Makes endpoints, and remembers what was told of those that are none."""

    def __init__(self, log: logging.Logger, what: str, maker: Maker, leave_out: Callable[[int], None]) -> None:
        """Make them as `maker` does; say in `log` what is left out of `what`, and count it by `leave_out`."""
        self._log = log
        self._what = what
        self._maker = maker
        self._leave_out = leave_out
        self._told: set[str] = set()

    def endpoints(self, found: Mapping[str, str], problems: set[str]) -> list[EndpointConfig]:
        """Return the endpoints of `found`, name to address; `problems`: what was no name and address at all."""
        endpoints = []
        for name, address in found.items():
            try:
                endpoints.append(self._maker.endpoint(name, address))
            except ValueError:  # pydantic's too
                problems.add(f"{name!r:.100} at {address!r:.100}")
        news = problems - self._told
        for problem in sorted(news)[:MOST_TOLD]:
            self._log.warning("%s: left out, no endpoint: %s", self._what, problem)
        self._leave_out(len(news))
        self._told = problems
        return endpoints
