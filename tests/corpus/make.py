"""Write the seeds: `python tests/corpus/make.py`, from the root of the repository."""

from __future__ import annotations

from pathlib import Path

from extproc._pb import ext_proc_pb2 as pb

SEEDS = Path(__file__).parent / "seeds"
_ATTRIBUTES = "envoy.filters.http.ext_proc"


def headers(kind: str, *pairs: tuple[str, bytes], end: bool = False) -> pb.ProcessingRequest:
    """A message of headers."""
    message = pb.ProcessingRequest()
    part = getattr(message, kind)
    part.SetInParent()
    part.end_of_stream = end
    for key, value in pairs:
        part.headers.headers.add(key=key, raw_value=value)
    return message


def attributes(message: pb.ProcessingRequest, **values: bytes) -> pb.ProcessingRequest:
    """Add what request_attributes asks for; `_` in a name stands for a dot."""
    for key, value in values.items():
        message.attributes[_ATTRIBUTES].fields[key.replace("_", ".", 1)].string_value = value
    return message


def seeds() -> dict[str, pb.ProcessingRequest]:
    """All seeds by name."""
    full = headers(
        "request_headers",
        ("x-model", b"sim"),
        ("x-request-class", b"interactive"),
        ("x-tenant-id", b"acme"),
        ("x-session-id", b"session-1"),
        ("x-queue-budget", b"5s"),
        ("content-length", b"1234"),
        ("x-request-id", b"7d5e5a0e-0000-4000-8000-000000000000"),
    )
    attributes(full, request_time=b"2026-01-01T00:00:00.123456Z", request_id=b"7d5e5a0e")
    fields = headers("request_headers", ("x-request-id", b"1"))
    body = fields.metadata_context.filter_metadata["extproc_request"].fields
    body["model"].string_value = b"sim"
    body["max_tokens"].number_value = 128
    body["priority"].number_value = -3
    body["stream"].bool_value = True
    answer = headers("response_headers", (":status", b"200"))
    attributes(answer, response_code_details=b"via_upstream")
    answer.attributes[_ATTRIBUTES].fields["response.code_details"].string_value = b"via_upstream"
    found = {
        "request-bare": headers("request_headers", ("x-model", b"sim"), end=True),
        "request-full": full,
        "request-fields": fields,
        "request-odd-bytes": headers(
            "request_headers",
            ("x-model", b"\xff\xfe"),
            ("x-tenant-id", b"a\r\nb"),
            ("x-request-class", b"\x00"),
            ("x-queue-budget", b"1e999s"),
            ("content-length", b"99999999999999999999"),
        ),
        "request-twice": headers(
            "request_headers", ("x-model", b"sim"), ("x-model", b"other"), ("x-upstream-cluster", b"evil")
        ),
        "request-many": headers("request_headers", *((f"x-{number}", b"v" * 20) for number in range(100))),
        "response-ok": answer,
        "response-503": headers("response_headers", (":status", b"503"), end=True),
        "response-no-status": headers("response_headers"),
    }
    for kind in ("request_body", "response_body"):
        message = pb.ProcessingRequest()
        getattr(message, kind).body = b"data: {}\n\n"
        found[kind.replace("_", "-")] = message
    for kind in ("request_trailers", "response_trailers"):
        message = pb.ProcessingRequest()
        getattr(message, kind).trailers.headers.add(key="grpc-status", raw_value=b"0")
        found[kind.replace("_", "-")] = message
    probe = pb.ProcessingRequest(observability_mode=True)
    probe.response_body.body = b"data"
    found["probe"] = attributes(probe, request_id=b"7d5e5a0e")
    found["nothing"] = pb.ProcessingRequest()
    return found


if __name__ == "__main__":
    SEEDS.mkdir(exist_ok=True)
    for name, message in seeds().items():
        (SEEDS / f"{name}.bin").write_bytes(message.SerializeToString(deterministic=True))
