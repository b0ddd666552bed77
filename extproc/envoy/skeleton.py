"""What every Envoy bootstrap of ours has, whatever the dialect: one listener, our filter in it, the sidecar's cluster.

A dialect gives what is its own (`Skeleton`), and a word on each key why it is so: the text is read, and merged into
somebody's own, so its comments are part of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from extproc.config import split_address
from extproc.envoy.local_replies import local_replies
from extproc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MARGIN_S = 20.0
"""message_timeout above the longest budget: Envoy must never give up before we do."""
IDLE_S = 3700.0
"""stream_idle_timeout; held time counts against it, and so does the silence before a first token."""
BODY_LIMIT = 32 << 20
EXT_PROC_CLUSTER = "extproc_queue"
FILTERS = "type.googleapis.com/envoy.extensions.filters.http."
BUFFER = "envoy.filters.http.buffer"


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What the bootstrap needs beyond the sidecar's configuration.

    Attributes:
        http: host:port of Envoy's listener.
        admin: host:port of Envoy's admin interface.
        access_log: path of a JSON access log; None: no log.
        upstream_protocol: what the endpoints speak, "h1" or "h2" (prior knowledge).
        fail_open: what happens while no sidecar answers: True: requests go to any endpoint; False: they get 503.
        sidecars: where Envoy finds sidecars, as in `listen`; none: where the configuration says that this one listens.
        unqueued: exact paths that go past the queue, to any endpoint: for probes, which must not get its refusals.
    """

    http: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:9901"
    access_log: str | None = "/dev/stdout"
    upstream_protocol: str = "h1"
    fail_open: bool = False
    sidecars: tuple[str, ...] = ()
    unqueued: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A bootstrap by what its dialect has of its own. Texts are YAML, whole lines at their place's indent.

    Attributes:
        title: by what it was written, and for whom.
        options: where Envoy listens, and what it logs.
        why: what is said above a key, by the key; without its `#` and indent.
        removed: the header that no client may send, as YAML writes it, and what the mutation is called.
        idle, message_timeout: durations, as Envoy writes them.
        log: the access log's fields.
        routes: of the only virtual host.
        filters, filters_behind: before ours; between ours and the router.
        response_attributes: what we are told of an answer.
        written: the headers that we write, as an expression.
        read: the headers that we read.
        received, forwarded: namespaces of metadata that we write, and that we are told; "": none.
        clusters: all of them.
        after_admin, codec, before_hosts, manager, retries, mode_override: further lines, in the order of their places.
    """

    title: str
    options: EnvoyOptions
    why: Mapping[str, str]
    removed: tuple[str, str]
    idle: str
    log: Mapping[str, str]
    routes: str
    filters: str
    filters_behind: str
    message_timeout: str
    response_attributes: str
    written: str
    read: Iterable[str]
    received: str
    forwarded: str
    clusters: str
    after_admin: str = ""
    codec: str = ""
    retries: str = ""
    mode_override: str = ""
    manager: str = ""
    before_hosts: str = ""

    def render(self) -> str:
        """Return the bootstrap."""
        options, removed = self.options, self.removed
        return f"""\
# Written by {self.title}
admin:
  address: {socket_address(options.admin)}
{self.after_admin}\
static_resources:
  listeners:
  - name: ingress
    address: {socket_address(options.http)}
    # A client that vanishes without a packet is noticed by TCP keepalive alone; else its request is held and then run.
    tcp_keepalive: {{keepalive_time: 30, keepalive_interval: 10, keepalive_probes: 3}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
{self.codec}\
          generate_request_id: true
          # Every answer tells its x-request-id, refusals too: what `extproc why` and the access log know it by.
          always_set_request_id_in_response: true
{self._why("stream_idle_timeout", 10)}\
          stream_idle_timeout: {self.idle}
{self._why("request_timeout", 10)}\
          request_timeout: 0s
{self._why("early_header_mutation_extensions", 10)}\
          early_header_mutation_extensions:
          - name: {removed[1]}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
              mutations:
              - remove: {removed[0]}
{access_log(options.access_log, self.log)}\
{local_replies(fail_open=options.fail_open)}\
          route_config:
            name: main
{self.before_hosts}\
            virtual_hosts:
            - name: all
              domains: ["*"]
{self._why("request_body_buffer_limit", 14)}\
              request_body_buffer_limit: {BODY_LIMIT}
              routes:
{self.routes}\
{self.manager}\
          http_filters:
{self._why("buffer", 10)}\
          - name: {BUFFER}
            typed_config:
              "@type": {FILTERS}buffer.v3.Buffer
              max_request_bytes: {BODY_LIMIT}
{self.filters}\
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": {FILTERS}ext_proc.v3.ExternalProcessor
              grpc_service:
{self._why("skip_envoy_headers", 16)}\
                envoy_grpc: {{cluster_name: {EXT_PROC_CLUSTER}, skip_envoy_headers: true}}
                timeout: 0s
{self._why("retry_policy", 16)}\
                retry_policy:
                  retry_on: connect-failure,reset,unavailable,cancelled
                  num_retries: 30
                  retry_back_off: {{base_interval: 0.2s, max_interval: 1s}}
{self.retries}\
{self._why("failure_mode_allow", 14)}\
              failure_mode_allow: true
{self._why("message_timeout", 14)}\
              message_timeout: {self.message_timeout}
{self._why("processing_mode", 14)}\
              processing_mode:
                request_header_mode: SEND
                response_header_mode: SEND
                request_body_mode: NONE
                response_body_mode: NONE
                request_trailer_mode: SKIP
                response_trailer_mode: SEND
{self.mode_override}\
              request_attributes: [request.time]
              response_attributes: [{self.response_attributes}]
{self._why("mutation_rules", 14)}\
              mutation_rules:
                disallow_all: true
                allow_expression: {{regex: {json.dumps(self.written)}}}
{self._why("forward_rules", 14)}\
              forward_rules:
                allowed_headers:
                  patterns:
{lines(18, [f"- {{exact: {json.dumps(name)}}}" for name in self.read])}\
              metadata_options:
                receiving_namespaces: {{untyped: [{self.received}]}}
{lines(16, [f"forwarding_namespaces: {{untyped: [{self.forwarded}]}}"] if self.forwarded else [])}\
{self.filters_behind}\
          - name: envoy.filters.http.router
            typed_config: {{"@type": {FILTERS}router.v3.Router}}

  clusters:
{self.clusters}"""

    def _why(self, key: str, indent: int) -> str:
        return comment(self.why.get(key, ""), indent)


def access_log(path: str | None, fields: Mapping[str, str]) -> str:
    """Return a JSON access log of `fields` at `path`, if any."""
    if path is None:
        return ""
    return f"""\
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {quoted(path)}
              log_format:
                json_format:
{lines(18, [f'{name}: "{value}"' for name, value in fields.items()])}"""


def sidecar_cluster(
    sidecars: Sequence[str], hosts: str, why: Mapping[str, str], *, more: str = "", tls: str = ""
) -> str:
    """Return the cluster of `sidecars`, which `hosts` lists; `more`: further keys; `why`: what is said above keys.

    Raises ConfigError where Envoy would refuse it.
    """
    return f"""\
  - name: {EXT_PROC_CLUSTER}
{_kind(sidecars)}\
    connect_timeout: 1s
    load_assignment:
      cluster_name: {EXT_PROC_CLUSTER}
{hosts}\
{more}\
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            max_concurrent_streams: 1024
{comment(why.get("max_outbound_control_frames", ""), 12)}\
            max_outbound_control_frames: 100000
            max_outbound_frames: 200000
{comment(why.get("connection_keepalive", ""), 12)}\
            connection_keepalive: {{interval: 5s, timeout: 3s}}
{tls}\
{comment(why.get("circuit_breakers", ""), 4)}\
    circuit_breakers:
      thresholds:
      - {{max_connections: 1000, max_requests: 100000, max_pending_requests: 100000, max_retries: 100000}}
"""


def _kind(sidecars: Sequence[str]) -> str:
    sockets = [one for one in sidecars if one.startswith("unix:")]
    named = [one for one in sidecars if one not in sockets and not has_ip(one)]
    if not named:
        return "    type: STATIC\n"
    if sockets:
        problem = f"{named[0]!r} is a name, and {sockets[0]!r} a unix socket: Envoy looks nothing up where there is one"
        raise ConfigError("sidecars", [problem])
    return """\
    # A name is looked up; one with IPv4 and IPv6 addresses, like localhost, is one sidecar.
    type: STRICT_DNS
    dns_lookup_family: V4_PREFERRED
"""


def has_ip(address: str) -> bool:
    """Tell whether nothing has to be looked up: Envoy knows a STATIC cluster at once, a DNS one after an answer."""
    try:
        ip_address(split_address(address)[0])
    except ValueError:
        return False
    return True


def quoted(text: str) -> str:
    """Return any text as YAML writes it, in ASCII. JSON's halves of what is beyond 16 bits are nothing to YAML."""
    return "".join(('"', *(f"\\U{ord(one):08x}" if one > "\uffff" else json.dumps(one)[1:-1] for one in text), '"'))


def socket_address(address: str) -> str:
    """Return `HOST:PORT` as Envoy writes an address, in YAML's flow style."""
    host, port = split_address(address)
    return f"{{socket_address: {{address: {json.dumps(host)}, port_value: {port}}}}}"


def sidecar_address(listen: str) -> str:
    """Return where the sidecar listens, the same way: `unix:PATH` or `HOST:PORT`."""
    if listen.startswith("unix:"):
        return f"{{pipe: {{path: {quoted(listen.removeprefix('unix:'))}}}}}"
    return socket_address(listen)


def comment(text: str, indent: int) -> str:
    """Return `text` as a comment, each line at this indent; "": none."""
    return lines(indent, [f"# {line}" for line in text.splitlines()])


def other_host(indent: int, *, attempts: int) -> str:
    """Return what has a retry go to a host that was not tried: so often one is drawn, if the last were."""
    return lines(
        indent,
        [
            "retry_host_predicate:",
            "- name: envoy.retry_host_predicates.previous_hosts",
            "  typed_config:",
            '    "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate',
            f"host_selection_retry_max_attempts: {attempts}",
        ],
    )


def lines(indent: int, texts: Iterable[str]) -> str:
    """Return lines, each at this indent."""
    return "".join(f"{' ' * indent}{line}\n" for line in texts)
