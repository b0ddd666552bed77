"""An Envoy of one's own: what docs/existing-envoy.md says to copy is all that it needs, and each part of it is needed.

A walk by that page's table ended with `route: unknown cluster 'unsteered'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.config import parse_config
from extproc.envoy.advice import advice
from extproc.envoy.bootstrap import render
from extproc.envoy.check import check_envoy
from extproc.envoy.skeleton import EnvoyOptions

from .kit.envoy import plain_bootstrap, validate

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[2] / "docs/existing-envoy.md"
SERVERS = {"llm_1": ("127.0.0.1:8001", "h1"), "llm_2": ("127.0.0.1:8002", "h1")}
CONFIG = parse_config(
    yaml.safe_dump(
        {
            "endpoints": [{"name": name, "address": address} for name, (address, _) in SERVERS.items()],
            "classes": [{"name": "default", "budget": "10m"}],  # longer than Envoy's stream_idle_timeout, 5 min
        }
    ),
    "file",
    {},
)
KIND = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


class Bootstrap:
    """The parts that people move from one bootstrap to another."""

    def __init__(self, text: str) -> None:
        self.whole: dict[str, Any] = yaml.safe_load(text)
        resources = self.whole["static_resources"]
        self.clusters: list[dict[str, Any]] = resources["clusters"]
        self.manager: dict[str, Any] = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        self.host: dict[str, Any] = self.manager["route_config"]["virtual_hosts"][0]
        self.filters: list[dict[str, Any]] = self.manager["http_filters"]

    def cluster(self, name: str) -> dict[str, Any]:
        return next(one for one in self.clusters if one["name"] == name)

    def filter(self, name: str) -> dict[str, Any]:
        return next(one for one in self.filters if one["name"] == f"envoy.filters.http.{name}")


def add_filter(name: str) -> Callable[[Bootstrap, Bootstrap], None]:
    return lambda own, wanted: own.filters.insert(-1, wanted.filter(name))


def add_cluster(name: str) -> Callable[[Bootstrap, Bootstrap], None]:
    return lambda own, wanted: own.clusters.append(wanted.cluster(name))


def of_the_manager(name: str) -> Callable[[Bootstrap, Bootstrap], None]:
    return lambda own, wanted: own.manager.update({name: wanted.manager[name]})


def split_the_route(own: Bootstrap, wanted: Bootstrap) -> None:
    steered, _, unsteered = wanted.host["routes"]
    own.host["routes"] = [steered, unsteered]


def idle_timeouts(own: Bootstrap, _: Bootstrap) -> None:
    for name in SERVERS:
        own.cluster(name)["typed_extension_protocol_options"][KIND]["common_http_protocol_options"] = {
            "idle_timeout": "4s"
        }


def buffer_limit(own: Bootstrap, wanted: Bootstrap) -> None:
    own.host["request_body_buffer_limit"] = wanted.host["request_body_buffer_limit"]


PARTS: dict[str, Callable[[Bootstrap, Bootstrap], None]] = {
    "the filter `envoy.filters.http.buffer`": add_filter("buffer"),
    "the filter `envoy.filters.http.ext_proc`": add_filter("ext_proc"),
    "the cluster `extproc_queue`": add_cluster("extproc_queue"),
    "with an `idle_timeout` below the server's": idle_timeouts,
    "the two routes": split_the_route,
    "the cluster `unsteered`": add_cluster("unsteered"),
    "`early_header_mutation_extensions`": of_the_manager("early_header_mutation_extensions"),
    "`stream_idle_timeout`": of_the_manager("stream_idle_timeout"),
    "the buffer limit": buffer_limit,
}


def problems_without(left_out: str, directory: Path) -> tuple[list[str], list[str]]:
    """Copy all parts but that one; return what `check` and Envoy say is wrong then, and what `check` warns of."""
    own = Bootstrap(plain_bootstrap("127.0.0.1:1", "127.0.0.1:2", SERVERS, directory / "access.log"))
    wanted = Bootstrap(render(CONFIG, EnvoyOptions()))
    for part, copy in PARTS.items():
        if part != left_out:
            copy(own, wanted)
    path = directory / "envoy.yaml"
    path.write_text(yaml.safe_dump(own.whole))
    is_taken, said = validate(path.read_text(), directory)
    return check_envoy(CONFIG, path) + ([] if is_taken else [said]), advice(CONFIG, path)


def test_an_envoy_with_all_parts_that_the_page_names_fits(tmp_path):
    needed = PAGE.read_text().partition("Good to have, and not needed")[0]
    assert [part for part in PARTS if part not in needed] == []
    assert problems_without("", tmp_path)[0] == []


@pytest.mark.parametrize("part", PARTS)
def test_an_envoy_without_one_of_them_does_not(part, tmp_path):
    assert problems_without(part, tmp_path) != problems_without("", tmp_path)
