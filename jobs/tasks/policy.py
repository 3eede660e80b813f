"""Task `policy`: do in each state what was done in a log, learned by behaviour cloning.

Rows: observation (N, D) float32, scaled, or uint8 where it is an image of pixels; label (N,) int32, or action (N, A)
float32, standardised; targets (N,) int32, all ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions, regression, scores
from jobs.tasks.classification import Classifier
from jobs.tasks.grouping import Grouping
from jobs.tasks.labels import classified
from jobs.tasks.observations import Observations
from jobs.tasks.own_networks import OwnNetworks
from jobs.tasks.policy_log import (
    Kind,
    LogFindings,
    Names,
    action_of,
    as_numbers,
    kind_of_actions,
    numbers,
    observation_of,
    observed,
)
from jobs.tasks.policy_options import PolicyOptions
from jobs.tasks.regression import Standard

if TYPE_CHECKING:
    import torch

POLICY_FILE = "policy.json"


class Policy(Classifier, OwnNetworks):
    """Say what to do in a state, as whoever wrote the log would: a chosen action with its probability, or amounts.

    It sees one observation at a time and remembers none. In states that the log does not hold it guesses, and one
    mistake may lead to more of such states: try it where nothing breaks before it controls what can.
    """

    name: ClassVar[str] = "policy"
    version: ClassVar[int] = 2
    Options: ClassVar[type[TaskOptions]] = PolicyOptions
    unit: ClassVar[str] = "steps"
    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min", "accuracy": "max", "rmse": "min", "r2": "max"}
    learned_files: ClassVar[tuple[str, ...]] = (POLICY_FILE,)
    gathered: ClassVar[tuple[str, ...]] = ("guesses", "truths")
    networks: ClassVar[Mapping[str, str]] = {
        "mlp": "jobs.tasks.table_networks:Mlp",
        "policy-cnn": "jobs.tasks.policy_cnn:PolicyCnn",
    }

    options: PolicyOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.names = self.options.names()
        self.learned = self.names
        """The columns that a loaded model has learned from."""
        self.kind: Kind = "discrete"
        self.seen = Observations()
        self.single = True
        """Whether an action is one value, and no list."""
        self.standard = Standard((0.0,), (1.0,))

    # -- data -------------------------------------------------------------------------------------------------------

    def grouping(self) -> Grouping | None:
        """Make one example of each episode, if the log tells them apart."""
        column = self.options.episode_column
        return Grouping((column,), options={column: "episode_column"}) if column else None

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for a step without an observation or an action."""
        observation_of(example, self.names)
        action_of(example, self.names)

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return what was observed."""
        return [example.get(name) for name in self.names.observations or [self.names.observation]]

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return what was done."""
        return repr([example.get(name) for name in self.names.actions or [self.names.action]])

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither observed nor done."""
        read = {*self.names.read, self.options.episode_column}
        return [name for name, value in example.items() if name not in read and value is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> LogFindings:
        """Count the actions, and keep the numbers of a draw of the steps."""
        return observed([step for example in examples for step in self._steps(example)], self.names)

    def fit(self, findings: LogFindings) -> list[str]:
        """Learn the shape and the scale of observations, and what actions there are."""
        self.kind, said = kind_of_actions(findings, self.options.kind)
        self.seen, self.single = Observations.learned(findings), not findings.width
        notes = [said] if said else []
        if self.kind == "discrete":
            if findings.labels.counts is None:
                raise TaskError("there are too many different actions to choose from; see task.kind")
            notes += self._learn_labels(frozenset(findings.labels.counts), frozenset())
        else:
            width = max(findings.width, 1)
            acted = findings.sample[f"action {width}"]
            self.standard = Standard.of(acted, self._action_names(width))
            if width > 1 and (np.sort(acted, 1) == np.eye(width)[-1]).all():
                notes.append("of each action all numbers are 0 but one, which is 1: if it is a choice, give its number")
        name = self.names.observation
        of_vector = self.names.observations or [f"{name}[{at}]" for at in range(self.seen.size)]
        return [*notes, *self.seen.said(of_vector)]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's scales and actions; another kind of actions is refused, and another order of columns."""
        wished = self.options.kind
        super().inherit(parent)
        self._refuse_other_orders()
        if wished not in ("auto", self.kind):
            raise TaskError(f"task.kind is {wished}, but the model it starts from has {self.kind} actions")
        return True

    def inherited(self) -> list[str]:
        """Say what is kept."""
        what = f"the {len(self.labels)} actions" if self.kind == "discrete" else "the scales of actions"
        return [f"{what} and the form of observations are those of the model it starts from"]

    def save(self, directory: Path) -> None:
        """Write policy.json: columns, shape and scale of observations, actions."""
        settings = {
            "observation": self.names.observation,
            "observations": list(self.names.observations),
            "actions": list(self.names.actions),
            "kind": self.kind,
            "seen": self.seen.as_json(),
            "labels": self.labels,
            "single": self.single,
            "mean": list(self.standard.mean),
            "deviation": list(self.standard.deviation),
        }
        (directory / POLICY_FILE).write_text(json.dumps(settings, indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Policy:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            settings = json.loads((Path(directory) / POLICY_FILE).read_text(encoding="utf-8"))
            task.kind, task.labels, task.single = settings["kind"], settings["labels"], settings["single"]
            task.seen = Observations.of(settings["seen"])
            task.standard = Standard(tuple(settings["mean"]), tuple(settings["deviation"]))
            columns = tuple(settings["observations"]), tuple(settings.get("actions", ()))
            task.learned = Names(settings["observation"], columns[0], actions=columns[1])
            task.names = task.learned if options is None else task.names
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TaskError(f"{directory} holds no policy of Tandem: {POLICY_FILE}: {error}") from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Make a row of each step: scaled observations (N, D), numbered (N,) or standardised (N, A) actions."""
        steps = [step for example in examples for step in self._steps(example)]
        states = [self.seen.checked(observation_of(step, self.names)) for step in steps]
        ones = np.ones(len(steps), dtype=np.int32)
        return {"observation": self.seen.rows(np.stack(states)), **self._acted(steps), "targets": ones}

    def collate(self, rows: Columns) -> Batch:
        """Return numbers (B, D) fp32, those of an image row by row, and labels (B,) int64 or (B, A) fp32.

        Args:
            rows: as `encode` makes them, perhaps without label and action.
        """
        import torch

        batch = {"numbers": torch.from_numpy(self.seen.numbers(rows["observation"]))}
        if "label" in rows:
            batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
        if "action" in rows:
            batch["labels"] = torch.from_numpy(rows["action"].astype(np.float32))
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return how many numbers are observed, as an image or not, and how many outputs there are."""
        outputs = len(self.labels) if self.kind == "discrete" else len(self.standard.mean)
        known = {"numbers": self.seen.size, "categories": [], "outputs": outputs}
        return known | ({"image": self.seen.image} if self.seen.is_image else {})

    def placeholders(self) -> dict[str, Any]:
        """Return a small image, which both networks can see."""
        return {"numbers": 64, "categories": [], "outputs": 2, "image": [8, 8, 1]}

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make one of the networks with fresh weights in fp32; `policy-cnn` sees images only."""
        if architecture == "policy-cnn" and not self.seen.is_image:
            raise TaskError(
                f"model.architecture: policy-cnn sees images, and an observation is {self.seen.size} numbers: mlp"
            )
        return super().build(architecture, config)

    def served_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the network as one graph, where that says the same: control waits for each answer."""
        from jobs.tasks import frozen

        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else None
        batch = self.collate({"observation": self.seen.rows(np.zeros((1, *self.seen.shape)))})
        return frozen.frozen(model, {"numbers": batch["numbers"].to(dtype)})

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the steps the cross-entropy in nats, or the squared error of the standardised actions, averaged over
        their numbers, a scalar () fp32, and the number of steps, a scalar () int64."""
        import torch

        if self.kind == "discrete":
            return super().loss(model, batch)
        labels = batch["labels"]
        errors = torch.nn.functional.mse_loss(self._logits(model, batch), labels, reduction="none")
        return errors.mean(1).sum(), torch.full((), len(labels), device=labels.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets, and confusion or errors; of amounts, keep guesses and truths (B, A)."""
        import torch

        logits, labels = self._logits(model, batch), batch["labels"]
        targets = torch.full((), len(labels), device=labels.device)
        if self.kind == "discrete":
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            return {"loss": loss, "targets": targets, **scores.sums(logits, labels)}
        loss = torch.nn.functional.mse_loss(logits, labels, reduction="none").mean(1).sum()
        kept = {"guesses": logits, "truths": labels}
        return {"loss": loss, "targets": targets, **kept, **regression.sums(logits, labels, self.standard)}

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the loss with accuracy, or with RMSE and R2, the mean over the numbers of an action."""
        count = max(sums["targets"], 1)
        found = {"loss": sums["loss"] / count}
        if "confusion.0" in sums:
            return found | {"accuracy": float(scores.confusion(sums).trace()) / count}
        return found | regression.metrics(sums)

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw confusion, or guessed against true actions."""
        if self.kind == "continuous":
            guesses, truths = (self.standard.undone(sums[name]) for name in ("guesses", "truths"))
            return {"actions.png": regression.picture(guesses, truths, self._action_names(guesses.shape[1]))}
        if len(self.labels) > scores.DRAWN:
            return {}
        return {"confusion.png": scores.picture(scores.confusion(sums), self.labels)}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> np.ndarray:
        """Return what was observed: float64 (D,), (H, W) or (H, W, C).

        Raises:
            TaskError: it is missing, or the rows are gathered by episodes, and not one state each.
        """
        if self.options.episode_column is not None:
            raise TaskError("task.episode_column is set, and an answer is to one state: leave it out to predict")
        return observation_of(example, self.names)

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Say what to do in states, each of the shape that was seen in training.

        Raises:
            TaskError: a state has another shape, or holds what is no finite number.
        """
        import torch

        states = np.stack([self.seen.checked(numbers(instance, "observation")) for instance in instances])
        with torch.inference_mode():
            logits = self._logits(model, self.collate({"observation": self.seen.rows(states)}))
        if not np.isfinite(logits.numpy(force=True)).all():
            raise TaskError("an observation so far from those in training that the model has no finite answer to it")
        if self.kind == "discrete":
            return [
                {"action": self._called(each["label"]), "score": each["score"], "scores": each["scores"]}
                for each in self._answers(logits)
            ]
        actions = self.standard.undone(logits.cpu().numpy()).astype(np.float32)
        return [{"action": float(action[0]) if self.single else action} for action in actions]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the observation: UINT8 where it is an image of whole numbers to 255, else FP32."""
        tensor: dict[str, Any] = {"name": "observation", "datatype": "UINT8" if self.seen.pixels else "FP32"}
        tensor |= {"shape": [-1, *self.seen.shape]}
        columns = {"parameters": {"columns": list(self.names.observations)}} if self.names.observations else {}
        return [tensor | columns]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the action: chosen, with score and scores, or its numbers."""
        if self.answers_otherwise(Policy):
            return []
        if self.kind == "continuous":
            shape = [-1] if self.single else [-1, len(self.standard.mean)]
            return [{"name": "action", "datatype": "FP32", "shape": shape}]
        datatype = "INT64" if self._are_numbers else "BYTES"
        return [{"name": "action", "datatype": datatype, "shape": [-1]}, *classified(self.labels)[1:]]

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _are_numbers(self) -> bool:
        """Tell whether all actions to choose from are whole numbers."""
        return all(label.removeprefix("-").isdecimal() for label in self.labels)

    def _called(self, label: str) -> str | int:
        return int(label) if self._are_numbers else label

    def _action_names(self, width: int) -> list[str]:
        name = self.names.action
        return list(self.names.actions) or ([name] if width == 1 else [f"{name}[{at}]" for at in range(width)])

    def _refuse_other_orders(self) -> None:
        """Raise TaskError where columns of a number each stand in another order than where the model learned them."""
        pairs = {
            "observation_columns": (self.names.observations, self.learned.observations),
            "action_columns": (self.names.actions, self.learned.actions),
        }
        for option, (now, before) in pairs.items():
            if now != before and set(now) & set(before):
                raise TaskError(
                    f"task.{option} is {list(now)}, and the model it starts from learned {list(before)}: each column "
                    "has a scale of its own there, so give them in that order"
                )

    def _steps(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the steps of an example: of an episode, one for each entry of its columns."""
        if self.options.episode_column is None:
            return [dict(example)]
        columns = [name for name in example if name in self.names.read]
        return [
            dict(zip(columns, step, strict=True)) for step in zip(*(example[name] for name in columns), strict=True)
        ]

    def _label(self, example: Mapping[str, Any]) -> str:
        action = action_of(example, self.names)
        if not isinstance(action, str):
            raise TaskError(f"column {self.names.action!r} holds a list, and the actions are names")
        return action

    def _acted(self, steps: Sequence[Mapping[str, Any]]) -> Columns:
        """Return label (N,) or action (N, A)."""
        if self.kind == "discrete":
            return {"label": self._numbers(steps)}
        actions = [as_numbers(action_of(step, self.names), self.names.action) for step in steps]
        for action in actions:
            if action.size != len(self.standard.mean):
                raise TaskError(f"an action of {action.size} numbers, and others have {len(self.standard.mean)}")
        return {"action": self.standard(np.stack(actions))}

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) or standardised actions (B, A) in fp32."""
        import torch

        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        return model(numbers=batch["numbers"].to(parameter.device, dtype)).logits.float()
