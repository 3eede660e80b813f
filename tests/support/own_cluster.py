"""A cluster that a test may break: in a home of its own, gone afterwards, its token forgotten."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import local, ray_internals
from tests.conftest import free_port


@contextmanager
def own_cluster(job_grace_s: float = 5, **options: Any) -> Iterator[local.LocalCluster]:
    """Start a cluster on free ports; `options` are those of `local.up`."""
    folder = Path(tempfile.mkdtemp(prefix="to-", dir="/tmp"))  # short: Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(folder))
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        ports = {"ray_port": free_port(), "dashboard_port": free_port(), "mlflow_port": free_port()}
        try:
            yield local.up(**ports, **options)
        finally:
            import ray

            ray.shutdown()
            local.down(job_grace_s=job_grace_s)
            shutil.rmtree(folder, ignore_errors=True)
    ray_internals.read_token_again()  # the session's cluster, if it runs, has another one
