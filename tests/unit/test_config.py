"""The configuration: defaults of the contract, all errors at once with key paths, environment, cross-checks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extproc.config import Config, doubts, load_config, parse_config
from extproc.errors import ConfigError

ENDPOINT = {"name": "a", "address": "10.0.0.1:8000"}


def problems(data: object, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(data), "file", environ or {})
    return caught.value.problems


def config(data: object, environ: dict[str, str] | None = None) -> Config:
    return parse_config(yaml.safe_dump(data), "file", environ or {})


def test_the_defaults_are_those_of_the_contract():
    default = config({})
    assert (default.listen, default.admin) == ("127.0.0.1:50051", "127.0.0.1:9902")
    assert default.enable_queue is False
    assert default.max_running_requests is None  # adaptive
    assert default.max_queue_wait_time == 1.0
    assert default.binding == "late"
    assert default.max_queued_requests == 10_000
    assert [(klass.name, klass.budget_s) for klass in default.classes] == [("default", 30.0)]
    names = default.header_names()
    assert (names.cluster, names.model, names.request_class) == ("x-upstream-cluster", ("x-model",), "x-request-class")
    assert (names.tenant, names.budget) == (("x-tenant-id",), "x-queue-budget")
    assert names.session == ("x-session-id", "x-session-affinity")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"admin": "127.0.0.1:50051"}, "admin: '127.0.0.1:50051' is taken by listen"),
        ({"admin": "0.0.0.0:50051", "allow_remote_admin": True}, "admin: '0.0.0.0:50051' is taken by listen"),
        ({"listen": "[::1]:9902", "admin": "[0::1]:9902"}, "admin: '[0::1]:9902' is taken by listen"),
        (
            {"replicas": {"listen": "127.0.0.1:9902", "valkey": {"url": "valkey://h:6379"}}},
            "replicas.listen: '127.0.0.1:9902' is taken by admin",
        ),
    ],
)
def test_two_servers_of_ours_at_one_port_are_a_mistake(keys, problem):
    assert problems(keys) == [f"{problem}; each needs a port of its own"]


@pytest.mark.parametrize(
    "keys",
    [
        {"admin": "127.0.0.2:50051"},
        {"admin": "[::1]:50051"},
        {"listen": "0.0.0.0:9000", "allow_insecure_listen": True, "admin": "[::1]:9000"},
        {"listen": "unix:/run/extproc.sock"},
        {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"},  # each gets one that is free
    ],
)
def test_one_port_at_two_addresses_is_two(keys):
    config(keys)


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path, {}) == config({})


def test_all_problems_come_at_once_each_with_its_key_path_and_what_would_be_right():
    found = problems(
        {
            "listn": 1,
            "enable_queue": "yes please",
            "endpoints": [
                {"name": "a", "address": "10.0.0.1:8000", "max_running_requests": -3},
                {"name": "a", "address": "10.0.0.2", "models": "llama"},
                {"address": "h:1"},
            ],
            "classes": [{"name": "x", "budget": "2h"}, {"name": "y", "budget": "fast", "prio": 3}],
            "binding": "early",
        }
    )
    expected = {
        "listn: unknown key; did you mean 'listen'?",
        "enable_queue: must be true or false, not 'yes please'",
        "endpoints[0].max_running_requests: must be 'adaptive' or a whole number from 1, not -3",
        "endpoints[1].name: 'a' is taken by endpoints[0]; each must be unique",
        "endpoints[1].cluster: 'a' is taken by endpoints[0]; each must be unique",
        "endpoints[1].address: must be host:port, like 10.0.0.7:8000 or [::1]:8000, not '10.0.0.2'",
        "endpoints[1].models: must be a list, not 'llama'",
        "endpoints[2].name: is required",
        "classes[0].budget: 7200s is above what Envoy's message_timeout can cover (at most 3600s); 3500s or less works",
        "classes[1].budget: must be a duration like 10s or 250ms, not 'fast'",
        "classes[1].prio: unknown key; did you mean 'priority'?",
        "binding: must be 'late' or 'bound', not 'early'",
    }
    assert set(found) == expected
    assert len(found) == len(expected)


NO_MAPPING = "must be a mapping of keys to values, not"
BAD_NAME = "must be 1 to 128 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit, not 'b b'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "endpoints: ['h:1', 'http://h:1/v1', x]",
            [
                f"endpoints[0]: {NO_MAPPING} 'h:1'; {{name: server-1, address: 'h:1'}} would be right",
                f"endpoints[1]: {NO_MAPPING} 'http://h:1/v1'; {{name: server-2, address: 'h:1'}} would be right",
                f"endpoints[2]: {NO_MAPPING} 'x'; {{name: server-3, address: '10.0.0.7:8000'}} would be right",
            ],
        ),
        (
            "endpoints: [{name: a}, {name: b}]",
            ["endpoints[0].address: is required", "endpoints[1].address: is required"],
        ),
        ("dialect: endpoint-picker\nendpoints: [{name: a}]", ["endpoints[0].address: is required"]),
        ("overflow_clusters: [{name: 'b b'}]", [f"overflow_clusters[0].name: {BAD_NAME}"]),
        (
            "classes: [{name: a, on_refusal: {cluster: 'b b'}}]",
            [f"classes[0].on_refusal.cluster: {BAD_NAME}"],
        ),
        ("tenants: {named: [3]}", ["tenants.named[0]: must be a mapping of keys to values, not 3"]),
        ("classes: [{name: a, weight: x}, {name: b, weight: 2}]", ["classes[0].weight: can't be 'x'"]),
        ("allow_remote_admin: x\nadmin: 0.0.0.0:1", ["allow_remote_admin: must be true or false, not 'x'"]),
    ],
)
def test_what_stands_in_for_a_broken_value_is_no_problem_that_anybody_is_told_of(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "file", {})
    assert caught.value.problems == said


DISCOVERY = "envoy_clusters_file: /a.yaml\ndiscovery: [{%s}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "no valid YAML"),
        ("- 1", "must be a mapping of keys to values, not a list"),
        ("admin: {address: 1}\nstatic_resources: {}", "looks like an Envoy bootstrap"),
        ("listen: a:1\nlisten: b:2", "key 'listen' stands twice"),
        ("? [a]\n: 3", "a key must be a plain word"),
        ("3: 4", "unknown key"),
        ("endpoints: 3", "endpoints: must be a list, not 3"),
        ("endpoints: [3]", "endpoints[0]: must be a mapping"),
        ("classes: []", "classes: needs 1 item at least"),
        ("listen: null", "not nothing"),
        ("enable_queue: null", "must be true or false, not nothing"),
        ("endpoints: [{name: a, address: 'https://h:443'}]", "must be host:port without https://; Envoy and we speak"),
        ("endpoints: [{name: a, address: 'h:70000'}]", "must have a port from 1 to 65535, not 70000"),
        ("endpoints: [{name: a, address: '[::1:80'}]", "address: must be host:port, like"),
        ("listen: 'unix:/" + "x" * 107 + "'", "the path of a unix socket has at most 107 bytes; this one has 108"),
        ("socket_group: 'a b'", "socket_group: must match ^[A-Za-z0-9_]"),
        (
            "endpoints: [{name: a, address: 'h:1', models: [" + "a, " * 1001 + "]}]",
            "may have 1000 items at most, not 1001",
        ),
        ("endpoints: [{name: a, address: 'h:0'}]", "must have a port from 1 to 65535, not 0"),
        ("second_try: 127.0.0.1:0", "must have a port from 1 to 65535, not 0"),
        ("endpoints: [{name: a, address: '10.0.0.256:1'}]", "'10.0.0.256' is neither"),
        ("endpoints: [{name: a, address: 'vllm..svc:1'}]", "'vllm..svc' is neither"),
        (
            "endpoints: [{name: a, address: '[fd00::1%lo]:1'}]",
            "must have no zone: only an address of fe80::/10 has one, not 'fd00::1%lo'",
        ),
        ("admin: '[::1%1]:1'", "admin: must have no zone"),
        ("upstream_idle_timeout: 277778h", "upstream_idle_timeout: must be 999999999s or less, not '277778h'"),
        ('listen: "unix:/a\\nb"', "the path of a unix socket must be printable text"),
        ('envoy_clusters_file: "/a\\nb.yaml"', "envoy_clusters_file: must be an absolute path"),
        ("tls: {self_signed: true, envoy: {ca_file: /c, server_name: müller}}", "tls.envoy.server_name: must be a DNS"),
        (DISCOVERY % "dns: {name: '', port: 1}", "dns.name: must be a name that can be looked up"),
        (DISCOVERY % "dns: {name: vllm..svc, port: 1}", "without a port, not 'vllm..svc'"),
        (DISCOVERY % "dns: {name: 'vllm:1', port: 1}", "without a port, not 'vllm:1'"),
        (DISCOVERY % "kubernetes: {service: ''}", "kubernetes.service: must match ^[a-z0-9]"),
        (DISCOVERY % "kubernetes: {service: vllm.llm.svc}", "kubernetes.service: must match ^[a-z0-9]"),
        (DISCOVERY % "kubernetes: {selector: ''}", "kubernetes.selector: must not be empty"),
        (DISCOVERY % "kubernetes: {service: a, namespace: a/b}", "kubernetes.namespace: must match ^[a-z0-9]"),
        (DISCOVERY % "kubernetes: {service: a, port: '8000'}", "must be a port's number without quotes"),
        ("endpoints: [{name: a, address: 'h:1', models: ['']}]", "endpoints[0].models[0]: must not be empty"),
        (
            "endpoints: [{name: a, address: 'h:1', metrics_url: 'http://u:s3cret@h/m'}]",
            "metrics_url: must have no user and no password in it: nothing keeps a URL out of the log",
        ),
        ("endpoints: [{name: a, address: 'h:1', models: [3]}]", "endpoints[0].models[0]: must be text, not 3"),
        (
            "classes: [{name: a, weight: 4}, {name: b}]",
            "classes[1].weight: is needed, as classes[0] of the same priority has one",
        ),
        ("classes: [{name: a, weight: 0}]", "classes[0].weight: must be 0.001 or more"),
        (
            "tenants: {named: [{name: a}, {name: a}]}",
            "tenants.named[1].name: 'a' is taken by tenants.named[0]; each must be unique",
        ),
        ("tenants: {others: {max_in_flight: 0}}", "tenants.others.max_in_flight: must be 1 or more"),
        ("tenants: {others: {name: x}}", "tenants.others.name"),
        (
            "classes: [{name: a, on_refusal: {cluster: x}}]",
            "classes[0].on_refusal.cluster: 'x' is none of overflow_clusters",
        ),
        (
            "overflow_clusters: [{name: a}]\nendpoints: [{name: a, address: 'h:1'}]",
            "overflow_clusters[0].name: 'a' is an endpoint's cluster",
        ),
        ("no_endpoint_budget: 3480s", "no_endpoint_budget: 3480s and the longest budget after it are above"),
        ("no_endpoint_budget: 0s", "no_endpoint_budget: must be longer than 0s"),
        ("headers: {model: x-a, tenant: x-a}", "headers: 'x-a' is used for two things"),
        ("listen: 0.0.0.0:1", "listen: '0.0.0.0:1' can be reached from other machines"),
        ("admin: 10.0.0.1:1", "admin: '10.0.0.1:1' can be reached from other machines"),
        ("max_queue_wait_time: true", "must be a duration"),
        ("max_queued_requests: 1.5", "must be a whole number"),
        ("scrape_timeout: 2024-13-45", "is no valid YAML: month must be in 1..12"),
        ("a: 0x_", "is no valid YAML"),
        ("a: !!int abc", "is no valid YAML"),
        ("a: !!bool abc", "is no valid YAML"),
        ("a: " + "9" * 5000, "is no valid YAML"),
        ("a: " + "[" * 3000, "is no valid YAML"),
        ("endpoints: [{name: a, address: 'h:1', metrics_url: 'http://h:99999/m'}]", "metrics_url: must be a URL"),
        ("endpoints: [{name: a, address: 'a b:80'}]", "address: must be host:port"),
        ("headers: {cluster: host}", "headers.cluster: 'host' has a meaning of its own"),
    ],
)
def test_one_wrong_thing_is_named(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "file", {})
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "name", ["vllm", "vllm.llm.svc.cluster.local.", "a_b", "10.0.0.1", "fd00::1", "müller.example"]
)
def test_any_name_that_could_be_looked_up_is_one(name):
    parse_config(DISCOVERY % f"dns: {{name: '{name}', port: 1}}", "file", {})


def test_a_missing_or_binary_file_is_one_clear_problem(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_config(tmp_path / "none.yaml", {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        load_config(binary, {})


def test_a_pipe_is_read_and_one_that_nobody_writes_to_is_a_problem_and_no_wait(tmp_path):
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    check = (sys.executable, "-m", "extproc", "check")
    done = subprocess.run((*check, path), capture_output=True, text=True, timeout=60)
    assert (done.returncode, "is a pipe, and nobody writes to it" in done.stderr) == (1, True), done
    piped = f"{shlex.join(check)} <(printf 'max_queued_requests: -1')"
    done = subprocess.run(("bash", "-c", piped), capture_output=True, text=True, timeout=60)
    assert "max_queued_requests: must be" in done.stderr


def test_environment_variables_win_over_the_file_and_strange_ones_are_ignored():
    environ = {
        "EXTPROC_ENABLE_QUEUE": "true",
        "EXTPROC_HEADERS__MODEL": "X-LLM",
        "EXTPROC_ENDPOINTS": "[{name: e, address: 'h:1'}]",
        "EXTPROC_PORT": "tcp://10.0.0.1:80",  # what Kubernetes sets for a service called extproc
        "EXTPROC_SERVICE_HOST": "10.0.0.1",
        "PATH": "/bin",
    }
    changed = config({"enable_queue": False, "endpoints": [ENDPOINT]}, environ)
    assert changed.enable_queue
    assert changed.headers.model == ["x-llm"]
    assert [endpoint.name for endpoint in changed.endpoints] == ["e"]


def test_an_environment_variable_of_the_wrong_type_is_named_by_its_key():
    assert problems({}, {"EXTPROC_MAX_QUEUED_REQUESTS": "many"}) == [
        "max_queued_requests: must be a whole number, not 'many'"
    ]


@pytest.mark.parametrize(
    ("tenants", "counts_for"),
    [
        ({"others": {"max_in_flight": 3}}, "stranger"),
        ({"named": [{"name": "a", "weight": 2}]}, ""),
        ({"named": [{"name": "a"}], "count_others": "apart"}, "stranger"),
        ({"count_others": "together"}, ""),
    ],
)
def test_tenants_that_nobody_named_are_one_where_others_are_named(tenants, counts_for):
    rules = config({"tenants": tenants}).policy().tenants
    assert rules.who("stranger")[0] == counts_for
    assert rules.who("a")[0] == ("a" if counts_for or tenants.get("named") else "")


def test_an_endpoint_inherits_the_common_limit_or_has_its_own():
    specs = config(
        {
            "max_running_requests": 7,
            "endpoints": [
                ENDPOINT,
                {**ENDPOINT, "name": "b", "address": "10.0.0.2:8000", "max_running_requests": 3},
                {**ENDPOINT, "name": "c", "address": "10.0.0.3:8000", "max_running_requests": "adaptive"},
            ],
        }
    ).endpoint_specs()
    assert [spec.max_running_requests for spec in specs] == [7, 3, None]
    assert [spec.cluster for spec in specs] == ["a", "b", "c"]


def test_remote_addresses_work_when_asked_for_by_name():
    asked = {"allow_insecure_listen": True, "allow_remote_admin": True}
    assert config({**asked, "listen": "0.0.0.0:1", "admin": "[::]:2"}).listen == "0.0.0.0:1"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*Config.model_fields, "name", "address", "budget", "class", "models"])


@given(
    st.dictionaries(keys, json_like | st.lists(st.dictionaries(keys, json_like, max_size=4), max_size=3), max_size=5)
)
def test_any_yaml_is_a_config_or_a_config_error_with_problems(data):
    try:
        parse_config(yaml.safe_dump(data), "file", {})
    except ConfigError as error:
        found = error.problems
    else:
        return
    assert found


def test_the_longest_path_that_a_unix_socket_can_have_is_taken():
    assert config({"listen": "unix:/" + "x" * 106}).listen.endswith("x")


# ---- the words of a library are not ours


def test_whatever_pydantic_finds_is_said_in_our_words():
    """Every kind of mistake at every key: none of pydantic's sentences comes out."""
    strange = (None, 3, -1, 1e99, "", "x" * 300, True, [], {}, [[]], [None], {"a": None}, {3: 4}, [{}])
    said = set()
    for key in Config.model_fields:
        for value in strange:
            try:
                parse_config(yaml.safe_dump({key: value}), "file", {})
            except ConfigError as error:
                said |= {problem.partition(": ")[2] for problem in error.problems}
    theirs = re.compile(
        r"Input should|validation|String should|List should|Value error|None|valid (string|integer|list)"
    )
    assert [words for words in said if theirs.search(words)] == []
    assert len(said) > 30


# ---- doubts

FOUND = "envoy_clusters_file: /c.yaml\n"
PICKS = "dialect: endpoint-picker\nendpoints: [{name: a, address: '10.0.0.1:1'}]\n"
REPLICAS = "replicas: {listen: '127.0.0.1:1', valkey: {url: 'valkey://127.0.0.1:2'}}"
TWO_MODELS = "[{name: a, address: 'h:1', models: [m]}, {name: b, address: 'h:2', models: [n]}]"


def doubtful(tmp_path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    path = tmp_path / "sidecar.yaml"
    path.write_text(text)
    return doubts(load_config(path, environ or {}), path, environ or {})


def test_a_misspelt_environment_variable_is_refused_and_one_of_somebody_else_is_not():
    assert problems({}, {"EXTPROC_ENABLE_QEUE": "true"}) == [
        "environment variable EXTPROC_ENABLE_QEUE: no such key; did you mean EXTPROC_ENABLE_QUEUE?"
    ]
    assert problems({}, {"EXTPROC_HEADER__MODEL": "x-llm"})[0].endswith("did you mean EXTPROC_HEADERS__MODEL?")
    config({}, {"EXTPROC_PORT_50051_TCP": "tcp://10.0.0.1:50051", "EXTPROC_SERVICE_HOST": "10.0.0.1", "EXTPROC_X": "1"})


def test_a_variable_that_does_nothing_is_named_but_for_those_that_kubernetes_sets(tmp_path):
    text = "endpoints: [{name: a, address: 'h:1'}]"
    environ = {"EXTPROC_PORT_50051_TCP": "tcp://10.0.0.1:50051", "EXTPROC_SERVICE_HOST": "h", "EXTPROC_LISTEN": "h:1"}
    environ |= {"EXTPROC_ALLOW_INSECURE_LISTEN": "true"}
    assert doubtful(tmp_path, text, environ) == []
    assert doubtful(tmp_path, text, {"EXTPROC_FOO": "1"}) == [
        "environment variable EXTPROC_FOO: no such key; it does nothing"
    ]


def test_a_default_model_that_no_endpoint_lists_is_doubted_unless_somebody_serves_any(tmp_path):
    """Who named none waited out the budget, and got 503; nothing told why."""
    typo = f"default_model: o\nendpoints: {TWO_MODELS}"
    assert doubtful(tmp_path, typo) == [
        "default_model: no endpoint lists 'o', so who names no model waits for one in vain; the models listed are m, n"
    ]
    assert doubtful(tmp_path, typo.replace("o\n", "n\n")) == []
    assert doubtful(tmp_path, "default_model: o\nendpoints: [{name: a, address: 'h:1'}]") == []


GREEDY = "tenants: {count_others: together, others: {max_in_flight: 2, guaranteed: 3}}"
TWINS = "endpoints: [{name: a, address: '127.0.0.1:1'}, {name: b, address: 'localhost:1'}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TWINS, "endpoints[1].address: localhost:1 may be the server of endpoints[0], 127.0.0.1:1"),
        (
            f"enable_queue: true\n{GREEDY}\nendpoints: [{{name: a, address: 'h:1'}}]",
            "tenants.others.guaranteed: 3 is above its max_in_flight, 2",
        ),
    ],
)
def test_what_is_legal_and_hardly_meant_is_doubted(tmp_path, text, words):
    (doubt,) = doubtful(tmp_path, text)
    assert words in doubt


def test_what_becomes_of_requests_is_told_as_it_is():
    """A dry run was told to be "on"."""
    modes = [
        config({"enable_queue": on, "dry_run": dry}).mode for on, dry in ((True, True), (True, False), (False, False))
    ]
    assert [mode.partition(" (")[0] for mode in modes] == ["dry run", "on", "off"]


def test_a_small_number_of_seconds_may_be_a_bare_number():
    """YAML's 0.00002 is 2e-05 to Python."""
    assert config({"learning": {"steps": {"sequence": 0.00002}}}).policy().laws.steps.sequence_s == 0.00002


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "tenants: {named: [{name: acme}]}",
            ["tenants.count_others: is not set"],
        ),
        ("tenants: {named: [{name: acme}], count_others: together}", []),
        ("tenants: {named: [{name: acme}]}\ntenant_fairness: false", []),
        ("tenants: {others: {guaranteed: 1}}", []),
        (
            "tenants: {others: {max_in_flight: 1}}",
            ["tenants: max_in_flight holds for nobody"],
        ),
        ("tenants: {others: {max_in_flight: 1}}\nenable_queue: true", []),
        ("tenants: {others: {max_in_flight: 1}}\ndry_run: true", []),
    ],
)
def test_tenants_that_share_an_account_unasked_and_caps_without_a_queue_are_doubted(tmp_path, text, words):
    found = doubtful(tmp_path, f"endpoints: [{{name: a, address: 'h:1'}}]\n{text}")
    assert [line[: len(start)] for line, start in zip(found, words, strict=True)] == words


def test_durations_without_a_unit_are_doubted_where_they_stand(tmp_path):
    text = (
        "endpoints: [{name: a, address: 'h:1'}]\nclasses: [{name: x, budget: 1s}, {name: y, budget: 30}]\n"
        "health_check: {interval: 2}\ndrain_timeout: 0\nscrape_timeout: 250ms\nno_endpoint_budget: 60"
    )
    assert doubtful(tmp_path, text) == [
        "health_check.interval: 2 is read as 2s; write the unit",
        "no_endpoint_budget: 60 is read as 60s; write the unit",
        "classes[1].budget: 30 is read as 30s; write the unit",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: every key has its default"),
        ("enable_queue: true", "no endpoints, and no discovery"),
        (
            f"endpoints: {TWO_MODELS}",
            "only the header x-model says which one",
        ),
        ("endpoints: [{name: a, address: 'h:1', engine: none}]", "endpoints[0].max_running_requests: nothing tells"),
        ("scrape_interval: 0s\nendpoints: [{name: a, address: 'h:1'}]", "(scrape_interval: 0s)"),
        ("endpoints: [{name: a, address: 'h:1', engine: trtllm}]", "(engine: trtllm, whose page has no token rate"),
        (f"{FOUND}discovery: [{{dns: {{name: e, port: 1, engine: none}}}}]", "discovery[0].dns.max_running_requests"),
        (f"{FOUND}discovery: [{{kubernetes: {{service: e, engine: none}}}}]", "discovery[0].kubernetes.max_running"),
        ("scrape_interval: 0s\ninference_pool: {name: p}", "inference_pool.max_running_requests: nothing tells"),
        (
            f"dialect: endpoint-picker\nendpoints: {TWO_MODELS.replace('h:', '10.0.0.1:')}",
            "set picker.read_model: true",
        ),
        (f"{PICKS}picker: {{fallbacks: 1}}\n{REPLICAS}", "picker.fallbacks: does nothing with replicas"),
    ],
)
def test_what_may_not_be_meant_is_a_doubt_and_no_mistake(tmp_path, text, words):
    assert any(words in doubt for doubt in doubtful(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "envoy_clusters_file: /c.yaml\ndiscovery: [{dns: {name: engines, port: 8000}}]",
        f"request_fields: true\nendpoints: {TWO_MODELS}",
        f"default_model: m\nendpoints: {TWO_MODELS}",
        "endpoints: [{name: a, address: 'h:1', models: [m]}, {name: b, address: 'h:2', models: [m]}]",
        "max_running_requests: 8\nendpoints: [{name: a, address: 'h:1', engine: none}]",
        "endpoints: [{name: a, address: 'h:1', engine: none, kv_capacity_tokens: 24000}]",
        *(f"endpoints: [{{name: a, address: 'h:1', engine: {engine}}}]" for engine in ("vllm", "llamacpp", "nim")),
        f"{FOUND}discovery: [{{dns: {{name: e, port: 1, engine: none, max_running_requests: 8}}}}]",
        f"{PICKS}picker: {{fallbacks: 1}}",
        f"dialect: endpoint-picker\npicker: {{read_model: true}}\nendpoints: {TWO_MODELS.replace('h:', '10.0.0.1:')}",
        f"{PICKS}{REPLICAS}",
    ],
)
def test_what_is_well_raises_no_doubt(tmp_path, text):
    assert doubtful(tmp_path, text) == []
