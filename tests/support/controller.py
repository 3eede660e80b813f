"""Ray Serve's controller, as a process."""

from __future__ import annotations

from collections.abc import Mapping

import psutil


def controller_pid(replicas: Mapping[str, int]) -> int:
    """Return the pid of the controller of the cluster that these replicas (pids by id) belong to."""
    home = psutil.Process(next(iter(replicas.values()))).environ()["TANDEM_HOME"]
    found = [process for process in psutil.process_iter() if process.name().startswith("ray::ServeCont")]
    return next(process.pid for process in found if process.environ().get("TANDEM_HOME") == home)
