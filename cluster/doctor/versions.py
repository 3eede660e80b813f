"""What is installed on a node, read from what its packages say of themselves: nothing is imported for it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from cluster.doctor import gpus

PACKAGES = ("ray", "torch", "deepspeed", "mlflow", "pyarrow", "transformers")
MUST_MATCH = ("python", "ray", "torch", "deepspeed", "transformers")
"""Where these differ, a job fails or computes something else on some of its nodes."""
CODE, DRIVER = "tandem's code", "NVIDIA driver"


def installed(folders: Iterable[Path]) -> dict[str, str]:
    """Return versions by name: Python, packages, the NVIDIA driver, and a digest of Tandem's code in `folders`."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {**found, DRIVER: gpus.driver_version(), CODE: digest(folders)}


def of(name: str, version: str) -> str:
    """Return the part of a version that has to be the same on all nodes: of Python two numbers; no builds. Pure."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def digest(folders: Iterable[Path]) -> str:
    """Return what tells one state of the code from another, wherever it lies."""
    state = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            state.update(str(path.relative_to(folder.parent)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
