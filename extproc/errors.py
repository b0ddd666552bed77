"""Every error this package raises on purpose. A message says what was wrong, where, and what would be right."""

from __future__ import annotations

import os
import socket
from importlib import metadata


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


def plain_words(error: BaseException) -> str:
    """Say why something failed in the operating system's words where it has some, without those of a library."""
    cause = getattr(error, "os_error", error)  # aiohttp's own text goes on with "ssl:default [Connect call failed"
    if isinstance(cause, socket.gaierror):
        return "the name does not resolve"
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return str(error) or type(error).__name__


def pip_install(extra: str) -> str:
    """Return the command that brings the packages of `extra` in pyproject.toml: the project itself is on no index."""
    try:
        named = [one.partition(";") for one in metadata.requires("extproc-queue") or ()]
    except metadata.PackageNotFoundError:  # it came in some other way than pip's
        named = []
    packages = [f"'{name.strip()}'" for name, _, marker in named if marker.strip() == f'extra == "{extra}"']
    return f"`pip install {' '.join(packages) or extra}`"
