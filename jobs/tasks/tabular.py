"""Task `tabular`: a label or a number for each row of a table of numbers, dates and categories, any of them missing.

Rows: numbers (N, C) float32, scaled, and missing (N, C) uint8, categories (N, K) int32; label (N,) int32, or target
(N,) float32, standardised; targets (N,) int32, all ones. C or K may be none: their columns are not there then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions, regression, roc, scores, table_rows
from jobs.tasks.cells import read, spelling
from jobs.tasks.classification import Classifier
from jobs.tasks.finite import finite
from jobs.tasks.labels import classified, column_of
from jobs.tasks.own_networks import OwnNetworks
from jobs.tasks.regression import Standard
from jobs.tasks.table_columns import FIRST, Column, OtherKind, check_kept, chosen, target_column
from jobs.tasks.table_findings import TableFindings, observed
from jobs.tasks.table_options import TabularOptions
from jobs.tasks.table_target import Kind, kind_of_target, labels_of, telling

if TYPE_CHECKING:
    import torch

COLUMNS_FILE = "columns.json"


class Tabular(Classifier, OwnNetworks):
    """Predict one column of a table from the others: a label with its probability, or a number.

    It knows rows like those that it was trained on: numbers far outside of what it has seen are held near its edge, and
    categories that it has not seen are one, "unknown". What it says is what was usual in the data, not why.
    """

    name: ClassVar[str] = "tabular"
    Options: ClassVar[type[TaskOptions]] = TabularOptions
    unit: ClassVar[str] = "rows"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "accuracy": "max",
        "auc": "max",
        "calibration_error": "min",
        "rmse": "min",
        "r2": "max",
    }
    learned_files: ClassVar[tuple[str, ...]] = (COLUMNS_FILE,)
    gathered: ClassVar[tuple[str, ...]] = ("scores", "truths")
    counted: ClassVar[Mapping[str, str]] = {
        "unknown": "rows hold a category that is not told apart from others unknown",
        "newly_missing": "rows lack a value that no row in training lacked: taken as a middling or unknown one",
        "unread": "rows have columns that were not there, or not read, in training",
    }
    networks: ClassVar[Mapping[str, str]] = {
        "mlp": "jobs.tasks.table_networks:Mlp",
        "ft-transformer": "jobs.tasks.table_networks:FtTransformer",
    }

    options: TabularOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.kind: Kind = "classification"
        self.target = self.options.target_column
        self.columns: list[Column] = []
        self.left_out: list[str] = []
        self.standard = Standard((0.0,), (1.0,))

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for a row without its target, or with what no cell of a table holds."""
        self._label(example)
        for name, value in example.items():
            if name not in self.options.ignore:
                cell = read(value, name)
                if cell.form == "number" and np.isinf(cell.number) and not isinstance(value, str):
                    raise TaskError(f"column {name!r} holds {value!r}, which is no finite number")

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return all columns that may be read, without the target."""
        out = {self.options.target_column, *self.options.ignore}
        return {name: value for name, value in example.items() if name not in out}

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are left out by choice; those that `fit` leaves out it says itself."""
        return [name for name in self.options.ignore if example.get(name) is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> TableFindings:
        """Count what the columns hold, and keep the numbers of a draw of the rows."""
        return observed(examples, frozenset(self.options.ignore), frozenset(self.options.categorical))

    def fit(self, findings: TableFindings) -> list[str]:
        """Learn what each column is, and what the target."""
        found = target_column(findings, self.target)
        self.kind, said = kind_of_target(self.target, found, self.options.kind)
        if self.kind == "classification":
            said = [*said, *self._learn_labels(labels_of(self.target, found), frozenset())]
        else:
            values = findings.sample[self.target]
            self.standard = Standard.of(values[:, None], [self.target])
            said = [*said, f"{self.target}: {values.mean():.4g} on average, deviation {values.std():.4g}"]
        self.columns, notes = chosen(findings, self.options.wishes())
        read_ = {column.name for column in self.columns}
        self.left_out = [name for name in findings.columns if name not in read_ and name != self.target]
        numbers = [column.name for column in self.columns if column.kind != "category"]
        return [*said, *notes, *telling(findings.sample, self.target, numbers)]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's columns, categories, scales and labels; another kind of target is refused, and what else
        is asked of columns that the parent reads otherwise."""
        wished = self.options.kind
        super().inherit(parent)
        check_kept(self.columns, self.options.wishes())
        if wished not in ("auto", self.kind):
            raise TaskError(f"task.kind is {wished}, but the model it starts from was trained for {self.kind}")
        return True

    def inherited(self) -> list[str]:
        """Say what is kept."""
        return [f"{self.kind} by the {len(self.columns)} columns of the model it starts from, scaled as there"]

    def save(self, directory: Path) -> None:
        """Write columns.json: the columns with their scales and categories, the target, the labels."""
        settings = {
            "kind": self.kind,
            "target": self.target,
            "labels": self.labels,
            "mean": list(self.standard.mean),
            "deviation": list(self.standard.deviation),
            "columns": [column.as_json() for column in self.columns],
            "left_out": self.left_out,
        }
        text = json.dumps(settings, indent=1, ensure_ascii=False, allow_nan=False)
        (directory / COLUMNS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Tabular:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            settings = json.loads((Path(directory) / COLUMNS_FILE).read_text(encoding="utf-8"))
            task.kind, task.labels, task.left_out = settings["kind"], settings["labels"], settings["left_out"]
            task.standard = Standard(tuple(settings["mean"]), tuple(settings["deviation"]))
            task.columns = [Column.of(column) for column in settings["columns"]]
            if options is None:
                task.target = settings["target"]
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TaskError(f"{directory} holds no table model of Tandem: {COLUMNS_FILE}: {error}") from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Scale numbers (N, C), number categories (N, K) and labels (N,); count what training has not seen."""
        known = {column.name for column in self.columns} | {self.target, *self.left_out, *self.options.ignore}
        try:
            encoded = table_rows.encoded(examples, self.columns)
        except OtherKind as error:
            raise TaskError(f"{error}; task.categorical takes a column's values as names, whatever they are") from None
        rows = {
            **encoded,
            **self._targets(examples),
            "targets": np.ones(len(examples), dtype=np.int32),
            "unread": np.array([not known.issuperset(row) for row in examples], dtype=np.int32),
        }
        return rows | table_rows.newly(rows, self.columns)

    def collate(self, rows: Columns) -> Batch:
        """Return numbers and missing (B, C) fp32, categories (B, K) int64, and labels (B,) int64 or fp32 (B, 1).

        Args:
            rows: as `encode` makes them, perhaps without label and target.
        """
        import torch

        batch = {
            name: torch.from_numpy(rows[name].astype(dtype))
            for name, dtype in (("numbers", np.float32), ("missing", np.float32), ("categories", np.int64))
            if name in rows
        }
        if "label" in rows:
            batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
        if "target" in rows:
            batch["labels"] = torch.from_numpy(rows["target"].astype(np.float32)[:, None])
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return how many numbers and outputs there are, and how many categories each other column has."""
        named = [column for column in self.columns if column.kind == "category"]
        return {
            "numbers": len(self.columns) - len(named),
            "categories": [column.cardinality for column in named],
            "outputs": len(self.labels) if self.kind == "classification" else 1,
        }

    def placeholders(self) -> dict[str, Any]:
        """Return a table of two numbers and a category."""
        return {"numbers": 2, "categories": [FIRST + 1], "outputs": 2}

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the rows the cross-entropy in nats, or the squared error of the standardised target, a scalar ()
        fp32, and their number, a scalar () int64."""
        import torch

        if self.kind == "classification":
            return super().loss(model, batch)
        labels = batch["labels"]
        total = torch.nn.functional.mse_loss(self._logits(model, batch), labels, reduction="sum")
        return total, torch.full((), len(labels), device=labels.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets and what metrics are made of; keep the scores (B, C) or guesses (B, 1), and the truths."""
        import torch

        logits, labels = self._logits(model, batch), batch["labels"]
        targets = torch.full((), len(labels), device=labels.device)
        if self.kind == "classification":
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            kept = {"scores": logits.softmax(-1), "truths": labels}
            return {"loss": loss, "targets": targets, **kept, **scores.sums(logits, labels)}
        loss = torch.nn.functional.mse_loss(logits, labels, reduction="sum")
        kept = {"scores": logits, "truths": labels}
        return {"loss": loss, "targets": targets, **kept, **regression.sums(logits, labels, self.standard)}

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the loss with accuracy, AUC and calibration error, or with RMSE and R2.

        AUC is left out where the rows are all of one class, R2 where all targets are the same: there is none then.
        """
        count = max(sums["targets"], 1)
        found = {"loss": sums["loss"] / count}
        if "confusion.0" not in sums:
            return found | regression.metrics(sums)
        found["accuracy"] = float(scores.confusion(sums).trace()) / count
        area = roc.auc(sums["scores"], sums["truths"])
        found |= {} if area is None else {"auc": area}
        return found | {"calibration_error": scores.calibration_error(scores.array(sums, "bins").reshape(3, -1))}

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw confusion, ROC and reliability, or predicted against true values with what is left between them."""
        if self.kind == "regression":
            guesses, truths = (self.standard.undone(sums[name]) for name in ("scores", "truths"))
            return {"predicted.png": regression.picture(guesses, truths, [self.target])}
        drawn = {"reliability.png": roc.reliability_picture(scores.array(sums, "bins").reshape(3, -1))}
        if len(self.labels) <= scores.DRAWN:
            drawn["confusion.png"] = scores.picture(scores.confusion(sums), self.labels)
        if roc.auc(sums["scores"], sums["truths"]) is not None:
            drawn["roc.png"] = roc.roc_picture(sums["scores"], sums["truths"], self.labels)
        return drawn

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that are read.

        Raises:
            TaskError: one is not there that all rows in training had; a column of another name may be meant.
        """
        for column in self.columns:
            column.cell(example)
        return {column.name: example[column.name] for column in self.columns if column.name in example}

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer rows, each a mapping of column to value; of a single column the value itself will do.

        None, NaN and empty texts are missing, and so is a column that is not there. Where columns hold categories, an
        answer says with `unknown_category` whether the row has one that training did not see, or did not tell apart.

        Raises:
            TaskError: a value is none of its column, or is missing where none was in training.
        """
        import torch

        columns = table_rows.asked([table_rows.given(instance, self.columns) for instance in instances], self.columns)
        with torch.inference_mode():
            logits = self._logits(model, self.collate(columns))
        if self.kind == "classification":
            answers = self._answers(logits)
        else:
            answers = [{"value": value} for value in self.standard.undone(finite(logits).cpu().numpy())[:, 0].tolist()]
        if "categories" not in columns:
            return answers
        strange = table_rows.unknown(columns).tolist()
        return [{**answer, "unknown_category": each} for answer, each in zip(answers, strange, strict=True)]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe a tensor for each column: FP64 for numbers, BYTES for dates and names."""
        return [table_rows.tensor(column) for column in self.columns]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe label, score and scores, or the value; and whether a category is unknown, where there are any."""
        if self.answers_otherwise(Tabular):
            return []
        named = any(column.kind == "category" for column in self.columns)
        strange = [{"name": "unknown_category", "datatype": "BOOL", "shape": [-1]}] * named
        if self.kind == "classification":
            return [*classified(self.labels), *strange]
        return [{"name": "value", "datatype": "FP32", "shape": [-1]}, *strange]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _label(self, example: Mapping[str, Any]) -> str:
        """Return the target by its spelling, also where it is a number."""
        value = column_of(example, self.target, "target_column")
        if read(value, self.target).form == "missing":
            raise TaskError(f"column {self.target!r}, the target, is empty; such rows are for predictions")
        return spelling(value)

    def _targets(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        if self.kind == "classification":
            return {"label": self._numbers(examples)}
        column = Column(self.target, "number")
        cells = [column.cell(row) for row in examples]
        for row, cell in zip(examples, cells, strict=True):
            if np.isnan(cell.number):
                raise TaskError(f"column {self.target!r}, the target, holds {row[self.target]!r:.60}: it is no number")
        return {"target": self.standard(np.array([[cell.number] for cell in cells]))[:, 0]}

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) or standardised guesses (B, 1) in fp32."""
        import torch

        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        given = {
            name: batch[name].to(parameter.device) for name in ("numbers", "missing", "categories") if name in batch
        }
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
        return model(**given).logits.float()
