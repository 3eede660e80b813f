"""What Tandem uses of MLflow's insides (3.17): the server's app with the settings that it reads, and reserved tags."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

from cluster.internals import Internal

EXTERNAL_TAG = "mlflow.model.isExternal"
"""mlflow.utils.mlflow_tags.MLFLOW_MODEL_IS_EXTERNAL: a logged model whose files are not MLflow's."""
SPLIT_TAG = "mlflow.data.context"
"""mlflow.utils.mlflow_tags.MLFLOW_DATASET_CONTEXT."""
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_DIGEST_CHARS = 36

UNKNOWN_HOST = "Invalid Host header"
"""How the server's answer to a Host header that it does not know begins."""

ENTRIES = (
    Internal(
        "mlflow.server.fastapi_app.app, mlflow.server.handlers.initialize_backend_stores",
        "to serve MLflow in one process; `mlflow server` starts uvicorn as a child",
        "`tandem cluster up` fails: no MLflow",
        "`mlflow server` can run in its own process",
    ),
    Internal(
        "mlflow.server.BACKEND_STORE_URI_ENV_VAR and its four sisters",
        "the names by which `mlflow server` hands its options to its app",
        "MLflow keeps its data elsewhere than in Tandem's home, or does not start",
        "as for fastapi_app",
    ),
    Internal(
        "mlflow.server.security_utils (get_default_allowed_hosts, INVALID_HOST_MSG)",
        "the names by which MLflow may be reached are added to its own; a client that is refused is told the way out",
        "the server does not start; or a client that uses another name sees MLflow's bare 403",
        "`--allowed-hosts` adds to the defaults, and the refusal has an error code of its own",
    ),
    Internal(
        "_MLFLOW_SGI_NAME, _MLFLOW_SERVER_BOOT_ID, _MLFLOW_IN_JOB_EXECUTOR",
        "they tell MLflow that it is a server, and which: it must never rebuild scorers from code that a client sent",
        "the server may run code that a client sent; its authentication takes it for a Flask server",
        "as for fastapi_app",
    ),
    Internal(
        "mlflow.utils.mlflow_tags.MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_DATASET_CONTEXT",
        "checkpoints are logged models whose files stay in place; data sets have a split",
        "MLflow offers to download checkpoints that it does not have; data sets have no split",
        "the client has arguments for both",
    ),
    Internal(
        "mlflow.utils.validation (MAX_PARAMS_TAGS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH, …)",
        "what the server takes at most; longer values are cut with a note, larger batches are divided",
        "a job with a long spec is refused by the server, or its values are cut shorter than they need be",
        "the server tells its limits",
    ),
)


def set_server_environment(store: str, artifacts: str, hosts: Sequence[str]) -> None:
    """Put what MLflow's app reads at its import into the environment.

    Args:
        store: an SQLAlchemy URL, for runs and models.
        artifacts: where the server keeps artifacts, a path or a URI.
        hosts: the Host headers to accept besides MLflow's own, which are localhost and private addresses.
    """
    from mlflow import server
    from mlflow.environment_variables import MLFLOW_SERVER_ALLOWED_HOSTS
    from mlflow.server.security_utils import get_default_allowed_hosts

    usual = MLFLOW_SERVER_ALLOWED_HOSTS.get() or ",".join(get_default_allowed_hosts())
    os.environ[MLFLOW_SERVER_ALLOWED_HOSTS.name] = ",".join([usual, *hosts])

    os.environ[server.BACKEND_STORE_URI_ENV_VAR] = store
    os.environ[server.REGISTRY_STORE_URI_ENV_VAR] = store
    os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = artifacts
    os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    os.environ["_MLFLOW_SERVER_BOOT_ID"] = uuid.uuid4().hex
    os.environ["_MLFLOW_IN_JOB_EXECUTOR"] = "false"


def server_app() -> Any:
    """Create or migrate the database that the environment names; return the ASGI app over it."""
    from mlflow import server
    from mlflow.server.handlers import initialize_backend_stores

    store = os.environ[server.BACKEND_STORE_URI_ENV_VAR]
    initialize_backend_stores(store, store, os.environ[server.ARTIFACT_ROOT_ENV_VAR])

    from mlflow.server.fastapi_app import app

    return app
