"""The way to a cluster: address, token and code shipping, for the Jobs API and for `ray.init`.

`RAY_ADDRESS` and `MLFLOW_TRACKING_URI` win over the local cluster that `tandem cluster up` started. Inside a Ray job
both are set, so the same calls connect a job to its own cluster.
"""

import importlib.util
import logging
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import local, ray_internals
from cluster.daemons import can_bind
from cluster.errors import UserError
from cluster.home import home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("cluster", "jobs", "serve", "tracking")


@dataclass(frozen=True)
class Connection:
    """Where Ray and MLflow are."""

    ray_address: str
    """What `RAY_ADDRESS` says, or the local head's `host:port`."""
    jobs_address: str
    """What the Jobs API client takes: the dashboard's URL, or an address from which Ray finds it."""
    tracking_uri: str
    is_local: bool
    """Whether Ray is the one that `tandem cluster up` started on this machine."""


def connection() -> Connection:
    """Find the cluster: the environment first, then what `tandem cluster up` started.

    For the local cluster its token settings are put into this process's environment, for Ray to read; the token of any
    other cluster is the user's own matter. Raises UserError when there is no cluster or no MLflow to be found.
    """
    cluster = local.state()
    ray_address = os.environ.get("RAY_ADDRESS") or (cluster.ray_address if cluster else "")
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or (cluster.mlflow_url if cluster else "")
    if not ray_address:
        raise UserError("no cluster: run `tandem cluster up`, or set RAY_ADDRESS to the address of yours")
    if not tracking_uri:
        raise UserError("no MLflow: set MLFLOW_TRACKING_URI to that of your server, or run `tandem cluster up`")
    is_local = cluster is not None and cluster.owns(ray_address)
    if cluster is not None and is_local:
        _use_token(local.token_environment(cluster.token_path))
    jobs_address = cluster.dashboard_url if cluster and is_local else ray_address
    return Connection(ray_address, jobs_address, tracking_uri, is_local)


def job_client() -> "JobSubmissionClient":
    """Return a Jobs API client of the cluster. Raises UserError when it does not answer or refuses the token."""
    address = connection().jobs_address
    with explained(address):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)


def get_json(path: str) -> Any:
    """Get `path` of the cluster's dashboard, such as `/api/serve/applications/`, with its token, as JSON."""
    client = job_client()
    with explained(client.get_address()):
        response = ray_internals.get(client, path)
        response.raise_for_status()
        return response.json()


def init_ray(**kwargs: Any) -> None:
    """Connect this process to the cluster as a driver, once; `kwargs` go to `ray.init`.

    Raises UserError when the cluster does not answer, or when RAY_ADDRESS is a Jobs API address.
    """
    import ray

    if ray.is_initialized():
        return
    address = connection().ray_address
    if address.startswith(("http://", "https://")):
        raise UserError(f"RAY_ADDRESS={address} reaches the Jobs API only; give the head's own address, host:6379")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR", **kwargs}
    with explained(address):
        ray.init(**options)


def packages() -> list[Path]:
    """List the folders of Tandem's four packages: in a clone, an installed wheel, or on a worker."""
    return [Path(folder) for name in PACKAGES for folder in _locations(name)]


def runtime_env(working_dir: Path | None = None, env_vars: dict[str, str] | None = None) -> dict[str, Any]:
    """Describe what travels with a job: Tandem's packages, the spec's folder, the addresses and `env_vars`."""
    environment = {**_addresses_for_jobs(), **(env_vars or {})}
    shipped: dict[str, Any] = {
        "py_modules": [str(folder) for folder in packages()],
        "excludes": ["**/__pycache__", "**/*.pyc"],
        "env_vars": environment,
    }
    if working_dir is not None:
        shipped["working_dir"] = str(working_dir.absolute())
    return shipped


def submit(
    entrypoint: str,
    *,
    submission_id: str,
    working_dir: Path | None = None,
    env_vars: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    """Submit `entrypoint` as a Ray job with Tandem's code and return its submission id.

    Raises UserError when the cluster does not answer, refuses the token, or already has a job of that id.
    """
    client = job_client()
    shipped = runtime_env(working_dir, env_vars)
    try:
        with explained(client.get_address()), _quiet_uploads():
            return client.submit_job(
                entrypoint=entrypoint, submission_id=submission_id, runtime_env=shipped, metadata=metadata
            )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        raise UserError(f"the cluster already has a job {submission_id!r}: choose another name") from error


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what Ray raises about an unreachable or refusing cluster into errors a user can act on."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with its token"
        raise UserError(f"the cluster at {address} refused the token: {remedy}") from error
    except ConnectionError as error:
        raise UserError(f"the cluster at {address} does not answer: does it run, is the address right?") from error


def _use_token(settings: dict[str, str]) -> None:
    """Put the token settings into the environment, and have Ray read them again if it has been imported before."""
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the token file
    if settings.items() <= os.environ.items():
        return
    os.environ.update(settings)
    ray_internals.read_token_again()


def _locations(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or []) if spec else []


def _addresses_for_jobs() -> dict[str, str]:
    """Tell jobs where MLflow, Tandem's home and storage are, unless that means nothing on the machines where they run.

    A loopback address reaches MLflow from here, perhaps through a tunnel, but not from another machine; the nodes of a
    real cluster have MLFLOW_TRACKING_URI in their own environment (ray-cluster.yaml sets it).
    """
    found = connection()
    shared = {}
    if found.is_local or not _is_loopback(found.tracking_uri) or _runs_here():
        shared["MLFLOW_TRACKING_URI"] = found.tracking_uri
    if found.is_local or os.environ.get("TANDEM_HOME"):
        shared["TANDEM_HOME"] = str(home())
    if os.environ.get("TANDEM_STORAGE"):
        shared["TANDEM_STORAGE"] = os.environ["TANDEM_STORAGE"]
    return shared


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _runs_here() -> bool:
    """Say whether every node of the cluster has an address of this machine."""
    from ray.util.state import list_nodes

    client = job_client()
    with explained(client.get_address()):
        nodes = list_nodes(client.get_address(), filters=[("state", "=", "ALIVE")])
    return all(can_bind(node.node_ip) for node in nodes)


@contextmanager
def _quiet_uploads() -> Iterator[None]:
    """Keep Ray from reporting every package that it uploads, or finds uploaded already."""
    loggers = [logging.getLogger(name) for name in ray_internals.UPLOAD_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
