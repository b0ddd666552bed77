"""The contenders as processes: what stands before the engines of one stack, each set as its operator would set it.

A contender's name is one of NAMES, of the peers that are installed on demand (peers.py), or NAME=FILE (rival.py);
`ours` and `original` take config keys after commas, `ours,scrape_interval=5s`, and several gateways (gateways.py);
`haproxy` its number and its waits, `haproxy,limit=10,queue=600ms:1600ms:14600ms`: one for all, or one for each class,
the most urgent first, which needs HAProxy 3.4.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench.proof import gateways, peers, rival
from extproc.config import parse_config
from extproc.durations import format_duration
from extproc.envoy.bootstrap import render
from extproc.envoy.skeleton import EnvoyOptions
from extproc.simulate.contenders import BEST_FIXED, ENGINE_QUEUE, HAPROXY_QUEUE_S
from tests.e2e.kit.envoy import envoy_binary
from tests.e2e.kit.processes import Child, free_port, http_get, http_ok, tcp_open

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from extproc.simulate.workload import Klass

NAMES = ("round_robin", "least_request", "circuit_breaker", "tuned_engine", "haproxy", "original", "ours")
HAPROXY = os.environ.get("HAPROXY") or shutil.which(
    "haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
)
"""The program; `HAPROXY=` names another."""
CHECK = {"path": "/health", "interval": "1s", "timeout": "1s", "down": 3, "up": 1}
"""Active health checks of all balancers. `ours` has none by default: failures tell it."""
NEVER_S = 3500.0
READY_S = 90.0
"""Forty processes of a round that start at once take turns on two cores."""
_EXTENSIONS = "type.googleapis.com/envoy.extensions"


def engine_params(contender: str, preset: str) -> dict[str, Any]:
    """Return how the engines are started for a contender: the preset, but for the one that tunes them."""
    kind = "tuned" if contender == "tuned_engine" else peers.engines(contender)
    if kind == "plain":
        return {"preset": preset}
    if kind == "priority":
        return {"preset": preset, "scheduling_policy": "priority"}
    limit = BEST_FIXED[preset]
    return {
        "preset": preset,
        "scheduling_policy": "priority",
        "max_num_seqs": limit,
        "max_num_queued": limit + ENGINE_QUEUE[preset],
    }


class Front:
    """One contender before engines at `addresses`.

    Attributes:
        address: where clients send.
        gateways: each address where clients send; more than one where there are several gateways.
        children: its processes, by kind; of several of a kind, the others have `#1`, `#2` and so on behind it.
    """

    def __init__(
        self,
        contender: str,
        preset: str,
        addresses: Sequence[str],
        classes: Sequence[Klass],
        directory: Path,
    ) -> None:
        """Write its configuration; start nothing. `directory` takes that and the logs."""
        self.contender = contender
        self.address = f"127.0.0.1:{free_port()}"
        self.gateways = [self.address]
        self.group: gateways.Group | None = None
        self.children: dict[str, Child] = {}
        self._ready: list[tuple[Child, Callable[[], bool]]] = []
        name, *settings = contender.split(",")
        match name:
            case _ if rival.is_own(contender):
                self._own(Path(contender.partition("=")[2]), addresses, classes, directory)
            case "haproxy":
                path = directory / "haproxy.cfg"
                path.write_text(haproxy_config(self.address, addresses, classes, preset, settings))
                self._add("front", [str(HAPROXY), "-db", "-f", str(path)], directory)
                self._ready.append((self.children["front"], lambda: tcp_open(self.address)))
            case "smg" | "vllm_router":
                argv = peers.argv(contender, self.address, addresses, classes, CHECK, directory)
                self._add("front", argv, directory)
                self._ready.append(
                    (self.children["front"], lambda: peers.ready(contender, self.address, len(addresses)))
                )
            case "ours" | "original":
                self._ours(name, gateways.among(settings), addresses, classes, directory)
            case _:
                admin = f"127.0.0.1:{free_port()}"
                bootstrap = balancer_config(name, self.address, admin, addresses, preset)
                self._envoy(yaml.safe_dump(bootstrap, sort_keys=False), admin, directory)

    def _ours(
        self, name: str, among: gateways.Among, addresses: Sequence[str], classes: Sequence[Klass], directory: Path
    ) -> None:
        self.gateways += [f"127.0.0.1:{free_port()}" for _ in range(among.count - 1)]
        if among.has_store:
            self.group = gateways.Group(among, directory)
            self.group.store = self._add("store", self.group.argv, directory)
            self._ready.append((self.group.store, self.group.store_is_up))
        for number, address in enumerate(self.gateways):
            keys = sidecar_config(name, addresses, classes) | among.keys
            keys |= self.group.keys() if self.group is not None else {}
            path = directory / f"sidecar{_number(number)}.yaml"
            path.write_text(yaml.safe_dump(keys, sort_keys=False))
            config = parse_config(path.read_text(), str(path), {})
            argv = [sys.executable, "-m", "extproc", "serve", "--config", str(path)]
            sidecar = self._add(f"sidecar{_number(number)}", argv, directory)
            self._ready.append((sidecar, partial(http_ok, config.admin, "/readyz")))
            admin = f"127.0.0.1:{free_port()}"
            self._envoy(render(config, EnvoyOptions(address, admin, None)), admin, directory, number)
            if self.group is not None:
                self.group.sidecars[config.admin] = sidecar
        if self.group is not None:
            self._ready += [(one, partial(self.group.knows_all, at)) for at, one in self.group.sidecars.items()]

    def events(self) -> Sequence[gateways.Event]:
        """Return what happens to its processes, and when."""
        return self.group.events() if self.group is not None else []

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that its processes used so far, by kind."""
        kinds = dict.fromkeys((name.partition("#")[0] for name in self.children), 0.0)
        for name, child in self.children.items():
            kinds[name.partition("#")[0]] += cpu_s(child)
        return kinds

    def _own(self, recipe: Path, addresses: Sequence[str], classes: Sequence[Klass], directory: Path) -> None:
        for name, argv, ready in rival.prepare(rival.read(recipe), self.address, addresses, classes, directory):
            self._add(name, argv, directory)
            address, _, path = ready.removeprefix("http://").partition("/")
            if ready.startswith("http://"):
                self._ready.append((self.children[name], partial(http_ok, address, f"/{path}")))
            else:
                self._ready.append((self.children[name], partial(tcp_open, address)))

    def _envoy(self, text: str, admin: str, directory: Path, number: int = 0) -> None:
        name = f"front{_number(number)}"
        path = directory / f"envoy{_number(number)}.yaml"
        path.write_text(text)
        options = ["--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
        front = self._add(name, [str(envoy_binary()), "-c", str(path), *options], directory)
        # Not just any Envoy on that port: the one with this file.
        self._ready.append((front, lambda: http_ok(admin, "/ready") and _says(admin, str(path))))

    def _add(self, name: str, argv: list[str], directory: Path) -> Child:
        child = self.children[name] = Child(argv, directory / f"{name}.log", name=f"{self.contender} {name}")
        return child

    def start(self) -> None:
        """Start the processes; `wait` says when they are ready."""
        for child in self.children.values():
            child.start()

    def wait(self) -> None:
        """Wait until it takes requests. Raises AssertionError if a process ended, or a port is somebody else's."""
        for child, probe in self._ready:
            child.wait_ready(probe, READY_S)
        for child in self.children.values():
            if child.returncode is not None:
                raise AssertionError(f"{child!r}; its output:\n{child.output()[-2000:]}")

    def stop(self) -> None:
        """End the processes."""
        for child in self.children.values():
            child.stop()


def _says(admin: str, text: str) -> bool:
    return text.encode() in http_get(admin, "/server_info")[1]


def cpu_s(child: Child) -> float:
    """Return the CPU seconds that a running child used so far."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


# ---- ours


def sidecar_config(name: str, addresses: Sequence[str], classes: Sequence[Klass]) -> dict[str, Any]:
    """Return the config file of `ours`, defaults but for what a site must say, or of `original`."""
    keys: dict[str, Any] = {
        "listen": f"127.0.0.1:{free_port()}",
        "admin": f"127.0.0.1:{free_port()}",
        "enable_queue": True,
        "classes": [
            {"name": klass.name, "priority": klass.priority, "budget": format_duration(klass.budget_s)}
            for klass in classes
        ],
        "endpoints": [{"name": f"engine-{number}", "address": address} for number, address in enumerate(addresses)],
    }
    if name == "ours":
        return keys
    # A home on arrival, ten requests, ten seconds, a look at the gauges every thirty; no KV or prompt books, no budget.
    for klass in keys["classes"]:
        klass["budget"] = format_duration(NEVER_S)
    for endpoint in keys["endpoints"]:
        endpoint["kv_capacity_tokens"] = 1_000_000_000
    return keys | {
        "binding": "bound",
        "max_running_requests": 10,
        "max_queue_wait_time": "10s",
        "scrape_interval": "30s",
        "telemetry_stale_after": "90s",
        "max_prompt_tokens": 1_000_000_000,
        "shed": False,
        "tenant_fairness": False,
    }


def _number(number: int) -> str:
    return f"#{number}" if number else ""


# ---- Envoy alone


def balancer_config(name: str, listen: str, admin: str, addresses: Sequence[str], preset: str) -> dict[str, Any]:
    """Return the bootstrap of an Envoy without a sidecar: health checks, and another host after a failed connect."""
    route = {
        "cluster": "engines",
        "timeout": "0s",
        "retry_policy": {
            "retry_on": "connect-failure",
            "num_retries": 2,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {"@type": f"{_EXTENSIONS}.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
                }
            ],
            "host_selection_retry_max_attempts": 3,
        },
    }
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"},
            }
        ],
    }
    cluster: dict[str, Any] = {
        "name": "engines",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": "engines",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket(address)}} for address in addresses]}],
        },
        "health_checks": [
            {
                "interval": CHECK["interval"],
                "no_traffic_interval": CHECK["interval"],
                "timeout": CHECK["timeout"],
                "unhealthy_threshold": CHECK["down"],
                "healthy_threshold": CHECK["up"],
                "http_health_check": {"path": CHECK["path"]},
            }
        ],
        # Only `max_requests` is a breaker; a bound on connections would make Envoy hold requests in order of arrival.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 100_000,
                    "max_pending_requests": 100_000,
                    "max_requests": BEST_FIXED[preset] * len(addresses) if name == "circuit_breaker" else 100_000,
                }
            ]
        },
    }
    match name:
        case "round_robin":
            cluster["lb_policy"] = "ROUND_ROBIN"
        case "least_request" | "circuit_breaker":
            cluster["lb_policy"] = "LEAST_REQUEST"  # as it is by default: the better of two random hosts
        case "tuned_engine":
            kind = f"{_EXTENSIONS}.load_balancing_policies.least_request.v3.LeastRequest"
            policy = {
                "name": "least",
                "typed_config": {"@type": kind, "selection_method": "FULL_SCAN"},
            }
            cluster["load_balancing_policy"] = {"policies": [{"typed_extension_config": policy}]}
        case _:
            raise ValueError(f"no such contender: {name}; known are {', '.join(NAMES)}")
    return {
        "admin": {"address": _socket(admin)},
        "static_resources": {
            "listeners": [
                {
                    "name": "ingress",
                    "address": _socket(listen),
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [cluster],
        },
    }


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


# ---- HAProxy


def haproxy_config(
    listen: str, addresses: Sequence[str], classes: Sequence[Klass], preset: str, settings: Sequence[str] = ()
) -> str:
    """Return the configuration of HAProxy: its own queue, late binding, priority classes, the best limit per engine.

    No `maxqueue` beside `leastconn`: it would bind early. With one class nothing bids it wait for longer than that
    class can use, so its `timeout queue` is that class' budget. Raises ValueError for settings that it does not have.
    """
    wait_s = classes[0].budget_s if len(classes) == 1 else HAPROXY_QUEUE_S
    limit, waits = _haproxy_settings(settings, BEST_FIXED[preset], [f"{wait_s * 1000:.0f}ms"], len(classes))
    order = sorted(classes, key=lambda klass: -klass.priority)
    rules, each = [], []
    for place, klass in enumerate(order):
        which = f"if {{ req.hdr(x-request-class) -m str {klass.name} }}"
        rules.append(f"    http-request set-priority-class int({place}) {which}")
        if len(waits) > 1:
            each.append(f"    http-request set-timeout queue {waits[place]} {which}")
    servers = [f"    server engine-{number} {address}" for number, address in enumerate(addresses)]
    return f"""\
global
    maxconn 5000
    nbthread 1
defaults
    mode http
    timeout connect 1s
    timeout client 3600s
    timeout server 3600s
    timeout queue {waits[-1]}
    option abortonclose
    option redispatch 1
    option http-no-delay
    retries 3
frontend ingress
    bind {listen}
{chr(10).join(rules) if len(classes) > 1 else ""}
    default_backend engines
backend engines
    balance leastconn
{chr(10).join(each)}
    option httpchk GET {CHECK["path"]}
    default-server check inter {CHECK["interval"]} fall {CHECK["down"]} rise {CHECK["up"]} maxconn {limit}
{chr(10).join(servers)}
"""


def _haproxy_settings(settings: Sequence[str], limit: int, waits: list[str], classes: int) -> tuple[int, list[str]]:
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "limit":
            limit = int(value)
        elif key == "queue" and value.count(":") in (0, classes - 1):
            waits = value.split(":")
        else:
            raise ValueError(
                f"haproxy: {setting!r} is none of limit=N, queue=WAIT, queue=WAIT:... with one for each class"
            )
    return limit, waits


# ---- what engines counted


def engine_counts(address: str) -> Mapping[str, Any]:
    """Return an engine's own figures since its start."""
    status, body = http_get(address, "/debug/peaks", timeout_s=10)
    if status != 200:
        raise AssertionError(f"engine {address}: /debug/peaks answered {status}")
    counts: dict[str, Any] = json.loads(body)
    return counts
