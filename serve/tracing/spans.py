"""Spans by OpenTelemetry. No other module imports it; this one is imported only where spans go somewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

LAST_S = 2.0
"""How long a process that ends waits for its last spans to be sent."""


def set_by_others() -> trace.TracerProvider | None:
    """Return the provider that somebody has set in this process."""
    found = trace.get_tracer_provider()
    return None if isinstance(found, trace.ProxyTracerProvider) else found


def provider(exporters: Sequence[SpanExporter], service: Mapping[str, str]) -> TracerProvider:
    """Return a provider of this process's own; what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes first."""
    resource = Resource.create(service).merge(OTELResourceDetector().detect())
    made = TracerProvider(resource=resource, shutdown_on_exit=False)  # `Spans.end` waits less long
    for exporter in exporters:
        made.add_span_processor(BatchSpanProcessor(exporter))
    return made


class Spans:
    """Makes the spans of one process, each below the one that a request names in its `traceparent`."""

    def __init__(self, provider: Any, scope: str, is_own: bool = False) -> None:
        """`provider` is OpenTelemetry's; `is_own`: it ends with this."""
        self._tracer = provider.get_tracer(scope)
        self._provider = provider if is_own else None
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, parent: str | None, state: str | None = None) -> Iterator[Span]:
        """Run something in a span, of a process that is called by another one.

        An exception that ends it is told by its class alone: its words may hold a part of the prompt.

        Args:
            parent: the `traceparent` that it is below; None: a trace begins.
            state: the `tracestate` beside it.
        """
        carrier = {"traceparent": parent, "tracestate": state}
        context = self._propagator.extract({key: value for key, value in carrier.items() if value})
        made = Span(self._tracer, self._tracer.start_span(name, context, trace.SpanKind.SERVER), self._propagator)
        try:
            yield made
        except Exception as error:
            made.failed(type(error).__qualname__)
            raise
        finally:
            made.end()

    def end(self, within_s: float = LAST_S) -> None:
        """Send what is left, for so long at most."""
        if self._provider is not None:
            ending = threading.Thread(target=self._provider.shutdown, name="tandem-last-spans", daemon=True)
            ending.start()
            ending.join(within_s)


class Span:
    """One span that is open. Attributes are OpenTelemetry's; those that are None are left out."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, propagator: TraceContextTextMapPropagator) -> None:
        self._tracer, self._span = tracer, span
        self._context = trace.set_span_in_context(span)
        self._propagator = propagator
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self.is_recorded = span.is_recording()
        """Whether anybody will see it; a sampler may have left it out."""

    @property
    def carried(self) -> tuple[str | None, str | None]:
        """The `traceparent` and the `tracestate` of what is below this span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._context)
        return carrier.get("traceparent"), carrier.get("tracestate")

    def note(self, attributes: Mapping[str, Any], name: str | None = None) -> None:
        """Add attributes, and give it another name."""
        self._span.set_attributes({key: value for key, value in attributes.items() if value is not None})
        if name is not None:
            self._span.update_name(name)

    def failed(self, kind: str) -> None:
        """Mark it as failed."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR)

    def part(self, name: str, began: float, ended: float, attributes: Mapping[str, Any]) -> None:
        """Add a span below it for a time that has passed, `began` and `ended` as `time.perf_counter` tells them."""
        times = [self._epoch_ns + int(each * 1e9) for each in (began, max(began, ended))]
        part = self._tracer.start_span(name, self._context, attributes=dict(attributes), start_time=times[0])
        part.end(times[1])

    def end(self) -> None:
        """End it now, by the clock of its parts, so that none of them ends later."""
        self._span.end(self._epoch_ns + time.perf_counter_ns())
