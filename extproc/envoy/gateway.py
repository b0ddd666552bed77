"""`extproc check --envoy` for `dialect: endpoint-picker`: what a gateway's Envoy does to requests that a picker holds.

Reads a config dump (`curl ADMIN/config_dump`, Istio: `istioctl proxy-config all -o json` has the same parts) or a
bootstrap. A control plane wrote it, so what is told is what the gateway does, and what would cut or lose requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extproc.envoy.view import (
    EXT_PROC,
    Spot,
    clusters_of,
    read_numbers,
    read_parts,
    targets,
    told_if_misshapen,
    what_else,
)
from extproc.errors import ConfigError
from extproc.stream.wire import PICK_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extproc.config import Config

_PER_ROUTE = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute"
FULL, BUFFERED, NONE = "FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"
DEFAULT_IDLE_S, DEFAULT_MESSAGE_S, DEFAULT_BREAKER = 300.0, 0.2, 1024


class Gateway:
    """What a dump says: `problems` cut or lose what is held, `notes` what it costs, and `good` what is as it should be."""

    def __init__(self, config: Config, path: Path) -> None:
        """Look at the dump at `path`. Raises ConfigError if it can't be read."""
        data, spots = read_parts(path)
        reason = what_else(data)
        if reason is not None:
            raise ConfigError(str(path), [f"is neither a config dump nor an Envoy bootstrap: {reason}"])
        wrong = read_numbers(spots)
        if wrong:
            raise ConfigError(str(path), wrong)
        self._longest_s = config.longest_budget_s
        self._reads_model = config.picker.read_model
        self._hands_over = config.hands_over
        self._says_hand_over = "hand_over is on" + ("" if config.hand_over else ", as it is where it is not set")
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.good: list[str] = []
        with told_if_misshapen(path):
            self._clusters = clusters_of(spots)
            self._managers = [spot for spot in spots if "http_filters" in spot.node]
            self._filters = {
                str(listed.get("name")): Spot(f"{listed.path}.typed_config", listed.get("typed_config") or {})
                for manager in self._managers
                for listed in manager.each("http_filters")
                if listed.get("typed_config", "@type") == EXT_PROC
            }
            self._routes = [
                way
                for spot in spots
                if "virtual_hosts" in spot.node
                for host in spot.each("virtual_hosts")
                for route in host.each("routes")
                for way in _ways(route)
            ]
            if not self._filters:
                self.problems.append("has no envoy.filters.http.ext_proc filter: no picker is asked at all")
            else:
                self._look()

    def _look(self) -> None:
        asked = [(route, how) for route in self._routes if (how := self._asks(route)) is not None]
        pools = {name for route, _ in asked for name in targets(route)} | set(self._picked_clusters())
        for route in self._routes:
            if self._asks(route) is None and (its := pools & set(targets(route))):
                self.problems.append(
                    f"{route.path}: goes to {', '.join(sorted(its))} and asks no picker: past the queue, so no limit holds "
                    "(Istio: CORS or fault injection on the route does that)"
                )
        if not asked:
            self.problems.append("no route asks a picker: the ext_proc filter skips request headers everywhere")
        found = [(problem, note) for route, how in asked for problem, note in self._judge(route, how)]
        found += [(problem, note) for manager in self._managers for problem, note in self._times(manager)]
        self.problems += dict.fromkeys(text for problem, text in found if problem)
        self.notes += dict.fromkeys(text for problem, text in found if not problem)
        lean = (route.path for route, how in asked if _body_modes(how) == [NONE, NONE])
        self.good += dict.fromkeys(f"{path}: lean: two messages a request" for path in lean)

    def _asks(self, route: Spot) -> Spot | None:
        """Return how a route asks a picker, the filter's settings with the route's own over them; None: it doesn't."""
        for name, base in self._filters.items():
            own = route.get("typed_per_filter_config", name) or {}
            if own.get("disabled"):
                continue
            overrides = own.get("overrides") or {} if own.get("@type", _PER_ROUTE) == _PER_ROUTE else {}
            settings = {**base.node, **overrides}
            if (settings.get("processing_mode") or {}).get("request_header_mode", "DEFAULT") != "SKIP":
                return Spot(base.path, settings)
        return None

    def _picked_clusters(self) -> Iterator[str]:
        for name, cluster in self._clusters.items():
            if PICK_HEADER in str(cluster.get("load_balancing_policy")) + str(cluster.get("original_dst_lb_config")):
                yield name

    def _judge(self, route: Spot, how: Spot) -> Iterator[tuple[bool, str]]:
        modes: dict[str, Any] = how.get("processing_mode") or {}
        bodies = _body_modes(how)
        where = route.path
        yield from self._judge_modes(where, how, bodies)
        if FULL not in bodies:
            timeout_s = how.seconds("message_timeout", DEFAULT_MESSAGE_S)
            if timeout_s <= self._longest_s:
                yield (
                    True,
                    (
                        f"{how.path}.message_timeout: {timeout_s:g}s is not above the longest budget, {self._longest_s:g}s: "
                        "held requests get 504"
                    ),
                )
            if modes.get("response_trailer_mode") != "SEND":
                yield (
                    True,
                    (
                        f"{how.path}.processing_mode.response_trailer_mode: not SEND: the stream ends as the answer begins, and "
                        "its slot is given away while the server works"
                    ),
                )
        for path, seconds in (
            (f"{where}.route.idle_timeout", _seconds(route, "route", "idle_timeout")),
            (
                f"{where}.route.max_stream_duration",
                _seconds(route, "route", "max_stream_duration", "max_stream_duration"),
            ),
        ):
            if seconds is not None and 0 < seconds <= self._longest_s:
                yield True, f"{path}: {seconds:g}s: held time counts against it, and a budget is {self._longest_s:g}s"
        yield from self._breaker(how)
        if self._hands_over:
            yield from self._judge_hand_over(how, bodies)

    def _judge_hand_over(self, how: Spot, bodies: list[str]) -> Iterator[tuple[bool, str]]:
        """Tell what is lost with a picker that leaves at SIGTERM what it holds, and what runs, to the next one."""
        right = "hand_over: false, and a drain_timeout as long as the longest answer, would be right"
        path, retry_on = f"{how.path}.grpc_service.retry_policy", how.get("grpc_service", "retry_policy", "retry_on")
        if "reset" not in str(retry_on):
            yield (
                False,
                (
                    f"{path}: {self._says_hand_over}, and this Envoy sends nothing again (no retry_on with reset): with each "
                    f"restart of the picker what waits there fails; {right}"
                ),
            )
        elif FULL in bodies or not how.get("failure_mode_allow"):
            why = "bodies pass through the picker" if FULL in bodies else "failure_mode_allow is off"
            yield (
                False,
                f"{how.path}: {self._says_hand_over}, and {why}: a restart of the picker cuts what runs; {right}",
            )

    def _judge_modes(self, where: str, how: Spot, bodies: list[str]) -> Iterator[tuple[bool, str]]:
        request, answer = bodies
        if self._reads_model and request not in (FULL, BUFFERED):
            text = f"{where}: request_body_mode is {request}: no body comes before our pick, so picker.read_model finds no model"
            yield False, f"{text}; a header must name it, or BUFFERED would be right"
        if FULL in bodies:
            yield False, f"{where}: full duplex: each piece of a body comes through us, and costs CPU for each token"
            if how.get("failure_mode_allow"):
                yield False, f"{where}: failure_mode_allow holds for requests without a body alone: full duplex"
        elif bodies == [NONE, NONE]:
            return
        elif how.get("allow_mode_override") and not self._reads_model:
            yield False, f"{where}: {request} until we answer, then lean; a body above the listener's buffer gets 413"
        elif answer == NONE or how.get("allow_mode_override"):
            text = f"{where}: {request}: each request's body comes in one message, and nothing of its answer"
            yield False, f"{text}; a body above the listener's buffer gets 413"
        else:
            text = f"{where}: bodies are {request}, {answer} and allow_mode_override is off: answers come in one piece, not streamed"
            yield True, f"{text}; allow_mode_override: true would be right"

    def _breaker(self, how: Spot) -> Iterator[tuple[bool, str]]:
        cluster = self._clusters.get(str(how.get("grpc_service", "envoy_grpc", "cluster_name")))
        if cluster is not None:
            most = ((cluster.get("circuit_breakers", "thresholds") or [{}])[0]).get("max_requests", DEFAULT_BREAKER)
            if most <= DEFAULT_BREAKER:
                yield False, f"{cluster.path}: what is held and what runs together is {most} at most: the next gets 500"

    def _times(self, manager: Spot) -> Iterator[tuple[bool, str]]:
        if not any(listed.get("name") in self._filters for listed in manager.each("http_filters")):
            return
        for key, default in (("stream_idle_timeout", DEFAULT_IDLE_S), ("request_timeout", 0.0)):
            seconds = manager.seconds(key, default)
            if 0 < seconds <= self._longest_s:
                yield (
                    True,
                    (
                        f"{manager.path}.{key}: {seconds:g}s: held time counts against it, and a budget is {self._longest_s:g}s"
                    ),
                )


def _body_modes(how: Spot) -> list[str]:
    """Return how the bodies of requests and of answers come."""
    modes: dict[str, Any] = how.get("processing_mode") or {}
    return [modes.get(f"{side}_body_mode", NONE) for side in ("request", "response")]


def _ways(route: Spot) -> Iterator[Spot]:
    """Walk a route's ways: itself, or one for each of its weighted clusters, whose own settings go before the route's."""
    weighted = route.each("route", "weighted_clusters", "clusters")
    if not weighted:
        yield route
    for one in weighted:
        action = {**route.node["route"], "cluster": one.get("name")}
        del action["weighted_clusters"]
        own = {**(route.get("typed_per_filter_config") or {}), **(one.get("typed_per_filter_config") or {})}
        yield Spot(one.path, {**route.node, "route": action, "typed_per_filter_config": own})


def _seconds(spot: Spot, *keys: str) -> float | None:
    *above, last = keys
    node = spot.get(*above)
    return Spot("", node).seconds(last, -1.0) if isinstance(node, dict) and last in node else None
