"""Reads an ORCA load report, which a response header may carry. Pure; garbage is None, never an exception.

Formats as Envoy and gRPC know them (gRFC A51, xds.data.orca.v3.OrcaLoadReport): `TEXT a=1, b=2`, `JSON {...}`,
`BIN <base64>`. vLLM sends the first two, and only on answers that don't stream; the figures are those at the end of
the answer. A report tells little: what it doesn't say stays as the last scrape had it (`Endpoint.merge`).
"""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING

from extproc.admission.load import Load
from extproc.endpoints.telemetry.bounds import MOST_REQUESTS, MOST_TOKENS, share, whole, within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MOST_CHARACTERS = 4096
_NAMED = 8
"""Field number of named_metrics in OrcaLoadReport: map<string, double>."""


def parse_orca(value: str) -> Load | None:
    """Return the load that a header value tells, or None if it can't be read or says nothing that we know."""
    if len(value) > MOST_CHARACTERS:
        return None
    form, _, rest = value.strip().partition(" ")
    try:
        match form.upper():
            case "TEXT":
                named = _text(rest)
            case "JSON":
                named = _json(rest)
            case "BIN":
                named = _binary(base64.b64decode(rest.strip() + "=" * (-len(rest.strip()) % 4), validate=True))
            case _:
                return None
    except (ValueError, OverflowError, RecursionError, struct.error):
        return None
    load = _load(named)
    return None if load == Load() else load


def _load(named: Mapping[str, float]) -> Load:
    """Pick what we know: vLLM's names, and Triton's."""
    kv_usage = next(
        (
            named[name]
            for name in ("kv_cache_usage_perc", "kv_cache_utilization", "gpu_cache_usage_perc")
            if name in named
        ),
        None,
    )
    return Load(
        running=within(named.get("num_requests_running"), MOST_REQUESTS),
        waiting=within(named.get("num_requests_waiting"), MOST_REQUESTS),
        kv_usage=share(kv_usage),
        kv_capacity_tokens=whole(named.get("max_token_capacity"), MOST_TOKENS),
    )


def _text(text: str) -> dict[str, float]:
    named = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(pair)
        if key.strip().startswith("named_metrics."):
            named[key.strip().removeprefix("named_metrics.")] = float(value)
    return named


def _json(text: str) -> dict[str, float]:
    report = json.loads(text)
    if not isinstance(report, dict):
        raise ValueError("no object")  # noqa: TRY004 - one kind of error for all garbage
    named = report.get("named_metrics", report.get("namedMetrics", {}))
    if not isinstance(named, dict):
        raise ValueError("no object")  # noqa: TRY004
    return {
        str(key): float(value)
        for key, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _binary(message: bytes) -> dict[str, float]:
    named = {}
    for number, entry in _fields(message):
        if number == _NAMED and isinstance(entry, bytes):
            parts = dict(_fields(entry))
            key, value = parts.get(1, b""), parts.get(2, 0.0)
            if isinstance(key, bytes) and isinstance(value, float):
                named[key.decode()] = value
    return named


def _fields(message: bytes) -> Iterator[tuple[int, bytes | float | int]]:
    """Walk a protobuf message: field number and value. Raises ValueError or struct.error where it is none."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
            case 1:
                yield tag >> 3, struct.unpack_from("<d", message, at)[0]
                at += 8
            case 2:
                size, at = _varint(message, at)
                if at + size > len(message):
                    raise ValueError("cut off")
                yield tag >> 3, message[at : at + size]
                at += size
            case 5:
                yield tag >> 3, struct.unpack_from("<f", message, at)[0]
                at += 4
            case _:
                raise ValueError("no wire type")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("cut off")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("varint too long")
