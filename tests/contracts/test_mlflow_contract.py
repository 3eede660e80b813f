"""MLflow still has what tracking/mlflow_internals.py relies on. Its server is read, not imported, to be quick."""

import importlib
import tokenize

import pytest

from tests.support.contracts import Contract, defines, file_of, source_mentions
from tracking import mlflow_internals

MLFLOW = Contract("tracking/mlflow_internals.py", mlflow_internals.ENTRIES)


def assigned(module: str, name: str) -> str:
    """Return the source of what a module assigns to a name, without importing it."""
    package, _, last = module.rpartition(".")
    with tokenize.open(file_of(package, f"{last}.py")) as file:
        lines = [line.partition("=")[2].strip() for line in file if line.startswith(f"{name} =")]
    assert len(lines) == 1, f"{module} does not assign {name} once"
    return lines[0]


@MLFLOW.check("mlflow.server.fastapi_app.app, mlflow.server.handlers.initialize_backend_stores")
def _app() -> None:
    defines(file_of("mlflow", "server/fastapi_app.py"), "app")
    defines(file_of("mlflow", "server/handlers.py"), "initialize_backend_stores")


@MLFLOW.check("mlflow.server.BACKEND_STORE_URI_ENV_VAR and its four sisters")
def _names() -> None:
    names = ("BACKEND_STORE_URI", "REGISTRY_STORE_URI", "ARTIFACT_ROOT", "ARTIFACTS_DESTINATION", "SERVE_ARTIFACTS")
    text = file_of("mlflow", "server/__init__.py").read_text()
    missing = [name for name in names if f"{name}_ENV_VAR" not in text]
    assert not missing, missing


@MLFLOW.check("mlflow.server.security_utils (get_default_allowed_hosts, INVALID_HOST_MSG)")
def _hosts() -> None:
    path = file_of("mlflow", "server/security_utils.py")
    defines(path, "get_default_allowed_hosts", "INVALID_HOST_MSG")
    assert f'INVALID_HOST_MSG = "{mlflow_internals.UNKNOWN_HOST}' in path.read_text()


@MLFLOW.check("_MLFLOW_SGI_NAME, _MLFLOW_SERVER_BOOT_ID, _MLFLOW_IN_JOB_EXECUTOR")
def _server() -> None:
    variables = importlib.import_module("mlflow.environment_variables")
    for name in ("_MLFLOW_SGI_NAME", "_MLFLOW_SERVER_BOOT_ID", "_MLFLOW_IN_JOB_EXECUTOR"):
        assert getattr(variables, name).name == name
    text = file_of("mlflow", "server/__init__.py").read_text()
    for line in ("env_map[_MLFLOW_SERVER_BOOT_ID.name] = uuid", 'env_map[_MLFLOW_IN_JOB_EXECUTOR.name] = "false"'):
        assert line in text, f"`mlflow server` does not set it as we do: {line}"


@MLFLOW.check("mlflow.utils.mlflow_tags.MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_DATASET_CONTEXT")
def _tags() -> None:
    assert assigned("mlflow.utils.mlflow_tags", "MLFLOW_MODEL_IS_EXTERNAL") == f'"{mlflow_internals.EXTERNAL_TAG}"'
    assert assigned("mlflow.utils.mlflow_tags", "MLFLOW_DATASET_CONTEXT") == f'"{mlflow_internals.SPLIT_TAG}"'


@MLFLOW.check("mlflow.utils.validation (MAX_PARAMS_TAGS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH, …)")
def _limits() -> None:
    ours = {
        "MAX_PARAMS_TAGS_PER_BATCH": max(mlflow_internals.MAX_PARAMS_PER_BATCH, mlflow_internals.MAX_TAGS_PER_BATCH),
        "MAX_PARAM_VAL_LENGTH": mlflow_internals.MAX_PARAM_CHARS,
        "MAX_TAG_VAL_LENGTH": mlflow_internals.MAX_TAG_CHARS,
        "MAX_DATASET_DIGEST_SIZE": mlflow_internals.MAX_DIGEST_CHARS,
    }
    for name, limit in ours.items():
        assert int(assigned("mlflow.utils.validation", name)) >= limit, name
    source_mentions("mlflow.utils.validation", "MAX_METRICS_PER_BATCH")


@pytest.mark.parametrize("name", MLFLOW.entries)
def test_mlflow(name: str) -> None:
    MLFLOW.verify(name)
