"""What clients read when Envoy itself answers for a server or for us: an error of OpenAI's shape with the true cause.

Envoy's own texts point the wrong way: "no healthy upstream" where no sidecar answered and all servers are well. Only
its answers that bear one of these flags are written anew: never a server's own, nor our refusals, which bear none.
"""

from __future__ import annotations

import json

from extproc.stream import wire

_CAUSES = (
    ("UH", "no_server_address", "Envoy knows no address of the inference server that the queue chose."),
    ("NC", "no_cluster", "The queue chose an inference server that Envoy's configuration lacks."),
    ("UF", "server_unreachable", "The inference server took no connection."),
    ("UC, UR, UPE", "server_broke_off", "The inference server ended the connection before it answered."),
    ("UO", "breaker_open", "Envoy's circuit breaker let no more requests through to the inference server."),
    (
        "UT, SI, UMSDR, DT",
        "timeout",
        "A timeout in Envoy's configuration ended the request, in the queue or at the server.",
    ),
)
"""Flags of Envoy's access log (`%RESPONSE_FLAGS%`), what a program reads, what a person reads; the first that fits."""
_NO_SIDECAR = "no_sidecar"
_NOBODY_ASKED = "The queue's sidecar did not answer Envoy, and no inference server was asked: they may all be well."
_NOBODY_LEFT = "The queue's sidecar did not answer Envoy, and Envoy has no inference server that it could ask instead."
"""Where the fallback is any server (fail open)."""


def local_replies(*, fail_open: bool) -> str:
    """Return the key of a connection manager, with the one for what no sidecar decided first.

    `fail_open`: that went to any server.
    """
    undecided = (
        "- metadata_filter: {matcher: {filter: " + wire.NAMESPACE + ", path: [{key: outcome}], "
        'value: {string_match: {exact: ""}}}, match_if_key_not_found: true}'
    )
    mappers = [
        "- filter:",
        "    and_filter:",
        "      filters:",
        "      - response_flag_filter: {flags: [UH]}",
        f"      {undecided}",
        _body(_NO_SIDECAR, _NOBODY_LEFT if fail_open else _NOBODY_ASKED),
    ]
    for flags, code, message in _CAUSES:
        mappers += [f"- filter: {{response_flag_filter: {{flags: [{flags}]}}}}", _body(code, message)]
    text = "".join(f"            {line}\n" for line in mappers)
    return f"""\
          # Envoy's own answers say whose fault it is; refusals of the queue, and answers of servers, are left alone.
          local_reply_config:
            mappers:
{text}"""


def _body(code: str, message: str) -> str:
    error = {
        "message": message,
        "type": "server_error",
        "param": None,
        "code": code,
        "flags": "%RESPONSE_FLAGS%",
        "request_id": "%REQ(X-REQUEST-ID)%",
    }
    return f"  body_format_override: {{json_format: {json.dumps({'error': error})}}}"
