"""Which endpoint served a session last: its KV cache is there. Bounded, and silent about endpoints that are gone."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint


class Home(NamedTuple):
    """Where a session was served last, by name; `age_s` ago it was sent there, and left about `tokens` in the cache."""

    session: str
    endpoint: str
    tokens: int
    age_s: float


class Sessions:
    """A least-recently-used memory of sessions."""

    __slots__ = ("_endpoints",)

    def __init__(self) -> None:
        """Start empty."""
        self._endpoints: OrderedDict[str, tuple[Endpoint, int, int, float]] = OrderedDict()

    def __len__(self) -> int:
        """Count the sessions remembered."""
        return len(self._endpoints)

    def remember(self, session: str, endpoint: Endpoint, tokens: int, capacity: int, at: float) -> None:
        """Note that `endpoint` serves `session` since `at`, and will have `tokens` of it cached. Older news: no-op.

        Over `capacity` sessions, the one that was seen longest ago is forgotten.
        """
        if session in self._endpoints and self._endpoints[session][3] > at:
            return
        self._endpoints[session] = (endpoint, tokens, endpoint.kv.turnover, at)
        self._endpoints.move_to_end(session)
        while len(self._endpoints) > capacity:
            self._endpoints.popitem(last=False)

    def recall(self, session: str) -> Endpoint | None:
        """Return the endpoint that served `session` last, unless it is gone."""
        if session not in self._endpoints:
            return None
        endpoint, _, before, _ = self._endpoints[session]
        if endpoint.removed or endpoint.has_evicted(before):
            del self._endpoints[session]
            return None
        return endpoint

    def cached(self, session: str, endpoint: Endpoint) -> int:
        """Return how many tokens of `session` are probably in the cache of `endpoint`."""
        if session not in self._endpoints:
            return 0
        home, tokens, _, _ = self._endpoints[session]
        return tokens if home is endpoint else 0

    def homes(self, most: int, now: float) -> list[Home]:
        """Return the `most` that were seen last, the last one first."""
        newest = islice(reversed(self._endpoints.items()), most)
        return [Home(session, known[0].name, known[1], max(now - known[3], 0.0)) for session, known in newest]
