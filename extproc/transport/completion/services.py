"""Health and reflection as handlers of streams: the messages are those of grpcio's own packages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Send = Callable[[bytes], None]


class StatusError(Exception):
    """Ends a stream with a status of its own."""

    def __init__(self, code: Any, details: str) -> None:
        """Name the status' code, one of cygrpc.StatusCode, and say why."""
        super().__init__(details)
        self.code = code


class Health:
    """The status of each service, and those who watch it."""

    NAME = "grpc.health.v1.Health"
    CHECK, WATCH = f"/{NAME}/Check".encode(), f"/{NAME}/Watch".encode()

    def __init__(self) -> None:
        """Know no service yet."""
        self._statuses: dict[str, Any] = {}
        self._watches: dict[_Watch, str] = {}

    def methods(self) -> dict[bytes, Any]:
        """Return what opens a handler, by method."""
        return {self.CHECK: partial(_Check, self), self.WATCH: self._watch}

    def put(self, services: Iterable[str], *, serving: bool) -> None:
        """Change the status of services, and tell."""
        answers = health_pb2.HealthCheckResponse
        for service in services:
            self._statuses[service] = answers.SERVING if serving else answers.NOT_SERVING
        for watch, service in list(self._watches.items()):
            watch.tell(self.answer(service))

    def answer(self, service: str) -> bytes | None:
        """Return the encoded status, or None for a service that nobody knows."""
        status = self._statuses.get(service)
        return None if status is None else health_pb2.HealthCheckResponse(status=status).SerializeToString()

    def _watch(self, send: Send) -> _Watch:
        return _Watch(self, self._watches, send)


class _Handler:
    """What a handler is that neither waits nor lets wait."""

    over = False
    paused = False

    def half_closed(self) -> bool:
        """Say no more either."""
        return False

    def end(self) -> None:
        """Nothing is kept."""


class _Check(_Handler):
    def __init__(self, health: Health, send: Send) -> None:
        self._health = health
        self._send = send
        self.over = False

    def receive(self, data: bytes) -> None:
        answer = self._health.answer(_service(data))
        if answer is None:
            raise StatusError(cygrpc.StatusCode.not_found, "unknown service")
        self._send(answer)
        self.over = True


class _Watch(_Handler):
    def __init__(self, health: Health, watches: dict[_Watch, str], send: Send) -> None:
        self._health = health
        self._watches = watches
        self._send = send
        self._told: bytes | None = None

    def receive(self, data: bytes) -> None:
        service = self._watches[self] = _service(data)
        self.tell(self._health.answer(service))

    def tell(self, answer: bytes | None) -> None:
        unknown = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        answer = answer or unknown.SerializeToString()
        if answer != self._told:
            self._told = answer
            self._send(answer)

    def end(self) -> None:
        self._watches.pop(self, None)


class Reflection(_Handler):
    """grpcio's answers about services; one at a time, because we have no iterator of requests."""

    def __init__(self, servicer: reflection.ReflectionServicer, send: Send) -> None:
        """Answer by `send`."""
        self._servicer = servicer
        self._send = send

    @classmethod
    def methods(cls, services: Iterable[str]) -> dict[bytes, Any]:
        """Return what opens a handler, by method; `services`: what is there besides reflection."""
        servicer = reflection.ReflectionServicer((*services, reflection.SERVICE_NAME))
        return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo".encode(): partial(cls, servicer)}

    def receive(self, data: bytes) -> None:
        """Answer one question."""
        question = _parse(reflection_pb2.ServerReflectionRequest, data)
        for answer in self._servicer.ServerReflectionInfo(iter((question,)), None):
            self._send(answer.SerializeToString())


def _service(data: bytes) -> str:
    return str(_parse(health_pb2.HealthCheckRequest, data).service)


def _parse(message: Any, data: bytes) -> Any:
    try:
        return message.FromString(data)
    except Exception as error:
        raise StatusError(cygrpc.StatusCode.invalid_argument, f"not a {message.DESCRIPTOR.name}: {error}") from None
