"""What an Envoy bootstrap that works leaves people without: told by `extproc check --envoy` as warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.envoy.check import read_bootstrap
from extproc.envoy.view import views
from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extproc.config import Config
    from extproc.envoy.view import View


def advice(config: Config, path: Path) -> list[str]:
    """Return what is missing in the bootstrap at `path`. Raises ConfigError if it can't be read."""
    return list(dict.fromkeys(line for view in views(config, read_bootstrap(path)) for line in _access_log(view)))


def _access_log(view: View) -> Iterator[str]:
    logs = view.manager.each("access_log")
    if not logs:
        yield f"{view.manager.path}.access_log: there is none: nothing says later why a request waited or was refused"
    elif wire.NAMESPACE not in "".join(_dynamic_metadata(str(log.node)) for log in logs):
        yield (
            f"{view.manager.path}.access_log: has no queue data, which says why a request waited; "
            f"%DYNAMIC_METADATA({wire.NAMESPACE})% in its format would be right"
        )


def _dynamic_metadata(log: str) -> str:
    """Return what of a log's format is about dynamic metadata."""
    return "".join(piece.partition(")")[0] for piece in log.split("DYNAMIC_METADATA(")[1:])
