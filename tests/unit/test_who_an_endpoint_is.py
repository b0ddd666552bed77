"""One server is one endpoint, whoever tells of it; and files that others can touch are not turned against us."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import EndpointSpec, Policy, Request
from extproc.config import Config, KubernetesConfig, parse_config
from extproc.config.types import is_ours
from extproc.endpoints.discovery.kubernetes import Kubernetes, ready_addresses
from extproc.endpoints.names import may_be_found, of_family
from extproc.envoy import bootstrap
from extproc.envoy.clusters import ClustersFile
from extproc.envoy.skeleton import EnvoyOptions
from extproc.envoy.upstreams import ANY_CLUSTER
from extproc.errors import ConfigError, StartError
from extproc.files import read_regular
from extproc.transport.completion.loop import TESTED
from extproc.transport.listener import Listener


def config(**keys: Any) -> Config:
    return parse_config(yaml.safe_dump(keys), "test", {})


def kubernetes(**keys: Any) -> KubernetesConfig:
    return KubernetesConfig.model_validate({"service": "vllm", **keys})


def slice_(*endpoints: Any, ports: tuple[tuple[str, Any], ...] = (("http", 8000),), **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "s"},
        "ports": [{"name": name, "port": port} for name, port in ports],
        "endpoints": list(endpoints),
        **more,
    }


def pod(name: str, address: str = "10.0.0.1", **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": name}}


# ---- what Kubernetes tells


@pytest.mark.parametrize(
    ("conditions", "is_there"),
    [
        ({}, True),
        ({"ready": True}, True),
        ({"ready": False}, False),
        ({"ready": True, "serving": False}, False),  # publishNotReadyAddresses: ready is always true
        ({"ready": True, "serving": True, "terminating": True}, False),
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": True, "terminating": False}, True),
    ],
)
def test_serving_and_terminating_decide_who_gets_requests(conditions, is_there):
    found = list(ready_addresses(slice_(pod("a", **conditions)), kubernetes(), set()))
    assert found == ([("a", "10.0.0.1:8000")] if is_there else [])


@pytest.mark.parametrize("ports", [[8000, 8001], ["rank-0", "rank-1"]])
def test_each_port_of_a_data_parallel_pod_is_an_endpoint(ports):
    there = slice_(pod("a"), ports=(("metrics", 9000), ("rank-0", 8000), ("rank-1", 8001)))
    found = list(ready_addresses(there, kubernetes(ports=ports), set()))
    assert found == [("a-8000", "10.0.0.1:8000"), ("a-8001", "10.0.0.1:8001")]


MALFORMED: list[Any] = [
    *(None, 7, "slice", [], {}, {"metadata": None}, {"metadata": {"name": "s"}, "endpoints": "none"}),
    slice_(None, "text", [], {"addresses": "10.0.0.9"}, {"addresses": [None]}, {"addresses": {"a": 1}}),
    slice_(pod("a pod"), {"addresses": ["no host!"]}, {"addresses": ["10.0.0.1"], "targetRef": "x"}),
    slice_({"addresses": ["10.0.0.1"], "conditions": [True]}, ports=()),
    slice_(pod("far"), ports=(("http", 70_000),)),
    slice_(pod("far"), ports=(("http", "8000"),)),
    slice_(pod("far")) | {"ports": "8000"},
]


@pytest.mark.parametrize("item", MALFORMED)
def test_an_item_that_makes_no_endpoint_is_left_out_and_the_rest_is_followed(item):
    counted: list[int] = []
    source = Kubernetes(kubernetes(), {}, counted.append)
    source._slices.items = {"bad": item, "good": slice_(pod("good", "10.0.0.7"))}
    for _ in range(2):  # told and counted once
        assert "good" in {endpoint.name for endpoint in source._endpoints()}
    assert counted[1:] == [0]


def test_what_is_left_out_is_counted(caplog):
    counted: list[int] = []
    source = Kubernetes(kubernetes(), {}, counted.append)
    source._slices.items = {"s": slice_(pod("a pod"), pod("good", "10.0.0.7"), None)}
    assert [endpoint.name for endpoint in source._endpoints()] == ["good"]
    assert counted == [2]
    assert "left out" in caplog.text


# ---- addresses


def test_a_name_with_addresses_of_both_families_is_one_server_unless_told_otherwise():
    both = ["10.0.0.1:1", "[fd00::1]:1"]
    assert of_family(both, "auto") == ["10.0.0.1:1"]
    assert of_family(both[1:], "auto") == ["[fd00::1]:1"]
    assert of_family(both, "ipv6") == ["[fd00::1]:1"]
    assert of_family(both, "ipv4") == ["10.0.0.1:1"]
    assert of_family(both, "any") == both


@pytest.mark.parametrize(
    ("address", "by_default"),
    [
        *(("10.0.0.1:1", True), ("[fd00::1]:1", True), ("8.8.8.8:1", True)),
        *(("127.0.0.1:1", False), ("[::1]:1", False), ("[::ffff:127.0.0.1]:1", False), ("169.254.169.254:80", False)),
        *(("0.0.0.0:1", False), ("[::]:1", False), ("[fe80::1]:1", False), ("224.0.0.1:1", False)),
        *(("localhost:1", False), ("example.org:1", False)),
    ],
)
def test_discovery_may_bring_no_address_of_this_machine_or_link(address, by_default):
    assert may_be_found(address, None) is by_default


def test_allowed_addresses_say_what_discovery_may_bring():
    assert may_be_found("127.0.0.1:1", ["127.0.0.0/8"])
    assert not may_be_found("10.0.0.1:1", ["127.0.0.0/8"])
    assert not may_be_found("[fd00::1]:1", ["10.0.0.0/8"])
    with pytest.raises(ConfigError, match=r"allowed_addresses\[0\]: must be a network like 10.0.0.0/8"):
        config(allowed_addresses=["10.0.0.0/99"])


@pytest.mark.parametrize(
    ("one", "other"), [("10.0.0.1:8000", "10.0.0.1:8000"), ("[fd00::1]:1", "[FD00:0::1]:1"), ("Host:1", "host:1")]
)
def test_two_endpoints_with_one_address_are_an_error_that_names_both(one, other):
    with pytest.raises(ConfigError, match=r"'b' and 'a'.*same address"):
        config(endpoints=[{"name": "a", "address": one}, {"name": "b", "address": other}])
    config(endpoints=[{"name": "a", "address": one}, {"name": "b", "address": "10.9.9.9:8000"}])


@pytest.mark.parametrize("name", ["unsteered", "extproc_queue", "extproc_any_endpoint", "extproc_new"])
@pytest.mark.parametrize("key", ["name", "cluster"])
def test_names_of_our_own_clusters_are_refused(key, name):
    with pytest.raises(ConfigError, match=rf"endpoints\[0\].{key}: '{name}' is kept for clusters of our own"):
        config(endpoints=[{"name": "a", "address": "10.0.0.1:1", key: name}])


def test_every_cluster_that_the_bootstrap_adds_has_a_name_kept_for_it():
    text = bootstrap.render(config(endpoints=[{"name": "a", "address": "10.0.0.1:1"}]), EnvoyOptions())
    clusters = yaml.safe_load(text)["static_resources"]["clusters"]
    assert {cluster["name"] for cluster in clusters if not is_ours(cluster["name"])} == {"a"}
    assert is_ours(ANY_CLUSTER)


# ---- models at zero replicas


def test_a_model_that_the_configuration_names_waits_while_it_has_no_endpoint_and_another_one_has():
    keys = {"envoy_clusters_file": "/c.yaml", "endpoints": [{"name": "a", "address": "h:1", "models": ["there"]}]}
    named = config(discovery=[{"dns": {"name": "x", "port": 1, "models": ["later"]}}], **keys)
    assert named.models == {"there", "later"}
    core = Controller(Policy(enable_queue=True))
    core.put_endpoint(EndpointSpec("a", models=frozenset({"there"})), 0.0)
    core.know_models(named.models, 0.0)
    waits, unknown = (Ticket(Request(id=model, arrived=0.0, model=model)) for model in ("later", "never"))
    core.offer(waits, 0.0)
    core.offer(unknown, 0.0)
    assert (waits.state, unknown.state) == (State.WAITING, State.LEFT)
    core.put_endpoint(EndpointSpec("b", models=frozenset({"later"})), 1.0)
    assert waits.state is State.LEASED


# ---- files

CLUSTER = """\
resources: [{name: %s, load_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address:
  {address: h, port_value: %s}}}}]}]}}]
"""


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "7", "[]", "resources: 7", "resources: [7]", "resources: [{name: 1}]", "a: 2024-13-45", "\x00"),
        "resources: " + "[" * 5000,
        CLUSTER % ("a", "many"),
        CLUSTER % ("[a]", "1"),
        CLUSTER % ("a", "70000"),
        (CLUSTER % ("a", "1")).replace(" h,", " a b,"),
        CLUSTER % ("a@10.0.0.1:1", "1"),
        CLUSTER % ("extproc_queue", "1"),
        "!!int abc",
    ],
)
def test_an_odd_clusters_file_is_written_anew(tmp_path, text, caplog):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert ClustersFile(str(path)).read() == {}
    assert "writing it anew" in caplog.text


def test_a_link_where_the_clusters_file_is_written_is_not_followed_and_a_narrowed_mode_stays(tmp_path):
    path, victim = tmp_path / "c.yaml", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".c.yaml.new").symlink_to(victim)
    file = ClustersFile(str(path))
    file.write({"a": "10.0.0.1:1"}, ["10.0.0.1:1"], config())
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    file.write({"b": "10.0.0.1:1"}, ["10.0.0.1:1"], config())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.read() == {"b": "10.0.0.1:1"}


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "s.lock").symlink_to(victim)
    with pytest.raises(StartError, match="symbolic link"):
        Listener(f"unix:{tmp_path}/s").bind(lambda _address, _credentials: 1)
    assert not victim.exists()


def test_only_regular_files_are_read_and_no_fifo_holds_us_up(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(b"12345")
    for name, problem in (("fifo", "no regular file"), ("long", "more than 4 bytes"), ("", "no regular file")):
        with pytest.raises(OSError, match=problem):
            read_regular(tmp_path / name, 4)
    assert read_regular(tmp_path / "long", 5) == b"12345"


# ---- gRPC


def test_grpcio_is_installed_only_in_versions_that_the_completion_queue_is_tested_with():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (lowest, above) = (".".join(map(str, version)) for version in TESTED)
    ranges = [line.removeprefix("grpcio") for line in project["dependencies"] if line.startswith("grpcio>")]
    assert ranges == [f">={lowest},<{above}"]
