"""The commands, run as a user runs them: exit codes, one clear line, nothing left running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from extproc.admission.limit import DEFAULT_LAW
from extproc.commands.up import _endpoint_of
from extproc.config import parse_config

from .kit import commands
from .kit.clients import complete_many
from .kit.envoy import validate
from .kit.processes import PATIENCE_S, Child, free_port, http_get, http_ok, run, wait_until
from .kit.stack import local

EXTPROC = [sys.executable, "-m", "extproc"]
ROOT = Path(__file__).parents[2]
_S = r"( +-| +\d+\.\d\ds)"
STATUS = (
    r" *\d+s  running +\d+/8  waiting +\d+  done +\d+ \(ok \d+(, \w+ \d+)*\) *"
    rf"  first token p95  interactive{_S}  default{_S}  batch{_S}"
)
"""A line of the demo in a log: no drawing over, and nothing that needs columns."""
LOGGED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ extproc"
"""A line of our own log: on a busy machine an engine may be said to be slow, or down."""


def extproc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run([*EXTPROC, *arguments])


def processes_mentioning(text: str) -> list[str]:
    """Return command lines of live processes that mention `text` (a path or port of this test alone)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def config_file(tmp_path):
    def write(**keys) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"endpoints": [{"name": "a", "address": "127.0.0.1:9"}], **keys}))
        return str(path)

    return write


def test_check_says_ok_or_all_problems_at_once(config_file):
    good = extproc("check", config_file())
    assert (good.returncode, good.stderr) == (0, "")
    assert "ok: 1 endpoint(s), queue off" in good.stdout
    bad = extproc("check", config_file(listn=1, binding="x"))
    assert bad.returncode == 1
    assert "listn: unknown key; did you mean 'listen'?" in bad.stderr
    assert "binding: must be 'late' or 'bound'" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_missing_file_is_one_line_and_exit_code_1(tmp_path):
    for command in (["check"], ["serve", "--config"], ["envoy-config", "--config"], ["up", "--config"]):
        done = extproc(*command, str(tmp_path / "none.yaml"))
        assert done.returncode == 1, command
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "can't be read: No such file or directory" in done.stderr


def test_wrong_usage_is_exit_code_2():
    for arguments in ([], ["nonsense"], ["serve"], ["up"], ["up", "--engines", "0"], ["up", "--engines", "x"]):
        assert extproc(*arguments).returncode == 2, arguments


def test_a_taken_port_is_one_line_and_exit_code_3(config_file, taken):
    for keys in ({"listen": taken, "admin": local()}, {"listen": local(), "admin": taken}):
        done = extproc("serve", "--config", config_file(**keys))
        assert done.returncode == 3
        assert f"can't bind {taken}" in done.stderr
        assert "Traceback" not in done.stderr
    for flag in ("--http", "--admin"):
        ports = {"--http": local(), "--admin": local(), flag: taken}
        done = extproc("up", "--engines", "1", *(word for pair in ports.items() for word in pair))
        assert done.returncode == 3
        assert f"extproc: {flag}: can't listen on {taken}: Address already in use" in done.stderr
    done = extproc("engine", "--port", taken.rsplit(":", 1)[1])
    assert done.returncode == 3
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_second_server_on_a_unix_socket_is_refused_and_the_first_goes_on(config_file, tmp_path):
    listen = f"unix:{tmp_path}/ext_proc.sock"
    config = config_file(listen=listen, admin=local(), drain_timeout="200ms")
    admin = yaml.safe_load(Path(config).read_text())["admin"]
    with Child([*EXTPROC, "serve", "--config", config], tmp_path / "first.log") as first:
        first.wait_ready(lambda: http_ok(admin, "/readyz"))
        second = extproc("serve", "--config", config_file(listen=listen, admin=local()))
        assert second.returncode == 3
        assert "another server holds" in second.stderr
        assert http_ok(admin, "/readyz")


def test_top_without_a_sidecar_is_one_line_and_exit_code_3():
    done = extproc("top", "--admin", local(), "--once")
    assert done.returncode == 3
    assert "no sidecar's admin port at" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_q_ends_top_and_the_terminal_is_as_it_was(config_file, tmp_path):
    keys = {"listen": local(), "admin": local(), "drain_timeout": "200ms"}
    ours, theirs = os.openpty()
    before = termios.tcgetattr(ours)
    with Child([*EXTPROC, "serve", "--config", config_file(**keys)], tmp_path / "serve.log") as serving:
        serving.wait_ready(lambda: http_ok(keys["admin"], "/readyz"))
        shown = subprocess.Popen(
            [*EXTPROC, "top", "--admin", keys["admin"]], stdin=theirs, stdout=theirs, stderr=theirs
        )
        try:
            seen = b""
            while b"OUTCOMES" not in seen:
                assert select.select([ours], [], [], PATIENCE_S)[0], seen
                seen += os.read(ours, 4096)
            os.write(ours, b"q")
            assert shown.wait(PATIENCE_S) == 0
        finally:
            shown.kill()
        assert termios.tcgetattr(ours) == before
    os.close(ours)
    os.close(theirs)


def test_a_listen_path_that_is_no_socket_is_left_alone(config_file, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    done = extproc("serve", "--config", config_file(listen=f"unix:{precious}", admin=local()))
    assert done.returncode == 3
    assert "is there already, and it is no socket" in done.stderr
    assert precious.read_text() == "mine"
    folder = extproc("serve", "--config", config_file(listen=f"unix:{tmp_path}", admin=local()))
    assert folder.returncode == 3
    assert "Traceback" not in folder.stderr


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("a:1,b:2", "several stand apart by spaces, without commas"),
        ("https://x:1", "speaks plain HTTP to servers"),
        ("h:70000", "must have a port from 1 to 65535, not 70000"),
        ("http://[::1", "must be like http://10.0.0.7:8000"),
        ("h:x", "must be host:port"),
    ],
)
def test_up_with_a_server_that_is_none_is_one_line_that_says_what_would_be_right(url, words):
    done = extproc("up", "--endpoint", url, "--http", local(), "--admin", local())
    assert done.returncode == 1
    assert done.stderr.startswith("command line: --endpoint: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_with_an_ipv6_address_is_one_that_up_and_the_configuration_take():
    given = _endpoint_of("http://[::1]:8000", 0, simulated=False)
    assert given == {"name": "0::1:8000", "address": "[::1]:8000"}
    parse_config(yaml.safe_dump({"endpoints": [given]}), "up", {})


def test_ctrl_c_during_a_start_is_one_line(config_file, tmp_path):
    """A source that doesn't answer keeps the start waiting for some seconds."""
    silent = {"kubernetes": {"service": "x", "namespace": "y", "api": f"http://{local()}"}}
    config = config_file(
        listen=local(), admin=local(), discovery=[silent], envoy_clusters_file=str(tmp_path / "clusters.yaml")
    )
    with Child([*EXTPROC, "serve", "--config", config], tmp_path / "serve.log") as starting:
        admin = yaml.safe_load(Path(config).read_text())["admin"]
        starting.wait_ready(lambda: http_ok(admin, "/healthz"))
        starting.signal(signal.SIGINT)
        assert starting.wait_exit() == 130
        assert "Traceback" not in starting.output()
        assert starting.lines()[-1] == "extproc: interrupted"


def test_a_reload_says_each_key_with_its_old_and_its_new_value(config_file, tmp_path):
    keys = {"listen": local(), "admin": local(), "drain_timeout": "200ms"}
    config = config_file(**keys)
    with Child([*EXTPROC, "serve", "--config", config], tmp_path / "serve.log") as serving:
        serving.wait_ready(lambda: http_ok(keys["admin"], "/readyz"))
        config_file(**keys, enable_queue=True, max_queued_requests=7)
        serving.wait_line("configuration taken over")
        said = [line.partition(" configuration: ")[2] for line in serving.output().splitlines()]
        assert [line for line in said if line] == ["enable_queue: false -> true", "max_queued_requests: 10000 -> 7"]


def test_check_of_a_configuration_that_finds_its_endpoints_raises_no_alarm():
    done = extproc("check", str(ROOT / "k8s/base/sidecar.yaml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 endpoint(s) and those of 1 source(s)" in done.stdout


def test_check_of_a_configuration_without_any_endpoint_fails_unless_that_is_written(tmp_path):
    path = tmp_path / "none.yaml"
    path.write_text("enable_queue: true")
    done = extproc("check", str(path))
    assert done.returncode == 1
    assert "endpoints: there are none, and no discovery" in done.stderr
    path.write_text("endpoints: []")
    done = extproc("check", str(path))
    assert done.returncode == 0
    assert "every request will be refused" in done.stderr


def test_up_without_an_envoy_binary_says_how_to_get_one():
    done = extproc("up", "--engines", "1", "--http", local(), "--admin", local(), "--envoy", "/nonexistent/envoy")
    assert done.returncode == 3
    assert done.stderr.strip() == "extproc: --envoy: /nonexistent/envoy is no executable file"


def test_up_with_something_that_is_no_envoy_fails_and_leaves_nothing_running(tmp_path):
    admin = local()
    fake = tmp_path / "envoy"
    fake.write_text("#!/bin/sh\necho 'I am no Envoy' >&2\nexit 7\n")
    fake.chmod(0o755)
    done = extproc("up", "--engines", "1", "--http", local(), "--admin", admin, "--envoy", str(fake))
    assert done.returncode == 3
    assert "Envoy did not start: I am no Envoy" in done.stderr
    assert not http_ok(admin, "/readyz")


def test_up_serves_through_envoy_says_that_the_queue_is_on_and_leaves_nothing_behind(tmp_path):
    http, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command = [*EXTPROC, "up", "--engines", "2", "--demo", "--http", http, "--admin", admin]
    with Child(command, tmp_path / "up.log", env={"TMPDIR": str(tmp_path)}) as up:
        up.wait_line(r"interactive +\d+\.\d\ds")
        said = up.output()
        behind = up.lines().index(f"More is shown at http://{admin}/, and in a terminal.") + 2
        in_a_log = [line for line in up.lines()[behind:] if not re.match(LOGGED, line)]
        assert all(re.fullmatch(STATUS, line) for line in in_a_log), said
        assert "queue      on (no configuration file was given)" in said
        assert f"curl -N http://{http}/v1/chat/completions" in said
        body = {"model": "sim", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
        request = urllib.request.Request(
            f"http://{http}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "x-request-class": "interactive"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            assert json.load(answer)["choices"]
        with urllib.request.urlopen(f"http://{admin}/queues", timeout=PATIENCE_S) as answer:
            state = json.load(answer)
        assert [endpoint["limit"] for endpoint in state["endpoints"]] == [4, 4]
        with urllib.request.urlopen(f"http://{admin}/", timeout=PATIENCE_S) as answer:
            assert b"The waiting room" in answer.read()
        shown = extproc("top", "--admin", admin, "--once")
        assert shown.returncode == 0
        assert "/4 in flight" in shown.stdout
        assert processes_mentioning(str(tmp_path))
        up.signal(signal.SIGINT)
        assert up.wait_exit() == 0
        assert "Traceback" not in up.output()
    wait_until(lambda: not processes_mentioning(str(tmp_path)), message="no process left")


def test_up_in_front_of_given_servers_forwards_to_them(tmp_path):
    http, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with Child([*EXTPROC, "engine", "--port", "0", "--name", "mine"], tmp_path / "engine.log") as engine:
        url = engine.wait_line(r"listening on (http://\S+)").group(1)
        command = [*EXTPROC, "up", "--endpoint", url, "--http", http, "--admin", admin]
        with Child(command, tmp_path / "up.log") as up:
            up.wait_line("curl -N")
            with urllib.request.urlopen(f"http://{http}/v1/models", timeout=PATIENCE_S) as answer:
                assert answer.headers["x-engine"] == "mine"
            up.signal(signal.SIGTERM)
            assert up.wait_exit() == 0


def answer_to_what_is_printed(said: str) -> bytes:
    """What comes of the command that `up` prints, in a shell."""
    command = said[said.index("curl -N") :].partition("\n\n")[0]
    return subprocess.run(["sh", "-c", f"{command} -sf"], capture_output=True, timeout=PATIENCE_S, check=True).stdout


def test_up_asks_given_servers_for_their_models_and_sends_each_request_where_its_model_is(tmp_path):
    """Before six servers of two models half of the requests got 404, and no word of it."""
    http = local()
    with ExitStack() as running:
        urls = []
        for name, model in (("a", "alpha"), ("b", "beta"), ("c", "beta")):
            engine = [*EXTPROC, "engine", "--port", "0", "--name", name, "--model", model]
            child = running.enter_context(Child(engine, tmp_path / f"{name}.log", name=name))
            urls.append(child.wait_line(r"listening on (http://\S+)").group(1))
        where = [url.removeprefix("http://") for url in urls]
        command = [*EXTPROC, "up", "--endpoint", *urls, "--http", http, "--admin", local()]
        with Child(command, tmp_path / "up.log") as up:
            up.wait_line(r"curl -N [^{]*{.*\n")
            said = up.output()
            assert f"models     alpha ({where[0]}); beta ({where[1]}, {where[2]}); named in the body" in said
            for model in ("alpha", "beta"):
                body = json.dumps({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]})
                headers = {"content-type": "application/json"}
                url = f"http://{http}/v1/chat/completions"
                answers = complete_many(url, 12, lambda _, headers=headers: headers, body=body.encode())
                assert {one.status for one in answers} == {200}
            assert b"[DONE]" in answer_to_what_is_printed(said)


@pytest.mark.parametrize("fields", [False, True])
def test_what_up_prints_for_a_file_of_two_models_can_be_sent_and_the_file_says_where_the_page_is(tmp_path, fields):
    """The command got 400, and `admin` of the file was not heeded."""
    http, admin = local(), local()
    with ExitStack() as running:
        endpoints = []
        for name in ("alpha", "beta"):
            engine = [*EXTPROC, "engine", "--port", "0", "--model", name]
            child = running.enter_context(Child(engine, tmp_path / f"{name}.log", name=name))
            url = child.wait_line(r"listening on (http://\S+)").group(1)
            endpoints.append({"name": name, "address": url.removeprefix("http://"), "models": [name]})
        file = tmp_path / "file.yaml"
        keys = {"enable_queue": True, "endpoints": endpoints, "admin": admin, "request_fields": fields}
        file.write_text(yaml.safe_dump(keys))
        with Child([*EXTPROC, "up", "--config", file, "--http", http], tmp_path / "up.log") as up:
            up.wait_line(r"second_try: 127.0.0.1:\d+. sends them to another one")
            said = up.output()
            assert (
                f"models     alpha (alpha); beta (beta); named in {'the body' if fields else 'header x-model'}" in said
            )
            assert b"[DONE]" in answer_to_what_is_printed(said)
            assert http_get(admin, "/readyz")[0] == 200


def test_up_with_nothing_to_read_again_drains_at_sighup(tmp_path):
    with Child([*EXTPROC, "engine", "--port", "0"], tmp_path / "engine.log") as engine:
        url = engine.wait_line(r"listening on (http://\S+)").group(1)
        command = [*EXTPROC, "up", "--endpoint", url, "--http", local(), "--admin", local()]
        with Child(command, tmp_path / "up.log") as up:
            up.wait_line("curl -N")
            up.signal(signal.SIGHUP)
            assert up.wait_exit() == 0
            assert "draining" in up.output()


def test_up_checks_the_health_of_servers_that_have_a_page_for_it(tmp_path):
    admin = f"127.0.0.1:{free_port()}"
    with Child([*EXTPROC, "engine", "--port", "0"], tmp_path / "engine.log") as engine:
        url = engine.wait_line(r"listening on (http://\S+)").group(1)
        command = [*EXTPROC, "up", "--endpoint", url, "--http", local(), "--admin", admin]
        with Child(command, tmp_path / "up.log") as up:
            said = up.wait_line("limit      (.*)").group(1)
            assert said.startswith(f"adaptive: starts at {DEFAULT_LAW.start}, ")
            wait_until(lambda: states(admin) == ["up"], message="a passed check, before any request")


def test_up_says_which_servers_it_cannot_reach_and_when_one_fails_and_is_back(tmp_path):
    http, port = local(), free_port()
    endpoints = [f"127.0.0.1:{port}", "nowhere.invalid:1"]
    command = [*EXTPROC, "up", "--endpoint", *endpoints, "--http", http, "--admin", local()]
    with Child(command, tmp_path / "up.log") as up:
        up.wait_line(f"cannot connect to 127.0.0.1:{port}: Connection refused")
        up.wait_line("cannot connect to nowhere.invalid:1: the name does not resolve")

        def told(line: str) -> bool:
            body = json.dumps({"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}).encode()
            request = urllib.request.Request(f"http://{http}/v1/chat/completions", body)
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=3):
                pass
            return re.search(line, up.output()) is not None

        wait_until(
            lambda: told(
                rf"WARNING extproc.health endpoint 127.0.0.1:{port} is down: neither requests nor its metrics page "
            ),
            message="down",
        )
        with Child([*EXTPROC, "engine", "--port", str(port)], tmp_path / "engine.log") as engine:
            engine.wait_line("listening on")
            line = rf"WARNING extproc.queue endpoint 127.0.0.1:{port}: (up|unknown) \(was down"
            wait_until(lambda: told(line), message="back")


def states(admin: str) -> list[str]:
    with urllib.request.urlopen(f"http://{admin}/queues", timeout=PATIENCE_S) as answer:
        return [endpoint["state"] for endpoint in json.load(answer)["endpoints"]]


def test_up_loses_no_request_to_a_server_that_was_just_killed(tmp_path):
    """Those that found it out got 503, where plain Envoy with a usual retry policy asks another one."""
    http, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with ExitStack() as running:
        engine = [*EXTPROC, "engine", "--port", "0"]
        engines = [running.enter_context(Child(engine, tmp_path / f"{n}.log", name=n)) for n in ("one", "two")]
        urls = [one.wait_line(r"listening on (http://\S+)").group(1) for one in engines]
        command = [*EXTPROC, "up", "--endpoint", *urls, "--limit", "8", "--http", http, "--admin", admin]
        with Child(command, tmp_path / "up.log", env={"TMPDIR": str(tmp_path)}) as up:
            up.wait_line(r"curl -N ")

            def send() -> set[int]:
                body = b'{"model": "sim", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}'
                headers = {"content-type": "application/json"}
                url = f"http://{http}/v1/chat/completions"
                return {one.status for one in complete_many(url, 16, lambda _: headers, body=body)}

            assert send() == {200}
            engines[1].signal(signal.SIGKILL)
            engines[1].wait_exit()
            assert send() == {200}
            (counted,) = re.findall(r"^extproc_second_tries_total (\S+)", http_get(admin, "/metrics")[1].decode(), re.M)
            assert float(counted) > 0


def test_up_ends_with_code_3_when_envoy_dies(tmp_path):
    http, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command = [*EXTPROC, "up", "--engines", "1", "--http", http, "--admin", admin]
    with Child(command, tmp_path / "up.log", env={"TMPDIR": str(tmp_path)}) as up:
        up.wait_line("curl -N")
        pids = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit()
            and str(tmp_path).encode() in (entry / "cmdline").read_bytes()
            and b"envoy.yaml" in (entry / "cmdline").read_bytes()
        ]
        os.kill(pids[0], signal.SIGKILL)
        assert up.wait_exit() == 3
        assert "Envoy died" in up.output()


@pytest.mark.parametrize("name", ["sidecar.yaml", "fail-open.yaml"])
def test_the_shipped_envoy_files_are_valid(tmp_path, name):
    ok, said = validate((ROOT / "envoy" / name).read_text(), tmp_path)
    assert ok, said


@pytest.mark.parametrize(
    "keys",
    [
        {"listen": "localhost:50051"},
        {"listen": "unix:/a \U0001f600 'b' \"#c\" \\\\.sock", "upstream_idle_timeout": "999999999s"},
        {
            "endpoints": [{"name": "a", "address": "[fe80::1%1]:1"}],
            "health_check": {"interval": "999999999s", "timeout": "999999999s", "path": '/a"\\\\b%zz'},
        },
        {"headers": {"cluster": "x!#$%&'*+.^_`|~-y", "model": "x%y"}},
        {"listen": "localhost:50051", "dialect": "endpoint-picker"},
    ],
)
def test_what_is_odd_and_passes_check_envoy_takes_too(tmp_path, config_file, keys):
    config = config_file(**keys)
    printed = commands.envoy_config("--config", config, "--http", local(), "--envoy-admin", local())
    ok, said = validate(printed, tmp_path)
    assert ok, said
    bootstrap = tmp_path / "printed.yaml"
    bootstrap.write_text(printed)
    if "dialect" not in keys:
        checked = commands.extproc("check", config, "--envoy", bootstrap)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("flags", [[], ["--fail-open"], ["--access-log", "none"], ["--upstream-protocol", "h2"]])
def test_whatever_envoy_config_prints_is_valid_and_passes_our_own_check(tmp_path, config_file, flags):
    config = config_file(
        listen=f"unix:{tmp_path}/s.sock",
        endpoints=[{"name": "a.b:1", "address": "[::1]:8000"}, {"name": "x", "address": "localhost:1"}],
        headers={"cluster": "x-my.cluster"},
    )
    printed = commands.envoy_config("--config", config, "--http", local(), "--envoy-admin", local(), *flags)
    ok, said = validate(printed, tmp_path)
    assert ok, said
    bootstrap = tmp_path / "printed.yaml"
    bootstrap.write_text(printed)
    assert commands.extproc("check", config, "--envoy", bootstrap).returncode == 0
