"""Bytes to values and back: the only room that knows ext_proc messages.

In: what Envoy sent becomes an `Incoming`. Out: decisions become bytes; what is always the same is built once.
"""

from __future__ import annotations

import struct
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from google.protobuf import wrappers_pb2
from google.protobuf.message import DecodeError

from extproc._pb import ext_proc_pb2 as pb
from extproc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, MutableMapping

    from google.protobuf.struct_pb2 import Value

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD = "Process"
NAMESPACE: Final = "extproc"
"""The dynamic metadata namespace that our decisions go to."""
FIELDS_NAMESPACE = "extproc_request"
"""The namespace in which Envoy's json_to_metadata filter puts the fields of a request's body."""
PROMPTS = "prompts"
"""The key beside them for how many prompts a list has, which a Lua filter counts; no field of a body gets there."""

NUMBER_NAMESPACE = "extproc_ticket"
"""The namespace by which Envoy's first-byte probe tells whose answer begins. Only we write it: a client can't."""
UNSTEERED_NAMESPACE = "extproc_route"
"""The namespace in which our bootstrap notes that a request came past our filter."""

REFUSAL_HEADERS = ("content-type", "retry-after", "x-extproc-outcome")
"""What a refusal sets: Envoy's mutation_rules must allow them, or they are dropped without a word."""

SERVER_TIMING = "server-timing"

AGAIN: Final = "x-extproc-again"
"""Carries the key of a second try (again.py) to Envoy, and from there back to us."""

PICK_HEADER = "x-gateway-destination-endpoint"
"""The Endpoint Picker Protocol: the pick, as a header and as dynamic metadata; and what else has names made of it."""
PICK_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

BODY_MODES = tuple(pb.ProcessingMode.BodySendMode.values())
"""How a gateway may send bodies; two of them are of interest."""
NO_BODY, FULL_DUPLEX = pb.ProcessingMode.NONE, pb.ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED = pb.ProcessingMode.BUFFERED

ATTRIBUTES: Final = "envoy.filters.http.ext_proc"
"""The namespace in which Envoy tells its attributes (`request_attributes`)."""
_OVERWRITE = pb.HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


def written(cluster_header: str, *, server_timing: bool, second_try: bool = False) -> tuple[str, ...]:
    """Return the names of all headers that our answers set: what Envoy's mutation_rules must allow."""
    more = (*((SERVER_TIMING,) if server_timing else ()), *((AGAIN,) if second_try else ()))
    return (cluster_header, *REFUSAL_HEADERS, *more)


class Kind(Enum):
    """What Envoy sent; values are the names of the message's oneof."""

    __hash__ = object.__hash__  # a member equals nothing but itself; Enum's own hash is a call of Python's

    REQUEST_HEADERS = "request_headers"
    RESPONSE_HEADERS = "response_headers"
    REQUEST_BODY = "request_body"
    RESPONSE_BODY = "response_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_TRAILERS = "response_trailers"


_KINDS: Final = {kind.value: kind for kind in Kind}
_RESPONSE_HEADERS: Final = Kind.RESPONSE_HEADERS

REPEATED: Final = 256
"""Messages with response headers that are kept as read, so long as they are short: most of an engine's answers begin
with the very same ones."""
SHORT: Final = 512

_RECEIVED: Final = pb.Received.FromString


class Incoming:
    """One message from Envoy; not to be changed.

    Attributes:
        kind: what it is.
        headers: the wanted headers that it has, lower-case names; of a repeated header the first value.
        fields: request fields that Envoy's json_to_metadata filter read from the body, unchecked.
        has_body: a body will follow the headers; of a piece of a body: it has bytes.
        is_last: a piece of a body, behind which nothing more comes.
        number: our number of the request whose answer the first-byte probe shows; 0: none.
        observed: Envoy only shows it (the first-byte probe) and ignores any answer.
        modes: how the bodies of this stream will be sent, of request and answer; None: the gateway doesn't say.
        subset: the addresses that the gateway allows; None: any.
        served: the address that the answer came from, where the gateway tells it.
    """

    __slots__ = (
        *("_attributes", "_message", "fields", "has_body", "headers", "is_last", "kind"),
        *("modes", "number", "observed", "served", "subset"),
    )

    def __init__(
        self,
        kind: Kind,
        headers: dict[str, str] | None = None,
        message: pb.Received | None = None,
        fields: dict[str, str | float | bool] | None = None,
        *,
        has_body: bool = False,
    ) -> None:
        """Make one that says this; `message`: it has Envoy's attributes, unread.

        Written out: where the rest is compiled, a dataclass has its own interpreted.
        """
        self.kind = kind
        self.headers: dict[str, str] = {} if headers is None else headers
        self._message = message
        self._attributes: dict[str, str] = {}
        self.fields: dict[str, str | float | bool] = {} if fields is None else fields
        self.has_body = has_body
        self.is_last = False
        self.number = 0
        self.observed = False
        self.modes: tuple[int, int] | None = None
        self.subset: tuple[str, ...] | None = None
        self.served = ""

    @property
    def attributes(self) -> dict[str, str]:
        """Envoy's attributes by name (request.id, request.time, ...); only strings. Read when they are asked for."""
        if self._message is not None:
            self._attributes, self._message = _texts(self._message.attributes), None
        return self._attributes


class Reader:
    """Reads messages, and of their headers only those that anybody needs."""

    __slots__ = ("_fields_namespace", "_picks", "_repeated", "_wanted")

    def __init__(self, wanted: Collection[str], fields_namespace: str = "", *, picks: bool = False) -> None:
        """Want these headers (lower case) and, if named, the metadata namespace with the request's fields.

        `picks`: also what the Endpoint Picker Protocol puts beside headers.
        """
        self._picks = picks
        self._wanted = frozenset(wanted)
        self._fields_namespace = fields_namespace
        self._repeated: dict[bytes, Incoming] = {}

    def read(self, data: bytes) -> Incoming:
        """Parse one message. Raises ProtocolError if it is none, or one that says nothing."""
        is_short = len(data) <= SHORT  # to look a long one up costs more than it is worth
        incoming = self._repeated.get(data) if is_short else None
        if incoming is None:
            try:
                incoming = self._parse(data)
            except DecodeError:
                raise ProtocolError(f"not a ProcessingRequest: {len(data)} bytes that don't parse") from None
            if is_short and incoming.kind is _RESPONSE_HEADERS:
                if len(self._repeated) >= REPEATED:
                    self._repeated.clear()
                self._repeated[data] = incoming
        return incoming

    def _parse(self, data: bytes) -> Incoming:
        message = _RECEIVED(data)
        name = message.WhichOneof("request")
        if name is None:
            raise ProtocolError("a ProcessingRequest must carry headers, a body or trailers; this one carries nothing")
        incoming = Incoming(_KINDS[name], message=message)
        incoming.observed = message.observability_mode
        if name == "request_headers":
            head = message.request_headers
            incoming.has_body = not head.end_of_stream
            self._pick(head, data, incoming)
            if self._fields_namespace and self._fields_namespace in message.metadata_context.filter_metadata:
                incoming.fields = _scalars(message.metadata_context.filter_metadata[self._fields_namespace])
            if self._picks:
                incoming.modes, incoming.subset = _modes(message), _subset(message.metadata_context)
        elif incoming.observed and name == "response_body":
            self._read_shown(message, incoming)
        elif name == "response_headers":
            head = message.response_headers
            incoming.has_body = not head.end_of_stream
            self._pick(head, data, incoming)
            if self._picks:
                incoming.modes, incoming.served = _modes(message), _served(message.metadata_context)
        elif name == "response_trailers":
            self._pick(message.response_trailers, data, incoming)
        return incoming

    def _read_shown(self, message: pb.Received, incoming: Incoming) -> None:
        piece, spaces = message.response_body, message.metadata_context.filter_metadata
        incoming.has_body, incoming.is_last = bool(piece.body), piece.end_of_stream
        if NUMBER_NAMESPACE in spaces:
            incoming.number = int(spaces[NUMBER_NAMESPACE].fields["n"].number_value)

    def _pick(self, head: pb.Head, data: bytes, incoming: Incoming) -> None:
        wanted, headers, merged = self._wanted, incoming.headers, head.map.headers
        keys = merged.keys[:]  # a list, made in one go: protobuf's own iterator costs more
        values = merged.raw_values[:] or merged.values[:]
        if len(values) != len(keys):
            keys, values = _one_by_one(data, incoming.kind)
        for at, key in enumerate(keys):
            if key in wanted and key not in headers:
                try:
                    headers[key] = values[at].decode()
                except UnicodeDecodeError:
                    headers[key] = values[at].decode("utf-8", "replace")


def _one_by_one(data: bytes, kind: Kind) -> tuple[list[str], list[bytes]]:
    """Return the keys of all headers and their values, where some of these are empty, or in the other field."""
    message = pb.ProcessingRequest.FromString(data)
    if kind is Kind.RESPONSE_TRAILERS:
        found = message.response_trailers.trailers.headers
    else:
        found = (message.request_headers if kind is Kind.REQUEST_HEADERS else message.response_headers).headers.headers
    return [header.key for header in found], [header.raw_value or header.value for header in found]


def _texts(told: Iterable[bytes]) -> dict[str, str]:
    """Read Envoy's attributes; what does not parse says nothing."""
    found: dict[str, str] = {}
    for one in told:
        try:
            entry = pb.ProcessingRequest.AttributesEntry.FromString(one)
        except DecodeError:
            continue
        if entry.key == ATTRIBUTES:
            for name, value in entry.value.fields.items():
                if value.HasField("string_value"):
                    found[name] = value.string_value.decode("utf-8", "replace")
    return found


def _scalars(values: pb.Fields) -> dict[str, str | float | bool]:
    found: dict[str, str | float | bool] = {}
    for key, value in values.fields.items():
        match value.WhichOneof("kind"):
            case "string_value":
                found[key] = value.string_value.decode("utf-8", "replace")
            case "number_value":
                found[key] = value.number_value
            case "bool_value":
                found[key] = value.bool_value
            case _:  # a list, an object or null is no value that anybody asked for
                pass
    return found


def _modes(message: pb.Received) -> tuple[int, int] | None:
    """Return how the bodies of request and answer will be sent, if the gateway says so."""
    if not message.HasField("protocol_config"):
        return None
    return message.protocol_config.request_body_mode, message.protocol_config.response_body_mode


def _served(metadata: pb.Metadata) -> str:
    """Return the address that an answer came from, if the gateway says so."""
    key = PICK_HEADER + "-served"
    if PICK_NAMESPACE not in metadata.filter_metadata:
        return ""
    fields = metadata.filter_metadata[PICK_NAMESPACE].fields
    return fields[key].string_value.decode("utf-8", "replace") if key in fields else ""


def _subset(metadata: pb.Metadata) -> tuple[str, ...] | None:
    """Return the addresses that the gateway allows: a list, a text with commas, or a list of such texts."""
    key = PICK_HEADER + "-subset"
    if SUBSET_NAMESPACE not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[SUBSET_NAMESPACE].fields
    if key not in fields:
        return None
    value = fields[key]
    texts = [one.string_value for one in value.list_value.values] or [value.string_value]
    parts = (part.strip() for text in texts for part in text.decode("utf-8", "replace").split(","))
    return tuple(part for part in parts if part)


# ---- answers

_EMPTY_ANSWERS = {
    Kind.REQUEST_HEADERS: pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString(),
    Kind.RESPONSE_HEADERS: pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString(),
    Kind.REQUEST_BODY: pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString(),
    Kind.RESPONSE_BODY: pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString(),
    Kind.REQUEST_TRAILERS: pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString(),
    Kind.RESPONSE_TRAILERS: pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString(),
}


def go_on(kind: Kind) -> bytes:
    """Answer a message of `kind` with "continue, nothing to change"."""
    return _EMPTY_ANSWERS[kind]


def steer(header: str, cluster: str) -> bytes:
    """Let the request go to `cluster`: overwrite the routing header, and have Envoy choose the route anew.

    The value goes into `raw_value`: Envoy 1.40 writes an empty header when `value` is used.
    """
    common = pb.CommonResponse(header_mutation=_set_headers({header: cluster}), clear_route_cache=True)
    return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common)).SerializeToString()


def pick(address: str, drop: Collection[str] = ()) -> bytes:
    """Let the request go to `address`, as the Endpoint Picker Protocol says it: a header, and metadata equal to it.

    `drop`: headers that end here. The route is chosen anew: some gateways route by the header.
    """
    mutation = _set_headers({PICK_HEADER: address})
    mutation.remove_headers.extend(drop)
    common = pb.CommonResponse(header_mutation=mutation, clear_route_cache=True)
    response = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    response.dynamic_metadata.fields[PICK_NAMESPACE].struct_value.fields[PICK_HEADER].string_value = address
    return response.SerializeToString()


_IN_BODY = bytes((pb.ProcessingResponse.REQUEST_BODY_FIELD_NUMBER << 3 | 2,))


def in_body(steer: bytes) -> bytes:
    """Return a pick, or what `steer` made, as the answer to a request's whole body instead of its headers.

    `HeadersResponse` and `BodyResponse` are the same on the wire; which of them it is, the first byte says.
    """
    return _IN_BODY + steer[1:]


def ask_body(*, lean: bool) -> bytes:
    """Let the headers be, and have the whole body come; `lean`: and no body of the answer.

    A destination that the client wrote ends here: what has trailers and no body goes on without a pick.
    """
    common = pb.CommonResponse(header_mutation=pb.HeaderMutation(remove_headers=[PICK_HEADER]))
    response = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    if lean:
        response.mode_override.CopyFrom(_told(BUFFERED, pb.ProcessingMode.SEND))
    return response.SerializeToString()


def _told(
    request_body: pb.ProcessingMode.BodySendMode, request_trailers: pb.ProcessingMode.HeaderSendMode
) -> pb.ProcessingMode:
    mode = pb.ProcessingMode
    return mode(
        request_header_mode=mode.SEND,
        response_header_mode=mode.SEND,
        request_body_mode=request_body,
        response_body_mode=mode.NONE,
        request_trailer_mode=request_trailers,
        response_trailer_mode=mode.SEND,
    )


LEAN = pb.ProcessingResponse(mode_override=_told(NO_BODY, pb.ProcessingMode.SKIP)).SerializeToString()
"""Ask to be told no bodies, and the answer's end alone. To be appended to a pick."""


def queue_time(wait_s: float) -> str:
    """Return `wait_s` as an entry of a Server-Timing header (W3C Server Timing): milliseconds."""
    return f"queue;dur={wait_s * 1000:.1f}"


def go_on_timed(wait_s: float) -> bytes:
    """Answer an answer's headers with "continue", and tell the client how long its request waited.

    Appended: an engine's own Server-Timing stays.
    """
    header = pb.HeaderValue(key=SERVER_TIMING, raw_value=queue_time(wait_s).encode())
    option = pb.HeaderValueOption(header=header, append=wrappers_pb2.BoolValue(value=True))
    mutation = pb.HeaderMutation(set_headers=[option])
    common = pb.CommonResponse(header_mutation=mutation)
    return pb.ProcessingResponse(response_headers=pb.HeadersResponse(response=common)).SerializeToString()


def refuse(
    status: int,
    outcome: str,
    body: bytes,
    retry_after_s: int | None,
    wait_s: float | None = None,
    *,
    grpc_status: int | None = None,
    more: Mapping[str, str] | None = None,
) -> bytes:
    """Answer the client in an engine's stead; `wait_s`: with a Server-Timing too; `more`: headers besides ours.

    `grpc_status`: Envoy tells a gRPC client this code, with `body` as its message and our headers as metadata.
    """
    content_type, retry_after, outcome_header = REFUSAL_HEADERS
    headers = {outcome_header: outcome, **(more or {})}
    if grpc_status is None:
        headers[content_type] = "application/json"
    if retry_after_s is not None:
        headers[retry_after] = str(retry_after_s)
    if wait_s is not None:
        headers[SERVER_TIMING] = queue_time(wait_s)
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=status),
            headers=_set_headers(headers),
            body=body,
            grpc_status=None if grpc_status is None else pb.GrpcStatus(status=grpc_status),
            details=f"extproc_{outcome}",
        )
    ).SerializeToString()


def answer(body: bytes, details: str) -> bytes:
    """Answer the client ourselves, with 200 and JSON."""
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=200),
            headers=_set_headers({REFUSAL_HEADERS[0]: "application/json"}),
            body=body,
            details=details,
        )
    ).SerializeToString()


def number_metadata(number: int) -> bytes:
    """Encode our number of a request, for the first-byte probe. To be appended to an answer, as `decision_metadata`."""
    return _NUMBER[0] + _DOUBLE.pack(number) + _NUMBER[1]


def again(key: str) -> bytes:
    """Encode the key of a second try as a header of the request. To be appended to a pick: protobuf merges them."""
    common = pb.CommonResponse(header_mutation=_set_headers({AGAIN: key}))
    return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common)).SerializeToString()


TOLD = ("outcome", "class", "endpoint", "home", "waited_for", "overflow")
"""The texts that the access log can say of a decision, by name."""


def decision_metadata(
    texts: tuple[str, ...],
    wait_ms: float,
    position: int,
    numbers: Mapping[str, float] | None = None,
    tenant: str = "",
) -> bytes:
    """Encode what the access log can say of a decision, as dynamic metadata: what is TOLD, and the two numbers.

    `texts`: one for each name in TOLD; "": it is left out.
    `numbers`: more of them, and `tenant`, any text of a client: each costs a message built anew. To be appended to an
    answer: protobuf merges concatenated messages.
    """
    if numbers or tenant:
        response = pb.ProcessingResponse()
        fields = response.dynamic_metadata.fields[NAMESPACE].struct_value.fields
        for key, number in {"position": float(position), "wait_ms": wait_ms, **(numbers or {})}.items():
            fields[key].number_value = number
        _tell(fields, texts)
        if tenant:
            fields["tenant"].string_value = tenant
        return response.SerializeToString()
    if not wait_ms and not position:
        return _at_once(texts)
    before, between, after = _around_numbers(texts)
    return before + _DOUBLE.pack(position) + between + _DOUBLE.pack(wait_ms) + after


_DOUBLE: Final = struct.Struct("<d")
_POSITION, _WAIT = -1.2345e-300, -5.4321e-300
"""Values that no decision has, to find where the numbers stand."""


@lru_cache(maxsize=4096)
def _at_once(texts: tuple[str, ...]) -> bytes:
    """Return what is said of a request that did not wait, and found nobody who did."""
    before, between, after = _around_numbers(texts)
    return before + _DOUBLE.pack(0.0) + between + _DOUBLE.pack(0.0) + after


@lru_cache(maxsize=4096)
def _around_numbers(texts: tuple[str, ...]) -> tuple[bytes, bytes, bytes]:
    """Return what stands before, between and after the numbers: all that differs from one decision to the next."""
    response = pb.ProcessingResponse()
    fields = response.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    fields["position"].number_value = _POSITION
    fields["wait_ms"].number_value = _WAIT
    _tell(fields, texts)
    before, _, rest = response.SerializeToString(deterministic=True).partition(_DOUBLE.pack(_POSITION))
    between, _, after = rest.partition(_DOUBLE.pack(_WAIT))
    return before, between, after


def _tell(fields: MutableMapping[str, Value], texts: tuple[str, ...]) -> None:
    for name, text in zip(TOLD, texts, strict=True):
        if text:
            fields[name].string_value = text


def _around_number() -> tuple[bytes, bytes]:
    response = pb.ProcessingResponse()
    response.dynamic_metadata.fields[NUMBER_NAMESPACE].struct_value.fields["n"].number_value = _POSITION
    before, _, after = response.SerializeToString().partition(_DOUBLE.pack(_POSITION))
    return before, after


_NUMBER = _around_number()


def _set_headers(headers: Mapping[str, str]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(header=pb.HeaderValue(key=key, raw_value=value.encode()), append_action=_OVERWRITE)
            for key, value in headers.items()
        ]
    )
