"""Whether MLflow answers to a node under the address by which a job there would look for it.

By plain HTTP: MLflow's client retries for minutes, and its server's `/health` answers to any Host header, while its API
refuses those that it was not told.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping

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
    headers = {"Content-Type": "application/json", **_login(environment)}
    content = None if body is None else json.dumps(body).encode()
    direct = [urllib.request.ProxyHandler({})] if "://127." in where else []
    try:
        opener = urllib.request.build_opener(*direct)
        with opener.open(urllib.request.Request(where + path, content, headers), timeout=TIMEOUT_S) as response:
            return Answer(shown(where), response.status, "")
    except urllib.error.HTTPError as error:
        return Answer(shown(where), error.code, error.read(200).decode(errors="replace").strip())
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Answer(shown(where), 0, str(reason))


def _login(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header by which MLflow's own client would log in."""
    if token := environment.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := environment.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{environment.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}
