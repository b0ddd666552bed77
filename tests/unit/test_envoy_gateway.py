"""`extproc check --envoy` on what the Envoys of Inference Gateways run: what cuts, what skips the picker, which mode."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.commands.check import check
from extproc.config import parse_config
from extproc.envoy import picker
from extproc.envoy.filters import JSON_FIELDS
from extproc.envoy.gateway import Gateway
from extproc.envoy.skeleton import EnvoyOptions
from extproc.errors import ConfigError
from extproc.stream import wire
from tests.e2e.kit.gateways import bootstrap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = "{dialect: endpoint-picker, listen: 127.0.0.1:1, classes: [{name: a, budget: 60s}]}"


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Gateway]:
    def look(
        kind: str,
        edit: Callable[[dict[str, Any]], object] = lambda _: None,
        *,
        dumped: bool = False,
        config: str = CONFIG,
    ) -> Gateway:
        built = bootstrap(kind, "127.0.0.1:80", "127.0.0.1:9002", ["10.0.0.1:8000"], tmp_path / "log")
        edit(built)
        path = tmp_path / "dump.json"
        path.write_text(json.dumps(dump_of(built) if dumped else built))
        return Gateway(parse_config(config, "test", {}), path)

    return look


def dump_of(built: dict[str, Any]) -> dict[str, Any]:
    """The same as `/config_dump` gives it: each listener, cluster and route configuration apart."""
    manager = manager_of(built)
    routes = manager.pop("route_config")
    routes["name"] = "80"
    manager["rds"] = {"route_config_name": "80"}
    static = built["static_resources"]
    return {
        "configs": [
            {"dynamic_active_clusters": [{"cluster": one} for one in static["clusters"]]},
            {"dynamic_listeners": [{"active_state": {"listener": one}} for one in static["listeners"]]},
            {"dynamic_route_configs": [{"route_config": routes}]},
        ]
    }


def manager_of(built: dict[str, Any]) -> dict[str, Any]:
    (listener,) = built["static_resources"]["listeners"]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def route_of(built: dict[str, Any]) -> dict[str, Any]:
    route: dict[str, Any] = manager_of(built)["route_config"]["virtual_hosts"][0]["routes"][0]
    return route


def ext_proc_of(built: dict[str, Any]) -> dict[str, Any]:
    (found,) = [one for one in manager_of(built)["http_filters"] if "ext_proc" in one["name"]]
    config: dict[str, Any] = found["typed_config"]
    return config


@pytest.mark.parametrize("dumped", [True, False])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("istio", "full duplex"), ("istio-lean", "lean: two messages"), ("llm-d", "full duplex"),
     ("ai-gateway-buffered", "BUFFERED until we answer, then lean")],
)  # fmt: skip
def test_the_mode_of_each_route_is_told_and_what_fits_has_no_problem(look, kind, mode, dumped):
    found = look(kind, dumped=dumped)
    assert found.problems == []
    assert any(mode in note for note in (found.good if kind == "istio-lean" else found.notes)), found.notes
    assert bool(found.good) is (kind == "istio-lean"), "what is as it should be is no warning"
    assert any("1024 at most" in note for note in found.notes)


def test_check_tells_what_is_as_it_should_be_beside_ok_and_to_a_pipeline_as_info(tmp_path, look, capsys):
    look("istio-lean")
    file, dump = tmp_path / "sidecar.yaml", tmp_path / "dump.json"
    file.write_text(CONFIG.removesuffix("}") + ", endpoints: []}")
    check(file, dump, as_json=False)
    told = capsys.readouterr()
    assert "lean: two messages a request" in told.out
    assert "lean" not in told.err
    check(file, dump, as_json=True)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [one["severity"] for one in findings if "lean" in one["message"]] == ["info"]


@pytest.mark.parametrize(
    ("kind", "edit", "problem"),
    [
        ("istio-lean", lambda b: ext_proc_of(b).update(message_timeout="60s"), "message_timeout: 60s is not above"),
        ("llm-d", lambda b: manager_of(b).update(stream_idle_timeout="30s"), "stream_idle_timeout: 30s"),
        ("llm-d", lambda b: route_of(b)["route"].update(idle_timeout="5s"), "route.idle_timeout: 5s"),
        (
            "ai-gateway-buffered",
            lambda b: ext_proc_of(b).update(allow_mode_override=False),
            "answers come in one piece",
        ),
        ("istio", lambda b: route_of(b).pop("typed_per_filter_config"), "asks no picker"),
        ("istio", lambda b: manager_of(b)["http_filters"].pop(0), "no picker is asked at all"),
    ],
)
def test_what_cuts_a_hold_or_skips_the_picker_is_a_problem(look, kind, edit, problem):
    found = look(kind, edit)
    assert any(problem in one for one in found.problems), found.problems


READS = CONFIG.removesuffix("}") + ", picker: {read_model: true}}"


@pytest.mark.parametrize(
    ("kind", "finds"), [("istio", True), ("llm-d", True), ("ai-gateway-buffered", True), ("istio-lean", False)]
)
def test_where_no_body_comes_before_a_pick_read_model_is_told_to_find_none(look, kind, finds):
    found = look(kind, config=READS)
    assert found.problems == []
    assert any("so picker.read_model finds no model" in note for note in found.notes) is not finds
    assert not any("read_model" in note for note in look(kind).notes)


def test_of_bodies_that_are_buffered_for_read_model_it_is_told_that_they_come(look):
    assert any(
        "each request's body comes in one message" in one for one in look("ai-gateway-buffered", config=READS).notes
    )
    alone = look("ai-gateway-buffered", requests_alone)
    assert alone.problems == []
    assert any("each request's body comes in one message" in note for note in alone.notes)


def requests_alone(built: dict[str, Any]) -> None:
    """No mode may be overridden, and of an answer nothing is sent anyway."""
    ext_proc_of(built)["processing_mode"] = {**ext_proc_of(built)["processing_mode"], "response_body_mode": "NONE"}
    ext_proc_of(built)["allow_mode_override"] = False


def test_of_two_weighted_pools_each_is_judged_by_its_own_settings(look):
    def weigh(built: dict[str, Any]) -> None:
        route = route_of(built)
        asks = {"typed_per_filter_config": route.pop("typed_per_filter_config")}
        pools = [{"name": "pool", "weight": 3, **asks}, {"name": "other", "weight": 1, **asks}]
        route["route"] |= {"weighted_clusters": {"clusters": pools}}
        del route["route"]["cluster"]

    found = look("istio", weigh)
    assert found.problems == []
    assert len([note for note in found.notes if "full duplex: each" in note]) == 2
    found = look("istio-lean", lambda built: (weigh(built), ext_proc_of(built).update(message_timeout="1s")))
    assert any("message_timeout: 1s" in one for one in found.problems)


def test_a_message_timeout_is_no_matter_in_full_duplex(look):
    assert look("llm-d", lambda b: ext_proc_of(b).update(message_timeout="1s")).problems == []


def test_lean_without_trailers_is_a_stream_that_ends_as_the_answer_begins(look):
    def edit(built: dict[str, Any]) -> None:
        overrides = route_of(built)["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
        overrides["processing_mode"] = {**overrides["processing_mode"], "response_trailer_mode": "SKIP"}

    assert any("response_trailer_mode: not SEND" in one for one in look("istio-lean", edit).problems)


@pytest.mark.parametrize(
    ("kind", "retries", "allows", "told"),
    [("istio-lean", False, True, "sends nothing again"), ("istio-lean", True, False, "failure_mode_allow is off"),
     ("istio", True, True, "bodies pass through the picker"), ("istio-lean", True, True, "")],
)  # fmt: skip
def test_what_a_picker_loses_that_hands_over_to_an_envoy_which_is_not_made_for_that_is_told(
    look, kind, retries, allows, told
):
    def edit(built: dict[str, Any]) -> None:
        ours = ext_proc_of(built)
        overrides = route_of(built)["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
        for one in (ours, overrides):
            one["failure_mode_allow"] = allows
            service = one.setdefault("grpc_service", dict(ours["grpc_service"]))
            service |= {"retry_policy": {"retry_on": "connect-failure,reset"}} if retries else {}

    notes = [note for note in look(kind, edit).notes if "hand_over" in note]
    assert [told in note for note in notes] == ([True] if told else []), notes
    off = CONFIG.removesuffix("}") + ", hand_over: false}"
    assert not any("hand_over" in note for note in look(kind, edit, config=off).notes)


def test_the_envoy_that_we_print_loses_nothing_when_its_picker_hands_over(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(own("picker: {}")))
    found = Gateway(parse_config(CONFIG, "test", {}), tmp_path / "own.json")
    assert not any("hand_over" in note for note in found.notes)


# ---- the bootstrap that we print for an Envoy without a control plane


def own(keys: str) -> dict[str, Any]:
    text = picker.render(parse_config(f"{CONFIG.removesuffix('}')}, {keys}}}", "test", {}), EnvoyOptions())
    built: dict[str, Any] = yaml.safe_load(text)
    return built


@pytest.mark.parametrize("dumped", [True, False])
def test_a_gateway_of_which_there_is_nothing_to_note_is_not_measured_by_what_our_own_envoy_has(
    look, tmp_path, capsys, dumped
):
    def edit(built: dict[str, Any]) -> None:
        for cluster in built["static_resources"]["clusters"]:
            cluster["circuit_breakers"] = {"thresholds": [{"max_requests": 100_000}]}

    config = CONFIG.removesuffix("}") + ", hand_over: false, endpoints: []}"
    assert look("istio-lean", edit, dumped=dumped, config=config).notes == []
    file = tmp_path / "sidecar.yaml"
    file.write_text(config)
    dump = tmp_path / "dump.json"
    assert check(file, dump, as_json=True)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {one["severity"] for one in findings if one["file"] == str(dump)} == {"info"}


def test_our_own_envoy_reads_the_model_itself_and_sends_no_body_for_it():
    built = own("request_fields: true, picker: {read_model: true}")
    ours = ext_proc_of(built)
    assert ours["processing_mode"]["request_body_mode"] == "NONE"
    assert set(ours["metadata_options"]["forwarding_namespaces"]["untyped"]) == {"envoy.lb", wire.FIELDS_NAMESPACE}
    names = [listed["name"] for listed in manager_of(built)["http_filters"]]
    assert names.index(JSON_FIELDS) < names.index("envoy.filters.http.ext_proc")
    assert JSON_FIELDS not in str(own("picker: {}"))


def test_read_model_alone_is_no_setting_for_an_envoy_that_sends_no_bodies():
    with pytest.raises(ConfigError) as raised:
        own("picker: {read_model: true}")
    assert "request_fields: true" in str(raised.value)
