"""Which endpoint served a session last: its KV cache is there. Bounded, and silent about endpoints that are gone."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint


class Sessions:
    """A least-recently-used memory of sessions."""

    __slots__ = ("_endpoints",)

    def __init__(self) -> None:
        """Start empty."""
        self._endpoints: OrderedDict[str, Endpoint] = OrderedDict()

    def __len__(self) -> int:
        """Count the sessions remembered."""
        return len(self._endpoints)

    def remember(self, session: str, endpoint: Endpoint, capacity: int) -> None:
        """Note that `endpoint` serves `session`; over `capacity`, forget the session that was seen longest ago."""
        self._endpoints[session] = endpoint
        self._endpoints.move_to_end(session)
        while len(self._endpoints) > capacity:
            self._endpoints.popitem(last=False)

    def recall(self, session: str) -> Endpoint | None:
        """Return the endpoint that served `session` last, unless it is gone."""
        endpoint = self._endpoints.get(session)
        if endpoint is not None and endpoint.removed:
            del self._endpoints[session]
            return None
        return endpoint
