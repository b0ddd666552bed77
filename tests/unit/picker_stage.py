"""A gateway that asks for picks, as plays have it: `>` what it sends, `<` what it must get then, and nothing else.

A real session on a real gate and core; only the clock is the test's. The ways of gateways as their sources have them:
FULL_DUPLEX_STREAMED (Istio, llm-d, agentgateway), BUFFERED (Envoy AI Gateway), no bodies, NGINX's.
"""

from __future__ import annotations

from extproc._pb import ext_proc_pb2 as pb
from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.config import parse_config
from extproc.stream import wire
from extproc.stream.ages import Ages
from extproc.stream.dialect import EndpointPicker
from extproc.stream.gate import Gate
from extproc.stream.reception import Reception
from extproc.stream.session import Session
from tests.unit.gate_room import Clock

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
MODE = pb.ProcessingMode
DUPLEX = (MODE.FULL_DUPLEX_STREAMED, MODE.FULL_DUPLEX_STREAMED)
BUFFERED = (MODE.BUFFERED, MODE.BUFFERED)
LEAN = (MODE.NONE, MODE.NONE)


class Gateway:
    """A pool of endpoints at these addresses, and streams that gateways open to its picker."""

    def __init__(self, *addresses: str, limit: int = 1, models: dict[str, set[str]] | None = None, **how: object):
        self.clock = Clock()
        fallbacks = how.pop("fallbacks", 0)
        classes = (RequestClass("default"), RequestClass("chat", 5))
        policy = how.pop("policy", Policy(classes=classes, next_choices=fallbacks))
        self.gate = Gate(Controller(policy), self.clock)
        names = parse_config("dialect: endpoint-picker", "test", {}).header_names()
        self.reception = Reception(self.gate, names, Ages(30.0), dialect=EndpointPicker(), **how)
        for number, address in enumerate(addresses):
            name = "abc"[number]
            served = frozenset((models or {}).get(name, ()))
            self.reception.put_cluster(name, address)
            self.gate.put_endpoint(EndpointSpec(name, address, models=served, max_running_requests=limit))
            self.gate.set_up(name, is_up=True)

    def stream(self, *, resets: bool = False) -> Stream:
        return Stream(self, resets=resets)

    def in_flight(self) -> dict[str, int]:
        return {name: len(one.leases) for name, one in self.gate.controller.endpoints.items()}


class Stream:
    """One stream: `>` is `hears`, `<` is what it says."""

    def __init__(self, gateway: Gateway, *, resets: bool) -> None:
        self.said: list[pb.ProcessingResponse] = []
        self.session = Session(gateway.reception, lambda data: self.said.append(pb.ProcessingResponse.FromString(data)))
        self.session.resets = resets

    def play(self, *lines: str, **messages: bytes) -> None:
        """`> name` sends that message; the lines `< ...` after it are all that the session says then."""
        script = list(lines)
        for index, line in enumerate(script):
            mark, _, rest = line.partition(" ")
            if mark == ">":
                already = len(self.said)
                self.session.receive(messages.get(rest, b"") or message(rest))
                expected = []
                for later in script[index + 1 :]:
                    if not later.startswith("<"):
                        break
                    expected.append(later.removeprefix("< "))
                assert [spoken(one) for one in self.said[already:]] == expected, line


def message(what: str) -> bytes:
    """`request_body ab|` is a piece with the text ab, and the last one; `response_headers 200` has that status."""
    kind, _, rest = what.partition(" ")
    request = pb.ProcessingRequest()
    part = getattr(request, kind)
    part.SetInParent()
    if kind.endswith("_body"):
        part.body, part.end_of_stream = rest.removesuffix("|").encode(), rest.endswith("|")
    elif kind == "response_headers":
        part.headers.headers.add(key=":status", raw_value=rest.removesuffix("|").encode())
        part.end_of_stream = rest.endswith("|")
    return request.SerializeToString()


def opening(modes: tuple[int, int] | None, *, body: bool = True, by_value: bool = False, **headers: str) -> bytes:
    """The first message of a stream; `modes` of the bodies of request and answer, as the gateway tells them."""
    request = pb.ProcessingRequest()
    part = request.request_headers
    part.end_of_stream = not body
    for key, value in {":method": "POST", ":path": "/v1/chat/completions", **headers}.items():
        header = part.headers.headers.add(key=key.replace("_", "-"))
        setattr(header, "value" if by_value else "raw_value", value.encode())
    if modes is not None:
        request.protocol_config.SetInParent()
        request.protocol_config.request_body_mode, request.protocol_config.response_body_mode = modes
    return request.SerializeToString()


def spoken(response: pb.ProcessingResponse) -> str:
    """A reply in the words of the plays."""
    kind = response.WhichOneof("response")
    if kind == "immediate_response":
        return f"refuse {response.immediate_response.status.code}"
    if kind in ("request_headers", "request_body") and (mutation := mutation_of(response)) is not None:
        if list(mutation.remove_headers) == [wire.PICK_HEADER]:
            assert not mutation.set_headers
            mode = MODE.BodySendMode.Name(response.mode_override.request_body_mode)
            return f"ask {mode}" if response.HasField("mode_override") else "ask"
        picked = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
        told = response.dynamic_metadata["envoy.lb"]
        assert picked == dict(told), "header and metadata are equal"
        override = " lean" if response.HasField("mode_override") else ""
        assert getattr(response, kind).response.clear_route_cache
        return f"pick {picked[wire.PICK_HEADER]}{override}{' in body' if kind == 'request_body' else ''}"
    if kind.endswith("_body"):
        mutation = getattr(response, kind).response.body_mutation
        if mutation.HasField("streamed_response"):
            streamed = mutation.streamed_response
            return f"{kind} {streamed.body.decode()}{'|' if streamed.end_of_stream else ''}"
    return kind


def mutation_of(response: pb.ProcessingResponse) -> pb.HeaderMutation | None:
    common = getattr(response, response.WhichOneof("response")).response
    return common.header_mutation if common.HasField("header_mutation") else None


def told(data: bytes, namespace: str, key: str, *values: str, as_list: bool = True) -> bytes:
    """The message `data` with this in its metadata, as a list or as one text."""
    request = pb.ProcessingRequest.FromString(data)
    value = request.metadata_context.filter_metadata[namespace].fields[key]
    if as_list:
        for text in values:
            value.list_value.values.add(string_value=text.encode())
        value.list_value.SetInParent()
    else:
        value.string_value = ", ".join(values).encode()
    return request.SerializeToString()


def subset(*addresses: str, as_list: bool = True) -> bytes:
    return told(opening(DUPLEX), wire.SUBSET_NAMESPACE, wire.PICK_HEADER + "-subset", *addresses, as_list=as_list)


def served_by(address: str) -> bytes:
    return told(message("response_headers 200"), "envoy.lb", wire.PICK_HEADER + "-served", address, as_list=False)


def reserved(gateway: Gateway) -> dict[str, int]:
    return {name: one.reserved for name, one in gateway.gate.controller.endpoints.items()}
