"""An ext_proc server that decides nothing, on one of our transports: `python -m bench.noop ADDRESS CLUSTER TRANSPORT`.

TRANSPORT is completion_queue, asyncio, or protobuf: grpc.aio as its tutorial shows it, with an async generator and
messages as objects. What is left is what the transport itself costs.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import grpc

import extproc.transport.aio
import extproc.transport.completion.server
from extproc._pb import ext_proc_pb2 as pb
from extproc.commands.cli import run_loop
from extproc.stream import wire
from extproc.transport.completion import server_on
from extproc.transport.listener import Listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

REQUEST_HEADERS = 0x12
"""The first byte of a message with request headers: field 2, and Envoy writes fields in their order."""


class Noop:
    """Has the interface of a session, and nothing behind it."""

    __slots__ = ("_send", "_steer", "hang_up", "resets")

    over = paused = False

    def __init__(self, steer: bytes, send: Callable[[bytes], None]) -> None:
        self._steer = steer
        self._send = send

    def receive(self, data: bytes) -> None:
        self._send(self._steer if data[0] == REQUEST_HEADERS else wire.go_on(wire.Kind.RESPONSE_HEADERS))

    def half_closed(self) -> bool:
        return False

    def end(self) -> None:
        pass


async def serve_objects(address: str, cluster: str) -> int:
    """Serve as grpc.aio's tutorial does."""
    steer = pb.ProcessingResponse.FromString(wire.steer("x-upstream-cluster", cluster))
    go_on = pb.ProcessingResponse(response_headers=pb.HeadersResponse())

    async def process(requests: AsyncIterator[pb.ProcessingRequest], _: object) -> AsyncIterator[pb.ProcessingResponse]:
        async for request in requests:
            yield steer if request.HasField("request_headers") else go_on

    handler = grpc.stream_stream_rpc_method_handler(
        process,
        request_deserializer=pb.ProcessingRequest.FromString,
        response_serializer=pb.ProcessingResponse.SerializeToString,
    )
    server = grpc.aio.server(options=extproc.transport.aio.OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, {wire.METHOD: handler}),))
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()
    return 0


async def serve(address: str, cluster: str) -> int:
    """Serve on the transport that the running loop was made for."""
    for module in (extproc.transport.aio, extproc.transport.completion.server):
        module.Session = Noop  # type: ignore[misc, assignment]
    steer = wire.steer("x-upstream-cluster", cluster)
    await server_on(asyncio.get_running_loop())(steer, Listener(address)).start()
    print("serving", flush=True)
    await asyncio.Event().wait()
    return 0


if __name__ == "__main__":
    address, cluster, transport = sys.argv[1:]
    if transport == "protobuf":
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # as it comes
        sys.exit(run_loop(serve_objects(address, cluster), "asyncio"))
    sys.exit(run_loop(serve(address, cluster), transport))
