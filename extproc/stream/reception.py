"""What all streams share: how a request is read, whom to ask, and the answers that are the same for every request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from extproc.admission.outcome import Outcome
from extproc.admission.refusals import OF_ENVOY, words_of
from extproc.admission.ticket import Ticket
from extproc.admission.values import TELLS_NOTHING, UNREACHED, Answer
from extproc.stream import wire
from extproc.stream.again import Again
from extproc.stream.answer import is_grpc
from extproc.stream.bodies import Allowance
from extproc.stream.dialect import ClusterHeader
from extproc.stream.request import BINARY_REPORT, REPORT, Requests
from extproc.stream.routes import Action, Routes, Shape
from extproc.stream.silence import MOST_READING, READING_S, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load
    from extproc.admission.values import Decision
    from extproc.stream.ages import Ages
    from extproc.stream.dialect import Dialect, Modes
    from extproc.stream.gate import Gate
    from extproc.stream.request import Headers
    from extproc.stream.session import Session
    from extproc.stream.wire import Incoming

log = logging.getLogger("extproc.session")

UPGRADE: Final = "UPGRADE"
"""Stands for the method of requests that ask for another protocol, in the table of routes."""
OVERFLOWS = frozenset(
    (Outcome.QUEUE_FULL, Outcome.BUDGET_PREDICTED, Outcome.BUDGET_EXPIRED, Outcome.NO_ENDPOINT, Outcome.DRAINING)
)
"""Refusals for want of room. What the client itself would have to change is refused wherever it is sent."""
FAILINGS = (Answer.FAILED, Answer.BROKE_OFF, Answer.ERROR)
"""The usual bad answers that are an endpoint's doing: counted from 0, so that Prometheus sees the first one come."""
SAID_AGAIN_S = 60.0
"""So often that it is said."""
MOST_SUBSETS = 1000
"""Lists of allowed addresses that are kept as read."""
LIST_S = 1.0
"""How long the list of all models is kept."""
KEPT_BY_ALL_BYTES = 64 << 20
"""What all held requests together keep: beyond it each keeps KEPT_BYTES, and whoever leaves untold is not seen."""


class Reception:
    """What all sessions share: how to read, whom to ask, and the answers that are the same for every request."""

    def __init__(
        self,
        gate: Gate,
        headers: Headers,
        ages: Ages,
        fields_namespace: str = "",
        class_priorities: Callable[[], Mapping[int, str]] = dict,
        read_report: Callable[[str, str], Load | None] = lambda _endpoint, _value: None,
        *,
        routes: Routes | None = None,
        default_model: str | None = None,
        server_timing: bool = False,
        dialect: Dialect | None = None,
        read_model: bool = False,
        picks_without_end: bool = False,
        finished: Callable[[Ticket, Answer], None] | None = None,
        second_try: str = "",
        unreached: Callable[[str], None] = lambda _endpoint: None,
    ) -> None:
        """Sit between the streams and `gate`.

        `fields_namespace`: where Envoy puts fields of the body, if it does; `class_priorities`: classes by priority;
        `read_report`: reads the report of its load that an endpoint sent;
        `routes`: which requests are queued; `default_model`: of requests that name none;
        `server_timing`: tell clients how long they waited;
        `finished`: is told of each request that was sent to an endpoint and is over;
        `dialect`: how the gateway speaks; by default as our own Envoy configuration has it;
        `read_model`: look for the model in a body, where no header names it and the gateway sends bodies;
        `unreached`: is told of an endpoint that a request found no connection to;
        `second_try`: the address by which a request comes back that could not be connected to its server;
        `picks_without_end`: choose an endpoint also for gateways that never tell of the end: no limit counts that.
        """
        self.dialect = dialect or ClusterHeader(headers.cluster)
        self.again = Again(second_try)
        self._overflow: dict[str, tuple[str, bytes]] = {}  # class -> cluster of last resort, and how to steer there
        self.overflowed: dict[str, int] = {}  # how many went there, by class
        self.bad_answers: dict[str, dict[Answer, int]] = {}  # by endpoint, of those that are there
        self._said: dict[tuple[str, Answer], float] = {}  # what Envoy did to requests of an endpoint, and when told
        self.read_model = read_model
        self._reads_fields = bool(fields_namespace)
        self.picks_without_end = picks_without_end
        self._has_refused_gateway = self._has_missed_body = False
        self.gate = gate
        self.is_probed = gate.controller.policy.first_byte_probe
        self.running: dict[int, Session] = {}  # by our own number, for the first-byte probe alone
        self.has_shown = False  # that probe is there: before, heads are believed
        self.dispatched = 0
        self._read_report = read_report
        self._unreached = unreached
        self.requests = Requests(headers, ages, class_priorities, default_model)
        where = f"a header ({headers.model[0]})"
        if fields_namespace or (self.dialect.picks and read_model):
            where = f'the body\'s "model" (JSON, by its content-type, not compressed), or in {where}'
        self.how_to_name_a_model = f"Several models are served here: name the one meant in {where}."
        self.routes = routes or Routes()
        self._listed: tuple[float, frozenset[str]] = (-LIST_S, frozenset())  # when, and all models
        self.named_models: frozenset[str] = frozenset()  # by the configuration, whoever serves them at the moment
        self.reader = wire.Reader(headers.wanted(), fields_namespace, picks=self.dialect.picks)
        self.streams = 0
        self.told_models = 0  # requests for the list of models, which are answered here
        self.silence: Silence[Session] = Silence(gate, lambda session: session.give_in())
        self.reading: Silence[Session] = Silence(gate, lambda session: session.read_no_more(), READING_S, MOST_READING)
        self.refused = 0  # those of them that were refused: Envoy has not ended them yet
        self.server_timing = server_timing
        self.finished = finished
        self._clusters: dict[str, str] = {}  # endpoint -> cluster
        self._endpoints: dict[str, str] = {}  # cluster -> endpoint
        self._steers: dict[str, bytes] = {}
        self._subsets: dict[tuple[str, ...], frozenset[str]] = {}
        self.kept = Allowance(KEPT_BY_ALL_BYTES)

    def drain(self) -> None:
        """Refuse what waits, for a slot or for its body, and what would have to.

        Whose body a gateway was asked for whole is decided when it comes: served if there is room, else refused too.
        """
        self.gate.drain()
        self.reading.end_all()

    def put_cluster(self, endpoint: str, cluster: str) -> None:
        """Note which Envoy cluster an endpoint is, from now on."""
        self.drop_cluster(endpoint)
        self._subsets.clear()
        self._clusters[endpoint] = cluster
        self._endpoints[cluster] = endpoint
        self._steers[endpoint] = self.dialect.steer(cluster)
        self.bad_answers.setdefault(endpoint, dict.fromkeys(FAILINGS, 0))

    def drop_cluster(self, endpoint: str) -> None:
        """Forget an endpoint that no request can be sent to any more. Unknown: no-op."""
        cluster = self._clusters.pop(endpoint, None)
        self.bad_answers.pop(endpoint, None)
        for answer in OF_ENVOY:
            self._said.pop((endpoint, answer), None)
        if cluster is not None:
            del self._steers[endpoint]
            if self._endpoints.get(cluster) == endpoint:
                del self._endpoints[cluster]

    def count_bad(self, ticket: Ticket, answer: Answer) -> None:
        """Count that a request got no good answer of its endpoint. Nobody knows, or that is gone: no-op."""
        counts = None if ticket.endpoint is None else self.bad_answers.get(ticket.endpoint.name)
        if counts is not None and answer not in TELLS_NOTHING:
            counts[answer] = counts.get(answer, 0) + 1
        if answer in UNREACHED and ticket.endpoint is not None:
            self._unreached(ticket.endpoint.name)

    def look_at_failure(self, ticket: Ticket, answer: Answer) -> None:
        """Say now and then what Envoy's configuration may be to blame for, if it is for this `answer`."""
        endpoint = ticket.endpoint
        if answer not in OF_ENVOY or endpoint is None or endpoint.name not in self._clusters:
            return
        now = self.gate.now()
        said_at = self._said.get((endpoint.name, answer))
        if said_at is None or now - said_at >= SAID_AGAIN_S:
            self._said[endpoint.name, answer] = now
            log.warning("endpoint %s: %s: %s", endpoint.name, answer.value, words_of(answer, endpoint.spec))

    def set_overflow(self, clusters: Mapping[str, str]) -> None:
        """Note to which cluster requests of a class go instead of a refusal for want of room, by class."""
        self._overflow = {name: (cluster, self.dialect.steer(cluster)) for name, cluster in clusters.items()}

    def overflow(self, decision: Decision) -> tuple[str, bytes] | None:
        """Return where a refused request goes instead, and the answer that sends it there; None: it is refused."""
        if decision.outcome not in OVERFLOWS:
            return None
        return self._overflow.get(decision.ticket.request_class.name)

    def ticket_for(self, incoming: Incoming, deliver: Callable[[Decision], None]) -> Ticket:
        """Return a new ticket for the request that `incoming` begins."""
        request = self.requests.read(incoming, self.gate.now(), self._endpoints)
        if incoming.subset is not None:
            request.allowed = self._allowed(incoming.subset)
        return Ticket(request, deliver)

    def _allowed(self, subset: tuple[str, ...]) -> frozenset[str]:
        """Return the endpoints at these addresses; one without a port means all ports there."""
        found = self._subsets.get(subset)
        if found is None:
            wanted = frozenset(subset)
            found = frozenset(
                endpoint
                for address, endpoint in self._endpoints.items()
                if address in wanted or address.rpartition(":")[0] in wanted
            )
            if len(self._subsets) >= MOST_SUBSETS:
                self._subsets.clear()
            self._subsets[subset] = found
        return found

    def follow(self, ticket: Ticket, served: str) -> None:
        """Have a lease be where the gateway says that the answer came from, and nothing be reserved elsewhere."""
        endpoint = self._endpoints.get(served, "")
        if ticket.endpoint is not None and (ticket.endpoint.name != endpoint or ticket.choices):
            self.gate.move(ticket, endpoint)

    def kind_of(self, headers: Mapping[str, str]) -> tuple[Action, Shape]:
        """Return what becomes of a request with these headers, and the shape that its errors have."""
        method = headers.get(":method", "")
        if "upgrade" in headers:  # a WebSocket begins as a GET, and takes tokens for as long as it is open
            method = UPGRADE
        found = self.routes.find(method, headers.get(":path", ""))
        return (found[0], Shape.GRPC) if is_grpc(headers.get("content-type", "")) else found

    def models(self) -> frozenset[str]:
        """Return all models served here, also those that have no endpoint at the moment: a request for one waits.

        None where an endpoint lists none, because nobody knows what it has.
        """
        now = self.gate.now()
        at, models = self._listed
        if now - at >= LIST_S:
            lists = [one.spec.models for one in self.gate.controller.endpoints.values() if not one.removed]
            models = self.named_models.union(*lists) if all(lists) else frozenset()
            self._listed = now, models
        return models

    def steer(self, endpoint: str, choices: tuple[Endpoint, ...] = ()) -> bytes:
        """Return the answer that sends a request to `endpoint`, or to its next `choices` if it has such."""
        if not choices:
            return self._steers[endpoint]
        names = (endpoint, *(one.name for one in choices if one.name in self._clusters))
        return self.dialect.steer(",".join(self._clusters[name] for name in names))

    def reads_body(self, incoming: Incoming, modes: Modes) -> bool:
        """Tell whether the model is to be looked for in a request's body: nothing else names it, and the body comes.

        Asked where `read_model` is set.
        """
        if not incoming.has_body or self.gate.controller.draining:
            return False
        if "model" in incoming.fields or any(incoming.headers.get(name) for name in self.requests.names.model):
            return False
        if not (modes.tells_body or self._reads_fields or self._has_missed_body):
            self._has_missed_body = True
            log.warning(
                "picker.read_model: a gateway sends no body before it has our pick (its request_body_mode is neither "
                "FULL_DUPLEX_STREAMED nor BUFFERED): no model is read there; let a header name it"
            )
        return modes.tells_body

    def refuse_gateway(self) -> None:
        """Say once that a gateway is refused because it never tells when an answer ends."""
        if not self._has_refused_gateway:
            self._has_refused_gateway = True
            log.error(
                "a gateway asks for endpoints and never tells when an answer ends (no protocol_config, as NGINX's): no "
                "limit could be kept, so its requests get 503; with `without_end: pick` they go uncounted"
            )

    def take_report(self, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Pass on what the headers of an answer say of the load of its endpoint, the one that `ticket` was sent to.

        One of the two headers must be there.
        """
        value = headers.get(REPORT)
        if value is None:
            value = f"BIN {headers[BINARY_REPORT]}"
        if ticket.endpoint is not None:
            load = self._read_report(ticket.endpoint.name, value)
            if load is not None:
                self.gate.report(ticket, load)
