"""Spans begin in a process, where somebody has said where they go."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

from serve.tracing.destination import destination

if TYPE_CHECKING:
    from serve.tracing.spans import Spans

GROUP = "opentelemetry_traces_exporter"
"""Under which exporters are registered, OpenTelemetry's own and those of others."""
logger = logging.getLogger(__name__)


def spans(scope: str, endpoint: str, instance: str, environ: Mapping[str, str] = os.environ) -> Spans | None:
    """Return what makes this process's spans; None: they go nowhere.

    A tracer provider that somebody has set is taken as it is (Ray's `--tracing-startup-hook`, Serve's own tracing, code
    of the user's own); else one is made as OpenTelemetry's variables say.

    Args:
        scope: what makes them, `tandem.gateway` or `tandem.replica`.
        endpoint: the endpoint's name, which is their namespace.
        instance: id of the replica.
    """
    if _is_installed():
        from serve.tracing import spans as made

        if (found := made.set_by_others()) is not None:
            return made.Spans(found, scope)
    to, problems = destination(environ, installed())
    for problem in problems:
        logger.warning("%s", problem)
    exporters = [exporter for name in to if (exporter := _started(name)) is not None]
    if not exporters:
        return None
    from serve.tracing import spans as made

    service = {"service.name": scope.replace(".", "-"), "service.namespace": endpoint, "service.instance.id": instance}
    return made.Spans(made.provider(exporters, service), scope, is_own=True)


def told(environ: Mapping[str, str]) -> Iterator[str]:
    """Say to whoever deploys where spans will go, and why not where they will not."""
    to, problems = destination(environ, installed())
    broken = {name: why for name in to if (why := _broken(name))}
    for problem in problems:
        yield f"warning: {problem}"
    for name, why in broken.items():
        yield f"warning: there are no spans by {name}, which cannot be loaded: {why}"
    if left := [name for name in to if name not in broken]:
        yield f"each request's spans go to {', '.join(left)}, as OpenTelemetry's variables (OTEL_…) say"


def installed() -> Collection[str]:
    """Return the names of the exporters that are installed."""
    return {point.name for point in metadata.entry_points(group=GROUP)} if _is_installed() else set()


def _is_installed() -> bool:
    return util.find_spec("opentelemetry") is not None and util.find_spec("opentelemetry.sdk") is not None


def _broken(name: str) -> str:
    """Say why an exporter cannot be loaded; empty where it can."""
    try:
        _loaded(name)
    except Exception as error:  # of a package that may be anybody's
        return repr(error)
    return ""


def _started(name: str) -> Any:
    """Return an exporter; None where it cannot start: wrong settings of spans keep no model from being served."""
    try:
        return _loaded(name)()
    except Exception as error:  # of a package that may be anybody's
        logger.error("there are no spans by %s, which cannot start: %r", name, error)
        return None


def _loaded(name: str) -> type:
    (point, *_) = metadata.entry_points(group=GROUP, name=name)
    exporter: type = point.load()
    return exporter
