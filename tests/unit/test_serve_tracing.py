"""OpenTelemetry's variables say where spans go; what is missing for that is said, and nothing is where nobody asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from serve.engines.call_spans import Part, parts
from serve.engines.stats import RequestStats
from serve.tracing import begin
from serve.tracing.destination import Destination, destination, of_replicas, of_user
from serve.tracing.spans import Spans, provider

ALL = ("console", "otlp_proto_http", "otlp_proto_grpc")
AT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environ", "installed", "expected"),
    [
        ({}, ALL, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, ALL, ()),
        (AT, ALL, ("otlp_proto_http",)),
        (AT, ("console", "otlp_proto_grpc"), ("otlp_proto_grpc",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, ALL, ("otlp_proto_http",)),
        ({**AT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ALL, ("otlp_proto_grpc",)),
        (
            {**AT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            ALL,
            ("otlp_proto_http",),
        ),
        ({**AT, "OTEL_TRACES_EXPORTER": "none"}, ALL, ()),
        ({**AT, "OTEL_SDK_DISABLED": "True"}, ALL, ()),
        ({**AT, "OTEL_TRACES_EXPORTER": "console"}, ALL, ("console",)),
        ({"OTEL_TRACES_EXPORTER": "otlp, console,otlp"}, ALL, ("otlp_proto_http", "console")),
        ({"OTEL_TRACES_EXPORTER": "otlp_proto_grpc"}, ALL, ("otlp_proto_grpc",)),
    ],
)
def test_the_variables_say_where_spans_go(
    environ: Mapping[str, str], installed: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert destination(environ, installed) == Destination(expected)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (AT, "OTEL_EXPORTER_OTLP_ENDPOINT asks for spans, and opentelemetry-exporter-otlp-proto-http is not installed"),
        ({**AT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "`pip install opentelemetry-exporter-otlp-proto-grpc`"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp_proto_http"},
            "OTEL_TRACES_EXPORTER asks for spans, and opentelemetry-exporter",
        ),
        ({**AT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'; known are"),
        (
            {"OTEL_TRACES_EXPORTER": "zipkin"},
            "names 'zipkin', and no such exporter is installed on the cluster (there ",
        ),
    ],
)
def test_what_is_missing_is_said_with_the_way_out(environ: Mapping[str, str], said: str) -> None:
    found = destination(environ, ("console",))
    assert len(found.problems) == 1
    assert said in found.problems[0]
    assert found.exporters == (("console",) if "console" in environ.get("OTEL_TRACES_EXPORTER", "") else ())


def test_what_says_something_of_spans_is_passed_on_and_nothing_else() -> None:
    ours = {**AT, "OTEL_EXPORTER_OTLP_HEADERS": "a=b", "OTEL_TRACES_SAMPLER": "always_off", "OTEL_SERVICE_NAME": "x"}
    others = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "x", "PATH": "/", "MY_OTEL_": "x"}
    sent = of_user({**ours, **others})
    assert len(sent) == 1, "Serve's controller would hand them on to all later replicas"
    node = {"OTEL_SERVICE_NAME": "the node's", "OTEL_BSP_SCHEDULE_DELAY": "1000"}
    assert of_replicas({**others, **node, **sent}) == {**ours, "OTEL_BSP_SCHEDULE_DELAY": "1000"}
    assert of_replicas({**others, **node}) == node
    assert of_user(others) == of_replicas(others) == {}


def test_nothing_begins_where_nobody_asks_or_nothing_can_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    assert begin.spans("tandem.gateway", "tandem", "r1", {}) is None
    assert not caplog.records
    wanted = {"OTEL_TRACES_EXPORTER": "nowhere"}
    assert begin.spans("tandem.gateway", "tandem", "r1", wanted) is None
    assert "nowhere" in caplog.text
    (said,) = begin.told(wanted)
    assert said.startswith("warning: OTEL_TRACES_EXPORTER names 'nowhere'")
    assert list(begin.told({})) == []
    assert list(begin.told({"OTEL_TRACES_EXPORTER": "console"})) == [
        "each request's spans go to console, as OpenTelemetry's variables (OTEL_…) say"
    ]


def in_a_process(code: str, environ: Mapping[str, str]) -> str:
    """Run code, and return what it printed."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        command, env={**clean, **environ}, capture_output=True, text=True, cwd=root, check=True, timeout=60
    )
    return done.stdout


ONE = """
from serve.tracing import begin
spans = begin.spans("tandem.gateway", "mine", "r1")
with spans.span("one", None):
    pass
spans.end()
"""


def test_a_process_sends_its_spans_as_the_variables_say_and_tells_who_it_is() -> None:
    asked = {"OTEL_TRACES_EXPORTER": "console"}
    sent = json.loads(in_a_process(ONE, asked))
    assert sent["name"] == "one"
    own = sent["resource"]["attributes"]
    names = ("service.name", "service.namespace", "service.instance.id")
    assert [own[name] for name in names] == ["tandem-gateway", "mine", "r1"]
    named = {**asked, "OTEL_SERVICE_NAME": "ours", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    own = json.loads(in_a_process(ONE, named))["resource"]["attributes"]
    assert [own[name] for name in (*names, "deployment.environment")] == ["ours", "mine", "r1", "test"]
    assert in_a_process(ONE, {**asked, "OTEL_TRACES_SAMPLER": "always_off"}) == ""


def test_a_provider_that_others_have_set_is_taken_and_not_ended() -> None:
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
theirs = TracerProvider()
theirs.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(theirs)
"""
    after = 'trace.get_tracer("theirs").start_span("two").end()'
    assert [
        line.split('"')[3] for line in in_a_process(code + ONE + after, {}).splitlines() if '    "name"' in line
    ] == [
        "one",
        "two",
    ]


def test_an_exporter_of_anybody_s_is_found_by_its_name_and_one_that_cannot_start_stops_nothing(tmp_path: Path) -> None:
    about = tmp_path / "theirs-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[opentelemetry_traces_exporter]\nworking = theirs:Working\nbroken = theirs:Broken\nhalf = theirs_not:Half\n"
    )
    (tmp_path / "theirs.py").write_text("""
class Working:
    def export(self, spans):
        print(*[span.name for span in spans])
    def shutdown(self):
        pass
class Broken(Working):
    def __init__(self):
        raise OSError("no such certificate")
""")
    places = {"PYTHONPATH": str(tmp_path)}
    assert in_a_process(ONE, {**places, "OTEL_TRACES_EXPORTER": "working"}) == "one\n"
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from serve.tracing import begin
print(*begin.told({"OTEL_TRACES_EXPORTER": "half,working"}), sep="\\n")
print(begin.spans("tandem.gateway", "mine", "r1"))
"""
    assert in_a_process(code, {**places, "OTEL_TRACES_EXPORTER": "broken"}).splitlines() == [
        "warning: there are no spans by half, which cannot be loaded: "
        "ModuleNotFoundError(\"No module named 'theirs_not'\")",
        "each request's spans go to working, as OpenTelemetry's variables (OTEL_…) say",
        "there are no spans by broken, which cannot start: OSError('no such certificate')",
        "None",
    ]


def test_the_routes_make_no_spans_of_their_own_for_a_provider_that_others_have_set() -> None:
    code = """
import asyncio, httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
theirs = TracerProvider()
theirs.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(theirs)
from serve.api import routes
from serve.api.gateway import Gateway
gateway = Gateway(None, 1000, 2)
app = httpx.ASGITransport(routes.build(lambda: gateway))
async def main():
    async with httpx.AsyncClient(transport=app, base_url="http://t") as client:
        print((await client.get("/v2/health/live")).status_code)
asyncio.run(main())
"""
    assert in_a_process(code, {}) == "200\n"


def test_a_process_without_opentelemetry_has_no_spans() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
import serve.front.app, serve.engines.call_spans, serve.engines.replica
from serve.tracing import begin
environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}
print(begin.spans("tandem.gateway", "mine", "r1", environ), *begin.told(environ))
"""
    said = in_a_process(code, {})
    assert said.startswith("None warning: OTEL_EXPORTER_OTLP_ENDPOINT asks for spans, and opentelemetry-exporter-")


def test_a_process_that_ends_waits_for_a_collector_that_hangs_no_longer_than_it_says() -> None:
    held = threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            held.wait(20)
            return SpanExportResult.FAILURE

        def shutdown(self) -> None:
            held.wait(20)

    spans = Spans(provider([Hanging()], {"service.name": "x"}), "x", is_own=True)
    with spans.span("one", None):
        pass
    began = time.monotonic()
    spans.end(within_s=0.05)
    held.set()
    assert time.monotonic() - began < 10


def noted(**values: Any) -> RequestStats:
    return RequestStats(submitted=1.0, **values)


@pytest.mark.parametrize(
    ("stats", "generates", "expected"),
    [
        (RequestStats(), True, []),
        (noted(), True, [("engine.queue", 1.0, 9.0)]),
        (noted(scheduled=2.0, steps=1), True, [("engine.queue", 1.0, 2.0), ("engine.prefill", 2.0, 9.0)]),
        (
            noted(scheduled=2.0, first_output=3.0, last_output=3.0, steps=2, steps_to_first=2),
            True,
            [("engine.queue", 1.0, 2.0), ("engine.prefill", 2.0, 3.0)],
        ),
        (
            noted(scheduled=2.0, first_output=3.0, last_output=9.5, steps=5, steps_to_first=2),
            True,
            [("engine.queue", 1.0, 2.0), ("engine.prefill", 2.0, 3.0), ("engine.decode", 3.0, 9.0)],
        ),
        (
            noted(scheduled=2.0, first_output=3.0, last_output=4.0, steps=5, steps_to_first=2),
            False,
            [("engine.queue", 1.0, 2.0), ("engine.compute", 2.0, 4.0)],
        ),
    ],
)
def test_an_engine_s_work_is_parts_that_end_with_the_call(
    stats: RequestStats, generates: bool, expected: list[tuple[str, float, float]]
) -> None:
    found: list[Part] = list(parts(stats, generates, ended=9.0))
    assert [(part.name, part.began, part.ended) for part in found] == expected
