"""The configuration: every key, its default and its meaning, in one place; `docs/reference.md` is written from here.

All problems of a file are reported at once, each with its key path and what would be right.
"""

from __future__ import annotations

import difflib
import os
import re
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from yarl import URL

from extproc.admission.values import Binding, EndpointSpec, Policy, RequestClass
from extproc.durations import parse_duration
from extproc.errors import ConfigError
from extproc.files import read_text
from extproc.session import Headers
from extproc.telemetry.engines import metrics_path
from extproc.telemetry.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

ENV_PREFIX = "EXTPROC_"
LONGEST_BUDGET_S = 3500.0
"""Envoy refuses a message_timeout above 3600 s, and ours must lie above the longest budget."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}", re.ASCII)
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)


_NOT_OURS = frozenset(
    ("host", "connection", "content-length", "content-type", "transfer-encoding", "te", "upgrade", "x-request-id")
)
"""Headers that can't carry our routing decision: Envoy refuses to set them, or other things break."""


# ---- types of values


def _duration(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be a duration like 10s or 250ms, not {value!r}")  # noqa: TRY004 - pydantic wants it
    seconds = parse_duration(str(value))
    if seconds is None:
        raise ValueError(f"must be a duration like 10s or 250ms, not {value!r}")
    return seconds


def _positive_duration(value: object) -> float:
    seconds = _duration(value)
    if seconds <= 0:
        raise ValueError(f"must be longer than 0s, not {value!r}")
    return seconds


def _limit(value: object) -> int | None:
    if value == "adaptive" or value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000:
        return value
    raise ValueError(f"must be 'adaptive' or a whole number from 1, not {value!r}")


def _own_limit(value: object) -> int | str | None:
    return value if value == "inherit" else _limit(value)


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(
        f"must be 1 to 128 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit, not {value!r}"
    )


def _header(value: object) -> str:
    if isinstance(value, str) and _HEADER.fullmatch(value.lower()):
        return value.lower()
    raise ValueError(f"must be the name of an HTTP header, like x-model, not {value!r}")


def _address(value: object) -> str:
    if isinstance(value, str):
        try:
            split_address(value)
        except ValueError:
            pass
        else:
            return value
    raise ValueError(f"must be host:port, like 10.0.0.7:8000 or [::1]:8000, not {value!r}")


def _listen(value: object) -> str:
    if isinstance(value, str) and value.startswith("unix:/"):
        return value
    return _address(value)


def _url(value: object) -> str:
    if isinstance(value, str):
        try:
            url = URL(value)
            if url.scheme in ("http", "https") and url.host and (url.explicit_port is None or url.explicit_port > 0):
                return value
        except ValueError:
            pass
    raise ValueError(f"must be a URL like http://10.0.0.7:8000/metrics, not {value!r}")


def _clusters_file(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.endswith((".yaml", ".yml")):
        return value
    raise ValueError(f"must be an absolute path that ends in .yaml, like /run/extproc/clusters.yaml, not {value!r}")


def _file(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.isprintable():
        return value
    raise ValueError(f"must be an absolute path, like /etc/extproc/tls/tls.crt, not {value!r}")


_SOCKET_MODES: dict[object, int] = {
    spelt: mode for mode in (0o600, 0o660, 0o666) for spelt in (f"{mode:04o}", f"{mode:#o}", mode, int(f"{mode:o}"))
}
"""Also as YAML 1.1 and 1.2 read a bare 0660: 432 and 660. With three choices no number means two."""


def _socket_mode(value: object) -> int:
    try:
        return _SOCKET_MODES[value]
    except (KeyError, TypeError):
        raise ValueError(
            f"must be 0600 (owner), 0660 (owner and group) or 0666 (anyone on this machine), not {value!r}"
        ) from None


def _path_of_url(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.isascii() and value.isprintable():
        return value
    raise ValueError(f"must be the path of a URL, like /health, not {value!r}")


def _slice_port(value: object) -> int | str | None:
    if value is None or (isinstance(value, str) and value) or (type(value) is int and 1 <= value <= 65535):
        return value
    raise ValueError(f"must be a port's number or name, not {value!r}")


def split_address(address: str) -> tuple[str, int]:
    """Split host:port, IPv6 hosts in brackets. Raises ValueError."""
    parts = urlsplit(f"//{address}")
    strange = parts.path or parts.query or parts.fragment or parts.username is not None
    if not parts.hostname or parts.port is None or strange or not _HOST.fullmatch(parts.hostname):
        raise ValueError(address)
    return parts.hostname, parts.port


def require_address(flag: str, address: str) -> tuple[str, int]:
    """Split what a command-line flag names. Raises ConfigError unless it is host:port."""
    try:
        return split_address(address)
    except ValueError:
        problem = f"{flag}: must be host:port, like 127.0.0.1:8080, not {address!r}"
        raise ConfigError("command line", [problem]) from None


Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[float, BeforeValidator(_positive_duration)]
Percent = Annotated[int, Field(ge=1, le=100)]
Limit = Annotated[int | None, BeforeValidator(_limit)]
OwnLimit = Annotated[int | Literal["inherit"] | None, BeforeValidator(_own_limit)]
Name = Annotated[str, BeforeValidator(_name)]
HeaderName = Annotated[str, BeforeValidator(_header)]
Address = Annotated[str, BeforeValidator(_address)]
Listen = Annotated[str, BeforeValidator(_listen)]
Url = Annotated[str, BeforeValidator(_url)]
ClustersFile = Annotated[str, BeforeValidator(_clusters_file)]
FilePath = Annotated[str, BeforeValidator(_file)]
SocketMode = Annotated[int, BeforeValidator(_socket_mode)]
UrlPath = Annotated[str, BeforeValidator(_path_of_url)]
Port = Annotated[int, Field(ge=1, le=65535)]
SlicePort = Annotated[int | str | None, BeforeValidator(_slice_port)]
Threshold = Annotated[int, Field(ge=1, le=100)]


# ---- the keys


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    engine: Literal["auto", "vllm", "sglang", "tgi", "trtllm", "triton", "llamacpp", "none"] = Field(
        "auto", description="Whose metric names it uses. `auto`: its page tells. `none`: its page is not read."
    )
    metrics_url: Url | None = Field(
        None, description="Its metrics page. Default: http://ADDRESS/metrics; for `trtllm` /prometheus/metrics."
    )
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
    engine: Literal["auto", "vllm", "sglang", "tgi", "trtllm", "triton", "llamacpp", "none"] = Field(
        "auto", description="As of `endpoints[]`, for each found."
    )

    def endpoint(self, name: str, address: str) -> EndpointConfig:
        """Return a found endpoint as if the file had listed it."""
        return EndpointConfig(
            name=name,
            address=address,
            models=self.models,
            max_running_requests=self.max_running_requests,
            kv_capacity_tokens=self.kv_capacity_tokens,
            engine=self.engine,
        )


class DnsConfig(_Found):
    """Every A and AAAA record of a name is an endpoint, called `address:port`. A failed lookup changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="The name to look up.")
    port: Port = Field(description="The servers' port.")
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
    api: Url | None = Field(None, description="The API server. Default: the one that a pod is told of.")
    token_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/token", description="Read again for every call: it is rotated."
    )
    ca_file: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", description="Who signed the API server's certificate."
    )


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

    cert_file: FilePath = Field(description="Our certificate, and after it those between it and its CA.")
    key_file: FilePath = Field(description="Its key, without a passphrase.")
    client_ca_file: FilePath | None = Field(
        None, description="Mutual TLS: only who shows a certificate signed by this CA may connect. Unset: anyone may."
    )
    envoy: TlsEnvoyConfig | None = Field(None, description="Envoy's side, for `extproc envoy-config`.")


class ClassConfig(_Section):
    """A service class. A request names its class in a header; an unknown or missing name means the first class."""

    name: Name = Field(description="Its name, as the header gives it.")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="Higher goes first, always.")
    budget: Duration = Field(30.0, description="The longest that a request of this class may wait.")


class HeadersConfig(_Section):
    """Which request header carries what."""

    cluster: HeaderName = Field(
        "x-upstream-cluster", description="We write the chosen cluster here; Envoy routes by it."
    )
    model: HeaderName = Field("x-model", description="Model name.")
    request_class: HeaderName = Field("x-request-class", alias="class", description="Class name.")
    tenant: HeaderName = Field("x-tenant-id", description="Whom to be fair to.")
    session: HeaderName = Field(
        "x-session-id", description="Requests of a session prefer the endpoint of the last one."
    )
    budget: HeaderName = Field("x-queue-budget", description="This request's budget, like `5s`; `0s`: never wait.")


class Config(_Section):
    """The sidecar's configuration file."""

    listen: Listen = Field("127.0.0.1:50051", description="Where Envoy connects: host:port or `unix:/path`.")
    admin: Address = Field("127.0.0.1:9902", description="HTTP: metrics, health, queues, the live page. Read-only.")
    tls: TlsConfig | None = Field(None, description="TLS at `listen`. Unset: plain text.")
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
    upstream_protocol: Literal["h1", "h2"] = Field(
        "h1", description="What the endpoints speak, for `envoy_clusters_file`; `h2` is prior knowledge."
    )
    max_running_requests: Limit = Field(
        None, description="The most requests at once per endpoint: a number, or `adaptive` (steered by token speed)."
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
    max_prompt_tokens: Annotated[int, Field(ge=1)] = Field(
        4096, description="The most prompt tokens at an endpoint that have no first token yet, where that can be seen."
    )
    shed: bool = Field(
        True,
        description="Refuse at once what is predicted to wait over twice its budget. Off: it waits its budget out.",
    )
    tenant_fairness: bool = Field(True, description="Inside a class, fair shares of tokens between tenants.")
    short_prompts_first: bool = Field(
        False, description="Inside a class, short prompts first, instead of fairness; long ones wait longest."
    )
    classes: Annotated[list[ClassConfig], Field(min_length=1)] = Field(
        [ClassConfig(name="default")], description="Service classes; the first is the default."
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
    request_fields: bool = Field(
        False,
        description="Also read model, max_tokens, user, service_tier and priority from the JSON body, which Envoy "
        "parses (json_to_metadata, rendered by `envoy-config`). Headers win. Envoy waits for the whole body first.",
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
            enable_queue=self.enable_queue,
            classes=tuple(RequestClass(klass.name, klass.priority, klass.budget) for klass in self.classes),
            patience_s=self.max_queue_wait_time,
            binding=Binding(self.binding),
            max_queued_requests=self.max_queued_requests,
            max_prompt_tokens=self.max_prompt_tokens,
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
            cluster=endpoint.cluster or endpoint.name,
            models=frozenset(endpoint.models),
            max_running_requests=self.max_running_requests if own == "inherit" else own,
            kv_capacity_tokens=endpoint.kv_capacity_tokens,
        )

    def scrape_targets(self) -> list[Target]:
        """Return what is scraped for each endpoint of the file."""
        return [target_of(endpoint) for endpoint in self.endpoints]

    def header_names(self) -> Headers:
        """Return the names of headers as a session knows them."""
        names = self.headers
        return Headers(
            names.model,
            names.request_class,
            names.tenant,
            names.session,
            names.budget,
            names.cluster,
            "traceparent" if self.tracing else "",
        )

    @property
    def longest_budget_s(self) -> float:
        """The longest that any request may wait."""
        return max(klass.budget for klass in self.classes)


def target_of(endpoint: EndpointConfig) -> Target:
    """Return what is scraped for one endpoint."""
    return Target(
        name=endpoint.name,
        url=endpoint.metrics_url or f"http://{endpoint.address}{metrics_path(endpoint.engine)}",
        engine=endpoint.engine,
        gpu_url=endpoint.gpu_metrics_url,
        gpu_labels=tuple(sorted(endpoint.gpu_metrics_labels.items())),
    )


# ---- reading


def load_config(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and validate a file. Environment variables win over it. Raises ConfigError with all problems."""
    return parse_config(read_text(path), str(path), environ)


def parse_config(text: str, source: str, environ: Mapping[str, str] = os.environ) -> Config:
    """Validate the YAML `text`, called `source` in messages. Raises ConfigError with all problems."""
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that also refuses duplicate keys
    except _YAML_ERRORS as error:
        raise ConfigError(source, ["is no valid YAML: " + _one_line(error)]) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(source, [f"must be a mapping of keys to values, not {_kind(data)}"])
    problems = _overlay_environment(data, environ)
    config, found = _validate(data)
    problems += found
    if config is not None:
        problems += cross_check(config)
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


_YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError)
"""What PyYAML raises: also its own constructors' errors, for a date like 2024-13-45, `!!int abc`, or deep nesting."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand only once in a mapping."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _overlay_environment(data: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Let EXTPROC_KEY, and EXTPROC_SECTION__KEY, win over the file. Other EXTPROC_ names are somebody else's."""
    problems = []
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX):
            continue
        path = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if path[0] not in Config.model_fields or len(path) > 2:
            continue
        try:
            value = yaml.safe_load(environ[variable])
        except _YAML_ERRORS:
            problems.append(f"{'.'.join(path)}: environment variable {variable} is no valid YAML")
            continue
        target = data
        if len(path) > 1:
            section = data.get(path[0])
            target = section if isinstance(section, dict) else {}
            data[path[0]] = target
        target[path[-1]] = value
    return problems


def _validate(data: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Validate types; on problems, return also the config without the broken parts, so that the rest is checked too."""
    problems: list[str] = []
    for _ in range(20):
        try:
            return Config.model_validate(data), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
        problems += [problem for problem in map(_explain, details) if problem not in problems]
        for detail in sorted(details, key=lambda detail: str(detail["loc"]), reverse=True):
            _drop(data, detail["loc"])
    return None, problems


_STAND_INS = {"name": "broken-{}", "address": "broken.invalid:1"}


def _drop(data: Any, location: tuple[int | str, ...]) -> None:
    """Replace the broken part at `location` by its default, or by a stand-in where a value is required."""
    index: int | str = 0
    if location[0] == "discovery":
        data.pop("discovery", None)  # all that is wrong in it was reported at once
        return
    if location[0] == "tls":
        data["tls"] = {"cert_file": "/broken", "key_file": "/broken"}  # likewise, and it is there
        return
    for depth, key in enumerate(location):
        last = depth + 1 == len(location)
        if isinstance(data, list) and isinstance(key, int):
            index = key
            if last or not isinstance(data[key], dict):
                names = _required(location) if depth == 1 else ()
                data[key] = {name: _STAND_INS[name].format(index) for name in names} or ""
                return
        elif last or not isinstance(data.get(key), (dict, list)):
            if key in _required(location):
                data[key] = _STAND_INS[str(key)].format(index)
            else:
                data.pop(key, None)
            return
        data = data[key]


def _required(location: tuple[int | str, ...]) -> tuple[str, ...]:
    return {"endpoints": ("name", "address"), "classes": ("name",)}.get(str(location[0]), ())


def _path(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def _explain(detail: ErrorDetails) -> str:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    context = detail.get("ctx", {})
    path = _path(part for part in location if not _is_union_branch(part))
    match kind:
        case "extra_forbidden":
            known = _keys_at(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            return f"{path}: unknown key; {hint}"
        case "missing":
            return f"{path}: is required"
        case "value_error":
            return f"{path}: {context['error']}"
        case "literal_error":
            return f"{path}: must be {context['expected']}, not {value!r}"
        case "greater_than_equal":
            return f"{path}: must be {context['ge']} or more, not {value!r}"
        case "less_than_equal":
            return f"{path}: must be {context['le']} or less, not {value!r}"
        case "too_short" | "too_long":
            return f"{path}: {detail['msg'].lower()}"
        case "invalid_key":
            return f"{path}: unknown key; keys are words"
        case _ if kind in _TYPES:
            return f"{path}: must be {_TYPES[kind]}, not {_kind(value)}"
        case _:
            return f"{path}: {detail['msg']}"


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and "[" in part


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[_Section]] = {
        "endpoints": EndpointConfig,
        "classes": ClassConfig,
        "headers": HeadersConfig,
        "health_check": HealthCheckConfig,
        "tls": TlsConfig,
        "envoy": TlsEnvoyConfig,
        "discovery": DiscoveryConfig,
        "dns": DnsConfig,
        "kubernetes": KubernetesConfig,
    }
    words = [part for part in location if isinstance(part, str)]
    section = sections[words[-1]] if words else Config
    return [field.alias or name for name, field in section.model_fields.items()]


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)


def cross_check(config: Config) -> list[str]:
    """Check what no single key can tell."""
    problems = []
    for section, what, names in (
        ("endpoints", "name", [endpoint.name for endpoint in config.endpoints]),
        ("endpoints", "cluster", [endpoint.cluster or endpoint.name for endpoint in config.endpoints]),
        ("classes", "name", [klass.name for klass in config.classes]),
    ):
        for index, name in enumerate(names):
            first = names.index(name)
            if first != index:
                problems.append(
                    f"{section}[{index}].{what}: {name!r} is taken by {section}[{first}]; each must be unique"
                )
    for index, klass in enumerate(config.classes):
        if klass.budget > LONGEST_BUDGET_S:
            problems.append(
                f"classes[{index}].budget: {klass.budget:g}s is above what Envoy's message_timeout can cover "
                f"(at most 3600s); {LONGEST_BUDGET_S:g}s or less works"
            )
    if config.gpu_utilization_perc is not None and not any(one.gpu_metrics_url for one in config.endpoints):
        problems.append(
            "gpu_utilization_perc: needs gpu_metrics_url at one endpoint at least; without it nothing tells GPU use"
        )
    problems += _check_discovery(config)
    if config.headers.cluster in _NOT_OURS:
        problems.append(
            f"headers.cluster: {config.headers.cluster!r} has a meaning of its own in HTTP or Envoy; one like "
            "'x-upstream-cluster' works"
        )
    names = [name for _, name in config.headers]
    problems += [
        f"headers: {name!r} is used for two things; each needs a header of its own"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    return problems + _check_ports(config)


def _check_ports(config: Config) -> list[str]:
    problems = []
    if config.tls is None and not config.allow_insecure_listen and not _is_local(config.listen):
        problems.append(
            f"listen: {config.listen!r} can be reached from other machines in plain text; set tls, use loopback or a "
            "unix socket, or set allow_insecure_listen: true"
        )
    if not config.allow_remote_admin and not _is_local(config.admin):
        problems.append(
            f"admin: {config.admin!r} can be reached from other machines in plain text; use loopback, or set "
            "allow_remote_admin: true"
        )
    if config.tls is None:
        return problems
    if config.listen.startswith("unix:"):
        problems.append("tls: a unix socket needs none, its socket_mode says who may connect; leave one of them out")
    envoy = config.tls.envoy
    if envoy is not None and (envoy.cert_file is None) is not (envoy.key_file is None):
        problems.append("tls.envoy: needs both or none of cert_file and key_file")
    elif envoy is not None and envoy.cert_file is None and config.tls.client_ca_file is not None:
        problems.append("tls.envoy.cert_file: is needed, and key_file: tls.client_ca_file asks Envoy for a certificate")
    return problems


def _check_discovery(config: Config) -> list[str]:
    problems = []
    if config.discovery and config.envoy_clusters_file is None:
        problems.append("discovery: needs envoy_clusters_file; without it Envoy can't know the endpoints found")
    for index, source in enumerate(config.discovery):
        where = f"discovery[{index}]"
        if (source.dns is None) is (source.kubernetes is None):
            problems.append(f"{where}: needs one of dns and kubernetes")
        found = source.kubernetes
        if found is not None and (found.service is None) is (found.selector is None):
            problems.append(f"{where}.kubernetes: needs one of service and selector")
    return problems


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
