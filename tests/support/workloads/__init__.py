"""What tests/e2e/test_e2e_workloads.py takes through every phase: a file here for each task, with its `WORKLOAD`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Endpoint:
    """The model behind HTTP."""

    client: httpx.Client
    """Its base URL is the endpoint's."""
    model: str

    def infer(self, **inputs: tuple[str, list[int], list[Any]]) -> dict[str, list[Any]]:
        """Ask for predictions of tensors, each (datatype, shape, flat data); return the outputs' data by name."""
        tensors = [
            {"name": name, "datatype": datatype, "shape": shape, "data": data}
            for name, (datatype, shape, data) in inputs.items()
        ]
        reply = self.client.post(f"/v2/models/{self.model}/infer", json={"inputs": tensors})
        assert reply.status_code == 200, reply.text
        return {part["name"]: part["data"] for part in reply.json()["outputs"]}


@dataclass(frozen=True)
class Workload:
    """One task on data made here, so small that each phase takes seconds on one core."""

    name: str
    task: str | Mapping[str, Any]
    """The spec's section `task`."""
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    """The spec's section `data`; relative paths lie in the folder that `write` filled."""
    write: Callable[[Path], None]
    """Writes the data into a folder."""
    learned: Callable[[dict[str, float]], None]
    """Asserts that training has taught something: the last metrics on held-out rows."""
    asked: Callable[[Endpoint], None]
    """Asks over HTTP, and asserts that the answer is right."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """What the spec's section `training` has beside the test's own."""
    pictures: tuple[str, ...] = ()
    """Files that the run in MLflow has."""
    falls: bool = True
    """Whether the loss on held-out rows must have fallen: not where two sides of it are at odds."""
    unquantised: str = ""
    """Part of the reason for which int8 is refused; "" where it is made."""


def workloads() -> list[Workload]:
    """Return those of all files here."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}").WORKLOAD for name in names]
