"""What a sidecar writes of itself and others: each line begins with who writes it, and where he is reached.

Who is on call reads the lines of several sidecars side by side.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from extproc.replicas.messages import Member

log = logging.getLogger("extproc.replicas")


class SidecarLog(logging.LoggerAdapter[logging.Logger]):
    """The log of one sidecar among others; as JSON, its lines have its name and address beside them, too."""

    def __init__(self, me: Member) -> None:
        """Write as `me`."""
        super().__init__(log, {"about": {"sidecar": me.id, "sidecar_address": me.address}})
        self._begin = f"{me}: ".replace("%", "%%")

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        """Put the name before a line."""
        return f"{self._begin}{msg}", {**kwargs, "extra": self.extra}
