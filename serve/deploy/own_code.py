"""Code of the user's own that a model needs, a task or an engine: from the folder of the spec into its replicas.

A model directory is data: its manifest names a task, and code that lies in it is never imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster import shipping
from cluster.connect import PACKAGES
from cluster.errors import UserError

Found = TypeVar("Found")


class CodeWanted(Exception):
    """A model needs code of the user's own, and none was sent along; nothing was deployed."""


@dataclass(frozen=True)
class OwnCode:
    """The files beside the user's spec."""

    origin: str
    """The folder on the user's machine, for messages."""
    folder: Path
    """Where the files lie here. It is on the import path."""
    packed: bytes

    @classmethod
    def here(cls, origin: str) -> OwnCode:
        """Describe what came with this Ray job: its working directory."""
        return cls(origin, Path.cwd(), shipping.pack(Path.cwd()))

    def holds(self, name: str) -> bool:
        """Say whether the module of `package.module:NAME` is among the files, and not installed on the cluster."""
        return shipping.holds(self.folder, name.partition(":")[0])


def load(what: str, name: str, get: Callable[[str], Found], code: OwnCode | None) -> Found:
    """Return `get(name)`, the class or entry that `package.module:NAME` stands for.

    Args:
        what: the model and the part of it, for messages: "models.m: its task".

    Raises:
        CodeWanted: the user's files are needed for it, and have not been sent.
        UserError: they have been sent, and it is not among them, nor installed on the cluster.
    """
    if code is None:
        raise CodeWanted(f"{what} {name!r}")
    try:
        return get(name)
    except (UserError, ModuleNotFoundError) as error:
        raise UserError(f"{what} {name!r} {_why(name, error, code)}") from error


def _why(name: str, error: Exception, code: OwnCode) -> str:
    module = name.partition(":")[0].partition(".")[0]
    if not code.holds(name):
        return (
            f"is code of your own, and {code.origin} has no {module}.py or {module}/: put it beside the spec that you "
            "deploy"
        )
    if module in PACKAGES:
        return f"cannot lie in {module}, the name of one of Tandem's own packages: rename it in {code.origin}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"cannot be imported: {error}; install it on the cluster's nodes, or, where only the replica's "
            "`runtime_env` has it, import it inside functions"
        )
    return f"cannot be used: {error}"


class Unpacked:
    """A model's own code inside its replica: in a folder of the process's own, first on the import path."""

    def __init__(self, packed: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-code-", ignore_cleanup_errors=True)
        shipping.unpack(packed, Path(self._folder.name))
        sys.path.insert(0, self._folder.name)
        os.chdir(self._folder.name)  # as in a training job: files are found beside the code

    def remove(self) -> None:
        """Remove the folder; what has been imported stays."""
        os.chdir(tempfile.gettempdir())
        self._folder.cleanup()
