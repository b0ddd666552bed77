"""The nouns of admission: what goes in (requests, endpoints, policy) and what comes out (decisions).

Values only. Times are seconds on the driver's monotonic clock, tokens are whole numbers, shares are 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from extproc.admission.decision import Decision, Dispatch, Reject
from extproc.admission.laws import LAWS, Laws
from extproc.admission.limit import DEFAULT_LAW, LimitLaw
from extproc.admission.tenants import NO_RULES, TenantRules

__all__ = [
    "DEFAULT_CLASS",
    "TELLS_NOTHING",
    "UNREACHED",
    "UNSIZED",
    "Answer",
    "Binding",
    "Decision",
    "Dispatch",
    "EndpointSpec",
    "Policy",
    "Reject",
    "Request",
    "RequestClass",
]

UNSIZED: Final = "unsized"
"""The kind of a body whose size nobody announced ..."""
JSON: Final = ""
FORM: Final = "form"
OTHER: Final = "other"
"""... and of others: text, and what may stand in it as base64; files as they are; anything else."""


@dataclass(slots=True, init=False)
class Request:
    """What the headers of one HTTP request say. Nothing here is trusted: a name that the config lacks is ignored.

    Attributes:
        id: Envoy's request id, for people; two requests may carry the same.
        arrived: when Envoy received it; earlier than the offer after a replay, so that its age survives a restart.
        model: model name, or None when the request names none (any endpoint may serve it).
        request_class: name of a class; an unknown one counts as the first class of the policy.
        tenant: whom to be fair to.
        session: requests of one session prefer the endpoint that served the last one.
        home: name of the endpoint that the client side asked for.
        budget_s: the longest it may wait; its class's budget is the most.
        prompt_tokens: estimate of its prompt's tokens.
        max_output_tokens: the most tokens it allows in the answer, if it says so.
        sequences: how many sequences it is for the engine: answers asked for, times prompts.
        kind: what its body is, for estimates: bodies of one kind and size have prompts of about one length.
        operation: what is asked for in OpenTelemetry's words, like `chat`; "": something else. For those who watch.
        trace: its W3C traceparent, for those who trace; like `id`, nothing is decided by it.
        allowed: names of the only endpoints that it may go to; None: any.
    """

    id: str
    arrived: float
    model: str | None
    request_class: str
    tenant: str
    session: str | None
    home: str | None
    budget_s: float | None
    prompt_tokens: int
    max_output_tokens: int | None
    sequences: int
    kind: str
    trace: str
    operation: str
    allowed: frozenset[str] | None

    def __init__(
        self,
        id: str,  # noqa: A002 - its attribute's name
        arrived: float,
        model: str | None = None,
        request_class: str = "",
        tenant: str = "",
        session: str | None = None,
        home: str | None = None,
        budget_s: float | None = None,
        prompt_tokens: int = 0,
        max_output_tokens: int | None = None,
        sequences: int = 1,
        kind: str = "",
        trace: str = "",
        operation: str = "",
        allowed: frozenset[str] | None = None,
    ) -> None:
        """Say this. Written out: where the rest is compiled, what dataclass makes of it is interpreted."""
        self.id = id
        self.arrived = arrived
        self.model = model
        self.request_class = request_class
        self.tenant = tenant
        self.session = session
        self.home = home
        self.budget_s = budget_s
        self.prompt_tokens = prompt_tokens
        self.max_output_tokens = max_output_tokens
        self.sequences = sequences
        self.kind = kind
        self.trace = trace
        self.operation = operation
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class RequestClass:
    """A service class. Strict priority between classes: the higher `priority` goes first.

    Those of one priority that have a `weight` share what is served as their weights; without one they are one line.
    """

    name: str = "default"
    priority: int = 0
    budget_s: float = 30.0
    weight: float | None = None


DEFAULT_CLASS: Final = RequestClass()


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """What the config or a discovery source says of one inference server.

    Attributes:
        name: key in all books, label of metrics, and Envoy cluster unless `cluster` says otherwise.
        models: model names it serves; empty = any.
        max_running_requests: the most requests at once; None: adaptive.
        kv_capacity_tokens: size of its KV cache; None: what telemetry says, and no limit while that is unknown.
        awaits_check: nothing is known of it, and it is down until its health check says otherwise.
        address: where it is: whoever comes to an address counts what runs there by another name. Empty: unknown.
    """

    name: str
    cluster: str = ""
    models: frozenset[str] = frozenset()
    max_running_requests: int | None = None
    kv_capacity_tokens: int | None = None
    awaits_check: bool = False
    address: str = ""


class Binding(Enum):
    """When a request is bound to an endpoint. BOUND, a home for every request on arrival, is the original design."""

    LATE = "late"
    BOUND = "bound"


class Answer(Enum):
    """What an answer says about the endpoint. Whether a refusal is its fault, others' answers tell: see health.py."""

    OK = "ok"
    FAILED = "failed"  # no connection, or nobody says more
    BROKE_OFF = "broke_off"  # cut before it answered: it may have died, or the request may be poison
    ERROR = "error"  # the engine itself answered 5xx: it may be down, or the request may be poison
    REFUSED = "refused"  # 4xx: the request may be wrong, or the engine lacks the model
    EMPTY = "empty"  # success, it says, and not a byte
    SATURATED = "saturated"  # the engine refused it as full, or as not ready yet
    NO_CLUSTER = "no_cluster"  # Envoy has no cluster of its name, so no request gets there
    NO_ADDRESS = "no_server_address"  # Envoy has one, and no address in it that it would send to
    BREAKER = "breaker_open"  # Envoy let no more through to it: its circuit breaker
    DROPPED = "dropped"  # Envoy let it not through, however many run: its operator wants none, or fewer
    TIMEOUT = "timeout"  # Envoy ended it before an answer began
    UNKNOWN = "unknown"  # the client left, or nobody saw
    UNASKED = "unasked"  # a filter or a route of Envoy's answered in its place, so it was not asked


FULL_CACHE: Final = 0.95
"""The share of a KV cache in use from which an endpoint gets nothing more, if nobody chose another."""
UNREACHED: Final = (Answer.FAILED, Answer.BROKE_OFF)
"""There may be no server any more."""
TELLS_NOTHING: Final = (Answer.UNASKED, Answer.UNKNOWN)
"""Of the endpoint, neither good nor bad."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of admission. Reloading replaces it whole.

    Attributes:
        enable_queue: False: endpoints are chosen and leases kept, nothing is ever held or refused for load.
        classes: at least one; the first is the default.
        tenants: who tenants are, and what each may have in flight.
        no_endpoint_budget_s: how long a request may wait while nobody is up who serves it; its class's budget then
            begins when somebody is. None: that budget holds for this wait too.
        patience_s: how long a request waits for its home before any endpoint of the pool may take it.
        max_queued_requests: over it, the last request of the lowest class is pushed out.
        shed: refuse at once what would wait longer than its budget. Off, it waits its budget out.
        fair: fair shares between the tenants of a class. Off, arrival alone decides.
        short_first: inside a class, short prompts first; long ones wait longest. Instead of fairness.
        session_affinity: a session's requests are at home where its last one went.
        adapter_affinity: a request goes where its LoRA adapter is loaded, before emptier endpoints.
        max_prompt_tokens: the most prompt tokens sent to an endpoint whose first token has not come; None: as many as
            the engine's measured pace allows.
        max_kv_usage: share of the KV cache in use from which an endpoint gets nothing more.
        max_gpu_usage: the same for GPU utilization; None: not looked at (it is near 1 at any load).
        limit_law: the constants of adaptive limits.
        laws: the constants of what is learned of engines beside that.
        stale_after_s: telemetry older than this is ignored.
        first_byte_probe: something calls `first_token`.
        session_memory: how many sessions' endpoints are remembered.
        next_choices: how many other endpoints a request gets with its own, for whom that takes no connection: room
            at each is kept until it is told who answers.
    """

    enable_queue: bool = True
    classes: tuple[RequestClass, ...] = (DEFAULT_CLASS,)
    tenants: TenantRules = NO_RULES
    no_endpoint_budget_s: float | None = None
    patience_s: float = 1.0
    binding: Binding = Binding.LATE
    max_queued_requests: int = 10_000
    shed: bool = True
    fair: bool = True
    short_first: bool = False
    session_affinity: bool = True
    adapter_affinity: bool = True
    max_prompt_tokens: int | None = None
    max_kv_usage: float = FULL_CACHE
    max_gpu_usage: float | None = None
    limit_law: LimitLaw = DEFAULT_LAW
    laws: Laws = LAWS
    stale_after_s: float = 10.0
    first_byte_probe: bool = False
    session_memory: int = 100_000
    next_choices: int = 0
