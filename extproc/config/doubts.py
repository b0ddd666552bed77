"""What in a valid configuration may not be what was meant: `extproc check` warns of it, and the log of a start."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from extproc.config.keys import Config
from extproc.config.read import ENV_PREFIX, SECTIONS, load_yaml
from extproc.config.types import is_duration
from extproc.endpoints.telemetry.engines import engines_for
from extproc.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pydantic import BaseModel

    from extproc.config.endpoints import EndpointConfig, SourceConfig

_KUBERNETES = re.compile(r"EXTPROC_(.*_)?(SERVICE|PORT)(_.*)?")
"""What Kubernetes tells each pod of a service called extproc."""


def doubts(config: Config, path: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each doubt about `config`, which was read from `path` and `environ`."""
    data = load_yaml(read_text(path))
    found = [] if data else ["is empty: every key has its default"]
    found += [f"{where}: {value:g} is read as {value:g}s; write the unit" for where, value in _bare(data, Config, "")]
    return [*found, *_variables(environ), *_endpoints(config), *_tenants(config)]


def _variables(environ: Mapping[str, str]) -> Iterator[str]:
    for variable in sorted(environ):
        key = variable.removeprefix(ENV_PREFIX).lower().partition("__")[0]
        if variable.startswith(ENV_PREFIX) and key not in Config.model_fields and not _KUBERNETES.fullmatch(variable):
            yield f"environment variable {variable}: no such key; it does nothing"


def _endpoints(config: Config) -> Iterator[str]:
    if not config.endpoints and not config.sources:
        yield "no endpoints, and no discovery: every request will be refused"
    named = [endpoint for endpoint in config.endpoints if endpoint.models]
    key, reads = ("picker.read_model", config.picker.read_model) if config.picks else ("request_fields", False)
    if len({model for endpoint in named for model in endpoint.models}) > 1 and not (
        reads or config.request_fields or config.default_model
    ):
        yield (
            f"endpoints list models, and only the header {config.headers.model[0]} says which one a request wants, "
            "which OpenAI's clients don't send: they get 400, with the queue off, too; set "
            f"{key}: true, or default_model"
        )
    listed = {model for one in (*config.endpoints, *config.sources) for model in one.models}
    if config.default_model is not None and config.default_model not in listed and not config.expects_any:
        yield (
            f"default_model: no endpoint lists {config.default_model!r}, so who names no model waits for one in vain; "
            f"the models listed are {', '.join(sorted(listed)[:8])}{', ...' if len(listed) > 8 else ''}"
        )
    loopback: dict[str, int] = {}
    for index, endpoint in enumerate(config.endpoints):
        host, _, port = endpoint.address.rpartition(":")
        first = loopback.setdefault(port, index) if host in ("localhost", "127.0.0.1", "[::1]") else index
        if first != index:
            yield (
                f"endpoints[{index}].address: {endpoint.address} may be the server of endpoints[{first}], "
                f"{config.endpoints[first].address}, which would then get both limits"
            )
    if config.picks and config.picker.fallbacks and config.replicas is not None:
        yield (
            "picker.fallbacks: does nothing with replicas, since who leads keeps no room for them: each "
            "pick is one address; leave one of them out"
        )
    for where, one in _where_limits_are(config):
        why = _blind(one.engine, config)
        limit = config.max_running_requests if one.max_running_requests == "inherit" else one.max_running_requests
        if why is not None and limit is None and one.kv_capacity_tokens is None:
            yield (
                f"{where}.max_running_requests: nothing tells how full a server is ({why}), so its limit is guessed "
                "from how long answers take; set the number of requests that it batches (vLLM: --max-num-seqs), or "
                "kv_capacity_tokens where its KV cache is full before that"
            )


def _tenants(config: Config) -> Iterator[str]:
    tenants = config.tenants
    if tenants is None:
        return
    if tenants.named and config.tenant_fairness and "count_others" not in tenants.model_fields_set:
        yield (
            "tenants.count_others: is not set, so all tenants that are not named share one account, and one of them "
            'that floods takes the share of all; "apart" gives each its own, where clients can\'t write the header '
            f'{config.headers.tenant} themselves; "together" says that one is meant'
        )
    named = ((f"tenants.named[{index}]", one) for index, one in enumerate(tenants.named))
    for where, rules in (*named, ("tenants.others", tenants.others)):
        if rules.max_in_flight is not None and rules.guaranteed > rules.max_in_flight:
            yield (
                f"{where}.guaranteed: {rules.guaranteed} is above its max_in_flight, {rules.max_in_flight}, and so is "
                "never reached"
            )
    capped = any(one.max_in_flight is not None for one in (*tenants.named, tenants.others))
    if capped and not config.enable_queue and not config.dry_run:
        yield "tenants: max_in_flight holds for nobody while enable_queue is false"


def _blind(engine: str, config: Config) -> str | None:
    """Return why a limit can't be learned from what such a server tells; None: it can, or its page will show."""
    if engine == "none":
        return "engine: none"
    if config.scrape_interval == 0:
        return "scrape_interval: 0s"
    if engine != "auto" and not engines_for(engine)[0].tells_room:
        return f"engine: {engine}, whose page has no token rate and no batch size"
    return None


def _where_limits_are(config: Config) -> Iterator[tuple[str, EndpointConfig | SourceConfig]]:
    for index, endpoint in enumerate(config.endpoints):
        yield f"endpoints[{index}]", endpoint
    for index, item in enumerate(config.discovery):
        if item.dns is not None:
            yield f"discovery[{index}].dns", item.dns
        if item.kubernetes is not None:
            yield f"discovery[{index}].kubernetes", item.kubernetes
    if config.inference_pool is not None:
        yield "inference_pool", config.inference_pool


def _bare(data: object, section: type[BaseModel], path: str, at: str = "") -> Iterator[tuple[str, float]]:
    """Walk the durations that are written without a unit; `path` of a section in the model, `at` in the file."""
    if not isinstance(data, dict):
        return
    for name, field in section.model_fields.items():
        key = field.alias or name
        value, below = data.get(key), f"{path}.{key}".lstrip(".")
        here = f"{at}.{key}".lstrip(".")
        if is_duration(field):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                yield here, value
        elif below in SECTIONS:
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                yield from _bare(item, SECTIONS[below], below, f"{here}[{index}]" if isinstance(value, list) else here)
