"""Reading the files that people name on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file. Raises ConfigError that says why it can't be read."""
    try:
        return path.read_text(encoding=encoding)
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        problem = f"is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        raise ConfigError(str(path), [problem]) from None
