"""Clients that no Envoy is: they leave in the worst moment. No lease may be left behind."""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from extproc.stream import silence

from .kit.clients import H2Client
from .kit.extproc_raw import METHOD
from .kit.load import IS_COMPLETION_QUEUE, memory_bytes
from .kit.processes import wait_until
from .kit.stack import Sidecar, local
from .test_protocol import SIM

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINTS = [{"name": "a", "address": "127.0.0.1:9", "max_running_requests": 100, "models": ["sim"]}]
LONG = os.environ.get("EXTPROC_LONG") == "1"
NOTICED_S = 3.0
"""How soon a sidecar must know that a client is gone."""
STAYS = 0.3 if IS_COMPLETION_QUEUE else 0.5
"""Which part of a burst's memory may stay resident. Of a stream on grpc.aio 60 objects are Python's, whose allocator
keeps each MiB in which one still lives: .27 to .32 stayed, 2 MB of it in use, and the next burst took it up."""


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    config = {"listen": local(), "enable_queue": True, "endpoints": ENDPOINTS, "drain_timeout": "200ms"}
    with Sidecar(config, tmp_path_factory.mktemp("attack")) as running:
        yield running


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that is in no table (RFC 7541, 6.2.2)."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


HEAD = b"".join(
    (
        b"\x83\x86",  # POST, http
        literal(b":path", METHOD.encode()),
        literal(b":authority", b"x"),
        literal(b"content-type", b"application/grpc"),
        literal(b"te", b"trailers"),
    )
)


def silent_streams(address: str, count: int) -> socket.socket:
    """A connection with so many streams on which nothing is said, opened at once."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    connection.sendall(b"".join(frame(1, 4, 2 * number + 1, HEAD) for number in range(count)))
    return connection


def test_streams_that_say_nothing_become_few_though_no_more_come_and_their_memory_goes_back(sidecar: Sidecar) -> None:
    """H7. What glibc keeps is given back: it was 440 MiB after 20,000 such streams, and stayed."""
    each, pid = 1000, sidecar.child.pid
    count, within_s = (81 * each, 60.0) if LONG else (6 * each, 10.0)

    def streams() -> float:
        try:
            return sidecar.metrics()["extproc_streams"]
        except OSError:  # it takes 81,000 streams in
            return math.nan

    before = memory_bytes(pid)
    seen = [before]

    def is_bounded() -> bool:
        seen.append(memory_bytes(pid))
        return streams() <= silence.MOST

    connections = [silent_streams(sidecar.listen, each) for _ in range(count // each)]
    try:
        wait_until(lambda: streams() > silence.MOST, within_s)
        wait_until(is_bounded, within_s, "bounded")
    finally:
        for connection in connections:
            connection.close()
    most = max(seen)
    assert most - before > 6 * each * 8_000, "else there is nothing to show"
    wait_until(lambda: streams() == 0, within_s)
    wait_until(lambda: memory_bytes(pid) - before < STAYS * (most - before), within_s, "given back")
    print(f"{count} silent streams: {before >> 20} MiB before, {most >> 20} with them, {memory_bytes(pid) >> 20} after")


def leases(sidecar: Sidecar) -> int:
    return int(sidecar.queues()["endpoints"][0]["in_flight"])


def is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


def test_a_connection_that_is_reset_behind_its_last_frame_gives_its_leases_back(sidecar: Sidecar) -> None:
    """Frame and reset reach a busy sidecar in one wake-up: it is stopped meanwhile, so that they surely do."""
    before = leases(sidecar)
    clients = [H2Client(sidecar.listen) for _ in range(3)]
    for client in clients:
        message = b"\0" + struct.pack(">I", len(SIM)) + SIM
        stream = client.request(METHOD, [("content-type", "application/grpc"), ("te", "trailers")], message, end=False)
        assert stream.read_chunk()
    wait_until(lambda: leases(sidecar) == before + 3)
    for client in clients:
        while client.pump(0.1):  # gRPC's pings
            pass
    sidecar.child.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: is_stopped(sidecar.child.pid))
        for client in clients:
            client.grant(1000)
            client.rst()
    finally:
        sidecar.child.signal(signal.SIGCONT)
    wait_until(lambda: leases(sidecar) == before, NOTICED_S, "the leases come back")
