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
        self._endpoints: OrderedDict[str, tuple[Endpoint, int, int]] = OrderedDict()

    def __len__(self) -> int:
        """Count the sessions remembered."""
        return len(self._endpoints)

    def remember(self, session: str, endpoint: Endpoint, tokens: int, capacity: int) -> None:
        """Note that `endpoint` serves `session`, and will have `tokens` of it cached.

        Over `capacity` sessions, the one that was seen longest ago is forgotten.
        """
        self._endpoints[session] = (endpoint, tokens, endpoint.kv.turnover)
        self._endpoints.move_to_end(session)
        while len(self._endpoints) > capacity:
            self._endpoints.popitem(last=False)

    def recall(self, session: str) -> Endpoint | None:
        """Return the endpoint that served `session` last, unless it is gone."""
        endpoint, _, before = self._endpoints.get(session, (None, 0, 0))
        if endpoint is not None and (endpoint.removed or endpoint.has_evicted(before)):
            del self._endpoints[session]
            return None
        return endpoint

    def cached(self, session: str, endpoint: Endpoint) -> int:
        """Return how many tokens of `session` are probably in the cache of `endpoint`."""
        home, tokens, _ = self._endpoints.get(session, (None, 0, 0))
        return tokens if home is endpoint else 0
