"""WHAT is learned: the Task protocol and the table of tasks.

Training, evaluation, quantisation and serving all call a task, so encoding and post-processing exist once. A task is
one file here plus one line in `TASKS`, or a class of the user's own, named in the spec as `my_pkg.my_task:MyTask`.
This package imports nothing of Tandem's but the base class of errors, and neither ray, deepspeed nor mlflow: a server
can load it alone.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cluster.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

Columns = dict[str, "np.ndarray"]
"""Encoded rows: arrays that share their first axis, one entry of it per row."""

Batch = dict[str, "torch.Tensor"]
"""What `collate` makes of rows and `loss` reads."""

TASKS = {
    "causal-lm": "jobs.tasks.causal_lm:CausalLM",
    "image-classification": "jobs.tasks.image_classification:ImageClassification",
}


class TaskError(UserError, ValueError):
    """Data or a setting that the task cannot work with: what was wrong, the value, what to do."""


class Task(Protocol):
    """One kind of model, from raw examples to answers. Options come from the spec (`data` and `model`)."""

    name: ClassVar[str]
    generates: ClassVar[bool]
    """True when it answers by generating tokens, False when `predict` answers at once."""

    unit: ClassVar[str]
    """What the loss counts, in the plural: tokens, images."""

    options: dict[str, Any]

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raise TaskError for an option that is unknown or out of range."""

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError if a raw example lacks what `encode` needs; quick, and possible before `fit`."""

    def fit(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Learn from the raw training examples what encoding needs: a tokenizer, the labels, a normaliser."""

    def save(self, directory: Path) -> None:
        """Write what `fit` learned into an existing directory, beside the model's weights."""

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Task:
        """Read back what `save` wrote."""

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Encode (and pack) raw examples into rows. The number of rows may differ from that of the examples.

        The column `targets` (int32) says how many terms of the loss each row contributes.
        """

    def collate(self, rows: Columns) -> Batch:
        """Turn rows into the tensors of one micro-batch."""

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make a model with fresh weights in fp32, from torch's global random state."""

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load weights, in evaluation mode; `config` overrides entries of the model's own."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss (fp32, nats) and the number of its terms (int64)."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sums over the batch, to be added over batches and ranks; `loss` and `targets` are among them."""

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn added-up sums into the task's metrics; `loss` is always one."""

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer a list of inputs, one dictionary each. Generating tasks raise TaskError: an engine serves them."""

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the input tensors of `predict`, as in the Open Inference Protocol."""


def get(name: str) -> type[Task]:
    """Import the class of the task `name`: a key of `TASKS`, or `package.module:Class`.

    Raises:
        TaskError: no such task, or its module or class cannot be imported.
    """
    target = TASKS.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known tasks: {', '.join(TASKS)}, or my_pkg.my_task:MyTask"
        raise TaskError(f"unknown task {name!r}; {hint}")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith((error.name or "") + ".") and error.name != module_name:
            raise
        raise TaskError(f"task {name!r}: there is no module {error.name!r} on the path") from error
    except AttributeError as error:
        raise TaskError(f"task {name!r}: module {module_name!r} has no {class_name!r}") from error
