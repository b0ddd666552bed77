"""The parts of the kit that need no Envoy: child processes, ports, parsing, raw gRPC streams."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from .kit.awake import awake
from .kit.extproc_raw import METHOD, RawChannel, StreamEnd
from .kit.http1 import Body, chunk
from .kit.processes import PATIENCE_S, Child, free_port, http_ok, run, tcp_open, wait_until
from .kit.upstream import Behaviour, Upstream, behave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# Processes and waiting


def test_waiting_for_what_never_comes_fails_with_the_message_and_the_last_value() -> None:
    with pytest.raises(AssertionError, match=r"moon is full; last value: 0"):
        wait_until(lambda: 0, 0.05, "moon is full")


def test_free_ports_are_distinct_and_can_be_bound() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) == 50
    with socket.create_server(("127.0.0.1", ports.pop())) as server:
        assert tcp_open(f"127.0.0.1:{server.getsockname()[1]}")
    assert not tcp_open(f"127.0.0.1:{ports.pop()}")


def test_two_workers_of_pytest_never_give_out_the_same_port() -> None:
    ask = "from tests.e2e.kit.processes import free_port; print(*{free_port() for _ in range(1000)})"
    one, two = (
        set(run(["env", f"PYTEST_XDIST_WORKER={name}", sys.executable, "-c", ask]).stdout.split())
        for name in ("gw0", "gw1")
    )
    assert len(one) == len(two) == 1000
    assert not one & two


def test_a_child_is_ready_at_its_line_and_gone_after_its_context(tmp_path: Path) -> None:
    code = "import time; print('ready 7', flush=True); time.sleep(60)"
    with Child([sys.executable, "-c", code], tmp_path / "log") as child:
        assert child.wait_line(r"^ready (\d)$").group(1) == "7"
        assert child.returncode is None
    assert child.returncode == -signal.SIGTERM
    assert child.stop() == -signal.SIGTERM


def test_a_child_that_ignores_term_is_killed_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(f'grandchild {grandchild.pid}.', flush=True)\n"
        "time.sleep(60)\n"
    )
    with Child([sys.executable, "-c", code], tmp_path / "log", grace_s=0.1) as child:
        grandchild = int(child.wait_line(r"grandchild (\d+)\.").group(1))
    assert child.returncode == -signal.SIGKILL
    wait_until(lambda: _gone(grandchild), message="the grandchild is gone")


def _gone(pid: int) -> bool:
    done = run(["ps", "-o", "stat=", "-p", str(pid)])
    return not done.stdout.strip() or done.stdout.startswith("Z")


def test_a_child_that_dies_before_it_is_ready_fails_at_once_with_its_output(tmp_path: Path) -> None:
    started = awake()
    with (
        pytest.raises(AssertionError, match=r"(?s)ended with 3 before line.*no luck"),
        Child([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], tmp_path / "log") as child,
    ):
        child.wait_line("ready")
    assert awake() - started < PATIENCE_S / 2


def test_a_child_can_be_crashed_and_started_again(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    with Child([sys.executable, "-c", code], tmp_path / "log") as child:
        child.wait_line("up")
        child.signal(signal.SIGKILL)
        assert child.wait_exit() == -signal.SIGKILL
        child.stop()
        child.start()
        child.wait_line(r"up\nup")
        assert child.returncode is None


# Parsing


def test_a_chunked_body_cut_at_any_place_decodes_the_same() -> None:
    wire = chunk(b"hello ") + b"5;ext=1\r\nworld\r\n" + b"0\r\ntrailer: yes\r\n\r\n" + b"NEXT"
    for cut in range(1, len(wire)):
        body = Body([("transfer-encoding", "chunked")])
        payload = body.feed(wire[:cut]) + body.feed(wire[cut:])
        assert (payload, body.done, body.rest) == (b"hello world", True, b"NEXT"), cut


def test_a_behaviour_survives_its_header() -> None:
    _, value = behave("sse", events=5, gap_s=0.25, hold="body", fail=1)
    assert Behaviour.parse(value) == Behaviour("sse", events=5, gap_s=0.25, hold="body", fail=1)
    with pytest.raises(ValueError, match="no behaviour 'sulk'"):
        behave("sulk")


# The raw ext_proc client


@pytest.fixture
def echo() -> Iterator[str]:
    """A gRPC server whose Process method echoes each message; `bye` makes it refuse with RESOURCE_EXHAUSTED."""
    from concurrent.futures import ThreadPoolExecutor

    def process(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in messages:
            if message == b"bye":
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
            yield message

    _, service, method = METHOD.split("/")
    handler = grpc.method_handlers_generic_handler(service, {method: grpc.stream_stream_rpc_method_handler(process)})
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=[handler])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait(PATIENCE_S)


def test_raw_bytes_go_both_ways_and_a_half_close_ends_the_stream_well(echo: str) -> None:
    with RawChannel(echo) as channel:
        stream = channel.open()
        stream.send(b"\x00\xff")
        assert stream.read() == b"\x00\xff"
        assert stream.silent(0.05)
        stream.half_close()
        assert stream.wait_end().code is grpc.StatusCode.OK


def test_the_servers_status_ends_a_raw_stream(echo: str) -> None:
    with RawChannel(echo) as channel:
        stream = channel.open()
        stream.send(b"bye")
        with pytest.raises(StreamEnd, match="RESOURCE_EXHAUSTED: no more"):
            stream.read()


def test_a_cancelled_raw_stream_ends_and_others_go_on(echo: str) -> None:
    with RawChannel(echo) as channel:
        first, second = channel.open(), channel.open()
        first.cancel()
        assert first.wait_end().code is grpc.StatusCode.CANCELLED
        second.send(b"on")
        assert second.read() == b"on"


def test_a_closed_upstream_answers_nothing() -> None:
    with Upstream() as upstream:
        assert http_ok(upstream.address, "/metrics")
    assert not http_ok(upstream.address, "/metrics")
