"""The configuration's keys, each with its default and its meaning; `docs/reference.md` is written from here.

Sections have rooms of their own: endpoints.py, requests.py, learning.py, replicas.py, tls.py. `Config` also says it all
in the words of the other parts: admission's policy, a session's headers, what is scraped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, Field

from extproc.admission.tenants import NO_RULES
from extproc.admission.values import Binding, EndpointSpec, Policy, RequestClass
from extproc.config.endpoints import (
    DiscoveryConfig,
    EndpointConfig,
    HealthCheckConfig,
    InferencePoolConfig,
    SourceConfig,
)
from extproc.config.learning import LearningConfig, LimitConfig
from extproc.config.replicas import ReplicasConfig
from extproc.config.requests import (
    ClassConfig,
    HeadersConfig,
    OverflowConfig,
    PickerConfig,
    RouteConfig,
    TenantsConfig,
)
from extproc.config.section import Section
from extproc.config.tls import TlsConfig
from extproc.config.types import (
    Address,
    ClustersFile,
    Duration,
    Limit,
    Listen,
    Network,
    Percent,
    PositiveDuration,
    Server,
    SocketMode,
)
from extproc.stream.dialect import Told
from extproc.stream.request import Headers
from extproc.stream.routes import Action, Routes, Rule, Shape
from extproc.stream.wire import PICK_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator


class Config(Section):
    """The sidecar's configuration file."""

    listen: Listen = Field("127.0.0.1:50051", description="Where Envoy connects: host:port or `unix:/path`.")
    admin: Address = Field("127.0.0.1:9902", description="HTTP: metrics, health, queues, the live page. Read-only.")
    tls: TlsConfig | None = Field(None, description="TLS at `listen`. Unset: plain text.")
    health_listen: Address | None = Field(
        None,
        description="Serve gRPC health, and nothing else, there in plain text: for kubelet's probes, which can't do "
        "TLS. `listen` answers them too.",
    )
    dialect: Literal["cluster-header", "endpoint-picker"] | None = Field(
        None,
        description="What asks us. `cluster-header`: Envoy as `envoy-config` sets it up. `endpoint-picker`: an "
        "Inference Gateway of Kubernetes, or an Envoy that takes an address; endpoints need addresses with an IP. "
        "Default: `endpoint-picker` with `inference_pool`, else `cluster-header`.",
    )
    picker: PickerConfig = Field(PickerConfig(), description="For `dialect: endpoint-picker`.")
    allow_insecure_listen: bool = Field(
        False, description="Allow `listen` without `tls` on addresses other than loopback: anyone there can take slots."
    )
    allow_remote_admin: bool = Field(
        False,
        description="Allow `admin` on addresses other than loopback, in plain text: for probes and Prometheus in a "
        "cluster. Whoever gets there sees request ids, models and tenants' names.",
    )
    socket_mode: SocketMode = Field(
        0o660, description="Of a unix socket at `listen`: `0600`, `0660` or `0666`. Envoy must be able to write it."
    )
    socket_group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}$")] | None = Field(
        None, description="Its group, a name or a quoted number. Unset: this process's, or the directory's if setgid."
    )
    enable_queue: bool = Field(
        False, description="Off: endpoints are chosen and counted, nothing is held, or refused for load."
    )
    dry_run: bool = Field(
        False,
        description="Hold nothing; count in metrics what would have been held or refused, were the queue on. "
        "A restart changes it, and with it an `enable_queue: true` that came in the same file.",
    )
    endpoints: list[EndpointConfig] = Field([], description="The inference servers.")
    discovery: list[DiscoveryConfig] = Field([], description="Sources of more endpoints. Needs `envoy_clusters_file`.")
    inference_pool: InferencePoolConfig | None = Field(
        None,
        description="The InferencePool of Kubernetes whose picker we are: its pods are endpoints, beside all others.",
    )
    allowed_addresses: Annotated[list[Network], Field(max_length=100)] | None = Field(
        None,
        description="Networks that discovered endpoints may be in, like `[10.0.0.0/8]`; others are left out. Unset: "
        "any but loopback, link-local, unspecified and multicast ones. `endpoints` may be anywhere.",
    )
    health_check: HealthCheckConfig | None = Field(
        None, description="Ask endpoints whether they live; `{}` takes all defaults. Unset: only answers tell."
    )
    envoy_clusters_file: ClustersFile | None = Field(
        None,
        description="We write the endpoints' Envoy clusters there, and `envoy-config` makes Envoy follow it. Unset: "
        "the bootstrap lists them, and a new endpoint needs a new bootstrap.",
    )
    envoy_admin: Server | None = Field(
        None,
        description="Envoy's admin interface: tells when Envoy knows a new cluster. Unset: we give it a second.",
    )
    second_try: Server | None = Field(
        None,
        description="Envoy's own listener as Envoy reaches it, IP:port: a request whose server takes no connection "
        "comes back through it, waits on and goes to another server. Unset: it fails with 503. Render Envoy's "
        "configuration again after a change.",
    )
    upstream_protocol: Literal["h1", "h2"] = Field(
        "h1", description="What the endpoints speak, for `envoy_clusters_file`; `h2` is prior knowledge."
    )
    upstream_idle_timeout: PositiveDuration = Field(
        4.0,
        description="Envoy closes a connection to an endpoint that was idle for so long. Keep it below the server's "
        "own keep-alive (uvicorn, so vLLM and SGLang: 5 s): a request that meets a closing connection fails.",
    )
    max_running_requests: Limit = Field(
        None, description="The most requests at once per endpoint: a number, or `adaptive` (steered by token speed)."
    )
    no_endpoint_budget: PositiveDuration | None = Field(
        None,
        description="The longest that a request may wait while no server is up that has its model: as long as one "
        "takes to start and load, like `5m`. Its class's budget begins when one is up. Unset: that holds here too.",
    )
    max_queue_wait_time: Duration = Field(
        1.0, description="How long a request waits for its home endpoint before any other may take it."
    )
    binding: Literal["late", "bound"] = Field(
        "late", description="`bound`: every request gets a home on arrival; the original design, for comparison."
    )
    max_queued_requests: Annotated[int, Field(ge=0)] = Field(
        10_000, description="Over it the last request of the lowest class is refused, not the newest as such."
    )
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="The most prompt tokens at an endpoint that have no first token yet, where that can be seen. "
        "Unset: 4096, what the server computes in a quarter of a second, or three mean prompts: what is most.",
    )
    adaptive_limit: LimitConfig = Field(
        LimitConfig(), description="The constants of `max_running_requests: adaptive`. The defaults need no change."
    )
    learning: LearningConfig = Field(
        LearningConfig(), description="The constants of what else is learned of servers. The defaults need no change."
    )
    shed: bool = Field(
        True,
        description="Refuse at once what is predicted to wait over twice its budget. Off: it waits its budget out.",
    )
    tenants: TenantsConfig | None = Field(
        None, description="Limits, guarantees and weights of tenants. Unset: none, and each name is a tenant."
    )
    tenant_fairness: bool = Field(True, description="Inside a class, fair shares of tokens between tenants.")
    short_prompts_first: bool = Field(
        False, description="Inside a class, short prompts first, instead of fairness; long ones wait longest."
    )
    session_affinity: bool = Field(
        True,
        description="A session's requests prefer, and wait `max_queue_wait_time` for, the endpoint of its last one. "
        "Off: any endpoint, the emptiest first.",
    )
    adapter_affinity: bool = Field(
        True,
        description="A request whose model is a LoRA adapter goes first to an endpoint whose page says that it is "
        "loaded there, while that is not half full. Off: to the emptiest.",
    )
    classes: Annotated[list[ClassConfig], Field(min_length=1)] = Field(
        [ClassConfig(name="default")], description="Service classes; the first is the default."
    )
    overflow_clusters: Annotated[list[OverflowConfig], Field(max_length=100)] = Field(
        [], description="Envoy clusters that `on_refusal` of a class may name."
    )
    routes: Annotated[list[RouteConfig], Field(max_length=100)] = Field(
        [], description="Which requests are queued, which go at once, and what shape errors have, by method and path."
    )
    default_model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="Model of requests that name none. Unset: where endpoints list different models, they get 400.",
    )
    headers: HeadersConfig = Field(HeadersConfig(), description="Names of headers.")
    scrape_interval: Duration = Field(
        1.0, description="How often the endpoints' metrics are read. `0s`: never; limits go by our own books alone."
    )
    scrape_timeout: PositiveDuration = Field(0.5, description="A page that is not whole by then is given up.")
    telemetry_stale_after: PositiveDuration = Field(
        10.0, description="Metrics older than this are ignored; own books, the hard limit, go on."
    )
    max_gpu_perc: Percent = Field(
        95, description="Percent of the KV cache in use from which an endpoint gets nothing more."
    )
    gpu_utilization_perc: Percent | None = Field(
        None,
        description="The same for GPU utilization, from `gpu_metrics_url`. Near 100 at any load: better left unset.",
    )
    upgrades: bool = Field(
        False,
        description="Let WebSockets through (`/v1/realtime`): each takes a slot for as long as it is open. For "
        "`envoy-config`; render Envoy's configuration again after a change.",
    )
    request_fields: bool = Field(
        False,
        description="Also read model, max_tokens, n, best_of, safety_identifier or user (tenant), prompt_cache_key "
        "(session), service_tier and priority from the JSON body, which Envoy parses (json_to_metadata, rendered by "
        "`envoy-config`), the model from a form's field, and how many prompts a list has. Headers win.",
    )
    first_byte_probe: bool = Field(
        False,
        description="A second ext_proc filter tells when an answer's first byte came, for `max_prompt_tokens`, and "
        "that it has one: chunks without a byte that end with the head are a refusal then. Costs one more stream per "
        "request; without it the engine's own counters tell, where it has them.",
    )
    server_timing: bool = Field(
        False,
        description="Tell clients how long their request waited: `server-timing: queue;dur=` (ms) on every answer. "
        "Render Envoy's configuration again after a change: it must allow the header.",
    )
    log_format: Literal["text", "json"] = Field("text", description="`json`: the log is one JSON object per line.")
    tracing: bool = Field(
        False,
        description="OpenTelemetry: the time in the queue as a span of the trace that the request's `traceparent` "
        "names. Needs the extra `otel`; OTEL_... environment variables say where to. Render Envoy's "
        "configuration again after a change.",
    )
    otlp_metrics: bool = Field(
        False,
        description="OpenTelemetry: send the metrics of `/metrics` by OTLP over HTTP too, and count "
        "`gen_ai.server.request.duration`. Needs the extra `otel`; OTEL_... environment variables say "
        "where to and how often.",
    )
    metrics_aliases: bool = Field(
        False,
        description="Tell what `/metrics` tells under the names of llm-d's router too, new (`llm_d_epp_`) and old: for "
        "dashboards and autoscalers made for those.",
    )
    replicas: ReplicasConfig | None = Field(
        None, description="Share the endpoints with other sidecars: limits, order and fairness over all. Unset: alone."
    )
    transport: Literal["asyncio", "completion_queue"] = Field(
        "completion_queue",
        description="What carries gRPC: grpcio's core driven directly, or grpc.aio, which costs about three times the "
        "CPU. The former uses private parts of grpcio; if these are not as expected, the log says so and grpc.aio "
        "serves (docs/adr/0006).",
    )
    reflection: bool = Field(False, description="Serve gRPC reflection, for grpcurl.")
    drain_timeout: Duration = Field(
        30.0, description="After SIGTERM: how long held requests may still be placed, and then answers may run out."
    )
    hand_over: bool | None = Field(
        None,
        description="On SIGTERM, leave held requests to this sidecar restarted, or to another one behind the same "
        "Envoy: exit a second later; Envoy sends them again, and running answers go on. Off: place them, or refuse "
        "them with 503, and exit when answers have run out. Unset: on; off with `inference_pool`, whose gateway sends "
        "nothing again (docs/adr/0013).",
    )

    def policy(self) -> Policy:
        """Return the rules of admission."""
        return Policy(
            enable_queue=self.enable_queue and not self.dry_run,
            classes=tuple(
                RequestClass(klass.name, klass.priority, klass.budget_s, klass.weight) for klass in self.classes
            ),
            tenants=NO_RULES if self.tenants is None else self.tenants.rules(),
            no_endpoint_budget_s=self.no_endpoint_budget,
            patience_s=self.max_queue_wait_time,
            binding=Binding(self.binding),
            max_queued_requests=self.max_queued_requests,
            max_prompt_tokens=self.max_prompt_tokens,
            limit_law=self.adaptive_limit.law(min((klass.tpot for klass in self.classes if klass.tpot), default=None)),
            laws=self.learning.laws(),
            shed=self.shed,
            fair=self.tenant_fairness,
            short_first=self.short_prompts_first,
            session_affinity=self.session_affinity,
            adapter_affinity=self.adapter_affinity,
            first_byte_probe=self.first_byte_probe,
            max_kv_usage=self.max_gpu_perc / 100,
            max_gpu_usage=None if self.gpu_utilization_perc is None else self.gpu_utilization_perc / 100,
            stale_after_s=self.telemetry_stale_after,
            next_choices=self.picker.fallbacks if self.picks and self.replicas is None else 0,
        )

    def endpoint_specs(self) -> list[EndpointSpec]:
        """Return the endpoints of the file as admission knows them."""
        return [self.spec_of(endpoint) for endpoint in self.endpoints]

    def spec_of(self, endpoint: EndpointConfig) -> EndpointSpec:
        """Return one endpoint as admission knows it."""
        own = endpoint.max_running_requests
        return EndpointSpec(
            name=endpoint.name,
            cluster=endpoint.address if self.picks else endpoint.cluster or endpoint.name,
            models=frozenset(endpoint.models),
            max_running_requests=self.max_running_requests if own == "inherit" else own,
            kv_capacity_tokens=endpoint.kv_capacity_tokens,
            address=endpoint.address,
        )

    @property
    def models(self) -> frozenset[str]:
        """All models that the file names, whoever serves them at the moment."""
        named = {model for one in (*self.endpoints, *self.sources) for model in one.models}
        return frozenset(named | {self.default_model} if self.default_model is not None else named)

    @property
    def mode(self) -> str:
        """What becomes of requests, for people: whether the queue holds and refuses."""
        if self.dry_run:
            return "dry run (dry_run: true), nothing is held"
        return "on" if self.enable_queue else "off (enable_queue: false)"

    @property
    def expects_any(self) -> bool:
        """Whether something in the file lists no models: what comes from there serves any, once it is there."""
        return not all(one.models for one in (*self.endpoints, *self.sources))

    @property
    def sources(self) -> list[SourceConfig]:
        """Where endpoints are found that the file does not list."""
        found = [source for item in self.discovery for source in (item.dns, item.kubernetes)]
        return [source for source in (*found, self.inference_pool) if source is not None]

    def header_names(self) -> Headers:
        """Return the names of headers as a session knows them."""
        names = self.headers
        told = Told() if self.picks else None
        return Headers(
            model=(*names.model, *(told.model if told else ())),
            request_class=names.request_class,
            tenant=(names.tenant, *(told.tenant if told else ())),
            session=tuple(names.session),
            budget=names.budget,
            cluster=PICK_HEADER if told else names.cluster,
            trace="traceparent" if self.tracing else "",
            names_home=told is None,
            objective=told.objective if told else (),
            ttl_ms=told.ttl_ms if told else (),
            again=self.second_try is not None,
        )

    @property
    def picks(self) -> bool:
        """We are an endpoint picker: what we write is an address."""
        return self.dialect == "endpoint-picker" or (self.dialect is None and self.inference_pool is not None)

    @property
    def hands_over(self) -> bool:
        """What we hold at SIGTERM is left to whoever comes next: our bootstraps send it again, a picker's too; the
        gateway of an InferencePool does not."""
        return self.inference_pool is None if self.hand_over is None else self.hand_over

    @property
    def objectives(self) -> dict[str, str]:
        """The class of each InferenceObjective that the file names."""
        return {objective: one.name for one in self.classes for objective in one.objectives}

    @property
    def overflow(self) -> dict[str, str]:
        """The cluster of last resort of each class that has one."""
        return {one.name: one.on_refusal.cluster for one in self.classes if one.on_refusal is not None}

    def routes_table(self) -> Routes:
        """Return the table of routes as a session knows it."""
        return Routes(
            Rule(
                path=row.path,
                methods=frozenset(row.methods),
                action=None if row.action is None else Action(row.action),
                shape=None if row.errors is None else Shape(row.errors),
            )
            for row in self.routes
        )

    @property
    def longest_budget_s(self) -> float:
        """The longest that any request may wait."""
        return max(klass.budget_s for klass in self.classes) + (self.no_endpoint_budget or 0.0)


def sections(section: type[BaseModel] = Config, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Walk all sections below `section`: the path of each, like `discovery[].dns`, and what describes its keys."""
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                there = f"{path}{name}{'[]' if get_origin(field.annotation) is list else ''}"
                yield there, kind
                yield from sections(kind, f"{there}.")
