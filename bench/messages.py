"""What Envoy says of a request and its answer, for benchmarks that speak to the sidecar without an Envoy."""

from __future__ import annotations

from extproc._pb import ext_proc_pb2 as pb


def message(kind: str, **headers: str) -> bytes:
    """Return the message that tells `headers`; `kind`: `request_headers` or `response_headers`."""
    found = pb.ProcessingRequest()
    for name, value in headers.items():
        header = getattr(found, kind).headers.headers.add()
        header.key = f":{name}" if name in ("method", "path", "status") else name.replace("_", "-")
        header.raw_value = value.encode()
    return found.SerializeToString()
