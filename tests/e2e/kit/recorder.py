"""An ext_proc server that keeps what it is sent and steers every request to one cluster. It holds nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from extproc._pb import ext_proc_pb2 as pb
from extproc.stream.wire import METHOD, SERVICE

from .processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class Recorder:
    """Serves while `with` lasts. `messages` are as they came; `metadata` is what the streams began with."""

    def __init__(self, cluster: str = "a", credentials: grpc.ServerCredentials | None = None) -> None:
        self.messages: list[bytes] = []
        self.metadata: list[tuple[str, str]] = []
        self._cluster = cluster
        self._server = grpc.server(ThreadPoolExecutor(8))
        handler = grpc.stream_stream_rpc_method_handler(self._process)
        methods = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
        self._server.add_generic_rpc_handlers((methods,))
        where = "127.0.0.1:0"
        add = self._server.add_insecure_port
        port = add(where) if credentials is None else self._server.add_secure_port(where, credentials)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> Recorder:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(PATIENCE_S)

    def _process(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self.metadata += [(key, str(value)) for key, value in context.invocation_metadata()]
        for message in messages:
            self.messages.append(message)
            kind = pb.ProcessingRequest.FromString(message).WhichOneof("request")
            answer = pb.ProcessingResponse()
            getattr(answer, kind).SetInParent()
            if kind == "request_headers":
                common = answer.request_headers.response
                common.clear_route_cache = True
                option = common.header_mutation.set_headers.add()
                option.header.key = "x-upstream-cluster"
                option.header.raw_value = self._cluster.encode()
            yield answer.SerializeToString()
