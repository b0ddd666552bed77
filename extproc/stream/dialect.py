"""What two kinds of gateway expect of the same session: how a pick is written, and how a stream's bodies are told.

A session is given one of these and asks it; nothing else in this package knows which one it is. `ClusterHeader` is our
own Envoy configuration. `EndpointPicker` is the Endpoint Picker Protocol of Kubernetes' Inference Gateways
(gateway-api-inference-extension, docs/proposals/004): Istio, Envoy AI Gateway, agentgateway and others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final, Protocol

from extproc.admission.outcome import Outcome
from extproc.stream import bodies, wire
from extproc.stream.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.stream.wire import Incoming

_KINDS = {bodies.REQUEST: Kind.REQUEST_BODY, bodies.RESPONSE: Kind.RESPONSE_BODY}


class Modes:
    """How one stream's bodies are told, and answered; not to be changed.

    Attributes:
        sends_pieces: messages with bodies are to be answered unread.
        echoes: the kinds of body of which only what we send back goes on (FULL_DUPLEX_STREAMED).
        tells_end: the stream lasts as long as the answer.
        override: what is appended to a pick, to be told less.
        ask: the answer to a request's headers that has its whole body come before the pick; "": it can't be had so.
        holds_body: pieces of the request come before its headers were answered.
        tells_body: the request's body comes before the pick, or can: the model may be looked for there.
        shows_answer: all pieces of the answer come.
    """

    __slots__ = (
        "ask",
        "echoes",
        "holds_body",
        "override",
        "sends_pieces",
        "shows_answer",
        "tells_body",
        "tells_end",
    )

    def __init__(
        self,
        *,
        sends_pieces: bool = False,
        echoes: frozenset[int] = frozenset(),
        tells_end: bool = True,
        override: bytes = b"",
        ask: bytes = b"",
    ) -> None:
        """Make one that says this. What follows from it is worked out once, and not for each request."""
        self.sends_pieces = sends_pieces
        self.echoes = echoes
        self.tells_end = tells_end
        self.override = override
        self.ask = ask
        self.holds_body = bodies.REQUEST in echoes
        self.tells_body = self.holds_body or not tells_end or bool(ask)
        self.shows_answer = bodies.RESPONSE in echoes

    def answer(self, kind: int, piece: bytes) -> bytes:
        """Return the answer that lets a piece of a body go on."""
        return bodies.echo(kind, piece) if kind in self.echoes else wire.go_on(_KINDS[kind])


PLAIN: Final = Modes()


class Dialect(Protocol):
    """How one kind of gateway speaks."""

    picks: bool
    """The gateway tells more beside its headers: `wire.Reader`."""

    def steer(self, target: str) -> bytes:
        """Return the answer to a request's headers that sends it to `target`."""

    def modes(self, incoming: Incoming) -> Modes:
        """Return how a stream that begins so will tell its bodies."""

    def refusal_headers(self, outcome: Outcome) -> Mapping[str, str] | None:
        """Return what a refusal's headers say besides our own."""


@dataclass(frozen=True, slots=True)
class ClusterHeader:
    """Envoy as `extproc envoy-config` sets it up: routed by a header, and told no bodies."""

    header: str = "x-upstream-cluster"
    picks = False

    def steer(self, target: str) -> bytes:
        """Name a cluster."""
        return wire.steer(self.header, target)

    def modes(self, incoming: Incoming) -> Modes:  # noqa: ARG002
        """Answer whatever comes with "go on"."""
        return PLAIN

    def refusal_headers(self, outcome: Outcome) -> None:
        """Add nothing."""


@dataclass(frozen=True, slots=True)
class Told:
    """The headers in which gateways and their clients tell a picker what it should know.

    Envoy AI Gateway and the body-based router name the model; the rest is llm-d's, with its older names.
    """

    model: tuple[str, ...] = ("x-ai-eg-model", "x-gateway-model-name", "x-gateway-base-model-name")
    objective: tuple[str, ...] = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
    tenant: tuple[str, ...] = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
    ttl_ms: tuple[str, ...] = ("x-llm-d-inference-ttl", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")

    @property
    def drop(self) -> tuple[str, ...]:
        """Those that are meant for us alone: no engine sees them."""
        return (*self.objective, *self.tenant, *self.ttl_ms)


DROPPED = "x-llm-d-request-dropped-reason"
_REASONS = {
    Outcome.QUEUE_FULL: "rejected-saturated",
    Outcome.TENANT_LIMIT: "rejected-saturated",
    Outcome.BUDGET_PREDICTED: "rejected-saturated",
    Outcome.BUDGET_EXPIRED: "rejected-ttl-expired",
    Outcome.NO_ENDPOINT: "rejected-no-endpoints",
    Outcome.NONE_ALLOWED: "rejected-no-endpoints",
    Outcome.DRAINING: "rejected-shutting-down",
}
"""Why llm-d's router drops a request, in its words (llm-d-router, pkg/epp/flowcontrol)."""

_UNTOLD = Modes(sends_pieces=True, tells_end=False)


@dataclass(frozen=True, slots=True)
class EndpointPicker:
    """A gateway that asks an endpoint picker; which way it tells bodies is read from each stream's first message.

    Attributes:
        drop: headers of a request that are meant for the picker alone.
    """

    drop: tuple[str, ...] = Told().drop
    picks = True

    def steer(self, target: str) -> bytes:
        """Name an address."""
        return wire.pick(target, self.drop)

    def modes(self, incoming: Incoming) -> Modes:
        """Follow `protocol_config`; a gateway that does not send it is one that never tells of the end (NGINX's)."""
        return _UNTOLD if incoming.modes is None else _modes(*incoming.modes)

    def refusal_headers(self, outcome: Outcome) -> Mapping[str, str] | None:
        """Give llm-d's reason."""
        reason = _REASONS.get(outcome)
        return None if reason is None else {DROPPED: reason}


def _of(request: int, response: int) -> Modes:
    sent = {bodies.REQUEST: request, bodies.RESPONSE: response}
    echoes = frozenset(kind for kind, mode in sent.items() if mode == wire.FULL_DUPLEX)
    if request == response == wire.NO_BODY:
        return PLAIN
    # A mode can't be left from FULL_DUPLEX_STREAMED; and whether it may be from another, only Envoy's config knows.
    override = b"" if echoes else wire.LEAN
    ask = wire.ask_body(lean=not echoes) if request == wire.BUFFERED else b""
    return Modes(sends_pieces=True, echoes=echoes, override=override, ask=ask)


_ALL_MODES = {pair: _of(*pair) for pair in product(wire.BODY_MODES, repeat=2)}


def _modes(request: int, response: int) -> Modes:
    return _ALL_MODES.get((request, response), PLAIN)
