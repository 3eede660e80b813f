"""Talk to the MLflow server so that a dead one is noticed in a second and a lost reply creates nothing twice."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tracking.address import tracking_uri
from tracking.errors import Refused, ServerUnreachable, UnknownName
from tracking.mlflow_internals import UNKNOWN_HOST

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 0.2
PATIENCE_S = 10.0
"""No further attempt after this long: a server that hangs, rather than refuses, costs one timeout, not four."""
_TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}


def connect(uri: str | None = None) -> Any:
    """Return an `MlflowClient` for runs and models at `uri`, or wherever `address.tracking_uri` finds the server.

    MLflow reads these settings from the environment at each request and offers no other way. Its own retries are
    off: they repeat POSTs, so one lost reply makes two runs, and they block for minutes. `ask` and `create_once`
    retry instead.
    """
    address = tracking_uri(uri)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=address, registry_uri=address)


def ask(client: Any, call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """Return `call()`, repeating it while the server does not answer: only for requests that may be repeated.

    Raises ServerUnreachable after `attempts` or `PATIENCE_S`, Refused when the server says that the request is wrong.
    """
    started = time.monotonic()
    for attempt in range(attempts):
        try:
            return _translated(client, call)
        except UnknownName:
            raise
        except ServerUnreachable:
            if attempt == attempts - 1 or time.monotonic() - started > PATIENCE_S:
                raise
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("attempts must be positive")


def create_once(client: Any, find: Callable[[], T | None], create: Callable[[], object]) -> T:
    """Return what `find` finds, after `create` where it finds nothing.

    A reply that was lost, or somebody who was faster, is found by the next search instead of being created again.
    """
    for attempt in range(ATTEMPTS):
        found = ask(client, find)
        if found is not None:
            return found
        try:
            ask(client, create, attempts=1)
        except ServerUnreachable:
            time.sleep(FIRST_PAUSE_S * 2**attempt)
        except Refused as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
    found = ask(client, find)
    if found is None:
        raise ServerUnreachable(f"the tracking server at {client.tracking_uri} does not keep what is created there")
    return found


def _translated(client: Any, call: Callable[[], T]) -> T:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code in _TRANSIENT:
            raise ServerUnreachable(
                f"no answer from the tracking server at {client.tracking_uri}: start it with `tandem cluster up`, "
                f"or set MLFLOW_TRACKING_URI ({_cause(error)})"
            ) from error
        if UNKNOWN_HOST in str(error.message):
            raise UnknownName(unknown_name(client.tracking_uri)) from error
        message = f"the tracking server at {client.tracking_uri} refused: {error.message}"
        raise Refused(message, error.error_code) from error


def unknown_name(uri: str) -> str:
    """Return what a server's refusal of the name in `uri` means, and the way out. Pure."""
    host = urlsplit(uri).hostname
    return (
        f"the tracking server at {uri} does not answer to the name {host} (403, Invalid Host header): start it with "
        f"TANDEM_MLFLOW_HOSTS={host} in its environment, or with --allowed-hosts {host}"
    )


def _cause(error: Exception) -> str:
    """Return the innermost words of a chain of connection errors; MLflow wraps them four deep."""
    text = str(error).rstrip(")\"'")
    return text.rsplit(": ", 1)[-1][:200]
