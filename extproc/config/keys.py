"""Every key, its default and its meaning, in one place; `docs/reference.md` is written from here.

`Config` also says it in the words of the other parts: admission's policy, a session's headers, what is scraped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, Field

from extproc.admission.tenants import NO_RULES, TenantRule, TenantRules
from extproc.admission.values import Binding, EndpointSpec, Policy, RequestClass
from extproc.config.learning import LearningConfig, LimitConfig
from extproc.config.section import Section as _Section
from extproc.config.types import (
    Address,
    ClustersFile,
    Duration,
    FilePath,
    HeaderName,
    HeaderNames,
    Limit,
    Listen,
    Method,
    Name,
    NamedPort,
    Network,
    OwnLimit,
    Percent,
    PoolName,
    Port,
    PositiveDuration,
    RoutePath,
    SecretHeaders,
    SlicePort,
    SocketMode,
    StoreUrl,
    Threshold,
    Url,
    UrlPath,
)
from extproc.endpoints.access import Access
from extproc.endpoints.telemetry.engines import metrics_path
from extproc.endpoints.telemetry.target import Target
from extproc.stream.dialect import Told
from extproc.stream.request import Headers
from extproc.stream.routes import Action, Routes, Rule, Shape
from extproc.stream.wire import PICK_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import SecretStr


EngineName = Literal[
    "auto", "vllm", "sglang", "tgi", "trtllm", "triton", "llamacpp", "lmdeploy", "nim", "dynamo", "none"
]


class EndpointConfig(_Section):
    """One inference server. Any of the limits here overrides the common one."""

    name: Name = Field(description="Its name: in metrics, logs, `/queues`.")
    cluster: Name | None = Field(None, description="The Envoy cluster that leads to it. Default: `name`.")
    address: Address = Field(description="host:port of the server.")
    models: Annotated[list[str], Field(max_length=1000)] = Field(
        [], description="Model names it serves; it gets only requests for those. Empty: any."
    )
    max_running_requests: OwnLimit = Field(
        "inherit", description="The most requests at once: a number, or `adaptive`. Default: the common one."
    )
    kv_capacity_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Size of its KV cache in tokens. Default: what its metrics say; no KV limit while unknown."
    )
    engine: EngineName = Field(
        "auto", description="Whose metric names it uses. `auto`: its page tells. `none`: its page is not read."
    )
    metrics_url: Url | None = Field(
        None,
        description="Its metrics page. Default: http://ADDRESS/metrics (https with `metrics_ca_file`); for `trtllm` "
        "/prometheus/metrics, for `nim` /v1/metrics.",
    )
    metrics_headers: SecretHeaders = Field({}, description="Headers for its metrics page. Shown nowhere.")
    metrics_token_file: FilePath | None = Field(
        None, description="A token for its metrics page, sent as `authorization: Bearer`. Read again when it changes."
    )
    metrics_ca_file: FilePath | None = Field(None, description="Who signed the certificate of its metrics page.")
    gpu_metrics_url: Url | None = Field(None, description="Page of a DCGM exporter that sees its GPUs.")
    gpu_metrics_labels: dict[str, str] = Field(
        {}, description="Labels of the series there that are its GPUs, like `{Hostname: node-7, gpu: '0'}`. Empty: all."
    )


class _Found(_Section):
    """What is said of all endpoints that one source finds."""

    models: Annotated[list[str], Field(max_length=1000)] = Field([], description="As of `endpoints[]`, for each found.")
    max_running_requests: OwnLimit = Field("inherit", description="As of `endpoints[]`, for each found.")
    kv_capacity_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="As of `endpoints[]`, for each found."
    )
    engine: EngineName = Field("auto", description="As of `endpoints[]`, for each found.")
    metrics_headers: SecretHeaders = Field({}, description="As of `endpoints[]`, for each found.")
    metrics_token_file: FilePath | None = Field(None, description="As of `endpoints[]`, for each found.")
    metrics_ca_file: FilePath | None = Field(None, description="As of `endpoints[]`, for each found.")

    def endpoint(self, name: str, address: str) -> EndpointConfig:
        """Return a found endpoint as if the file had listed it."""
        return EndpointConfig(
            name=name,
            address=address,
            models=self.models,
            max_running_requests=self.max_running_requests,
            kv_capacity_tokens=self.kv_capacity_tokens,
            engine=self.engine,
            metrics_headers=self.metrics_headers,
            metrics_token_file=self.metrics_token_file,
            metrics_ca_file=self.metrics_ca_file,
        )


class DnsConfig(_Found):
    """Every address of a name is an endpoint, called `address:port`. A failed lookup changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="The name to look up.")
    port: Port | None = Field(None, description="The servers' port. Either this or `ports`.")
    ports: Annotated[list[Port], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Several: one endpoint for each address and port, as of a data parallel server."
    )
    family: Literal["auto", "ipv4", "ipv6", "any"] = Field(
        "auto",
        description="Which addresses count. `auto`: IPv4 if there is any, else IPv6: a name with both is mostly one "
        "server. `any`: each is a server of its own.",
    )
    interval: PositiveDuration = Field(5.0, description="How often.")


class KubernetesConfig(_Found):
    """Every ready address in the EndpointSlices of a service is an endpoint, called as its pod.

    Needs the right to list and watch `endpointslices` of `discovery.k8s.io`, in its namespace.
    """

    service: str | None = Field(None, description="The service's name. Either this or `selector`.")
    selector: str | None = Field(None, description="A label selector of EndpointSlices, like `app=vllm`.")
    namespace: str | None = Field(None, description="Default: the pod's own.")
    port: SlicePort = Field(
        None, description="Number, or the name of the slices' port. Default: the only or first one."
    )
    ports: Annotated[list[NamedPort], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Several, instead of `port`: one endpoint for each pod and port, called POD-PORT, as of a data "
        "parallel server with a port for each rank.",
    )
    api: Url | None = Field(None, description="The API server. Default: the one that a pod is told of.")
    token_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/token", description="Read again for every call: it is rotated."
    )
    ca_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", description="Who signed the API server's certificate."
    )


class InferencePoolConfig(_Found):
    """Every ready pod of an InferencePool (`inference.networking.k8s.io/v1`) is an endpoint, one for each target port.

    Endpoints are called as their pods, with several target ports POD-rank-N; a pod's annotation `llm-d.ai/active-ports`
    can name fewer ports. Needs the right to list and watch `inferencepools` of `inference.networking.k8s.io`, `pods`
    of the core API, and `inferenceobjectives` of `llm-d.ai` and `inference.networking.x-k8s.io`, in its namespace.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] = Field(
        description="The pool's name."
    )
    namespace: str | None = Field(None, description="Default: the pod's own.")
    objectives: bool = Field(
        True,
        description="Follow the pool's InferenceObjectives: a request that names one is in the class of that name, "
        "else in the class with its priority, else the next lower one, else the lowest.",
    )
    api: Url | None = Field(None, description="The API server. Default: the one that a pod is told of.")
    token_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/token", description="Read again for every call: it is rotated."
    )
    ca_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", description="Who signed the API server's certificate."
    )


SourceConfig = DnsConfig | KubernetesConfig | InferencePoolConfig
"""What says where endpoints are found."""


class DiscoveryConfig(_Section):
    """A source of endpoints that come and go. Each item has one of these keys."""

    dns: DnsConfig | None = Field(None, description="By DNS.")
    kubernetes: KubernetesConfig | None = Field(None, description="From Kubernetes.")


class HealthCheckConfig(_Section):
    """How to ask endpoints whether they live. 2xx within the timeout is a success."""

    path: UrlPath = Field("/health", description="vLLM's and SGLang's is `/health`.")
    interval: PositiveDuration = Field(2.0, description="From one check of an endpoint to the next.")
    timeout: PositiveDuration = Field(1.0, description="An answer that is not there by then is a failure.")
    unhealthy_threshold: Threshold = Field(
        3, description="Failures in a row that take an endpoint out; one is enough if it never passed."
    )
    healthy_threshold: Threshold = Field(1, description="Successes in a row that bring it back.")
    headers: SecretHeaders = Field({}, description="Headers of each check. Shown nowhere.")
    token_file: FilePath | None = Field(
        None, description="A token, sent as `authorization: Bearer`. Read again when it changes."
    )
    ca_file: FilePath | None = Field(None, description="Who signed the servers' certificates; checks then go by https.")

    def access(self) -> Access:
        """Return what a check needs to be let in."""
        return _access(self.headers, self.token_file, self.ca_file)


class TlsEnvoyConfig(_Section):
    """For `extproc envoy-config`: how Envoy meets our TLS. The paths are Envoy's, and nobody else looks at them."""

    server_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="A DNS name in our certificate. Envoy takes no other certificate."
    )
    ca_file: FilePath = Field(description="Who signed our certificate.")
    cert_file: FilePath | None = Field(
        None, description="What Envoy shows us. Needed with `client_ca_file`, and `key_file` with it."
    )
    key_file: FilePath | None = Field(None, description="Its key.")
    secrets_directory: FilePath = Field(
        "/etc/envoy", description="Where Envoy finds the files that `extproc envoy-config --secrets DIR` writes."
    )


class TlsConfig(_Section):
    """TLS at `listen`. PEM files, read again when they change: a rotated certificate needs no restart."""

    cert_file: FilePath | None = Field(
        None, description="Our certificate, and after it those between it and its CA. Required, but for `self_signed`."
    )
    key_file: FilePath | None = Field(None, description="Its key, without a passphrase.")
    self_signed: bool = Field(
        False,
        description="Make a certificate at start instead: for gateways that want TLS and look at no certificate. Needs "
        "`pip install extproc-queue[picker]`.",
    )
    client_ca_file: FilePath | None = Field(
        None, description="Mutual TLS: only who shows a certificate signed by this CA may connect. Unset: anyone may."
    )
    envoy: TlsEnvoyConfig | None = Field(None, description="Envoy's side, for `extproc envoy-config`.")


SERVER_MARGIN_S = 0.4
"""Of an objective for the first token, what is left to the server."""


class OverflowConfig(_Section):
    """A cluster of last resort: another region, a provider. No limit counts what goes there."""

    name: Name = Field(description="The Envoy cluster's name.")
    address: Address | None = Field(
        None,
        description="host:port, plain HTTP: `envoy-config` renders the cluster. Unset: your Envoy has it, with TLS, "
        "keys and host names as it needs them.",
    )


class OnRefusalConfig(_Section):
    """What becomes of a request that would be refused for want of room."""

    cluster: Name = Field(description="One of `overflow_clusters`: it goes there instead.")


class ClassConfig(_Section):
    """A service class. A request names its class in a header; an unknown or missing name means the first class."""

    name: Name = Field(description="Its name, as the header gives it.")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="Higher goes first, always.")
    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = Field(
        None,
        description="Its share of what classes of its priority get, by tokens: 4 beside 1 is four fifths while both "
        "have requests waiting. All of one priority have one, or none: then they are one line.",
    )
    budget: Duration = Field(
        30.0,
        description="The longest that a request of this class may wait. Where `ttft` is given, by default that less "
        "0.4s, which the server needs.",
    )
    on_refusal: OnRefusalConfig | None = Field(
        None, description="Instead of 429 or 503 for want of room. Unset: the refusal."
    )
    ttft: PositiveDuration | None = Field(None, description="Wanted time to the first token, as its users say it.")
    tpot: PositiveDuration | None = Field(
        None,
        description="Wanted time per output token after the first. Adaptive limits keep the tightest of all classes.",
    )

    @property
    def budget_s(self) -> float:
        """Return the longest that a request of this class may wait, in seconds."""
        if self.ttft is None or "budget" in self.model_fields_set:
            return self.budget
        return max(self.ttft - SERVER_MARGIN_S, self.ttft / 2)


class _TenantKeys(_Section):
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


class TenantsConfig(_Section):
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


class RouteConfig(_Section):
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


class HeadersConfig(_Section):
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
    budget: HeaderName = Field("x-queue-budget", description="This request's budget, like `5s`; `0s`: never wait.")


class PickerConfig(_Section):
    """For `dialect: endpoint-picker`; docs/inference-gateway.md says what each gateway needs."""

    read_model: bool = Field(
        False,
        description="Where no header names the model, look for it in the first 64 KiB of the body, if the gateway "
        "sends us bodies before it has our answer (FULL_DUPLEX_STREAMED).",
    )
    without_end: Literal["refuse", "pick"] = Field(
        "refuse",
        description="Gateways that never tell when an answer ends, as NGINX's. `refuse`: 503, and a line in the log. "
        "`pick`: each endpoint in its turn, at once; nothing is counted, so no limit holds.",
    )


class ValkeyConfig(_Section):
    """Valkey 7 or Redis 6 and later. Needs `pip install extproc-queue[valkey]`."""

    url: StoreUrl = Field(
        description="Like `valkey://10.0.0.7:6379/0`; `valkeys://` is TLS; `redis://`, `rediss://` and `unix:///path` "
        "work too. Shown nowhere."
    )
    password_file: FilePath | None = Field(None, description="A password; read again for each connection.")


class LeaseConfig(_Section):
    """One Lease (`coordination.k8s.io`) per sidecar.

    Needs the rights to get, list, create, patch and delete `leases`, in its namespace.
    """

    namespace: str | None = Field(None, description="Default: the pod's own.")
    api: Url | None = Field(None, description="The API server. Default: the one that a pod is told of.")
    token_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/token", description="Read again for every call: it is rotated."
    )
    ca_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", description="Who signed the API server's certificate."
    )


class ReplicasTlsConfig(_Section):
    """Mutual TLS between sidecars. PEM files, read again for each connection."""

    cert_file: FilePath = Field(description="Our certificate, and after it those between it and its CA.")
    key_file: FilePath = Field(description="Its key, without a passphrase.")
    ca_file: FilePath = Field(description="Who signed the certificates of all sidecars.")
    server_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="A DNS name in the certificate of every sidecar of the pool, and in no other's."
    )


class ReplicasConfig(_Section):
    """Several sidecars that share endpoints decide as one: one leads, the others follow (docs/replicas.md)."""

    pool: PoolName = Field("default", description="Sidecars of one pool share their endpoints; one pool per config.")
    listen: Address = Field("127.0.0.1:50061", description="Where other sidecars reach us: host:port.")
    advertise: Address | None = Field(
        None, description="The host:port that others are told. Default: `listen`. In a pod: its IP."
    )
    valkey: ValkeyConfig | None = Field(
        None, description="Find each other in Valkey or Redis. Either this or the next."
    )
    kubernetes_lease: LeaseConfig | None = Field(None, description="Find each other by Leases in Kubernetes.")
    tls: ReplicasTlsConfig | None = Field(None, description="TLS between sidecars. Unset: plain text.")
    allow_insecure: bool = Field(
        False, description="Allow `listen` without `tls` on addresses other than loopback: anyone there can take slots."
    )

    @property
    def reached_at(self) -> str:
        """The address that others are told."""
        return self.advertise or self.listen


class Config(_Section):
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
    enable_queue: bool = Field(False, description="Off: endpoints are chosen and counted, nothing is held or refused.")
    dry_run: bool = Field(
        False, description="Hold nothing; count in metrics what would have been held or refused, were the queue on."
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
    envoy_admin: Address | None = Field(
        None,
        description="Envoy's admin interface: tells when Envoy knows a new cluster. Unset: we give it a second.",
    )
    second_try: Address | None = Field(
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
        description="Also read model, max_tokens, n, safety_identifier or user (tenant), prompt_cache_key (session), "
        "service_tier and priority from the JSON body, which Envoy parses (json_to_metadata, rendered by "
        "`envoy-config`), and the model from a form's field. Headers win.",
    )
    first_byte_probe: bool = Field(
        False,
        description="A second ext_proc filter tells when an answer's first byte came, for `max_prompt_tokens`. Costs "
        "one more stream per request; without it the engine's own counters tell, where it has them.",
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
        "names. Needs `pip install extproc-queue[otel]`; OTEL_... environment variables say where to. Render Envoy's "
        "configuration again after a change.",
    )
    otlp_metrics: bool = Field(
        False,
        description="OpenTelemetry: send the metrics of `/metrics` by OTLP over HTTP too, and count "
        "`gen_ai.server.request.duration`. Needs `pip install extproc-queue[otel]`; OTEL_... environment variables say "
        "where to and how often.",
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
    hand_over: bool = Field(
        False,
        description="On SIGTERM, leave held requests to another sidecar behind the same Envoy, or to this one "
        "restarted: exit a second later; Envoy sends them again, and running answers go on. Off: place them, or "
        "refuse them with 503.",
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
            first_byte_probe=self.first_byte_probe,
            max_kv_usage=self.max_gpu_perc / 100,
            max_gpu_usage=None if self.gpu_utilization_perc is None else self.gpu_utilization_perc / 100,
            stale_after_s=self.telemetry_stale_after,
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
        )

    def scrape_targets(self) -> list[Target]:
        """Return what is scraped for each endpoint of the file."""
        return [target_of(endpoint) for endpoint in self.endpoints]

    @property
    def models(self) -> frozenset[str]:
        """All models that the file names, whoever serves them at the moment."""
        named = {model for one in (*self.endpoints, *self.sources) for model in one.models}
        return frozenset(named | {self.default_model} if self.default_model is not None else named)

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


def target_of(endpoint: EndpointConfig) -> Target:
    """Return what is scraped for one endpoint."""
    scheme = "http" if endpoint.metrics_ca_file is None else "https"
    return Target(
        name=endpoint.name,
        url=endpoint.metrics_url or f"{scheme}://{endpoint.address}{metrics_path(endpoint.engine)}",
        engine=endpoint.engine,
        own=frozenset((endpoint.address, *endpoint.models)),
        base=f"{scheme if endpoint.metrics_url is None else 'http'}://{endpoint.address}",
        access=_access(endpoint.metrics_headers, endpoint.metrics_token_file, endpoint.metrics_ca_file),
        gpu_url=endpoint.gpu_metrics_url,
        gpu_labels=tuple(sorted(endpoint.gpu_metrics_labels.items())),
    )


def _access(headers: dict[str, SecretStr], token_file: str | None, ca_file: str | None) -> Access:
    return Access(tuple((name, value.get_secret_value()) for name, value in headers.items()), token_file, ca_file)


def sections(section: type[BaseModel] = Config, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Walk all sections below `section`: the path of each, like `discovery[].dns`, and what describes its keys."""
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                there = f"{path}{name}{'[]' if get_origin(field.annotation) is list else ''}"
                yield there, kind
                yield from sections(kind, f"{there}.")
