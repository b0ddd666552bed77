"""The completion queue as an event loop, and the grpcio that it is made of."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from grpc._cython import cygrpc

from extproc.commands import cli
from extproc.transport.completion import loop as loop_module
from extproc.transport.completion.loop import FILES, make_loop
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.completion_stage import loop

__all__ = ["loop"]  # a fixture


def test_timers_threads_sockets_and_signals_work_as_on_any_loop(loop):
    async def everything() -> list[str]:
        seen = []
        began = loop.time()
        await asyncio.sleep(0.02)
        assert loop.time() - began >= 0.02
        seen.append(await asyncio.to_thread(lambda: "thread"))

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"socket\n")
        seen.append((await reader.readline()).decode().strip())
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(called.wait(), PATIENCE_S)
        loop.remove_signal_handler(signal.SIGUSR1)
        return seen

    assert loop.run_until_complete(everything()) == ["thread", "socket"]


def test_of_many_files_that_have_something_to_tell_some_are_dealt_with_in_each_turn_and_none_that_is_gone(loop):
    """After a moment without a processor the pages of 150 engines had come: to take them in took ten milliseconds."""
    pairs = [socket.socketpair() for _ in range(5 * FILES)]
    seen: list[int] = []
    turns: list[int] = []

    def came(number: int) -> None:
        seen.append(number)
        loop.remove_reader(pairs[number][0])
        if number in gone:
            loop.stop()
        elif len(seen) == 1:  # the last one goes, and another takes its place
            last = pairs[-1][0]
            loop.remove_reader(last)
            loop.add_reader(last, came, -1)

    def turn() -> None:
        turns.append(len(seen))
        if len(seen) < len(pairs):
            loop.call_soon(turn)
        else:
            loop.stop()

    gone = {len(pairs) - 1}
    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        loop.add_reader(ours, came, number)
    loop.call_soon(turn)
    loop.call_later(PATIENCE_S, loop.stop)
    loop.run_forever()
    for pair in pairs:
        for one in pair:
            one.close()
    assert sorted(seen) == [-1, *range(len(pairs) - 1)], "each once, the last one as what it is now"
    assert max(later - before for before, later in itertools.pairwise(turns)) <= FILES


@pytest.mark.parametrize("puts_off", ["call_soon", "call_later"])
def test_what_an_event_of_the_queue_puts_off_comes_in_time_though_nothing_else_happens(monkeypatch, puts_off):
    monkeypatch.setattr(loop_module, "HEARTBEAT_S", 60.0)
    loop = make_loop()
    assert loop is not None
    do = loop.call_soon if puts_off == "call_soon" else partial(loop.call_later, 0.01)
    late: list[int] = []
    loop.call_later(PATIENCE_S, lambda: late.append(1) or loop.stop())
    loop._wait._waker.start_server_batch((), lambda _: do(loop.stop))
    loop.run_forever()
    loop.close()
    assert not late


def test_events_that_follow_one_another_without_end_keep_no_timer_from_its_time(loop):
    left = 100_000

    def again(_: object) -> None:
        nonlocal left
        if left:
            left -= 1
            loop._wait._waker.start_server_batch((), again)

    again(None)
    loop.call_later(0.02, loop.stop)
    loop.run_forever()
    assert left
    left = 0


@pytest.mark.parametrize("bug", [ValueError, asyncio.CancelledError])
def test_an_event_that_raises_is_told_to_the_log_and_costs_no_other_event_its_turn(loop, caplog, bug):
    def broken(_: object) -> None:
        raise bug

    for tag in (broken, lambda _: loop.call_soon(loop.stop)):
        loop._wait._waker.start_server_batch((), tag)
    loop.run_forever()
    (record,) = caplog.records
    assert record.exc_info[0] is bug


def test_an_interrupt_in_an_event_ends_the_run_and_the_loop_can_run_again(loop):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    loop._wait._waker.start_server_batch((), interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    loop.run_until_complete(asyncio.wait_for(asyncio.to_thread(int), PATIENCE_S))


def test_an_idle_loop_sleeps(loop):
    began, cpu = time.monotonic(), time.process_time()
    loop.run_until_complete(asyncio.sleep(0.5))
    assert time.monotonic() - began >= 0.5
    assert time.process_time() - cpu < 0.2


@pytest.mark.parametrize(
    "gone",
    [
        *("CompletionQueue", "Server", "ReceiveCloseOnServerOperation", "ReceiveMessageOperation"),
        *("SendInitialMetadataOperation", "SendMessageOperation", "SendStatusFromServerOperation", "StatusCode"),
    ],
)
def test_a_grpcio_that_lacks_something_is_noticed_at_the_start(gone, monkeypatch, caplog):
    monkeypatch.delattr(cygrpc, gone)
    with caplog.at_level(logging.WARNING):
        assert make_loop() is None
    (record,) = caplog.records
    assert gone in record.getMessage()
    assert "grpc.aio" in record.getMessage()


def test_a_grpcio_that_behaves_otherwise_is_noticed_at_the_start(monkeypatch, caplog):
    class Deaf(cygrpc.ReceiveMessageOperation):  # type: ignore[misc, name-defined]
        def message(self) -> None:
            return None

    monkeypatch.setattr(cygrpc, "ReceiveMessageOperation", Deaf)
    assert make_loop() is None
    assert "a message that differs" in caplog.text


def test_a_grpcio_that_nobody_tested_is_not_tried(monkeypatch, caplog):
    monkeypatch.setattr(loop_module, "TESTED", ((1, 0), (1, 1)))
    assert make_loop() is None
    assert "tested with grpcio 1.0 to below 1.1" in caplog.text


def test_the_self_test_is_silent(capfd):
    """A line of gRPC's own is no JSON, and looks like trouble."""
    for _ in range(200):
        made = make_loop()
        assert made is not None
        made.close()
    assert capfd.readouterr() == ("", "")


def under_experiments(code: str) -> tuple[str, str]:
    """Run `code` in a process of its own, with what is switched of gRPC's; return what it says, and what gRPC logs."""
    environment = {**os.environ, "GRPC_EXPERIMENTS": cli.experiments("completion_queue", "unix:")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout, done.stderr


def test_grpc_knows_the_names_of_what_is_switched():
    """Else it goes on without, and a request costs a third more."""
    said, logged = under_experiments("from extproc.transport.completion.loop import make_loop; make_loop().close()")
    assert (said, "Unknown experiment" in logged) == ("", False)


LIMITED = """
from concurrent.futures import ThreadPoolExecutor
import grpc

server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", 1000)])
length = grpc.unary_unary_rpc_method_handler(lambda data, _: b"%d" % len(data))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("probe", {"Length": length}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    for size in (1000, 5000):
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            try:
                said = channel.unary_unary("/probe/Length")(bytes(size), compression=compression, timeout=10).decode()
            except grpc.RpcError as error:
                said = error.code().name
            print(said)
server.stop(0).wait()
"""


def test_no_message_is_longer_than_the_limit_compressed_or_not():
    """With fused filters one that came compressed was as long as it liked in grpcio 1.82 and 1.83."""
    said, _ = under_experiments(LIMITED)  # gRPC may log that its server went before the channel heard of its own end
    assert said.split() == ["1000", "1000", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]


@pytest.mark.parametrize(("version", "fused"), [("1.82.0", False), ("1.83.9", False), ("1.84.0rc1", True)])
def test_filters_are_fused_where_the_limit_of_a_message_holds_with_it(monkeypatch, version, fused):
    monkeypatch.setattr(cli.metadata, "version", {"grpcio": version}.__getitem__)
    assert (cli.FUSED in cli.experiments("asyncio", "127.0.0.1:0").split(",")) is fused


def test_reading_a_configuration_imports_no_grpc():
    """What `prepare_grpc` sets for the transport that the configuration names, gRPC reads when it is imported."""
    code = "import sys, extproc.config, extproc.commands.cli; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
