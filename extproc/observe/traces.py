"""OpenTelemetry: the time in the queue as a span. Imported only if `tracing` is on; needs the extra `otel`.

Where spans go, and which, is OpenTelemetry's own business: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME, OTEL_BSP_... Spans wait in a bounded queue (2,048) for a thread that sends them; when it is full they
are dropped, and the loop never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from extproc import __version__
from extproc.admission.outcome import Outcome
from extproc.admission.values import Dispatch

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, Request

log = logging.getLogger("extproc.traces")

SPAN = "extproc queue"
STOP_S = 2.0
"""How long the last spans may take to go out."""


def _genai(request: Request) -> dict[str, str | int]:
    """Return what a request is in the words of OpenTelemetry's conventions for generative AI."""
    said = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": request.max_output_tokens,
    }
    return {name: value for name, value in said.items() if value}


def resource() -> Resource:
    """Return who we are in OpenTelemetry's words: what the environment says, else the service `extproc`."""
    found = Resource.create()
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "extproc"}))
    return found


class QueueSpans:
    """An observer of decisions that makes a span of each wait: from the arrival to the decision."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Send to `exporter`; None: by OTLP over HTTP to where the environment says."""
        self._provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("extproc", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def decided(self, decision: Decision) -> None:
        """Make a span of a request that was dispatched or refused."""
        endpoint = decision.endpoint if isinstance(decision, Dispatch) else None
        self._record(decision.ticket, decision.outcome, decision.wait_s, endpoint)

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Make a span of a request whose client left."""
        self._record(ticket, Outcome.CANCELLED, wait_s, None)

    def _record(self, ticket: Ticket, outcome: Outcome, wait_s: float, endpoint: str | None) -> None:
        try:
            trace = ticket.request.trace
            context = self._propagator.extract({"traceparent": trace}) if trace else None
            end_ns = time.time_ns()
            start_ns = end_ns - int(wait_s * 1e9)
            span = self._tracer.start_span(SPAN, context, start_time=start_ns)
            if span.is_recording():
                span.set_attribute("extproc.outcome", outcome.value)
                span.set_attribute("extproc.class", ticket.request_class.name)
                span.set_attribute("extproc.wait_ms", round(wait_s * 1000, 1))
                span.set_attribute("extproc.position", ticket.position)
                span.set_attributes(_genai(ticket.request))
                if ticket.request.id:
                    span.set_attribute("extproc.request_id", ticket.request.id)
                if endpoint is not None:
                    span.set_attribute("extproc.endpoint", endpoint)
                if ticket.waited_for is not None:
                    span.set_attribute("extproc.waited_for", ticket.waited_for.value)
                if ticket.home is not None:
                    span.set_attribute("extproc.home", ticket.home.name)
                if outcome.status is not None:
                    span.set_attribute("error.type", outcome.value)
                    span.set_status(Status(StatusCode.ERROR, outcome.value))
            span.end(end_ns)
        except Exception:  # a request must not fail because its span did
            log.exception("a span was lost: please report it")

    async def stop(self) -> None:
        """Send what is left, for STOP_S at most. The thread is a daemon: a collector that hangs keeps nobody."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, daemon=True, name="last spans").start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sent.wait(), STOP_S)
