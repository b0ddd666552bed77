"""Reading files: those that people name on the command line, and those that we follow while others write them."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from extproc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Signature = tuple[int, int, int] | None
"""Changes when a regular file does: in place, by a rename, or by the swap of a link above it; None: there is none."""


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file. Raises ConfigError that says why it can't be read."""
    try:
        with open(path, encoding=encoding, opener=_open) as file:
            text = file.read()
            is_unwritten = not text and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        problem = f"is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        raise ConfigError(str(path), [problem]) from None
    if is_unwritten:
        raise ConfigError(str(path), ["is a pipe, and nobody writes to it"])
    return text


def _open(path: str, flags: int) -> int:
    """Open a file, or a pipe like `<(...)`, without waiting for somebody to write to it, which may be for ever."""
    number = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(number, True)  # who writes already may take his time
    return number


def signature_of(path: str | Path) -> Signature:
    """Return what changes when the file does."""
    try:
        found = os.stat(path)  # noqa: PTH116 - it is asked for each scrape
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def read_regular(path: str | Path, most_bytes: int | None = None) -> bytes:
    """Return what is in a regular file; others, which could block for ever, are not read. Raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(0, "is no regular file", str(path))
    with os.fdopen(number, "rb") as file:
        content = file.read() if most_bytes is None else file.read(most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise OSError(0, f"has more than {most_bytes} bytes", str(path))
    return content
