"""`extproc check --envoy`: ways past the queue, to another server or to no sidecar; and what it could not look at."""

from __future__ import annotations

import copy

import pytest

from extproc.commands import cli
from extproc.config import Config, parse_config
from extproc.envoy.advice import advice
from extproc.envoy.check import check_envoy, could_not_look
from extproc.envoy.skeleton import EnvoyOptions
from extproc.errors import ConfigError
from tests.unit.envoy_bootstrap import HOST, MANAGER, OURS, Rendered

TEXT = """
endpoints: [{name: a, address: '127.0.0.1:8001'}, {name: b, address: '127.0.0.1:8002', cluster: llm_b}]
"""
CONFIG = parse_config(TEXT, "file", {})
FILTER = "envoy.filters.http.ext_proc"
ROUTER = {
    "name": "envoy.filters.http.router",
    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
}
OFF = {
    FILTER: {"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute", "disabled": True}
}
ON = {
    FILTER: {"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute", "overrides": {}}
}


class Bootstrap(Rendered):
    """The parts of a rendered bootstrap that tests change."""

    def __init__(self, config: Config = CONFIG, options: EnvoyOptions | None = None) -> None:
        super().__init__(config, options)
        self.listeners = self.resources["listeners"]
        self.clusters = {cluster["name"]: cluster for cluster in self.resources["clusters"]}

    def first(self, match: dict, cluster: str = "a", **more: object) -> None:
        """Add a route before all others."""
        self.routes.insert(0, {"match": match, "route": {"cluster": cluster}, **more})

    def another_host(self, cluster: str, **more: object) -> None:
        """Add a virtual host with one route."""
        route = {"match": {"prefix": "/"}, "route": {"cluster": cluster}}
        self.manager["route_config"]["virtual_hosts"].append(
            {"name": "x", "domains": ["x"], "routes": [route], "request_body_buffer_limit": 32 << 20, **more}
        )

    def another_listener(self, route: dict) -> None:
        """Add a listener with one route and no ext_proc filter."""
        listener = copy.deepcopy(self.listeners[0])
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        manager["http_filters"] = [ROUTER]
        manager["route_config"]["virtual_hosts"][0]["routes"] = [route]
        self.listeners.append({**listener, "name": "second"})

    def move(self, cluster: str, *hosts: str) -> None:
        """Give a cluster other hosts: host:port, or the path of a socket."""
        addresses = [
            {"pipe": {"path": host}}
            if host.startswith("/")
            else {"socket_address": {"address": host.rpartition(":")[0], "port_value": int(host.rpartition(":")[2])}}
            for host in hosts
        ]
        found = [{"endpoint": {"address": address}} for address in addresses]
        self.clusters[cluster]["load_assignment"]["endpoints"] = [{"lb_endpoints": found}]


MODELS = """
endpoints:
- {name: a, address: '127.0.0.1:8001', models: [llama, qwen]}
- {name: b, address: '127.0.0.1:8002', models: [qwen]}
"""
DISCOVERY = "discovery: [{dns: {name: h, port: 80}}]\nenvoy_clusters_file: /run/clusters.yaml"
TLS = (
    "listen: 0.0.0.0:50051\n"
    "tls: {cert_file: /c, key_file: /k, envoy: {server_name: s, ca_file: /ca, secrets_directory: /e}}\n" + TEXT
)
RENDERED = {
    "plain": (TEXT, {}),
    "fail open": (TEXT, {"fail_open": True}),
    "fail open, by model": (MODELS, {"fail_open": True}),
    "fail open, by model in the body": (f"request_fields: true\n{MODELS}", {"fail_open": True}),
    "two sidecars, neither where this one listens": (TEXT, {"sidecars": ("127.0.0.1:7001", "127.0.0.1:7002")}),
    "h2": (TEXT, {"upstream_protocol": "h2"}),
    "by unix socket": (f"listen: unix:/run/s\n{TEXT}", {}),
    "everywhere": (f"listen: 0.0.0.0:50051\nallow_insecure_listen: true\n{TEXT}", {"sidecars": ("10.0.0.9:50051",)}),
    "a service's name": (f"listen: 0.0.0.0:50051\nallow_insecure_listen: true\n{TEXT}", {"sidecars": ("s.llm:50051",)}),
    "tls": (TLS, {}),
    "discovery": (DISCOVERY, {}),
    "discovery, fail open": (DISCOVERY, {"fail_open": True}),
    "by names": ("endpoints: [{name: a, address: 'a.local:1'}, {name: b, address: 'b.local:1'}]", {}),
    "probe": (f"first_byte_probe: true\nrequest_fields: true\n{TEXT}", {"unqueued": ("/health",)}),
    "unqueued": (TEXT, {"unqueued": ("/health", "/v1/models")}),
    "unqueued, fail open": (TEXT, {"unqueued": ("/health",), "fail_open": True}),
    "unqueued, discovery": (DISCOVERY, {"unqueued": ("/health",)}),
    "unqueued, discovery, fail open": (DISCOVERY, {"unqueued": ("/health",), "fail_open": True}),
}


@pytest.mark.parametrize("name", RENDERED)
def test_whatever_we_render_passes(tmp_path, name):
    text, options = RENDERED[name]
    bootstrap = Bootstrap(parse_config(text, "file", {}), EnvoyOptions(**options))
    assert bootstrap.check(tmp_path) == []
    sidecars = [note for note in bootstrap.notes(tmp_path) if "127.0.0.1:7001, 127.0.0.1:7002" in note]
    assert bootstrap.notes(tmp_path) == sidecars
    assert len(sidecars) == name.startswith("two sidecars")


SPOILT = {
    "the two routes swapped": (
        lambda b: b.routes.reverse(),
        f"{HOST}.routes[0]: a held request goes to unsteered and not to the endpoint whose slot it has;",
    ),
    "a narrower route to an engine before": (
        lambda b: b.first({"prefix": "/v1/"}),
        f"{HOST}.routes[0]: a held request goes to a and not to the endpoint whose slot it has: no limit holds;",
    ),
    "a weighted one": (
        lambda b: b.routes.insert(
            0,
            {
                "match": {"safe_regex": {"regex": "/v1/.*"}},
                "route": {"weighted_clusters": {"clusters": [{"name": "a", "weight": 1}, {"name": "x", "weight": 1}]}},
            },
        ),
        f"{HOST}.routes[0]: a held request goes to a, x and not",
    ),
    "an engine's address under another name": (
        lambda b: (
            b.whole["static_resources"]["clusters"].append({**copy.deepcopy(b.clusters["a"]), "name": "direct"}),
            b.first({"prefix": "/v1/"}, "direct"),
        ),
        "goes to direct and not to the endpoint whose slot it has: no limit holds;",
    ),
    "a probe that waits for a slot": (
        lambda b: b.routes.insert(0, {"match": {"path": "/healthz"}, "direct_response": {"status": 200}}),
        f"{HOST}.routes[0]: a held request goes to what this route says and not",
    ),
    "a steered route narrower than the one after it": (
        lambda b: b.steered["match"].update(prefix="/v1/"),
        f"{HOST}.routes[2]: a held request goes to unsteered and not",
    ),
    "a steered route with a condition more than the one after it": (
        lambda b: b.steered["match"]["headers"].append({"name": "x-model", "present_match": True}),
        f"{HOST}.routes[2]: a held request goes to unsteered and not",
    ),
    "a virtual host without the steered route": (
        lambda b: b.another_host("a"),
        f"{MANAGER}.route_config.virtual_hosts[1].routes[0]: a held request goes to a and not",
    ),
    "retries of the route": (
        lambda b: b.steered["route"].update(retry_policy={"retry_on": "5xx, reset,connect-failure"}),
        f"{HOST}.routes[0].route.retry_policy.retry_on: 5xx,reset: one slot, several runs",
    ),
    "retries of the virtual host": (
        lambda b: (b.steered["route"].pop("retry_policy"), b.host.update(retry_policy={"retry_on": "gateway-error"})),
        f"{HOST}.retry_policy.retry_on: gateway-error: one slot, several runs",
    ),
    "another server": (
        lambda b: b.move("a", "127.0.0.1:9999"),
        "static_resources.clusters[2].load_assignment: leads to 127.0.0.1:9999, and endpoints[0].address is 127.0.0.1:8001",
    ),
    "another machine": (
        lambda b: b.move("llm_b", "10.0.0.1:8002"),
        "leads to 10.0.0.1:8002, and endpoints[1].address is",
    ),
    "two servers": (
        lambda b: b.move("a", "127.0.0.1:8001", "127.0.0.1:8002"),
        "static_resources.clusters[2].load_assignment: 2 hosts (127.0.0.1:8001, 127.0.0.1:8002), and Envoy chooses among",
    ),
    "no server": (lambda b: b.move("a"), "static_resources.clusters[2].load_assignment: 0 hosts (none)"),
    "another port of the sidecar": (
        lambda b: b.move("extproc_queue", "127.0.0.1:50052"),
        "static_resources.clusters[0].load_assignment: Envoy asks 127.0.0.1:50052 and the sidecar listens at 127.0.0.1:50051",
    ),
    "a socket where the sidecar has a port": (
        lambda b: b.move("extproc_queue", "/run/s"),
        "Envoy asks unix:/run/s and the sidecar listens at 127.0.0.1:50051",
    ),
    "no sidecar": (lambda b: b.move("extproc_queue"), "static_resources.clusters[0].load_assignment: no host"),
    "off where requests arrive": (
        lambda b: b.unsteered.update(typed_per_filter_config=OFF),
        f"{HOST}.routes[2].typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of the steered",
    ),
    "off for the virtual host": (
        lambda b: b.host.update(typed_per_filter_config=OFF),
        f"{HOST}.typed_per_filter_config[{FILTER}].disabled: switches the filter off",
    ),
    "off for all": (
        lambda b: b.manager["route_config"].update(typed_per_filter_config=OFF),
        f"{MANAGER}.route_config.typed_per_filter_config[{FILTER}].disabled: switches the filter off",
    ),
    "off by a wrapped setting": (
        lambda b: b.unsteered.update(typed_per_filter_config={FILTER: {"config": OFF[FILTER]}}),
        f"{HOST}.routes[2].typed_per_filter_config[{FILTER}].disabled: switches the filter off",
    ),
    "off in the list of filters": (
        lambda b: b.manager["http_filters"][OURS].update(disabled=True),
        f"{MANAGER}.http_filters[{OURS}].disabled: switches the filter off",
    ),
    "off for a prefix that leads to an engine": (
        lambda b: b.first({"prefix": "/v1/"}, typed_per_filter_config=OFF),
        f"{HOST}.routes[0].typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of engines",
    ),
    "a bypass that takes some without a word": (
        lambda b: b.bypass["match"]["runtime_fraction"]["default_value"].update(numerator=5),
        f"{HOST}.routes[1].typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of engines",
    ),
    "a bypass that nobody can switch off": (
        lambda b: b.bypass["match"].pop("runtime_fraction"),
        f"{HOST}.routes[1].typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of engines",
    ),
    "off for a virtual host, where engines' requests and others arrive": (
        lambda b: (b.host.update(typed_per_filter_config=OFF), b.first({"prefix": "/v1/"})),
        f"{HOST}.typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of engines",
    ),
    "off for a prefix that leads to any endpoint, by the clusters file": (
        lambda b: b.first({"prefix": "/v1/"}, "extproc_any_endpoint", typed_per_filter_config=OFF),
        f"{HOST}.routes[0].typed_per_filter_config[{FILTER}].disabled: switches the filter off where requests of engines",
    ),
    "a second listener": (
        lambda b: b.another_listener({"match": {"prefix": "/"}, "route": {"cluster": "llm_b"}}),
        f"{HOST.replace('listeners[0]', 'listeners[1]')}.routes[0]: goes to llm_b without an envoy.filters.http.ext_proc",
    ),
    "a second listener where clients choose": (
        lambda b: b.another_listener({"match": {"prefix": "/"}, "route": {"cluster_header": "x-upstream-cluster"}}),
        "goes to the cluster that the client names in x-upstream-cluster without",
    ),
    "gRPC over HTTP/1.1": (
        lambda b: b.clusters["extproc_queue"].pop("typed_extension_protocol_options"),
        "static_resources.clusters[0].typed_extension_protocol_options: no http2_protocol_options: Envoy speaks HTTP/1.1",
    ),
    "routes by RDS, and clients that choose": (
        lambda b: (
            b.manager.pop("route_config"),
            b.manager.update(rds={"route_config_name": "x"}),
            b.manager.pop("early_header_mutation_extensions"),
        ),
        f"{MANAGER}.early_header_mutation_extensions: must remove",
    ),
    "clusters by CDS, and one that leads elsewhere": (
        lambda b: (
            b.whole.update(dynamic_resources={"cds_config": {"ads": {}}}),
            b.move("a", "127.0.0.1:9999"),
        ),
        "leads to 127.0.0.1:9999, and endpoints[0].address is 127.0.0.1:8001",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_way_past_the_queue_is_the_one_problem_named(tmp_path, name):
    spoil, words = SPOILT[name]
    bootstrap = Bootstrap()
    spoil(bootstrap)
    problem = bootstrap.the_problem(tmp_path)
    assert words in problem
    assert any(right in problem for right in ("would be right", "leave it on", "must remove"))


def test_swapped_endpoints_are_named_where_names_alone_could_not_tell(tmp_path):
    text = "endpoints: [{name: a, address: 'a.local:1'}, {name: b, address: 'b.local:1'}]"
    bootstrap = Bootstrap(parse_config(text, "file", {}))
    bootstrap.move("a", "b.local:1")
    (problem,) = bootstrap.check(tmp_path)
    assert "leads to b.local:1, and endpoints[0].address is a.local:1" in problem
    assert bootstrap.notes(tmp_path) == []


HARMLESS = {
    "an exact path past the queue": lambda b: b.first({"path": "/health"}, typed_per_filter_config=OFF),
    "an exact path that Envoy answers": lambda b: b.routes.insert(
        0, {"match": {"path": "/healthz"}, "direct_response": {"status": 200}, "typed_per_filter_config": OFF}
    ),
    "another service on the same Envoy": lambda b: b.first({"prefix": "/ui/"}, "ui", typed_per_filter_config=OFF),
    "another service on its own host": lambda b: b.another_host("ui", typed_per_filter_config=OFF),
    "off at the steered route, where no request arrives": lambda b: b.steered.update(typed_per_filter_config=OFF),
    "off in the list of filters and on where requests arrive": lambda b: (
        b.manager["http_filters"][OURS].update(disabled=True),
        b.unsteered.update(typed_per_filter_config=ON),
    ),
    "off for the virtual host and on where requests arrive": lambda b: (
        b.host.update(typed_per_filter_config=OFF),
        b.unsteered.update(typed_per_filter_config=ON),
    ),
    "the unsteered route first, for requests without the header": lambda b: (
        b.routes.reverse(),
        b.unsteered["match"].update(headers=[{"name": "x-upstream-cluster", "present_match": False}]),
    ),
    "a narrower route after the steered one": lambda b: b.routes.insert(
        1, {"match": {"prefix": "/v1/"}, "route": {"cluster": "a"}}
    ),
    "a steered route by regex": lambda b: (
        b.steered["match"].pop("prefix"),
        b.steered["match"].update(safe_regex={"regex": ".*"}),
    ),
    "the virtual host's retries where the route has its own": lambda b: b.host.update(retry_policy={"retry_on": "5xx"}),
    "retries before the engine has begun": lambda b: b.steered["route"]["retry_policy"].update(
        retry_on="connect-failure,refused-stream"
    ),
    "localhost": lambda b: (b.move("a", "localhost:8001"), b.move("extproc_queue", "localhost:50051")),
    "a second listener for something else": lambda b: b.another_listener(
        {"match": {"prefix": "/"}, "route": {"cluster": "ui"}}
    ),
    "a second listener for an engine's metrics alone": lambda b: b.another_listener(
        {"match": {"path": "/metrics"}, "route": {"cluster": "a"}}
    ),
    "HTTP/2 as older versions say it": lambda b: b.clusters["extproc_queue"].update(
        {
            "http2_protocol_options": b.clusters["extproc_queue"]
            .pop("typed_extension_protocol_options")
            .popitem()[1]["explicit_http_config"]["http2_protocol_options"]
        }
    ),
    "weights, which are no clusters": lambda b: b.routes.insert(
        1,
        {
            "match": {"prefix": "/v1/"},
            "route": {"weighted_clusters": {"clusters": [{"name": "a", "weight": 1}, {"name": "x", "weight": 1}]}},
        },
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_goes_past_nothing_is_no_problem(tmp_path, name):
    bootstrap = Bootstrap()
    HARMLESS[name](bootstrap)
    assert bootstrap.check(tmp_path) == []
    assert bootstrap.notes(tmp_path) == []


UNSEEN = {
    "routes by RDS": (
        lambda b: (b.manager.pop("route_config"), b.manager.update(rds={"route_config_name": "x"})),
        f"could not look at: routes (they come by RDS): {MANAGER}.rds",
    ),
    "scoped routes": (
        lambda b: (b.manager.pop("route_config"), b.manager.update(scoped_routes={"name": "x"})),
        f"could not look at: routes (they come by SRDS): {MANAGER}.scoped_routes",
    ),
    "virtual hosts by VHDS": (
        lambda b: b.manager["route_config"].update(vhds={"config_source": {"ads": {}}}),
        f"could not look at: virtual hosts (they come by VHDS): {MANAGER}.route_config.vhds",
    ),
    "clusters by CDS": (
        lambda b: (
            b.whole.update(dynamic_resources={"cds_config": {"ads": {}}}),
            b.whole["static_resources"].pop("clusters"),
        ),
        "could not look at: clusters (they come by CDS): dynamic_resources.cds_config",
    ),
    "all by LDS": (
        lambda b: (
            b.whole.update(dynamic_resources={"lds_config": {"ads": {}}}),
            b.whole["static_resources"].pop("listeners"),
        ),
        "could not look at: listeners (they come by LDS): dynamic_resources.lds_config",
    ),
    "an endpoint by EDS": (
        lambda b: (b.clusters["a"].update(type="EDS"), b.clusters["a"].pop("load_assignment")),
        "could not look at: hosts (they are not in the file): static_resources.clusters[2]",
    ),
    "a name where the configuration has an address": (
        lambda b: b.move("a", "vllm-a.local:8001"),
        "could not tell: whether vllm-a.local:8001 (static_resources.clusters[2].load_assignment) is 127.0.0.1:8001 (endpoints",
    ),
    "a sidecar elsewhere": (
        lambda b: b.move("extproc_queue", "extproc.llm.svc:50051"),
        "could not tell: whether extproc.llm.svc:50051 (static_resources.clusters[0].load_assignment) leads to the sidecar",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_could_not_be_looked_at_is_a_warning_and_no_plain_ok(tmp_path, capsys, name):
    spoil, words = UNSEEN[name]
    bootstrap = Bootstrap()
    spoil(bootstrap)
    file = tmp_path / "sidecar.yaml"
    file.write_text(TEXT)
    path = bootstrap.write(tmp_path)
    assert cli.main(["check", str(file), "--envoy", str(path)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{path}: warning: {words}")
    assert len(said.err.splitlines()) == 1
    assert said.out.splitlines()[1] == f"{path}: ok: what could be looked at fits {file}"


def test_where_all_was_looked_at_it_is_a_plain_ok(tmp_path, capsys):
    file = tmp_path / "sidecar.yaml"
    file.write_text(TEXT)
    path = Bootstrap().write(tmp_path)
    assert cli.main(["check", str(file), "--envoy", str(path)]) == 0
    said = capsys.readouterr()
    assert (said.out.splitlines()[1], said.err) == (f"{path}: ok: fits {file}", "")


NO_BOOTSTRAP = {
    "a match that is text": (check_envoy, lambda b: b.unsteered.update(match="x")),
    "settings in a list": (check_envoy, lambda b: b.host.update(typed_per_filter_config=[FILTER])),
    "an address that is text": (
        could_not_look,
        lambda b: b.clusters["a"].update(load_assignment={"endpoint": {"address": {"socket_address": "x"}}}),
    ),
}


@pytest.mark.parametrize("name", NO_BOOTSTRAP)
def test_a_file_that_no_envoy_would_take_is_one_problem_and_no_traceback(tmp_path, name):
    look, spoil = NO_BOOTSTRAP[name]
    bootstrap = Bootstrap()
    spoil(bootstrap)
    with pytest.raises(ConfigError, match=r"is not shaped like an Envoy bootstrap: `envoy --mode validate"):
        look(CONFIG, bootstrap.write(tmp_path))


UNQUEUED = {
    "": (TEXT, False, True),
    "fail open": (TEXT, True, True),
    "discovery": (DISCOVERY, False, False),
    "discovery, fail open": (DISCOVERY, True, False),
}


@pytest.mark.parametrize("name", UNQUEUED)
def test_an_unqueued_path_has_a_cluster_to_go_to_and_no_filter_of_ours(name):
    text, fail_open, rendered = UNQUEUED[name]
    config = parse_config(f"first_byte_probe: true\n{text}", "file", {})
    bootstrap = Bootstrap(config, EnvoyOptions(fail_open=fail_open, unqueued=("/health",)))
    route = bootstrap.routes[0]
    assert (route["match"], route["route"]["cluster"]) == ({"path": "/health"}, "extproc_unqueued")
    ours = {FILTER, "first-byte-probe"}
    assert ours < {one["name"] for one in bootstrap.manager["http_filters"]}
    assert {name: setting["disabled"] for name, setting in route["typed_per_filter_config"].items()} == dict.fromkeys(
        ours, True
    )
    assert ("extproc_unqueued" in bootstrap.clusters) is rendered
    late = bootstrap.manager["route_config"].get("validate_clusters") is False
    assert late is (config.envoy_clusters_file is not None)  # else Envoy does not start: the cluster comes later


@pytest.mark.parametrize("path", ["health", "", "/health?x=1", "/a b", "/v1/*", "/x#y", "/é", "/a\x01"])
def test_an_unqueued_path_must_be_exact(tmp_path, capsys, path):
    file = tmp_path / "sidecar.yaml"
    file.write_text(TEXT)
    assert cli.main(["envoy-config", "--config", str(file), "--unqueued", "/ok", path]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"--unqueued: must be an exact path without a query, like /health, not {path!r}" in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--http", "localhost:8080"], "--http: must have an IP address, where Envoy listens"),
        (["--envoy-admin", "localhost:9901"], "--envoy-admin: must have an IP address"),
        (["--sidecar", "unix:s.sock"], "--sidecar: must be host:port"),
        (["--sidecar", "unix:/" + "x" * 107], "--sidecar: the path of a unix socket has at most 107 bytes"),
        (["--sidecar", "unix:/s.sock", "h:1"], "'h:1' is a name, and 'unix:/s.sock' a unix socket"),
    ],
)
def test_an_address_that_envoy_would_refuse_is_refused(tmp_path, capsys, flags, said):
    file = tmp_path / "sidecar.yaml"
    file.write_text(TEXT)
    assert cli.main(["envoy-config", "--config", str(file), *flags]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert said in written.err


def test_a_last_route_to_any_server_is_named_where_servers_list_different_models(tmp_path):
    """`check` said that such a bootstrap fits; of 12 requests 5 got a server's 404."""
    config = parse_config(MODELS, "file", {})
    any_server = "requests go to any server of unsteered, and these list different models"

    def told(bootstrap: Bootstrap) -> list[str]:
        return [word for word in advice(config, bootstrap.write(tmp_path)) if any_server in word]

    assert told(Bootstrap(config, EnvoyOptions(fail_open=True))) == []
    assert told(Bootstrap(config)) == []
    alike = Bootstrap(parse_config(MODELS.replace("llama, ", ""), "file", {}), EnvoyOptions(fail_open=True))
    assert len(told(alike)) == 1
    assert told(alike)[0].startswith(f"{HOST}.routes[2]: while no sidecar answers")


def test_who_is_chosen_by_model_alone_and_takes_no_connection_is_left_for_another(tmp_path):
    """As docs/on-call.md says of the bypass, which leads there where servers list different models."""
    bootstrap = Bootstrap(parse_config(MODELS, "file", {}), EnvoyOptions(fail_open=True))
    (by_model,) = (one for one in bootstrap.routes if "extproc_unsteered_" in str(one["match"]))
    assert by_model["route"].get("retry_policy") == bootstrap.bypass["route"]["retry_policy"]
    assert bootstrap.check(tmp_path) == []
