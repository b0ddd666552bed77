"""`extproc check --envoy` on the config dump of an Envoy that got all from a control plane: LDS, RDS, CDS, EDS."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from .kit.clients import complete_many
from .kit.commands import extproc

if TYPE_CHECKING:
    from pathlib import Path

TYPE = "type.googleapis.com/envoy.config."


def served(path: Path, kind: str, resources: list[dict[str, Any]]) -> dict[str, Any]:
    """Write resources to a file that Envoy follows, as a control plane would send them; return where it gets them."""
    path.write_text(json.dumps({"resources": [{"@type": TYPE + kind, **one} for one in resources]}))
    return {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}


def by_control_plane(bootstrap: dict[str, Any], directory: Path, edit: str) -> None:
    """Take all that is in the file out of it, into files of a control plane; with one mistake, if `edit` names one."""
    static = bootstrap["static_resources"]
    clusters = static.pop("clusters")
    for cluster in clusters:
        if cluster["name"] == "a":
            hosts = {**cluster.pop("load_assignment"), "cluster_name": "a.svc"}
            source = served(directory / "eds.json", "endpoint.v3.ClusterLoadAssignment", [hosts])
            cluster |= {"type": "EDS", "eds_cluster_config": {"service_name": "a.svc", "eds_config": source}}
            cluster.pop("dns_lookup_family", None)
            if edit == "hosts":
                hosts["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"] += 1
                served(directory / "eds.json", "endpoint.v3.ClusterLoadAssignment", [hosts])
    listeners = static.pop("listeners")
    for listener in listeners:
        listener["name"] = "inbound.all"
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        routes = {"name": "routes", **manager.pop("route_config")}
        if edit == "timeout":
            for route in (one for host in routes["virtual_hosts"] for one in host["routes"] if "route" in one):
                route["route"]["timeout"] = "20s"
        source = served(directory / "rds.json", "route.v3.RouteConfiguration", [routes])
        manager["rds"] = {"route_config_name": routes["name"], "config_source": source}
        if edit == "idle":
            manager["stream_idle_timeout"] = "7s"
    bootstrap.setdefault("node", {}).update(id="one", cluster="gateway")
    bootstrap["dynamic_resources"] = {
        "lds_config": served(directory / "lds.json", "listener.v3.Listener", listeners),
        "cds_config": served(directory / "cds.json", "cluster.v3.Cluster", clusters),
    }


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        ("", None),
        ("timeout", "].route.timeout: 20s from dispatch to the end of the answer cuts long answers"),
        (
            "idle",
            "listeners[inbound.all].filter_chains[0].filters[0].typed_config.stream_idle_timeout: 7s is not",
        ),
        ("hosts", "clusters[a].load_assignment"),
    ],
)
def test_what_came_from_a_control_plane_is_looked_at_in_its_dump(stack, tmp_path, edit, found):
    """All of it was "could not look at", and a dump "no Envoy bootstrap"."""
    here = stack(edit=lambda bootstrap: by_control_plane(bootstrap, tmp_path, edit))
    if edit != "hosts":
        assert [one.status for one in complete_many(here.url, 2, lambda _: {})] == [200, 200]
    path = tmp_path / "dump.json"
    path.write_text(here.front.envoy.get("/config_dump?include_eds"))
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    if found is None:
        assert (checked.returncode, checked.stderr) == (0, "")
        assert "ok: fits" in checked.stdout
    else:
        assert checked.returncode == 1
        assert found in checked.stderr


def test_the_dump_of_an_envoy_that_has_a_file_fits_as_the_file_does(stack, tmp_path):
    here = stack()
    path = tmp_path / "dump.json"
    path.write_text(here.front.envoy.get("/config_dump"))
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_dump_without_hosts_says_that_they_are_not_in_it(stack, tmp_path):
    here = stack(edit=lambda bootstrap: by_control_plane(bootstrap, tmp_path, ""))
    path = tmp_path / "dump.json"
    path.write_text(here.front.envoy.get("/config_dump"))
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert checked.returncode == 0
    assert "could not look at: hosts (they are not in the file): clusters[a]" in checked.stderr
