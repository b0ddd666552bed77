"""Keys of requests: their classes and tenants, what becomes of which path, and what their headers say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from extproc.admission.tenants import TenantRule, TenantRules
from extproc.config.section import Section
from extproc.config.types import (
    Duration,
    HeaderName,
    HeaderNames,
    Method,
    Name,
    PositiveDuration,
    RoutePath,
    Server,
)

DEFAULT_BUDGET_S = 30.0
SERVER_MARGIN_S = 0.4
"""Of an objective for the first token, what is left to the server."""


class OverflowConfig(Section):
    """A cluster of last resort: another region, a provider. No limit counts what goes there."""

    name: Name = Field(description="The Envoy cluster's name.")
    address: Server | None = Field(
        None,
        description="host:port, plain HTTP: `envoy-config` renders the cluster. Unset: your Envoy has it, with TLS, "
        "keys and host names as it needs them.",
    )


class OnRefusalConfig(Section):
    """What becomes of a request that would be refused for want of room."""

    cluster: Name = Field(description="One of `overflow_clusters`: it goes there instead.")


class ClassConfig(Section):
    """A service class. A request names its class in a header; an unknown or missing name means the first class."""

    name: Name = Field(description="Its name, as the header gives it.")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="Higher goes first, always.")
    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = Field(
        None,
        description="Its share of what classes of its priority get, by tokens: 4 beside 1 is four fifths while both "
        "have requests waiting. All of one priority have one, or none: then they are one line.",
    )
    budget: Duration | None = Field(
        None,
        description="The longest that a request of this class may wait. Unset: 30s, or, where `ttft` is given, that "
        "less 0.4s, which the server needs.",
    )
    on_refusal: OnRefusalConfig | None = Field(
        None, description="Instead of 429 or 503 for want of room. Unset: the refusal."
    )
    objectives: Annotated[list[Name], Field(max_length=1000)] = Field(
        [],
        description="InferenceObjectives that mean this class, beside the one of its name: a request names one in "
        "`x-llm-d-inference-objective` (`dialect: endpoint-picker`). Wins over what Kubernetes says.",
    )
    ttft: PositiveDuration | None = Field(None, description="Wanted time to the first token, as its users say it.")
    tpot: PositiveDuration | None = Field(
        None,
        description="Wanted time per output token after the first. Adaptive limits keep the tightest of all classes.",
    )

    @property
    def budget_s(self) -> float:
        """Return the longest that a request of this class may wait, in seconds."""
        if self.budget is not None:
            return self.budget
        if self.ttft is None:
            return DEFAULT_BUDGET_S
        return max(self.ttft - SERVER_MARGIN_S, self.ttft / 2)


class _TenantKeys(Section):
    max_in_flight: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The most requests that wait or run at once; one more gets 429, `tenant_limit`. Unset: any."
    )
    guaranteed: Annotated[int, Field(ge=0)] = Field(
        0,
        description="So many of its requests in flight go before those of other tenants in their class. No room is "
        "kept free for them, and a higher class still goes first.",
    )
    weight: Annotated[float, Field(ge=0.001, le=1000)] = Field(
        1.0, description="Of its fair share of tokens in a class; needs `tenant_fairness`."
    )

    def rule(self) -> TenantRule:
        """Return it as admission knows it."""
        return TenantRule(self.max_in_flight, self.guaranteed, self.weight)


class TenantConfig(_TenantKeys):
    """A tenant by name."""

    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="Its name, as the header gives it.")


class OtherTenantsConfig(_TenantKeys):
    """What holds for tenants that are not named: for all of them together, or for each."""


class TenantsConfig(Section):
    """Who tenants are, and what each may have."""

    named: Annotated[list[TenantConfig], Field(max_length=10_000)] = Field([], description="Tenants by name.")
    others: OtherTenantsConfig = Field(OtherTenantsConfig(), description="All others.")
    count_others: Literal["together", "apart"] | None = Field(
        None,
        description="`together`: all others are one tenant, so that a made-up name gains nothing. `apart`: each is "
        "one; only where clients can't write the header themselves. Default: together if `named` names any.",
    )

    def rules(self) -> TenantRules:
        """Return them as admission knows them."""
        apart = self.count_others == "apart" or (self.count_others is None and not self.named)
        return TenantRules({one.name: one.rule() for one in self.named}, self.others.rule(), apart)


class RouteConfig(Section):
    """What becomes of some requests. The first row that fits decides.

    After these rows, `GET /v1/models` is answered with the models of all endpoints. What no row names: GET, HEAD,
    OPTIONS and DELETE go at once, all else is queued, and so is a WebSocket (`UPGRADE` stands for its method).
    """

    path: RoutePath = Field(description="Path without the query; with `*` at its end, all that begin so.")
    methods: Annotated[list[Method], Field(max_length=20)] = Field([], description="Methods. Empty: any.")
    action: Literal["queue", "pass", "models"] | None = Field(
        None,
        description="`queue`: waits for a slot. `pass`: goes at once to an endpoint that serves its model, takes no "
        "slot, counts for no limit. `models`: we list the models of all endpoints. Default: by method.",
    )
    errors: Literal["openai", "anthropic"] | None = Field(
        None,
        description="Shape of our errors. Default: Anthropic's at `/v1/messages`, else OpenAI's. gRPC has its own.",
    )


class HeadersConfig(Section):
    """Which request header carries what."""

    cluster: HeaderName = Field(
        "x-upstream-cluster", description="We write the chosen cluster here; Envoy routes by it."
    )
    model: HeaderNames = Field(
        ["x-model"], description="Model name. One name or a list, the first that a request has counts."
    )
    request_class: HeaderName = Field("x-request-class", alias="class", description="Class name.")
    tenant: HeaderName = Field("x-tenant-id", description="Whom to be fair to.")
    session: HeaderNames = Field(
        ["x-session-id", "x-session-affinity"],
        description="Requests of a session prefer the endpoint of the last one. One name or a list, the first that a "
        "request has counts.",
    )
    budget: HeaderName = Field(
        "x-queue-budget",
        description="This request's budget, like `5s`; `0s`: never wait. Its class's budget is the most.",
    )


class PickerConfig(Section):
    """For `dialect: endpoint-picker`; docs/inference-gateway.md says what each gateway needs."""

    fallbacks: Annotated[int, Field(ge=0, le=3)] = Field(
        0,
        description="How many next choices a pick lists after its address, for a gateway that tries them in turn when "
        "the first takes no connection, and tells who served: Istio from 1.30, or an Envoy with our bootstrap. Others "
        "(ORIGINAL_DST, agentgateway, NGINX's) fail with a list. A slot, and what it takes of a KV cache, is kept at "
        "each until the gateway tells who served, else until the request is over: an eighth of an endpoint's limits "
        "at most, so one of fewer than eight slots is none. Does nothing with `replicas`.",
    )
    read_model: bool = Field(
        False,
        description="Where no header names the model, look for it in the first 64 KiB of the body, if the gateway "
        "sends us bodies before it has our pick (FULL_DUPLEX_STREAMED or BUFFERED). "
        "An Envoy with our bootstrap sends none: `request_fields` is for that.",
    )
    without_end: Literal["refuse", "pick"] = Field(
        "refuse",
        description="Gateways that never tell when an answer ends, as NGINX's. `refuse`: 503, and a line in the log. "
        "`pick`: each endpoint in its turn, at once; nothing is counted, so no limit holds.",
    )
