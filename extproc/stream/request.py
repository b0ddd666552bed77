"""What a request says of itself: its headers, and the fields that Envoy read from its body, become a `Request`.

Nothing that a client wrote is believed further than the config goes: odd values are ignored, long ones cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from extproc.admission.values import FORM, JSON, OTHER, UNSIZED, Request
from extproc.durations import parse_duration
from extproc.stream.answer import GRPC_STATUS
from extproc.stream.wire import AGAIN, PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from extproc.stream.ages import Ages
    from extproc.stream.wire import Incoming

BYTES_PER_TOKEN: Final = 4
"""English prose in common tokenizers. Ordering by it did as well in simulation as ordering by the true lengths."""
UNKNOWN_PROMPT_TOKENS: Final = 512
"""For a body that comes without a content-length."""
MAX_TOKENS: Final = 1_000_000
MAX_SEQUENCES = 128
"""Answers to one prompt, at most: what OpenAI's API allows as `n`."""
MAX_NAME: Final = 256
"""Characters of a client's name for something that we keep."""
WHAT = (":method", ":path", "upgrade", "content-type")
"""Headers that tell what kind of request it is."""
OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What a path asks for, by OpenTelemetry's conventions for generative AI (`gen_ai.operation.name`)."""
REPORT: Final = "endpoint-load-metrics"
BINARY_REPORT: Final = "endpoint-load-metrics-bin"
"""Response headers in which an endpoint may tell its load (ORCA): with its form in front; base64 of a protobuf."""


@dataclass(frozen=True, slots=True)
class Headers:
    """Which request header carries what; all lower case. Where there are several, the first that a request has counts.

    Attributes:
        cluster: the one we write.
        names_home: what a request has there already is the endpoint that it would like.
        trace: W3C trace context, if it has a name.
        objective: names of classes beside `request_class`, as a gateway's API has them.
        ttl_ms: budgets in whole milliseconds.
        again: a request that comes back carries its key.
    """

    model: tuple[str, ...] = ("x-model",)
    request_class: str = "x-request-class"
    tenant: tuple[str, ...] = ("x-tenant-id",)
    session: tuple[str, ...] = ("x-session-id", "x-session-affinity")
    budget: str = "x-queue-budget"
    cluster: str = "x-upstream-cluster"
    trace: str = ""
    names_home: bool = True
    objective: tuple[str, ...] = ()
    ttl_ms: tuple[str, ...] = ()
    again: bool = False

    def wanted(self) -> frozenset[str]:
        """Return all headers that a session reads."""
        names = (*self.model, self.request_class, *self.tenant, *self.session, self.budget, *self.objective)
        names = (*names, *self.ttl_ms, *((self.cluster,) if self.names_home else ()))
        if self.trace:
            names = (*names, self.trace)
        if self.again:
            names = (*names, AGAIN)
        ours = (":status", "content-length", GRPC_STATUS, "x-request-id")
        return frozenset((*names, *ours, *WHAT, REPORT, BINARY_REPORT))


class Requests:
    """Reads requests, and counts what told nothing."""

    def __init__(
        self,
        names: Headers,
        ages: Ages,
        class_priorities: Callable[[], Mapping[int, str]] = dict,
        default_model: str | None = None,
    ) -> None:
        """Read headers of these `names`; `class_priorities`: classes by priority; `default_model`: if none is named."""
        self.names = names
        self.default_model = default_model
        self.class_of_objective: Callable[[str], str] = _itself  # the class that an objective's name means
        self.ignored = {"budget": 0, "cluster": 0}  # header values that told nothing
        self._ages = ages
        self._class_priorities = class_priorities

    def read(self, incoming: Incoming, now: float, endpoints: Mapping[str, str]) -> Request:
        """Read a request that is here at `now`; `endpoints`: by their Envoy clusters. Headers win over fields."""
        names, headers, fields = self.names, incoming.headers, incoming.fields
        path = headers.get(":path", "")
        request = Request(
            (headers.get("x-request-id") or incoming.attributes.get("request.id", ""))[:MAX_NAME],
            now - self._ages.age_s(incoming.attributes.get("request.time")) if self._ages.wants_stamp() else now,
        )
        if fields:
            _read_fields(request, fields)
        request.model = _first(headers, names.model) or request.model or self.default_model
        request.tenant = _first(headers, names.tenant) or request.tenant
        request.session = _first(headers, names.session) or request.session
        cluster = headers.get(names.cluster)
        if cluster:
            request.home = endpoints.get(cluster)
            self.ignored["cluster"] += request.home is None
        request_class = headers.get(names.request_class)
        if not request_class and (fields or names.objective):
            request_class = self._class_of(headers, fields)
        if request_class:
            request.request_class = request_class[:MAX_NAME]
        if names.budget in headers or names.ttl_ms:
            request.budget_s = self._budget_s(headers)
        _read_size(request, headers, has_body=incoming.has_body)
        if names.trace:
            request.trace = headers.get(names.trace, "")[:MAX_NAME]
        request.operation = OPERATIONS.get(path) or OPERATIONS.get(path.partition("?")[0], "")
        return request

    def _budget_s(self, headers: Mapping[str, str]) -> float | None:
        """Return how long a request says that it may wait, by the shortest of what it says."""
        names, budget_s = self.names, None
        budget = headers.get(names.budget)
        if budget:
            budget_s = parse_duration(budget)
            if budget_s is None:
                self.ignored["budget"] += 1
        for name in names.ttl_ms:
            ttl = headers.get(name)
            if ttl:
                ttl_s = _milliseconds(ttl)
                if ttl_s is None:
                    self.ignored["budget"] += 1
                elif budget_s is None or ttl_s < budget_s:
                    budget_s = ttl_s
        return budget_s

    def _class_of(self, headers: Mapping[str, str], fields: Mapping[str, object]) -> str:
        """Return the class that an objective means, or that a body asks for.

        There by name as OpenAI's service_tier, by number as vLLM's priority.
        """
        objective = _first(headers, self.names.objective)
        if objective:
            return self.class_of_objective(objective)
        tier = _text(fields.get("service_tier"))
        if tier is not None:
            return tier
        priority = fields.get("priority")
        if isinstance(priority, float) and priority.is_integer():
            return self._class_priorities().get(-int(priority), "")  # vLLM's lower goes first, ours higher
        return ""


def body_bytes(headers: Mapping[str, str]) -> int:
    """Return how long a body is by its content-length; 0: it has none that means anything."""
    length = headers.get("content-length", "")
    return int(length[:12]) if length.isascii() and length.isdigit() else 0


def _read_fields(request: Request, fields: Mapping[str, object]) -> None:
    """Take over what a request's body says."""
    request.model = (_text(fields.get("model")) or "")[:MAX_NAME] or None
    # OpenAI splits its old `user` into these two: who is asking, and which requests begin alike.
    request.tenant = (_text(fields.get("safety_identifier")) or _text(fields.get("user")) or "")[:MAX_NAME]
    request.session = (_text(fields.get("prompt_cache_key")) or "")[:MAX_NAME] or None
    answers = max(_count(fields.get("n")) or 1, _count(fields.get("best_of")) or 1)
    request.sequences = min(answers * (_count(fields.get(PROMPTS)) or 1), MAX_SEQUENCES)
    request.max_output_tokens = _count(fields.get("max_tokens")) or _count(fields.get("max_completion_tokens"))


def _read_size(request: Request, headers: Mapping[str, str], *, has_body: bool) -> None:
    """Estimate a prompt by its body's announced size, and note what kind of body it is."""
    if "content-length" in headers:
        length = headers["content-length"]
        if length.isascii() and length.isdigit():
            tokens = int(length[:12]) // BYTES_PER_TOKEN
            request.prompt_tokens = tokens if tokens < MAX_TOKENS else MAX_TOKENS
        elif has_body:
            request.prompt_tokens = UNKNOWN_PROMPT_TOKENS
        if has_body:
            request.kind = _kind_of(headers.get("content-type", ""))
    elif has_body:
        request.prompt_tokens, request.kind = UNKNOWN_PROMPT_TOKENS, UNSIZED


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """Return the value of the first of `names` that there is, cut to what we keep of a name."""
    for name in names:
        value = headers.get(name)
        if value:
            return value if len(value) <= MAX_NAME else value[:MAX_NAME]
    return None


def _itself(name: str) -> str:
    return name


def _milliseconds(text: str) -> float | None:
    return int(text) / 1000 if text.isascii() and text.isdigit() and len(text) <= 9 else None


def _kind_of(content_type: str) -> str:
    """Return what a body is: one of a few kinds, since clients could make up names without end."""
    if content_type == "application/json":  # as nearly all are
        return JSON
    media = content_type.partition(";")[0].strip().lower()
    if not media or media == "application/json" or media.endswith("+json"):
        return JSON
    return FORM if media.startswith("multipart/") else OTHER


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    """Return a whole positive number, or None for whatever else a client wrote there."""
    if isinstance(value, float) and 1 <= value <= MAX_TOKENS:
        return int(value)
    return None
