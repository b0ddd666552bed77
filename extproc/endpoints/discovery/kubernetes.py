"""Kubernetes: the ready addresses of a service's EndpointSlices. watch.py lists and watches them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from extproc.endpoints.discovery.findings import Findings
from extproc.endpoints.discovery.watch import Watch
from extproc.endpoints.names import address_of, name_of
from extproc.kubernetes import ApiServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from extproc.config import EndpointConfig, KubernetesConfig
    from extproc.endpoints.discovery.watch import Item

    Report = Callable[[Sequence[EndpointConfig]], None]

log = logging.getLogger("extproc.discovery.kubernetes")

MOST_NAME = 128


class Kubernetes:
    """Lists and watches EndpointSlices."""

    def __init__(
        self,
        config: KubernetesConfig,
        environ: Mapping[str, str] = os.environ,
        leave_out: Callable[[int], None] = lambda _number: None,
    ) -> None:
        """Watch what `config` says; `environ` tells a pod where the API server is; `leave_out` counts."""
        self._config = config
        selector = config.selector or f"kubernetes.io/service-name={config.service}"
        self._slices: Watch[Item] = Watch(
            ApiServer(config, environ), "discovery.k8s.io/v1", "endpointslices", {"labelSelector": selector}, _whole
        )
        what = f"kubernetes {config.service or config.selector}"
        self._findings = Findings(log, what, config, leave_out)

    async def run(self, report: Report) -> None:
        """Watch for ever. Failures change nothing: what was seen stays until the server says otherwise."""
        await self._slices.run(lambda: report(self._endpoints()))

    # ---- slices to endpoints

    def _endpoints(self) -> list[EndpointConfig]:
        """Return each pod and port once: it may stand in several slices for a while, and in one per IP family."""
        found: dict[str, str] = {}
        problems: set[str] = set()
        seen = [
            pair for slice_ in self._slices.items.values() for pair in ready_addresses(slice_, self._config, problems)
        ]
        for name, address in sorted(seen):
            if name not in found or (found[name].startswith("[") and not address.startswith("[")):
                found[name] = address
        return self._findings.endpoints(found, problems)


def ready_addresses(slice_: Item, config: KubernetesConfig, problems: set[str]) -> Iterator[tuple[str, str]]:
    """Walk name and address of the endpoints of a slice that may be sent requests; add what is none to `problems`.

    A missing condition says yes, says the API. `serving` is the pod's readiness where `ready` is always true
    (publishNotReadyAddresses); what terminates is left out even while it still serves.
    """
    if not isinstance(slice_, dict) or not isinstance(slice_.get("metadata"), dict):
        problems.add("an item that is no EndpointSlice")
        return
    which = slice_["metadata"].get("name", "?")
    endpoints = slice_.get("endpoints") or []
    if not isinstance(endpoints, list):
        problems.add(f"slice {which!r:.100}: endpoints is no list")
        return
    numbers = _ports_of(slice_, config)
    several = config.ports is not None and len(config.ports) > 1
    for index, endpoint in enumerate(endpoints):
        try:
            conditions = endpoint.get("conditions") or {}
            is_ready = conditions.get("ready") is not False and conditions.get("serving") is not False
            if not is_ready or conditions.get("terminating") is True or not endpoint.get("addresses"):
                continue
            host = endpoint["addresses"][0]  # more than one is never used, says the API
            target = endpoint.get("targetRef") or {}
            pod = target.get("name") if target.get("kind") == "Pod" else None
        except (AttributeError, LookupError, TypeError):
            problems.add(f"slice {which!r:.100}, endpoint {index}")
            continue
        for number in numbers:
            address = address_of(str(host), number)
            name = f"{pod}-{number}" if several else str(pod)
            yield (name if pod and len(name) <= MOST_NAME else name_of(address)), address


def _ports_of(slice_: Item, config: KubernetesConfig) -> list[int]:
    """Return the numbers of the ports that are wanted, those that the slice names only if it has them."""
    ports = [port for port in _listed(slice_.get("ports")) if isinstance(port, dict)]
    if config.ports is None and config.port is None:
        numbers = [port.get("port") for port in ports][:1]
    else:
        wanted = [config.port] if config.ports is None else config.ports
        numbers = [number for one in wanted for number in ([one] if isinstance(one, int) else _named(ports, one))]
    return list(dict.fromkeys(number for number in numbers if isinstance(number, int)))


def _named(ports: list[dict[str, Any]], name: str | None) -> list[Any]:
    return [port.get("port") for port in ports if port.get("name") == name][:1]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(item: Item) -> Item:
    return item
