"""Whether MLflow answers to a node under the address by which a job there would look for it.

Without MLflow's client, which retries for minutes, but with the library by which it asks: proxies, certificates and
logins are a job's. MLflow's server answers `/health` to any Host header, while its API refuses those it was not told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.doctor.facts import Answer
from cluster.stores import shown

TIMEOUT_S = 5.0
CALL = "/api/2.0/mlflow/experiments/search"


def asked(environment: Mapping[str, str]) -> Answer:
    """Ask for its health, then for one experiment; the first that fails is the answer.

    Args:
        environment: a job's on this node: MLFLOW_TRACKING_URI, and with what it logs in.
    """
    where = environment.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not where.startswith(("http://", "https://")):
        return Answer(shown(where), 0, "not asked: it is no http address" if where else "")
    for path, body in (("/health", None), (CALL, {"max_results": 1})):
        answer = _get(where, path, body, environment)
        if answer.status != 200:
            return answer
    return answer


def _get(where: str, path: str, body: dict[str, int] | None, environment: Mapping[str, str]) -> Answer:
    import requests

    method = "GET" if body is None else "POST"
    try:
        response = requests.request(method, where + path, json=body, timeout=TIMEOUT_S, **_login(environment))
    except (requests.RequestException, ValueError) as error:
        return Answer(shown(where), 0, _reason(error))
    return Answer(shown(where), response.status_code, "" if response.ok else response.text[:200].strip())


def _login(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return by what MLflow's own client would log in, as `requests` takes it."""
    verified: dict[str, Any] = {"verify": environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() != "true"}
    if token := environment.get("MLFLOW_TRACKING_TOKEN"):
        return {**verified, "headers": {"Authorization": f"Bearer {token}"}}
    if user := environment.get("MLFLOW_TRACKING_USERNAME"):
        return {**verified, "auth": (user, environment.get("MLFLOW_TRACKING_PASSWORD", ""))}
    return verified


def _reason(error: BaseException) -> str:
    """Return the innermost of an error's reasons: the others are of the library's own making, and name the URL."""
    inner = getattr(error, "reason", None) or next((one for one in error.args if isinstance(one, BaseException)), None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    return str(error) if inner is None else str(inner)
