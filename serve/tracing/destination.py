"""Where spans go, as OpenTelemetry's own environment variables say. Pure, and without OpenTelemetry."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import NamedTuple

EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
BY_PROTOCOL = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""Under which name the exporter of a protocol is installed."""
PACKAGES = {name: f"opentelemetry-exporter-{name.replace('_', '-')}" for name in BY_PROTOCOL.values()}
PASSED_ON = (
    "OTEL_TRACES_",
    "OTEL_EXPORTER_OTLP_",
    "OTEL_BSP_",
    "OTEL_SPAN_",
    "OTEL_ATTRIBUTE_",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_SERVICE_NAME",
    DISABLED,
)
"""Beginnings of the names of variables that say something of spans."""
OF_OTHERS = ("OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_LOGS_")
JOB = "TANDEM_SERVE_TRACING"
"""The variable by which a deploy job is told of them, as JSON. Under their own names they would stay for good: Serve's
controller inherits the variables of the job that starts it, and all later replicas those of the controller."""


class Destination(NamedTuple):
    """The exporters that spans go to, by the names under which they are installed, and why not to others."""

    exporters: tuple[str, ...]
    problems: tuple[str, ...] = ()


def of_user(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a deploy job is told of the environment that `serve up` runs in."""
    found = _of_spans(environ)
    return {JOB: json.dumps(found)} if found else {}


def of_replicas(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what gateways and replicas get of a deploy job's environment: the node's, and the user's over them."""
    return {**_of_spans(environ), **json.loads(environ.get(JOB, "{}"))}


def _of_spans(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environ.items() if name.startswith(PASSED_ON) and not name.startswith(OF_OTHERS)
    }


def destination(environ: Mapping[str, str], installed: Collection[str]) -> Destination:
    """Return where spans go.

    Args:
        installed: names of the exporters that are installed.
    """
    if environ.get(DISABLED, "").strip().lower() == "true":
        return Destination(())
    cause = next((name for name in (EXPORTER, *ENDPOINTS) if environ.get(name, "").strip()), None)
    if cause is None:
        return Destination(())
    named = environ[cause] if cause == EXPORTER else "otlp"
    wanted = dict.fromkeys(each.strip() for each in named.split(",") if each.strip() not in ("", "none"))
    found = [_exporter(each, cause, environ, installed) for each in wanted]
    exporters = tuple(each for each, problem in found if not problem)
    return Destination(exporters, tuple(problem for _, problem in found if problem))


def _exporter(name: str, cause: str, environ: Mapping[str, str], installed: Collection[str]) -> tuple[str, str]:
    """Return what the exporter is installed as, and what is wrong with it, if anything is."""
    if name == "otlp":
        return _otlp(cause, environ, installed)
    if name in PACKAGES and name not in installed:
        return name, _missing(name, cause)
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        return name, f"{cause} names {name!r}, and no such exporter is installed on the cluster (there are: {known})"
    return name, ""


def _otlp(cause: str, environ: Mapping[str, str], installed: Collection[str]) -> tuple[str, str]:
    """Choose OTLP's protocol: that which is named, else HTTP as OpenTelemetry has it, or gRPC where only that is."""
    asked = next((name for name in PROTOCOLS if environ.get(name, "").strip()), None)
    if asked is None:
        names = list(BY_PROTOCOL.values())
        name = next((each for each in names if each in installed), names[0])
    else:
        protocol = environ[asked].strip()
        if protocol not in BY_PROTOCOL:
            return "otlp", f"{asked} is {protocol!r}; known are {', '.join(BY_PROTOCOL)}"
        name = BY_PROTOCOL[protocol]
    return name, "" if name in installed else _missing(name, cause)


def _missing(name: str, cause: str) -> str:
    package = PACKAGES[name]
    return (
        f"{cause} asks for spans, and {package} is not installed on the cluster: `pip install {package}` on its nodes "
        f"and run `tandem serve up` again, or set {EXPORTER}=none"
    )
