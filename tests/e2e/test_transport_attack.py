"""Clients that no Envoy is: they leave in the worst moment. No lease may be left behind."""

from __future__ import annotations

import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .kit.clients import H2Client
from .kit.extproc_raw import METHOD
from .kit.processes import wait_until
from .kit.stack import Sidecar, local
from .test_protocol import SIM

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINTS = [{"name": "a", "address": "127.0.0.1:9", "max_running_requests": 100, "models": ["sim"]}]
NOTICED_S = 3.0
"""How soon a sidecar must know that a client is gone."""


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
