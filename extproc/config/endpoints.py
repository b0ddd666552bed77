"""Keys of endpoints: who they are, where others are found, how their pages and their health are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from extproc.config.kubernetes_api import KubernetesApi
from extproc.config.section import Section
from extproc.config.types import (
    FilePath,
    HostName,
    Label,
    ModelName,
    Name,
    NamedPort,
    OwnLimit,
    Port,
    PositiveDuration,
    SecretHeaders,
    Server,
    SlicePort,
    Threshold,
    Url,
    UrlPath,
)
from extproc.endpoints.access import Access
from extproc.endpoints.telemetry.engines import metrics_path
from extproc.endpoints.telemetry.target import Target

if TYPE_CHECKING:
    from pydantic import SecretStr

EngineName = Literal[
    "auto", "vllm", "sglang", "tgi", "trtllm", "triton", "llamacpp", "lmdeploy", "nim", "dynamo", "none"
]


class EndpointConfig(Section):
    """One inference server. Any of the limits here overrides the common one."""

    name: Name = Field(description="Its name: in metrics, logs, `/queues`.")
    cluster: Name | None = Field(None, description="The Envoy cluster that leads to it. Default: `name`.")
    address: Server = Field(description="host:port of the server.")
    models: Annotated[list[ModelName], Field(max_length=1000)] = Field(
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


class _Found(Section):
    """What is said of all endpoints that one source finds."""

    models: Annotated[list[ModelName], Field(max_length=1000)] = Field(
        [], description="As of `endpoints[]`, for each found."
    )
    max_running_requests: OwnLimit = Field("inherit", description="As of `endpoints[]`, for each found.")
    kv_capacity_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="As of `endpoints[]`, for each found."
    )
    engine: EngineName = Field("auto", description="As of `endpoints[]`, for each found.")
    metrics_headers: SecretHeaders = Field({}, description="As of `endpoints[]`, for each found.")
    metrics_token_file: FilePath | None = Field(None, description="As of `endpoints[]`, for each found.")
    metrics_ca_file: FilePath | None = Field(None, description="As of `endpoints[]`, for each found.")

    @property
    def place(self) -> dict[str, object]:
        """What decides which endpoints are found: all but what is said of each, and how often it is looked."""
        return self.model_dump(exclude={*_Found.model_fields, "interval"})

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

    name: HostName = Field(description="The name to look up.")
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


class KubernetesConfig(KubernetesApi, _Found):
    """Every ready address in the EndpointSlices of a service is an endpoint, called as its pod.

    Needs the right to list and watch `endpointslices` of `discovery.k8s.io`, in its namespace.
    """

    service: Label | None = Field(None, description="The service's name. Either this or `selector`.")
    selector: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="A label selector of EndpointSlices, like `app=vllm`."
    )
    port: SlicePort = Field(
        None, description="Number, or the name of the slices' port. Default: the only or first one."
    )
    ports: Annotated[list[NamedPort], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Several, instead of `port`: one endpoint for each pod and port, called POD-PORT, as of a data "
        "parallel server with a port for each rank.",
    )


class InferencePoolConfig(KubernetesApi, _Found):
    """Every ready pod of an InferencePool (`inference.networking.k8s.io/v1`) is an endpoint, one for each target port.

    Endpoints are called as their pods, with several target ports POD-rank-N; a pod's annotation `llm-d.ai/active-ports`
    can name fewer ports. Needs the right to list and watch `inferencepools` of `inference.networking.k8s.io`, `pods`
    of the core API, and `inferenceobjectives` of `llm-d.ai` and `inference.networking.x-k8s.io`, in its namespace.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] = Field(
        description="The pool's name."
    )
    objectives: bool = Field(
        True,
        description="Follow the pool's InferenceObjectives: a request that names one is in the class of that name, "
        "else in the class with its priority, else the next lower one, else the lowest.",
    )


SourceConfig = DnsConfig | KubernetesConfig | InferencePoolConfig
"""What says where endpoints are found."""


class DiscoveryConfig(Section):
    """A source of endpoints that come and go. Each item has one of these keys."""

    dns: DnsConfig | None = Field(None, description="By DNS.")
    kubernetes: KubernetesConfig | None = Field(None, description="From Kubernetes.")


class HealthCheckConfig(Section):
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
