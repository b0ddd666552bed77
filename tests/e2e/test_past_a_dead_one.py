"""What nobody steered, beside engines that take no connection: another one is asked, and no client hears of it."""

from __future__ import annotations

import os

import pytest

from extproc.envoy.bootstrap import BYPASS

from .kit.clients import complete_many
from .kit.commands import envoy_config, extproc
from .kit.envoy import Envoy, give_up_soon
from .kit.stack import local
from .kit.upstream import behave

LONG = os.environ.get("EXTPROC_LONG") == "1"
WAYS = {
    "the bypass": ([], {}),
    "the bypass, failing open": (["--fail-open"], {}),
    "the bypass by model": (["--fail-open"], {"b": {"models": ["m", "x"]}}),
    "no sidecar": (["--fail-open"], {}),
    "no sidecar by model": (["--fail-open"], {"b": {"models": ["m", "x"]}}),
    "no sidecar, a model that nobody lists": (["--fail-open"], {"a": {"models": ["x"]}}),
    "past the queue": (["--unqueued", "/v1/chat/completions"], {}),
    "the bypass, with a clusters file": ([], {}),
}


DEAD = {"one of three": ("a",), "two of three": ("a", "b")} if LONG else {"two of three": ("a", "b")}


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("way", WAYS)
def test_what_nobody_steered_loses_nothing_beside_a_dead_engine_and_runs_once(stack, tmp_path, way, dead):
    """18 to 83 of 100 got 503."""
    flags, models = WAYS[way]
    names = ("a", "b", "c")
    endpoints = {name: {"models": ["m"]} | models.get(name, {}) for name in names} if models else {}
    if "nobody" in way:
        endpoints |= {"b": {}, "c": {}}
        dead = ("b",)
    config = {"max_running_requests": 64}
    if "file" in way:
        config["envoy_clusters_file"] = str(tmp_path / "clusters.yaml")
    here = stack(upstreams=names, endpoints=endpoints, config=config)
    for name in dead:
        here.upstreams[name].down()
    http = local()
    addresses = ("--http", http, "--envoy-admin", local(), "--access-log", str(tmp_path / "front.log"))
    bootstrap = envoy_config("--config", here.sidecar.path, *flags, *addresses)
    path = tmp_path / "front.yaml"
    path.write_text(bootstrap)
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert checked.returncode == 0, checked.stdout
    with Envoy(give_up_soon(bootstrap), tmp_path, name="front") as front:
        if "bypass" in way:
            front.set_runtime(BYPASS, 100)
        elif "no sidecar" in way:
            here.sidecar.child.stop()

        def statuses(name: str, gap_s: float) -> list[int]:
            def headers(number: int) -> dict[str, str]:
                asked = {"x-model": "m"} if models else {}
                return {"x-test-id": f"{name}{number}", **asked, **dict([behave("ok", wait_s=0.2)])}

            url = f"http://{http}/v1/chat/completions"
            return [one.status for one in complete_many(url, 40, headers, gap_s=gap_s)]

        assert statuses("burst", 0.0) == [200] * 40
        assert statuses("spread", 0.02) == [200] * 40
        met = [record.request_id for upstream in here.upstreams.values() for record in upstream.records()]
        assert len(met) == len(set(met)) == 80
