"""What no single key can tell: which keys need, or exclude, one another."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from extproc.config.types import is_ours, split_address

if TYPE_CHECKING:
    from extproc.config.keys import Config

LONGEST_BUDGET_S = 3500.0
"""Envoy refuses a message_timeout above 3600 s, and ours must lie above the longest budget."""
_NOT_OURS = frozenset(
    ("host", "connection", "content-length", "content-type", "transfer-encoding", "te", "upgrade", "x-request-id")
)
"""Headers that can't carry our routing decision: Envoy refuses to set them, or other things break."""


def cross_check(config: Config) -> list[str]:
    """Check what no single key can tell."""
    problems = []
    for section, what, names in (
        ("endpoints", "name", [endpoint.name for endpoint in config.endpoints]),
        ("endpoints", "cluster", [endpoint.cluster or endpoint.name for endpoint in config.endpoints]),
        ("classes", "name", [klass.name for klass in config.classes]),
        ("overflow_clusters", "name", [one.name for one in config.overflow_clusters]),
        ("tenants.named", "name", [] if config.tenants is None else [one.name for one in config.tenants.named]),
    ):
        for index, name in enumerate(names):
            first = names.index(name)
            if first != index:
                problems.append(
                    f"{section}[{index}].{what}: {name!r} is taken by {section}[{first}]; each must be unique"
                )
    problems += _check_who(config) + _check_picker(config) + _check_objectives(config)
    for index, klass in enumerate(config.classes):
        if klass.budget_s > LONGEST_BUDGET_S:
            problems.append(
                f"classes[{index}].budget: {klass.budget_s:g}s is above what Envoy's message_timeout can cover "
                f"(at most 3600s); {LONGEST_BUDGET_S:g}s or less works"
            )
    weighted = {klass.priority: index for index, klass in enumerate(config.classes) if klass.weight is not None}
    problems += [
        f"classes[{index}].weight: is needed, as classes[{weighted[klass.priority]}] of the same priority has one"
        for index, klass in enumerate(config.classes)
        if klass.weight is None and klass.priority in weighted
    ]
    alone_s = config.no_endpoint_budget
    if alone_s is not None and config.longest_budget_s > LONGEST_BUDGET_S >= config.longest_budget_s - alone_s:
        problems.append(
            f"no_endpoint_budget: {alone_s:g}s and the longest budget after it are above what Envoy's message_timeout "
            f"can cover (at most 3600s); together {LONGEST_BUDGET_S:g}s or less works"
        )
    if config.gpu_utilization_perc is not None and not any(one.gpu_metrics_url for one in config.endpoints):
        problems.append(
            "gpu_utilization_perc: needs gpu_metrics_url at one endpoint at least; without it nothing tells GPU use"
        )
    problems += _check_discovery(config) + _check_replicas(config) + _check_second_try(config) + _check_overflow(config)
    if config.headers.cluster in _NOT_OURS:
        problems.append(
            f"headers.cluster: {config.headers.cluster!r} has a meaning of its own in HTTP or Envoy; one like "
            "'x-upstream-cluster' works"
        )
    names = [name for _, role in config.headers for name in (role if isinstance(role, list) else [role])]
    problems += [
        f"headers: {name!r} is used for two things; each needs a header of its own"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    return problems + _check_ports(config)


def _check_who(config: Config) -> list[str]:
    """Check that each endpoint is one server, behind a cluster of its own."""
    problems, first = [], dict[str, int]()
    for index, endpoint in enumerate(config.endpoints):
        where = f"endpoints[{index}]"
        same = first.setdefault(_canonical(endpoint.address), index)
        if same != index:
            problems.append(
                f"{where}.address: {endpoint.name!r} and {config.endpoints[same].name!r} (endpoints[{same}]) have the "
                f"same address, {endpoint.address}: one server needs one endpoint, else it gets both limits"
            )
        key = "cluster" if endpoint.cluster is not None else "name"
        if is_ours(endpoint.cluster or endpoint.name):
            problems.append(
                f"{where}.{key}: {endpoint.cluster or endpoint.name!r} is kept for clusters of our own ('unsteered', "
                "and all that begin with 'extproc_'); choose another"
            )
    return problems


def _check_picker(config: Config) -> list[str]:
    """Check what a gateway that takes addresses needs."""
    if not config.picks:
        return []
    problems = []
    if config.envoy_clusters_file is not None:
        problems.append(
            "envoy_clusters_file: is for dialect: cluster-header; an endpoint picker names addresses, and who asks "
            "it knows them; leave it out"
        )
    for index, endpoint in enumerate(config.endpoints):
        try:
            ip_address(split_address(endpoint.address)[0])
        except ValueError:
            problems.append(
                f"endpoints[{index}].address: {endpoint.address!r} is a name, and a gateway takes addresses alone "
                "(dialect: endpoint-picker); one like 10.0.0.7:8000, or discovery by dns, would be right"
            )
        if endpoint.cluster is not None:
            problems.append(
                f"endpoints[{index}].cluster: means nothing here: the gateway is told the address (dialect: "
                "endpoint-picker); leave it out"
            )
    return problems


def _check_objectives(config: Config) -> list[str]:
    """Check that no objective means two classes; one with the name of a class means that class."""
    meant = {one.name: f"the name of classes[{index}]" for index, one in enumerate(config.classes)}
    problems = []
    for index, klass in enumerate(config.classes):
        for objective in klass.objectives:
            if objective in meant:
                problems.append(
                    f"classes[{index}].objectives: {objective!r} is {meant[objective]}; each means one class"
                )
            meant[objective] = f"in classes[{index}].objectives already"
    return problems


def _canonical(address: str) -> str:
    host, port = split_address(address)
    try:
        return f"{ip_address(host)} {port}"
    except ValueError:
        return f"{host.lower()} {port}"


def _check_own_addresses(config: Config) -> list[str]:
    """Check that no two of our servers would bind one port: a start would end there."""
    own = [("listen", config.listen), ("admin", config.admin)]
    if config.replicas is not None:
        own.append(("replicas.listen", config.replicas.listen))
    problems = []
    for index, (key, address) in enumerate(own):
        for other, taken in own[:index]:
            if _would_meet(address, taken):
                problems.append(f"{key}: {address!r} is taken by {other}; each needs a port of its own")
    return problems


def _would_meet(one: str, other: str) -> bool:
    """Tell whether one of two can't be bound once the other is."""
    if one.startswith("unix:") or other.startswith("unix:"):
        return one == other
    (host, port), (other_host, other_port) = split_address(one), split_address(other)
    is_one_family = (":" in host) is (":" in other_host)
    anywhere = is_one_family and not {host, other_host}.isdisjoint(("0.0.0.0", "::"))
    return port == other_port != 0 and (anywhere or _canonical(one) == _canonical(other))  # 0: any that is free


def _check_ports(config: Config) -> list[str]:
    problems = _check_own_addresses(config)
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
    for key, path in (("cert_file", config.tls.cert_file), ("key_file", config.tls.key_file)):
        if (path is None) is not config.tls.self_signed:
            right = "leave it out: with self_signed we make one" if config.tls.self_signed else "is required"
            problems.append(f"tls.{key}: {right}")
    if config.listen.startswith("unix:"):
        problems.append("tls: a unix socket needs none, its socket_mode says who may connect; leave one of them out")
    envoy = config.tls.envoy
    if envoy is not None and (envoy.cert_file is None) is not (envoy.key_file is None):
        problems.append("tls.envoy: needs both or none of cert_file and key_file")
    elif envoy is not None and envoy.cert_file is None and config.tls.client_ca_file is not None:
        problems.append("tls.envoy.cert_file: is needed, and key_file: tls.client_ca_file asks Envoy for a certificate")
    return problems


def _check_replicas(config: Config) -> list[str]:
    replicas = config.replicas
    if replicas is None:
        return []
    problems = []
    if (replicas.valkey is None) is (replicas.kubernetes_lease is None):
        problems.append("replicas: needs one of valkey and kubernetes_lease, by which sidecars find each other")
    if replicas.tls is None and not replicas.allow_insecure and not _is_local(replicas.listen):
        problems.append(
            f"replicas.listen: {replicas.listen!r} can be reached from other machines in plain text; set replicas.tls, "
            "use loopback, or set replicas.allow_insecure: true"
        )
    host, _ = split_address(replicas.reached_at)
    if host in ("0.0.0.0", "::"):
        problems.append(f"replicas.advertise: is needed: nobody can connect to {replicas.reached_at!r}")
    return problems


def _check_discovery(config: Config) -> list[str]:
    problems = []
    if config.discovery and config.envoy_clusters_file is None and not config.picks:
        problems.append("discovery: needs envoy_clusters_file; without it Envoy can't know the endpoints found")
    if config.inference_pool is not None and not config.picks:
        problems.append(
            f"inference_pool: is for gateways that ask an endpoint picker, not for dialect: {config.dialect}; leave "
            "one of them out (for an Envoy of your own: discovery by kubernetes, from a Service of the same pods)"
        )
    for index, source in enumerate(config.discovery):
        where = f"discovery[{index}]"
        if (source.dns is None) is (source.kubernetes is None):
            problems.append(f"{where}: needs one of dns and kubernetes")
        found = source.kubernetes
        if found is not None and found.port is not None and found.ports is not None:
            problems.append(f"{where}.kubernetes: takes one of port and ports, not both")
        if source.dns is not None and (source.dns.port is None) is (source.dns.ports is None):
            problems.append(f"{where}.dns: needs one of port and ports")
        if found is not None and (found.service is None) is (found.selector is None):
            problems.append(f"{where}.kubernetes: needs one of service and selector")
    return problems


def ip_of(address: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address of host:port; None: it has a name."""
    try:
        return ip_address(split_address(address)[0])
    except ValueError:
        return None


def _check_overflow(config: Config) -> list[str]:
    names = {one.name for one in config.overflow_clusters}
    of_endpoints = {one.cluster or one.name for one in config.endpoints}
    problems = [
        f"classes[{index}].on_refusal.cluster: {klass.on_refusal.cluster!r} is none of overflow_clusters"
        for index, klass in enumerate(config.classes)
        if klass.on_refusal is not None and klass.on_refusal.cluster not in names
    ]
    problems += [
        f"overflow_clusters[{index}].name: {one.name!r} is an endpoint's cluster, or ours: nobody would count it there"
        for index, one in enumerate(config.overflow_clusters)
        if one.name in of_endpoints or is_ours(one.name)
    ]
    if names and config.picks:
        problems.append("overflow_clusters: are Envoy's; a gateway that asks a picker knows endpoints alone")
    return problems


def _check_second_try(config: Config) -> list[str]:
    address = config.second_try
    if address is None:
        return []
    if config.picks:
        return ["second_try: is for our own Envoy configuration; a gateway that asks a picker retries by itself"]
    if ip_of(address) is None:
        return [f"second_try: must have an IP address, which Envoy compares, like 127.0.0.1:8080, not {address!r}"]
    return []


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
