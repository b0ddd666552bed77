"""Clients that no Envoy is: they leave in the worst moment. No lease may be left behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.events
import pytest

from .kit.extproc_raw import METHOD
from .kit.processes import wait_until
from .kit.stack import Sidecar, local
from .test_protocol import SIM

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINTS = [{"name": "a", "address": "127.0.0.1:9", "max_running_requests": 100, "models": ["sim"]}]
NOTICED_S = 3.0
"""How soon a sidecar must know that a client is gone."""


class Peer:
    """One HTTP/2 connection whose frames are written one by one."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._flush()

    def ask(self) -> int:
        """Open a stream for a request that finds room; its number."""
        stream = self._h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", METHOD), (":authority", "x")]
        self._h2.send_headers(stream, [*headers, ("content-type", "application/grpc"), ("te", "trailers")])
        self._h2.send_data(stream, b"\0" + struct.pack(">I", len(SIM)) + SIM)
        self._flush()
        return stream

    def read_reply(self) -> None:
        """Read until a message came, and answer what HTTP/2 wants answered."""
        while True:
            events = self._h2.receive_data(self._socket.recv(65536))
            self._flush()
            if any(isinstance(event, h2.events.DataReceived) for event in events):
                return

    def settle(self) -> None:
        """Answer what still comes: gRPC's pings."""
        self._socket.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while data := self._socket.recv(65536):
                self._h2.receive_data(data)
                self._flush()

    def grant(self) -> None:
        """Send a frame that nobody answers."""
        self._h2.increment_flow_control_window(1000)
        self._flush()

    def reset_connection(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _flush(self) -> None:
        self._socket.sendall(self._h2.data_to_send())


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    config = {"listen": local(), "enable_queue": True, "endpoints": ENDPOINTS, "drain_timeout": "200ms"}
    with Sidecar(config, tmp_path_factory.mktemp("attack")) as running:
        yield running


def leases(sidecar: Sidecar) -> int:
    return int(sidecar.queues()["endpoints"][0]["in_flight"])


def is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


def test_a_connection_that_is_reset_behind_its_last_frame_gives_its_leases_back(sidecar: Sidecar) -> None:
    """Frame and reset reach a busy sidecar in one wake-up: it is stopped meanwhile, so that they surely do."""
    before = leases(sidecar)
    peers = [Peer(sidecar.listen) for _ in range(3)]
    for peer in peers:
        peer.ask()
        peer.read_reply()
    wait_until(lambda: leases(sidecar) == before + 3)
    for peer in peers:
        peer.settle()
    sidecar.child.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: is_stopped(sidecar.child.pid))
        for peer in peers:
            peer.grant()
            peer.reset_connection()
    finally:
        sidecar.child.signal(signal.SIGCONT)
    wait_until(lambda: leases(sidecar) == before, NOTICED_S, "the leases come back")
