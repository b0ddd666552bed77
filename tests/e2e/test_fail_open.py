"""`--fail-open` where servers have different models: what no sidecar steered goes to one that has the request's."""

from __future__ import annotations

import json

import pytest

from extproc.envoy.bootstrap import BYPASS

from .kit.clients import complete_many
from .kit.commands import envoy_config, extproc
from .kit.envoy import Envoy, give_up_soon
from .kit.stack import local

FORM = 'multipart/form-data; boundary="b"'


def form(model: str) -> bytes:
    return f'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\n{model}\r\n--b--\r\n'.encode()


@pytest.mark.parametrize("is_bypassed", [False, True], ids=["no sidecar", "bypass"])
def test_each_model_is_served_by_who_has_it_while_no_sidecar_is_asked(stack, tmp_path, is_bypassed):
    """It went to any endpoint: of 12 requests 5 got 404, which clients take for good."""
    shared, own = "meta-llama/Llama-3.1-8B", 'odd"\\|name'
    models = {"a": {"models": [shared, own]}, "b": {"models": [shared]}, "c": {"models": ["qwen"]}}
    config = {"request_fields": True, "headers": {"model": ["x-model", "x-llm"]}}
    here = stack(upstreams=("a", "b", "c"), endpoints=models, config=config)
    http = local()
    addresses = ("--http", http, "--envoy-admin", local())
    bootstrap = envoy_config("--config", here.sidecar.path, "--fail-open", *addresses)
    path = tmp_path / "open.yaml"
    path.write_text(bootstrap)
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    assert (checked.returncode, checked.stderr) == (0, "")
    if not is_bypassed:
        here.sidecar.child.stop()

    def reached(name: str, body: bytes = b"{}", **headers: str) -> set[str]:
        answers = complete_many(
            f"http://{http}/v1/chat/completions", 6, lambda n: {"x-test-id": f"{name}{n}", **headers}, body=body
        )
        assert {(one.status, one.headers["x-extproc-outcome"]) for one in answers} == {(200, "unsteered")}
        return {name_ for name_ in here.upstreams for n in range(6) if here.upstreams[name_].seen(f"{name}{n}")}

    with Envoy(give_up_soon(bootstrap), tmp_path, name="open") as envoy:
        if is_bypassed:
            envoy.set_runtime(BYPASS, 100)
        for model, servers in ((shared, {"a", "b"}), (own, {"a"}), ("qwen", {"c"})):
            in_body = json.dumps({"model": model}).encode()
            kind = {"content-type": "application/json"}
            asked = (
                reached(f"body-{model}", in_body, **kind),
                reached(f"form-{model}", form(model), **{"content-type": FORM}),
                reached(f"head-{model}", b"{}", **kind, **{"x-llm": model}),
                reached(f"wins-{model}", b'{"model": "qwen"}', **kind, **{"x-model": model}),
            )
            assert set.union(*asked) == servers  # each alone may have met one of two by chance
            assert all(asked)
        met = {
            name for turn in range(6) for name in reached(f"none-{turn}-")
        }  # drawn: one of three may be missed by 12
        assert met == {"a", "b", "c"}, "whoever is asked, without a model"


def test_where_a_file_tells_envoy_who_is_there_it_is_said_that_any_server_is_asked(stack, tmp_path):
    models = {"a": {"models": ["llama"]}, "b": {"models": ["qwen"]}}
    clusters = {"envoy_clusters_file": str(tmp_path / "clusters.yaml")}
    here = stack(upstreams=("a", "b"), endpoints=models, config=clusters)
    path = tmp_path / "open.yaml"
    path.write_text(envoy_config("--config", here.sidecar.path, "--fail-open"))
    rendering = extproc("envoy-config", "--config", here.sidecar.path, "--fail-open")
    checked = extproc("check", here.sidecar.path, "--envoy", path)
    for done in (rendering, checked):
        assert done.returncode == 0
        assert "one lacking its model answers 404" in done.stderr


@pytest.mark.parametrize("default", [None, "qwen"])
def test_a_request_without_a_model_goes_to_the_default_one_if_there_is_one(stack, tmp_path, default):
    models = {"a": {"models": ["llama"]}, "b": {"models": ["qwen"]}}
    here = stack(upstreams=("a", "b"), endpoints=models, config={"default_model": default} if default else {})
    http = local()
    bootstrap = envoy_config("--config", here.sidecar.path, "--fail-open", "--http", http, "--envoy-admin", local())
    here.sidecar.child.stop()
    with Envoy(give_up_soon(bootstrap), tmp_path, name="open"):
        answers = complete_many(f"http://{http}/v1/chat/completions", 40, lambda n: {"x-test-id": f"r{n}"})
    assert {answer.status for answer in answers} == {200}
    assert bool(here.upstreams["a"].records()) is (default is None)
