"""A request's span in the gateway: below the client's, with what the front and the routes know of the request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from serve.front.exchange import Exchange

if TYPE_CHECKING:
    from serve.tracing.spans import Spans


@contextmanager
def of(spans: Spans, exchange: Exchange) -> Iterator[None]:
    """Run a request in a span; what it goes on to is told of this one."""
    with spans.span(exchange.method, exchange.trace, exchange.trace_state) as span:
        exchange.trace, exchange.trace_state = span.carried
        try:
            yield
        finally:
            span.note(_attributes(exchange), f"{exchange.method} {exchange.template or ''}".strip())
            if (exchange.status or 0) >= 500:
                span.failed(exchange.refusal or str(exchange.status))


def _attributes(exchange: Exchange) -> dict[str, Any]:
    """Name what is known as OpenTelemetry's conventions do. Nothing of the prompt, nor of the answer."""
    first = exchange.first_token
    return {
        "http.request.method": exchange.method,
        "http.route": exchange.template,
        "http.response.status_code": exchange.status,
        "gen_ai.request.model": exchange.model,
        "gen_ai.usage.input_tokens": exchange.prompt_tokens,
        "gen_ai.usage.output_tokens": exchange.generated_tokens,
        "gen_ai.response.time_to_first_chunk": None if first is None else first - exchange.began,
        "tandem.queue_seconds": exchange.waited_s,
        "tandem.request_id": exchange.request_id,
        "tandem.cut": exchange.cut,
    }
