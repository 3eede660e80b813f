"""A span for each request, where OpenTelemetry is installed and somebody has set where spans go."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve.front.exchange import Exchange

INSTALLED = importlib.util.find_spec("opentelemetry") is not None


@contextmanager
def of(exchange: Exchange, provider: Any = None) -> Iterator[None]:
    """Run a request in a span below the client's; what it goes on to is told of this one.

    `provider`: OpenTelemetry's, the process's own when left out.
    """
    if not INSTALLED or (tracer := _tracer(provider)) is None:
        yield
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract({"traceparent": exchange.trace} if exchange.trace else {})
    with tracer.start_as_current_span(exchange.method, context=parent, kind=SpanKind.SERVER) as span:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        exchange.trace = carrier.get("traceparent", exchange.trace)
        try:
            yield
        finally:
            span.update_name(f"{exchange.method} {exchange.template or ''}".strip())
            span.set_attributes({name: value for name, value in _attributes(exchange).items() if value is not None})


def _attributes(exchange: Exchange) -> dict[str, Any]:
    """Name what is known as OpenTelemetry's conventions do. Nothing of the prompt, nor of the answer."""
    return {
        "http.request.method": exchange.method,
        "http.route": exchange.template,
        "http.response.status_code": exchange.status,
        "gen_ai.request.model": exchange.model,
        "gen_ai.usage.input_tokens": exchange.prompt_tokens,
        "gen_ai.usage.output_tokens": exchange.generated_tokens,
        "tandem.request_id": exchange.request_id,
    }


def _tracer(provider: Any) -> Any | None:
    from opentelemetry import trace

    provider = provider or trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider.get_tracer("tandem.gateway")
