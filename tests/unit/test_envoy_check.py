"""`extproc check --envoy`: unsafe Envoy settings are named with their place and what would be right."""

from __future__ import annotations

import copy
import json

import pytest

from extproc.commands.check import MOST_NAMED, check
from extproc.config import parse_config
from extproc.envoy.advice import advice
from extproc.envoy.check import check_envoy, could_not_look
from extproc.envoy.gateway import Gateway
from extproc.envoy.skeleton import EnvoyOptions
from extproc.errors import ConfigError
from tests.unit.envoy_bootstrap import HOST, MANAGER, OURS, Rendered

CONFIG = parse_config("endpoints: [{name: a, address: 'h:1'}]\nclasses: [{name: default, budget: 40s}]", "file", {})
EXT_PROC = f"{MANAGER}.http_filters[{OURS}].typed_config"


class Bootstrap(Rendered):
    """The parts of a rendered bootstrap that tests spoil."""

    def __init__(self, *, fail_open: bool = False) -> None:
        super().__init__(CONFIG, EnvoyOptions(fail_open=fail_open))
        self.filter = self.manager["http_filters"][OURS]["typed_config"]
        self.clusters = self.resources["clusters"]
        self.breaker = self.clusters[0]["circuit_breakers"]["thresholds"][0]

    def endpoint_options(self) -> dict:
        """The HTTP settings of the endpoint's cluster."""
        (options,) = self.clusters[2]["typed_extension_protocol_options"].values()
        return options

    def http2(self) -> dict:
        """The HTTP/2 settings of the sidecar's cluster."""
        (options,) = self.clusters[0]["typed_extension_protocol_options"].values()
        return options["explicit_http_config"]["http2_protocol_options"]


FEATURES = {
    "request_fields": "request_fields is on, and no json_to_metadata",
    "first_byte_probe": "first_byte_probe is on",
    "upgrades": "upgrades is on, and websocket is not among them",
    "server_timing": "mutation_rules: drops server-timing",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_without_its_filter_is_named_and_with_it_fits(tmp_path, feature):
    text = f"endpoints: [{{name: a, address: 'h:1'}}]\n{feature}: true"
    rendered = Rendered(parse_config(text, "file", {}))
    assert rendered.check(tmp_path) == []
    plain = Rendered(parse_config("endpoints: [{name: a, address: 'h:1'}]", "file", {}))
    plain.config = rendered.config
    assert any(FEATURES[feature] in problem for problem in plain.check(tmp_path))


def test_fields_of_the_body_that_envoy_does_not_forward_are_named(tmp_path):
    rendered = Rendered(parse_config("endpoints: [{name: a, address: 'h:1'}]\nrequest_fields: true", "file", {}))
    filters = rendered.manager["http_filters"]
    (ours,) = (one for one in filters if one["name"] == "envoy.filters.http.ext_proc")
    del ours["typed_config"]["metadata_options"]["forwarding_namespaces"]
    assert "forwarding_namespaces.untyped: lacks extproc_request" in rendered.the_problem(tmp_path)


@pytest.mark.parametrize("place", [None, 1])
def test_no_buffer_before_our_filter_is_worth_a_word_and_no_problem(tmp_path, place):
    bootstrap = Bootstrap()
    buffer = bootstrap.manager["http_filters"].pop(0)
    if place is not None:
        bootstrap.manager["http_filters"].insert(place, buffer)
    assert bootstrap.check(tmp_path) == []
    (word,) = advice(bootstrap.config, bootstrap.write(tmp_path))
    assert "no buffer filter stands before ext_proc" in word


def test_forms_whose_model_nothing_reads_are_worth_a_word_and_no_problem(tmp_path):
    rendered = Rendered(parse_config("endpoints: [{name: a, address: 'h:1'}]\nrequest_fields: true", "file", {}))
    assert advice(rendered.config, rendered.write(tmp_path)) == []
    filters = rendered.manager["http_filters"]
    filters[:] = [one for one in filters if one["name"] != "envoy.filters.http.lua"]
    assert rendered.check(tmp_path) == []
    (word,) = advice(rendered.config, rendered.write(tmp_path))
    assert "no lua filter reads the model of forms" in word


def test_an_envoy_that_answers_in_its_own_words_is_worth_a_word_and_no_problem(tmp_path):
    rendered = Rendered(CONFIG)
    del rendered.manager["local_reply_config"]
    assert rendered.check(tmp_path) == []
    (told,) = advice(CONFIG, rendered.write(tmp_path))
    assert told.startswith(f"{MANAGER}.local_reply_config: there is none")


def test_an_access_log_without_queue_data_is_worth_a_word_and_no_problem(tmp_path):
    rendered = Rendered(CONFIG)
    assert advice(CONFIG, rendered.write(tmp_path)) == []
    (log,) = rendered.manager["access_log"]
    del log["typed_config"]["log_format"]["json_format"]["queue"]
    (told,) = advice(CONFIG, rendered.write(tmp_path))
    assert told.startswith(f"{MANAGER}.access_log: has no queue data")
    assert rendered.check(tmp_path) == []
    log["typed_config"]["log_format"]["json_format"]["wait"] = "%DYNAMIC_METADATA(extproc:wait_ms)%"
    assert advice(CONFIG, rendered.write(tmp_path)) == []
    del rendered.manager["access_log"]
    assert advice(CONFIG, rendered.write(tmp_path)) == [
        f"{MANAGER}.access_log: there is none: nothing says later why a request waited or was refused"
    ]


@pytest.mark.parametrize("fail_open", [False, True])
def test_what_we_render_passes(tmp_path, fail_open):
    assert Bootstrap(fail_open=fail_open).check(tmp_path) == []


SPOILT = {
    "a message_timeout below the budget": (
        lambda b: b.filter.update(message_timeout="30s"),
        f"{EXT_PROC}.message_timeout: 30s is not above the longest budget, 40s",
    ),
    "an unset message_timeout, which is 200 ms": (lambda b: b.filter.pop("message_timeout"), "message_timeout: 0.2s"),
    "a message_timeout of 0, which fires at once": (
        lambda b: b.filter.update(message_timeout="0s"),
        "message_timeout: 0s",
    ),
    "a short stream_idle_timeout": (
        lambda b: b.manager.update(stream_idle_timeout="40s"),
        f"{MANAGER}.stream_idle_timeout: 40s is not above",
    ),
    "a short idle_timeout of the route": (
        lambda b: b.unsteered["route"].update(idle_timeout="5s"),
        f"{HOST}.routes[2].route.idle_timeout: 5s is not above",
    ),
    "a request_timeout": (lambda b: b.manager.update(request_timeout="60s"), f"{MANAGER}.request_timeout:"),
    "a max_stream_duration": (
        lambda b: b.manager.update(common_http_protocol_options={"max_stream_duration": "99s"}),
        f"{MANAGER}.common_http_protocol_options.max_stream_duration:",
    ),
    "a max_stream_duration of the route": (
        lambda b: b.unsteered["route"].update(max_stream_duration={"max_stream_duration": "9s"}),
        f"{HOST}.routes[2].route.max_stream_duration:",
    ),
    "the default route timeout": (lambda b: b.steered["route"].pop("timeout"), f"{HOST}.routes[0].route.timeout: 15s"),
    "no trailers, so no end of the answer": (
        lambda b: b.filter["processing_mode"].pop("response_trailer_mode"),
        f"{EXT_PROC}.processing_mode.response_trailer_mode: must be SEND",
    ),
    "no request headers": (
        lambda b: b.filter["processing_mode"].update(request_header_mode="SKIP"),
        "request_header_mode: SKIP leaves nothing to hold",
    ),
    "bodies through the sidecar": (
        lambda b: b.filter["processing_mode"].update(response_body_mode="STREAMED"),
        "response_body_mode: STREAMED sends bodies",
    ),
    "no immediate responses": (
        lambda b: b.filter.update(disable_immediate_response=True),
        f"{EXT_PROC}.disable_immediate_response:",
    ),
    "mutation rules that drop the headers of refusals": (
        lambda b: b.filter["mutation_rules"].update(allow_expression={"regex": "x-upstream-cluster"}),
        f"{EXT_PROC}.mutation_rules: drops content-type, retry-after, x-extproc-outcome",
    ),
    "no namespace for our metadata": (lambda b: b.filter.pop("metadata_options"), "lacks extproc"),
    "headers that we need and don't get": (
        lambda b: b.filter["forward_rules"]["allowed_headers"]["patterns"].pop(0),
        f"{EXT_PROC}.forward_rules.allowed_headers: lacks :method",
    ),
    "every header, secrets too": (
        lambda b: b.filter.pop("forward_rules"),
        f"{EXT_PROC}.forward_rules.allowed_headers: without it every header goes to the sidecar, authorization and cookies",
    ),
    "no request.time": (lambda b: b.filter.update(request_attributes=[]), f"{EXT_PROC}.request_attributes: lacks"),
    "running answers cut with the sidecar": (
        lambda b: b.filter.update(failure_mode_allow=False),
        f"{EXT_PROC}.failure_mode_allow: false cuts every running answer",
    ),
    "idle connections kept for an hour": (
        lambda b: b.clusters[2].pop("typed_extension_protocol_options"),
        "static_resources.clusters[2]: an idle connection is kept for 1h, and most servers close theirs after 5 s",
    ),
    "idle connections kept for a minute": (
        lambda b: b.endpoint_options()["common_http_protocol_options"].update(idle_timeout="60s"),
        "static_resources.clusters[2]: an idle connection is kept for 60s",
    ),
    "no replay": (
        lambda b: b.filter["grpc_service"].pop("retry_policy"),
        f"{EXT_PROC}.grpc_service.retry_policy: without",
    ),
    "replays once, by default": (
        lambda b: b.filter["grpc_service"]["retry_policy"].pop("num_retries"),
        f"{EXT_PROC}.grpc_service.retry_policy.num_retries: 1, the default, is used up before",
    ),
    "too few replays": (
        lambda b: b.filter["grpc_service"]["retry_policy"].update(num_retries=9),
        "retry_policy.num_retries: 9 is used up before",
    ),
    "replays in no time": (
        lambda b: b.filter["grpc_service"]["retry_policy"].update(
            retry_back_off={"base_interval": "0.01s", "max_interval": "0.1s"}
        ),
        f"{EXT_PROC}.grpc_service.retry_policy.retry_back_off: 30 retries are used up after some 1s",
    ),
    "no route that follows us": (
        lambda b: b.host["routes"].pop(0),
        f"{MANAGER}.route_config: no route has cluster_header: x-upstream-cluster",
    ),
    "clients that choose": (
        lambda b: b.manager.pop("early_header_mutation_extensions"),
        f"{MANAGER}.early_header_mutation_extensions: must remove x-upstream-cluster",
    ),
    "a direct_response to hold on": (
        lambda b: (b.unsteered.pop("route"), b.unsteered.update(direct_response={"status": 503})),
        f"{HOST}.routes[2].direct_response:",
    ),
    "the default body limit": (
        lambda b: b.host.pop("request_body_buffer_limit"),
        f"{HOST}.request_body_buffer_limit:",
    ),
    "default breakers: requests": (
        lambda b: b.breaker.pop("max_requests"),
        "static_resources.clusters[0].circuit_breakers.thresholds[0].max_requests: 1024",
    ),
    "default breakers: pending": (lambda b: b.breaker.pop("max_pending_requests"), "max_pending_requests: 1024"),
    "default breakers: retries": (lambda b: b.breaker.pop("max_retries"), "thresholds[0].max_retries: 3"),
    "the flood guard": (
        lambda b: b.http2().pop("max_outbound_control_frames"),
        "static_resources.clusters[0].typed_extension_protocol_options: http2_protocol_options.max_outbound_control_frames",
    ),
    "an endpoint that Envoy does not know": (
        lambda b: b.clusters.pop(2),
        "static_resources.clusters: there is no 'a', the cluster of endpoints[0]",
    ),
    "a server's breaker below its limit: requests": (
        lambda b: b.clusters[2]["circuit_breakers"]["thresholds"][0].update(max_requests=511),
        "static_resources.clusters[2].circuit_breakers.thresholds[0].max_requests: 511 is below the limit of endpoints[0], 512",
    ),
    "a server's breaker below its limit: connections": (
        lambda b: b.clusters[2]["circuit_breakers"]["thresholds"][0].update(max_connections=100),
        "static_resources.clusters[2].circuit_breakers.thresholds[0].max_connections: 100 is below",
    ),
    "clients that may order retries": (
        lambda b: b.manager.update(internal_address_config={"cidr_ranges": [{"address_prefix": "10.0.0.0"}]}),
        f"{MANAGER}.internal_address_config:",
    ),
    "a time for each try": (
        lambda b: b.steered["route"]["retry_policy"].update(per_try_timeout="3s"),
        f"{HOST}.routes[0].route.retry_policy.per_try_timeout: 3s: an answer that takes longer",
    ),
    "a time for each pause of a try, of all routes": (
        lambda b: b.host.update(retry_policy=b.steered["route"].pop("retry_policy") | {"per_try_idle_timeout": "1s"}),
        f"{HOST}.retry_policy.per_try_idle_timeout: 1s: an answer that pauses longer",
    ),
    "a minute for an answer": (
        lambda b: b.steered["route"].update(timeout="60s"),
        f"{HOST}.routes[0].route.timeout: 60s",
    ),
    "the filter twice": (
        lambda b: b.manager["http_filters"].insert(2, copy.deepcopy(b.manager["http_filters"][1])),
        f"{MANAGER}.http_filters[2]: is the second envoy.filters.http.ext_proc that holds",
    ),
    "a route that stays": (
        lambda b: b.filter.update(route_cache_action="RETAIN"),
        f"{EXT_PROC}.route_cache_action: RETAIN: Envoy keeps the route",
    ),
    "a route that stays, in the old words": (
        lambda b: b.filter.update(disable_clear_route_cache=True),
        f"{EXT_PROC}.disable_clear_route_cache: True: Envoy keeps the route",
    ),
    "headers that are kept back": (
        lambda b: b.filter["forward_rules"].update(
            disallowed_headers={"patterns": [{"prefix": "X-", "ignore_case": True}]}
        ),
        f"{EXT_PROC}.forward_rules.disallowed_headers: keeps back x-model",
    ),
    "headers that a wider pattern lacks": (
        lambda b: b.filter["forward_rules"]["allowed_headers"].update(patterns=[{"safe_regex": {"regex": "(:|x-).*"}}]),
        f"{EXT_PROC}.forward_rules.allowed_headers: lacks ",
    ),
    "copies of requests": (
        lambda b: b.steered["route"].update(request_mirror_policies=[{"cluster": "a"}]),
        f"{HOST}.routes[0].route.request_mirror_policies[0]: copies requests to a past the queue",
    ),
    "a check of the sidecar by HTTP": (
        lambda b: b.clusters[0].update(health_checks=[{"http_health_check": {"path": "/"}}]),
        "static_resources.clusters[0].health_checks[0]: the sidecar speaks gRPC",
    ),
    "a filter that crashes Envoy": (
        lambda b: b.manager["http_filters"].insert(0, {"name": "envoy.filters.http.sse_to_metadata"}),
        f"{MANAGER}.http_filters[0]: sse_to_metadata crashes",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_spoilt_setting_is_the_one_problem_named(tmp_path, name):
    spoil, words = SPOILT[name]
    bootstrap = Bootstrap()
    spoil(bootstrap)
    assert words in bootstrap.the_problem(tmp_path)


HARMLESS = {
    "ten minutes for an answer": lambda b: b.steered["route"].update(timeout="600s"),
    "headers by patterns": lambda b: b.filter["forward_rules"]["allowed_headers"].update(
        patterns=[
            *({"prefix": "X-", "ignore_case": True}, {"prefix": ":"}, {"suffix": "-type"}, {"contains": "length"}),
            *({"safe_regex": {"regex": "endpoint-load-.*"}}, {"exact": "grpc-status"}, {"exact": "upgrade"}),
        ]
    ),
    "a check of the sidecar that only connects": lambda b: b.clusters[0].update(
        health_checks=[{"tcp_health_check": {}}]
    ),
    "a time in a structure of somebody else's": lambda b: b.steered.update(
        metadata={"filter_metadata": {"my.org": {"timeout": 5, "num_retries": "many"}}}
    ),
    "copies for somebody else": lambda b: b.steered["route"].update(request_mirror_policies=[{"cluster": "shadow"}]),
    "Envoy's own back-off of 1 to 10 s": lambda b: b.filter["grpc_service"]["retry_policy"].pop("retry_back_off"),
    "ten replays": lambda b: b.filter["grpc_service"]["retry_policy"].update(num_retries=10),
    "a server's default breaker": lambda b: b.clusters[2].pop("circuit_breakers"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_costs_nobody_anything_is_no_problem(tmp_path, name):
    bootstrap = Bootstrap()
    HARMLESS[name](bootstrap)
    assert bootstrap.check(tmp_path) == []


def test_a_breaker_by_default_is_a_problem_where_the_limit_is_higher(tmp_path):
    bootstrap = Bootstrap()
    bootstrap.clusters[2].pop("circuit_breakers")
    config = CONFIG.model_copy(update={"max_running_requests": 2000})
    problems = check_envoy(config, bootstrap.write(tmp_path))
    assert [problem.split(":")[0].rsplit(".", 1)[-1] for problem in problems] == ["max_requests", "max_connections"]
    assert "1024 is below the limit of endpoints[0], 2000" in problems[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "it is a list"),
        ("just text", "it is the text 'just text'"),
        ("", "it is empty"),
        ("7", "it is 7"),
        ("admin: 'h:1'\nendpoints: []", "with 'endpoints' it looks like a configuration of the sidecar"),
        ("node: {id: x}", "it has neither static_resources nor dynamic_resources"),
    ],
)
def test_what_is_no_bootstrap_is_told_so_by_what_it_is(tmp_path, text, words):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_envoy(CONFIG, path)
    assert caught.value.problems == [f"is no Envoy bootstrap: {words}; `extproc envoy-config` prints one"]


@pytest.mark.parametrize("value", ["1 hour", "1h", 60, "60"])
def test_a_time_that_envoy_does_not_read_is_named_and_not_taken_for_the_default(tmp_path, value):
    bootstrap = Bootstrap()
    bootstrap.manager.update(stream_idle_timeout=value)
    with pytest.raises(ConfigError) as caught:
        bootstrap.check(tmp_path)
    assert caught.value.problems == [
        f"{MANAGER}.stream_idle_timeout: must be a duration as Envoy reads it, like 60s, not {value!r}"
    ]


def test_a_field_that_is_no_number_is_named_and_one_that_envoy_reads_as_one_is_read(tmp_path):
    bootstrap = Bootstrap()
    bootstrap.filter["grpc_service"]["retry_policy"].update(num_retries="30")
    bootstrap.breaker.update(max_requests=str(bootstrap.breaker["max_requests"]))
    assert bootstrap.check(tmp_path) == []
    bootstrap.filter["grpc_service"]["retry_policy"].update(num_retries="x")
    bootstrap.breaker.update(max_requests=1.5)
    with pytest.raises(ConfigError) as caught:
        bootstrap.check(tmp_path)
    assert caught.value.problems == [
        "static_resources.clusters[0].circuit_breakers.thresholds[0].max_requests: must be a whole number, not 1.5",
        f"{EXT_PROC}.grpc_service.retry_policy.num_retries: must be a whole number, not 'x'",
    ]


def test_the_name_of_a_cluster_in_a_dump_is_no_free_structure_whatever_it_says(tmp_path):
    cluster = {"name": "gke-metadata.svc", "circuit_breakers": {"thresholds": [{"max_requests": 1.5}]}}
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"configs": [{"dynamic_active_clusters": [{"cluster": cluster}]}]}))
    with pytest.raises(ConfigError) as caught:
        check_envoy(CONFIG, path)
    where = "clusters[gke-metadata.svc].circuit_breakers.thresholds[0].max_requests"
    assert caught.value.problems == [f"{where}: must be a whole number, not 1.5"]


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 2024-13-45", "static_resources: &a [*a]", "a: " + "[" * 1500, "[" * 9000, "a: !!int x", "? [a]\n: 3"],
)
def test_a_bootstrap_or_dump_that_is_no_yaml_is_named(tmp_path, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    for look in (check_envoy, could_not_look, advice, Gateway):
        with pytest.raises(ConfigError, match="no valid YAML"):
            look(CONFIG, path)


def test_a_part_of_another_shape_is_named_as_that_whoever_looks(tmp_path):
    bootstrap = Bootstrap()
    bootstrap.filter["processing_mode"] = 5
    bootstrap.manager["http_filters"][0]["typed_config"] = 1.5
    path = bootstrap.write(tmp_path)
    for look in (check_envoy, could_not_look, advice, Gateway):
        with pytest.raises(ConfigError, match="is not shaped like an Envoy bootstrap"):
            look(CONFIG, path)


def test_retries_without_end_are_not_counted_to_their_end(tmp_path):
    bootstrap = Bootstrap()
    bootstrap.filter["grpc_service"]["retry_policy"].update(num_retries=4_294_967_295)
    assert bootstrap.check(tmp_path) == []


def test_a_bootstrap_without_our_filter_is_named(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("static_resources: {}")
    (problem,) = check_envoy(CONFIG, path)
    assert "has no envoy.filters.http.ext_proc filter" in problem
    assert problem.endswith("; more is looked at once it is there")
    with pytest.raises(ConfigError, match="can't be read"):
        check_envoy(CONFIG, tmp_path / "none.yaml")


OVERFLOW = parse_config(
    "overflow_clusters: [{name: spare, address: 'h:9'}, {name: provider}]\nendpoints: [{name: a, address: 'h:1'}]\n",
    "file",
    {},
)


def test_a_cluster_of_last_resort_with_an_address_is_rendered_and_one_without_must_be_there(tmp_path):
    problem = Rendered(OVERFLOW).the_problem(tmp_path)
    assert "no 'provider', overflow_clusters[1]" in problem


SECOND_TRY = parse_config("second_try: 127.0.0.1:8080\nendpoints: [{name: a, address: '127.0.0.1:8001'}]", "file", {})


def test_the_rendered_bootstrap_takes_second_tries(tmp_path):
    assert Rendered(SECOND_TRY).check(tmp_path) == []


def test_the_route_by_model_of_what_no_sidecar_steered_needs_no_second_try(tmp_path):
    """It leads to several servers at once; `check` refused what `envoy-config` prints."""
    text = "second_try: 127.0.0.1:8080\nendpoints: [{name: a, address: '127.0.0.1:8001', models: [m]}, "
    config = parse_config(text + "{name: b, address: '127.0.0.1:8002', models: [n]}]", "file", {})
    assert Rendered(config, EnvoyOptions(fail_open=True)).check(tmp_path) == []


def test_each_part_that_a_second_try_needs_is_named_when_it_lacks(tmp_path):
    def without(remove) -> str:
        rendered = Rendered(SECOND_TRY)
        remove(rendered)
        return rendered.the_problem(tmp_path)

    def endpoint(rendered) -> dict:
        return next(one for one in rendered.resources["clusters"] if one["name"] == "a")

    def steered(rendered) -> dict:
        routes = rendered.manager["route_config"]["virtual_hosts"][0]["routes"]
        return next(one["route"] for one in routes if "cluster_header" in one["route"])

    def ours(rendered) -> dict:
        name = "envoy.filters.http.ext_proc"
        return next(one for one in rendered.manager["http_filters"] if one["name"] == name)["typed_config"]

    assert "retry_priority" in without(lambda it: steered(it)["retry_policy"].pop("retry_priority"))
    assert "lacks upstream.address" in without(lambda it: ours(it)["response_attributes"].remove("upstream.address"))
    assert "with priority 1" in without(lambda it: endpoint(it)["load_assignment"]["endpoints"].pop())
    assert "max_retries" in without(lambda it: endpoint(it)["circuit_breakers"]["thresholds"][0].pop("max_retries"))


@pytest.mark.parametrize(
    ("keys", "named"),
    [("", "a, in-envoy;"), ("dialect: endpoint-picker", ""), ("envoy_clusters_file: /tmp/clusters.yaml", "")],
)
def test_without_a_bootstrap_check_names_the_clusters_that_envoy_must_have_where_nobody_else_brings_them(
    tmp_path, capsys, keys, named
):
    path = tmp_path / "sidecar.yaml"
    second = "{name: b, address: '10.0.0.2:1'" + (", cluster: in-envoy}" if named else "}")
    path.write_text(f"endpoints: [{{name: a, address: '10.0.0.1:1'}}, {second}]\n{keys}\n")
    assert check(path, None, as_json=True)
    findings = json.loads(capsys.readouterr().out)["findings"]
    told = [one["message"] for one in findings if "Envoy needs a cluster" in one["message"]]
    assert [named in message for message in told] == ([True] if named else [])
    assert check(path, None, as_json=False)
    assert ("Envoy needs a cluster" in capsys.readouterr().out) is bool(named)


def test_of_many_clusters_that_envoy_must_have_check_names_a_few(tmp_path, capsys):
    path = tmp_path / "sidecar.yaml"
    many = [f"{{name: e{number}, address: '10.0.0.1:{number + 1}'}}" for number in range(MOST_NAMED + 2)]
    path.write_text(f"endpoints: [{', '.join(many)}]\n")
    assert check(path, None, as_json=False)
    assert f"e{MOST_NAMED - 1} and 2 more; " in capsys.readouterr().out
