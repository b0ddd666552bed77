"""What clients read when Envoy itself answers for a server or for us: an error of OpenAI's shape with the true cause.

Envoy's own texts point the wrong way: "no healthy upstream" where no sidecar answered and all servers are well. Only
its answers that bear one of these flags, and its 413, are written anew: never a server's own, nor our refusals.

A gRPC client gets no body: Envoy makes it the `grpc-message`, and of the status a gRPC one (of all but the 413
UNAVAILABLE). So such requests have mappers of their own, with a plain sentence: Envoy takes the first mapper that fits.
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
_TOO_LARGE = "{status_code_filter: {comparison: {op: EQ, value: {default_value: 413, runtime_key: extproc.too_large}}}}"
"""Envoy's own word on a body above its limit bears no flag; neither we nor anything else before a server say 413."""
_TOO_LARGE_CODE, _TOO_LARGE_TEXT = "body_too_large", "The request's body is larger than Envoy's configuration takes."
_NO_SIDECAR = "no_sidecar"
_NOBODY_ASKED = "The queue's sidecar did not answer Envoy, and no inference server was asked: they may all be well."
_NOBODY_LEFT = "The queue's sidecar did not answer Envoy, and Envoy has no inference server that it could ask instead."
"""Where the fallback is any server (fail open)."""
_OF_GRPC = (
    "{header_filter: {header: {name: content-type, string_match: {safe_regex: {regex: 'application/grpc(\\+.*)?'}}}}}"
)
"""What Envoy itself takes for gRPC; not gRPC-Web, whose clients read a body."""


def local_replies(*, fail_open: bool) -> str:
    """Return the key of a connection manager, with the one for what no sidecar decided first.

    `fail_open`: that went to any server.
    """
    undecided = (
        "{metadata_filter: {matcher: {filter: " + wire.NAMESPACE + ", path: [{key: outcome}], "
        'value: {string_match: {exact: ""}}}, match_if_key_not_found: true}}'
    )
    causes = [
        (_flags("UH"), [undecided], _NO_SIDECAR, _NOBODY_LEFT if fail_open else _NOBODY_ASKED),
        *((_flags(flags), [], code, message) for flags, code, message in _CAUSES),
        (_TOO_LARGE, [], _TOO_LARGE_CODE, _TOO_LARGE_TEXT),
    ]
    mappers = []
    for first, more, code, message in causes:
        mappers += [*_mapper([first, *more, _OF_GRPC]), _sentence(code, message)]
        mappers += [*_mapper([first, *more]), _body(code, message)]
    text = "".join(f"            {line}\n" for line in mappers)
    return f"""\
          # Envoy's own answers say whose fault it is; refusals of the queue, and answers of servers, are left alone.
          local_reply_config:
            mappers:
{text}"""


def _flags(names: str) -> str:
    return f"{{response_flag_filter: {{flags: [{names}]}}}}"


def _mapper(filters: list[str]) -> list[str]:
    """Return the lines that say for which answers it is: those that pass all filters."""
    if len(filters) == 1:
        return [f"- filter: {filters[0]}"]
    return ["- filter:", "    and_filter:", "      filters:", *(f"      - {one}" for one in filters)]


def _sentence(code: str, message: str) -> str:
    text = json.dumps(f"{message} ({code}, %RESPONSE_FLAGS%)")
    return f"  body_format_override: {{text_format_source: {{inline_string: {text}}}}}"


def _body(code: str, message: str) -> str:
    error = {
        "message": message,
        "type": "invalid_request_error" if code == _TOO_LARGE_CODE else "server_error",
        "param": None,
        "code": code,
        "flags": "%RESPONSE_FLAGS%",
        "request_id": "%REQ(X-REQUEST-ID)%",
    }
    return f"  body_format_override: {{json_format: {json.dumps({'error': error})}}}"
