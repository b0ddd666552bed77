"""Every error this package raises on purpose. A message says what was wrong, where, and what would be right."""

from __future__ import annotations


class ExtprocError(Exception):
    """Base of the errors below: catch it to catch all that we raise on purpose."""


class ConfigError(ExtprocError):
    """The configuration is wrong; carries all problems at once, each with its key path."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class StartError(ExtprocError):
    """Something outside the configuration prevents a start: a port is taken, a binary or a file is missing."""


class ProtocolError(ExtprocError):
    """The peer sent bytes that are no ext_proc message, or a message that has no place here."""


class TransitionError(ExtprocError):
    """A ticket was moved in a way that its state does not allow: a bug in the caller, never in the peer."""
