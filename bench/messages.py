"""What Envoy says of a request and its answer, for benchmarks that speak to the sidecar without an Envoy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc._pb import ext_proc_pb2 as pb
from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

PSEUDO = ("authority", "method", "path", "scheme", "status")


def message(kind: str, attributes: Mapping[str, str] | None = None, **headers: str) -> bytes:
    """Return what tells `headers` and Envoy's `attributes`; `kind`: `request_headers` or `response_headers`."""
    found = pb.ProcessingRequest()
    for name, value in headers.items():
        header = getattr(found, kind).headers.headers.add()
        header.key = f":{name}" if name in PSEUDO else name.replace("_", "-")
        header.raw_value = value.encode()
    for name, value in (attributes or {}).items():
        found.attributes[wire.ATTRIBUTES].fields[name].string_value = value.encode()
    return found.SerializeToString()
