"""Which endpoint is much slower than its peers: one that answers well, and late, fails no check and no request.

Each is held against the median of the others that serve the same models. By its time per output token, where pages tell
of tokens; else by how long its answers take, by our own books: requests in flight x seconds, over answers that came
whole (Little's law). That one is a hint for people and no metric: one client's long sessions, at home at one of equal
engines, look the same. Both are read when somebody looks, or every few seconds, nothing on the way of a request.

One that hangs is not slow: it takes requests, passes its checks, and writes nothing. That is told apart.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily

from extproc.observe.endpoints import serves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint

SEVERAL: Final = 3.0
"""So many times as slow as its peers is told in words: engines of one pool may well differ by less."""
WINDOW_S: Final = 120.0
"""How long answers take is a mean of so long."""
STEP_S: Final = 10.0
SILENT_S: Final = 30.0
"""Who runs requests and writes no token for so long is told to people: a long prompt alone takes some seconds."""
LEAST_ANSWERS: Final = 5
"""Fewer say nothing: one of them may just be long."""


class _Mark(NamedTuple):
    """Where an endpoint's books stood."""

    at: float
    held_s: float
    answered: int


class _Book:
    """Requests x seconds that an endpoint held since the first look, and marks of them in the last minutes.

    Beside them the tokens that it was seen to have written, and when it last wrote, had nothing to write, or told
    nothing.
    """

    __slots__ = ("at", "held_s", "marks", "written", "wrote_at")

    def __init__(self, now: float, answered: int) -> None:
        self.at, self.held_s = now, 0.0
        self.written, self.wrote_at = 0, now
        self.marks = deque([_Mark(now, 0.0, answered)])

    def look(self, endpoint: Endpoint, now: float) -> None:
        self.held_s += len(endpoint.leases) * (now - self.at)
        self.at = now
        if endpoint.written != self.written or not endpoint.leases or not _shows_no_life(endpoint):
            self.written, self.wrote_at = endpoint.written, now
        marks = self.marks
        if now - marks[-1].at >= STEP_S:
            marks.append(_Mark(now, self.held_s, endpoint.answered))
        while len(marks) > 1 and marks[1].at <= now - WINDOW_S:
            marks.popleft()

    def answer_s(self, endpoint: Endpoint) -> float | None:
        """Return how long answers took; None: too few to tell."""
        first = self.marks[0]
        held_s, answered = self.held_s - first.held_s, endpoint.answered - first.answered
        return held_s / answered if held_s and answered >= LEAST_ANSWERS else None


class Paces:
    """A collector for a Prometheus registry. `sample` is to be called every few seconds."""

    def __init__(self, controller: Controller, decides: Callable[[], bool] = lambda: True) -> None:
        """Compare the endpoints of `controller`. `decides`: it does, and no other sidecar's."""
        self._controller = controller
        self._decides = decides
        self._books: dict[str, _Book] = {}

    def sample(self, now: float) -> None:
        """Note what each endpoint holds."""
        before, self._books = self._books, {}
        for name, endpoint in self._controller.endpoints.items():
            book = self._books[name] = before.get(name) or _Book(now, endpoint.answered)
            book.look(endpoint, now)

    def slowness(self) -> dict[str, float]:
        """Return how many times as long as its peers' median each endpoint takes; nothing of who has nothing to do."""
        slow = self._against_peers(self._answer_s) | self.by_tokens()  # tokens tell more: they win
        silent = self.silent()
        return {name: ratio for name, ratio in slow.items() if silent.get(name, 0.0) < SILENT_S}

    def by_tokens(self) -> dict[str, float]:
        """Return the same of those whose pages tell of tokens, by their time per token alone."""
        return self._against_peers(_token_s)

    def silent(self) -> dict[str, float]:
        """Return for how long each endpoint that runs requests has written no token, as its page tells, in seconds.

        Or has shown no life at all, where it is down and its page can't be read: a dead server has ended what
        it ran, and one that hangs has not.
        """
        found = {}
        for name, endpoint in self._controller.endpoints.items() if self._decides() else ():
            book = self._books.get(name)
            if book is not None and endpoint.leases and _tells(endpoint):
                found[name] = book.at - book.wrote_at
        return found

    def _answer_s(self, endpoint: Endpoint) -> float | None:
        book = self._books.get(endpoint.name)
        return None if book is None else book.answer_s(endpoint)

    def _against_peers(self, time_s: Callable[[Endpoint], float | None]) -> dict[str, float]:
        """Hold the `time_s` of each endpoint against that of the others that serve the same models."""
        times: dict[frozenset[str], dict[str, float]] = {}
        for name, endpoint in self._controller.endpoints.items() if self._decides() else ():
            its = time_s(endpoint) if serves(endpoint) else None
            if its is not None:
                times.setdefault(endpoint.spec.models, {})[name] = its
        return {name: ratio for peers in times.values() for name, ratio in _against_others(peers)}

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families: prometheus_client asks."""
        slow = GaugeMetricFamily(
            "extproc_endpoint_slowness_ratio",
            "How many times as long an output token takes at an endpoint as at the median of the others that serve the "
            "same models. Absent while it, or all others, have nothing to do, and where its page tells no tokens.",
            labels=["endpoint"],
        )
        for name, ratio in self.by_tokens().items():
            slow.add_metric([name], ratio)
        silent = GaugeMetricFamily(
            "extproc_endpoint_silent_seconds",
            "For how long an endpoint that runs requests has written no token: one that hangs may pass its checks. Of "
            "one that is down and whose page can't be read: for how long it has shown no life. Absent while it runs "
            "none, and where its page does not tell how many it writes a second.",
            labels=["endpoint"],
        )
        for name, silent_s in self.silent().items():
            silent.add_metric([name], silent_s)
        yield from (slow, silent)


def _token_rate(endpoint: Endpoint) -> float | None:
    """Return how many tokens a second it writes by its page; None: it does not tell, or only when an answer ends, or
    never wrote any, as one that makes embeddings."""
    page = endpoint.reading.page
    return page.tokens_per_s if page is not None and endpoint.written else None


def _is_lost(endpoint: Endpoint) -> bool:
    """Tell whether it is down and nothing can be read of it."""
    return endpoint.reading.page is None and endpoint.health.is_up is False


def _tells(endpoint: Endpoint) -> bool:
    """Tell whether one that writes nothing shows it."""
    return _token_rate(endpoint) is not None or _is_lost(endpoint)


def _shows_no_life(endpoint: Endpoint) -> bool:
    return _token_rate(endpoint) == 0.0 or _is_lost(endpoint)


def _token_s(endpoint: Endpoint) -> float | None:
    return endpoint.steps.busy_tpot_s if endpoint.reading.page is not None and endpoint.leases else None


def _against_others(times_s: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Return each time over the median of all others; nothing of one that is alone."""
    order = sorted((time_s, name) for name, time_s in times_s.items())
    others = len(order) - 1
    for place, (time_s, name) in enumerate(order if others else ()):

        def other(index: int, place: int = place) -> float:
            return order[index if index < place else index + 1][0]

        yield name, time_s / ((other((others - 1) // 2) + other(others // 2)) / 2)
