"""What a task is: the base class, its options, its errors, and the types that cross between it and who calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError

from cluster.errors import UserError
from cluster.strict import Strict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from jobs.tasks.grouping import Grouping

Columns = dict[str, "np.ndarray"]
"""Encoded rows: arrays that share their first axis, one entry of it per row."""

Batch = dict[str, "torch.Tensor"]
"""What `collate` makes of rows and `loss` reads; tensors share their first axis B, one entry per row."""

Better = Literal["max", "min"]

IGNORED = -100
"""The label of what is no target (PyTorch's `ignore_index`)."""


class TaskError(UserError, ValueError):
    """Data or a setting that the task cannot work with: what was wrong, the value, what to do."""


class TaskSetupError(TaskError):
    """The task as a whole cannot work, whatever the example: no chat template, no end token. Not one row's fault."""


class TaskOptions(Strict):
    """A task's options: derive from it, with a default and a docstring for each. This one has none."""

    later: ClassVar[frozenset[str]] = frozenset()
    """Options that the task has got since jobs with it were run: at their defaults they change no digest of these."""


class Task:
    """One kind of model, from raw examples to answers. A task of one's own derives from this class.

    The order of events: `check` and `cut` the examples (having begun to `follow` the model that the job starts from);
    `observe` chunks of the training examples, add the findings up, `fit` and `save` once (or `inherit` from that
    model); `encode` chunks into rows; `collate`, `loss` and `measure` in the workers; `load` and `predict` where the
    model is served.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when `observe`, `fit` or `encode` change what they make: data that was prepared before is not used."""

    Options: ClassVar[type[TaskOptions]] = TaskOptions
    """What the spec may say in the mapping `task`."""

    generates: ClassVar[bool] = False
    """True when it answers by generating tokens, False when `predict` answers at once."""

    unit: ClassVar[str] = "examples"
    """What the loss counts, in the plural: tokens, images."""

    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min"}
    """What `summarise` returns, and which way is better."""

    loss_terms: ClassVar[str] = "targets"
    """Which sum of `measure` the sum `loss` is divided by for the mean: so that of a part of the rows is known, too."""

    learned_files: ClassVar[tuple[str, ...]] = ()
    """The files `save` writes: what a model directory holds besides weights that decides how data is encoded."""

    counted: ClassVar[Mapping[str, str]] = {}
    """Arrays that `encode` returns only to be added up and said in the log: name → what it counts ("texts cut")."""

    gathered: ClassVar[tuple[str, ...]] = ()
    """What `measure` returns of each row instead of a sum: (B, …), gathered over batches and ranks to (N, …)."""

    cuts_each: ClassVar[str] = ""
    """What `cut` holds out of every example, in words, where the end of each is held out and no whole ones:
    "the last interaction of each user"."""

    options: Any
    """The task's own `Options`."""

    expected_bytes: int = 0
    """About how many bytes of examples are to be observed in all: `observe` may leave out what `fit` will hardly need.
    Findings then say by `suffices` whether they hold all that is needed; if not, all is observed again with 0."""

    said: Sequence[str] = ()
    """Sentences about the weights that `load_model` read last: what was left out, or is random until trained."""

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        """Take the options, checked; None: the defaults.

        Raises:
            TaskError: an option is unknown or out of range.
        """
        try:
            self.options = self.Options.model_validate({} if options is None else options)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            raise TaskError(f"task {self.name}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from error

    @classmethod
    def check_options(cls, options: TaskOptions, starts_from: str | None) -> None:
        """Refuse options that do not go with the model that the job starts from, while the spec is checked.

        Args:
            options: the task's own.
            starts_from: `model.from`; None where the weights are fresh.

        Raises:
            TaskError: they do not.
        """

    @classmethod
    def check_shared_rows(cls, options: TaskOptions) -> None:
        """Raise TaskError where ranks cannot share a row, a part of it each, while the spec is checked.

        Where they can, the task is one that SharesRows (jobs/tasks/shared_rows.py).
        """
        raise TaskError(f"rows of task {cls.name!r} cannot be shared by several workers: leave it out, or set it to 1")

    @classmethod
    def metrics_of(cls, options: TaskOptions) -> Mapping[str, Better]:
        """Return those of `metrics` that a task with these options has."""
        return cls.metrics

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError if a raw example lacks what `encode` needs; quick, and possible before `fit`."""

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Cut an example in two, the first with the share `at` of it, to hold the end out; None where it is a whole.

        A task that `cuts_each` decides itself where; None means that an example is too short for it then.
        """
        return None

    def grouping(self) -> Grouping | None:
        """Say which rows of the data together are one example; None where each is one.

        `check` is given each row then, and everything else the example that they make.
        """
        return None

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return what of an example is learned from: examples that agree in it are copies, kept on one side of a split.

        Text, bytes, numbers, arrays, and lists and mappings of them. The whole example unless a task narrows it down.
        """
        return example

    def together(self, example: Mapping[str, Any]) -> Any:
        """Return what else keeps examples that agree in it on one side of a split, as copies are kept: a prompt.

        None where only copies belong together. Examples that agree in their `content` must agree in it, too.
        """
        return None

    def answer(self, example: Mapping[str, Any]) -> str | None:
        """Return what is to be learned for an example's `content`; None where the content holds it.

        Asked of Tandem's own tasks only.
        """
        return None

    def unused(self, example: Mapping[str, Any]) -> Iterable[str]:
        """Return the columns of an example that hold something and have no effect: they are counted in the log.

        Asked of Tandem's own tasks only: one that derives from them may read other columns.
        """
        return ()

    def files(self, example: Mapping[str, Any]) -> Sequence[Path]:
        """Return the files that an example names and `encode` opens: their bytes are part of what the data is."""
        return ()

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return what a chunk of the training examples says: small, picklable, with a method `merged(later)`.

        Chunks are observed one by one, on any node. What their merged findings are must not depend on where the
        chunks were cut; they are merged in the order of the data. None where there is nothing to learn.
        """
        return None

    def learns(self) -> bool:
        """Return whether `fit` needs findings; False spares a reading of all examples."""
        return True

    def fit(self, findings: Any) -> list[str]:
        """Learn from the merged findings what encoding needs: labels, statistics, a tokenizer.

        Returns:
            Sentences for the job's log: what was chosen that the user may want to know.
        """
        return []

    def inherit(self, parent: Path | str) -> bool:
        """Take over what the model in `parent` (a directory or a hub id) learned; False if `fit` is still needed."""
        vars(self).update(vars(type(self).load(Path(parent), self.options)))
        return True

    def follow(self, parent: Path | str) -> None:
        """Take over from the model in `parent` what decides how examples are checked and cut, before `inherit`.

        Of most tasks that is nothing. Asked of the task that reads the examples of a job that starts from a model.

        Raises:
            TaskError: the options ask for what `inherit` refuses.
        """

    def inherited(self) -> list[str]:
        """Return sentences for the job's log on what `inherit` has taken over."""
        return []

    def save(self, directory: Path) -> None:
        """Write what `fit` learned, and the options that serving needs, beside the model's weights."""

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Task:
        """Read back what `save` wrote; without options, as a server does."""
        return cls(options)

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Encode (and pack) raw examples into rows. The number N of rows may differ from that of the examples.

        The column `targets` (N,) int32 says how many terms of the loss each row contributes.
        """
        raise NotImplementedError

    def collate(self, rows: Columns) -> Batch:
        """Turn B rows into the tensors of one micro-batch, each (B, …), on the CPU."""
        raise NotImplementedError

    # -- model ------------------------------------------------------------------------------------------------------

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an architecture or an entry of its config that `build` would refuse; before `fit`."""

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model directory that its own config says `load_model` would refuse; before `fit`."""

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make a model with fresh weights in fp32, from torch's global random state."""
        raise NotImplementedError

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load weights, in evaluation mode; `config` overrides entries of the model's own."""
        raise NotImplementedError

    def served_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a loaded model as a replica is to call it; its weights change no more."""
        return model

    def prepare_model(self, model: torch.nn.Module, columns: Set[str]) -> list[str]:
        """Look at the whole model once, on each rank, before it is trained, divided or measured.

        Args:
            columns: the names of the columns of the rows that it will see.

        Returns:
            Sentences for the job's log: what follows for how it is trained.
        """
        return []

    def refers(self) -> bool:
        """Return whether the loss compares with a reference: then `reference` is asked for, before anything learns."""
        return False

    def reference(self, model: torch.nn.Module, rows: Columns) -> Columns:
        """Return columns that the model makes of B rows, each (B, …), which are kept with them for `collate`.

        The model is the one that the job starts from; where a model is only measured, the one that it was made from.
        """
        raise NotImplementedError

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, a scalar () fp32 in nats, and the number of its terms, a scalar () int64."""
        raise NotImplementedError

    def rows_meet(self) -> str:
        """Return what of the loss depends on which rows share a micro-batch, in words; "": each row stands alone.

        Where it does, the size of a micro-batch is part of what is learned, and nobody else may choose it.
        """
        return ""

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sums over the batch, to be added over batches and ranks; `loss` and `targets` are among them.

        Scalars (), or arrays of any fixed shape, which reach `summarise` and `figures` flattened: `confusion.0`, ….
        What `gathered` names is not added but kept row by row, and reaches them as an array (N, …) of numpy.
        """
        raise NotImplementedError

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Turn added-up sums into the task's `metrics`; `loss` is always one. Needs no `fit` and no `load`."""
        raise NotImplementedError

    def verdict(self, metrics: Mapping[str, float]) -> list[str]:
        """Return sentences for the job's log and the model on what its last evaluation says."""
        return []

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw what the sums say: name of a file → PNG. Logged with the run's last evaluation."""
        return {}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return what `predict` takes of a raw example, whose answer need not be there.

        Raises:
            TaskError: it lacks something, or the task makes no predictions of examples.
        """
        raise TaskError(f"task {self.name!r} does not say what of an example it predicts from")

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer a list of inputs, one dictionary each. Generating tasks raise TaskError: an engine serves them."""
        raise NotImplementedError

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the input tensors of `predict`, as in the Open Inference Protocol.

        What a client sends is checked against it: datatype and shape, whose first dimension, -1, is the batch. Where
        files may come in place of numbers, `"parameters": {"content_types": ["np", "base64"]}` says so, and where it
        may be left out, `"parameters": {"optional": True}`: an instance is a mapping then, without it.
        """
        raise NotImplementedError

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the output tensors; where this is empty, a replica looks at what `predict` makes of a blank one."""
        return []

    @classmethod
    def embeds(cls, config: Mapping[str, Any]) -> bool:
        """Return whether `embed` makes vectors with a model whose config.json says `config`."""
        return False

    def embed(self, model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return a vector for each of N texts, as token ids of `tokenizer`: (N, H) float32, of Euclidean length 1.

        A task that does has `tokenizer` and `max_length`, the most tokens of a text.
        """
        raise NotImplementedError

    def answers_otherwise(self, base: type[Task]) -> bool:
        """Return whether a class derived from `base` has a `predict` of its own, which may have other outputs."""
        return type(self).predict is not base.predict
