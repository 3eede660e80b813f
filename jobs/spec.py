"""JobSpec: one file per job. Frozen, typo-proof, and free of everything but pydantic and the standard library.

`tandem jobs schema` prints its JSON Schema; `tandem jobs validate SPEC` checks a file without a cluster. What a task's
options are, the task itself says (jobs/tasks): it is looked up while a spec is checked, and not imported here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from cluster.names import Name
from cluster.precision import Wanted
from cluster.strict import Strict, Text
from jobs.spec_predict import PredictSpec
from jobs.spec_rules import contradictions
from jobs.spec_sections import (
    CheckpointSpec,
    DataSpec,
    EvaluateSpec,
    FailuresSpec,
    LoraSpec,
    ModelSpec,
    OrItsName,
    QuantizeSpec,
    RegisterSpec,
    ResourcesSpec,
    TaskSpec,
    TrainingSpec,
    WorkersSpec,
)
from jobs.spec_sweep import SweepSpec

__all__ = ["DataSpec", "JobSpec", "LoraSpec", "TaskSpec", "TrainingSpec", "WorkersSpec"]


class JobSpec(Strict):
    """One job: what to do, to which model, with which data, on which workers."""

    short_forms: ClassVar[Mapping[str, str]] = {"task": "name", "sweep.scheduler": "name"}
    """Sections that may be written as the value of one key."""

    name: Name
    """What the job, its run in MLflow and its folder are called."""
    phase: Literal["pretrain", "finetune", "evaluate", "quantize", "predict", "sweep"]
    """What the job does; the keys that a phase needs are in docs/jobs.md."""
    task: Annotated[TaskSpec, OrItsName] = TaskSpec()
    """The task's name, or `{name: …}` with its options."""
    model: ModelSpec
    data: DataSpec = DataSpec()
    training: TrainingSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    failures: FailuresSpec = FailuresSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    """How phase `evaluate` measures."""
    predict: PredictSpec = PredictSpec()
    """What phase `predict` writes."""
    quantize: QuantizeSpec = QuantizeSpec()
    sweep: SweepSpec | None = None
    """What phase `sweep` tries; all else is as in the spec of one of its trials."""
    register_: RegisterSpec | None = Field(None, alias="register")
    storage: Text | None = None
    """Where data, checkpoints, models and all else of a run is kept: a folder that every node reaches, or an object
    store's URI (s3://bucket/folder). Default: $TANDEM_STORAGE, or $TANDEM_HOME/storage. A relative path starts at the
    spec's folder."""
    max_failures: int = Field(3, ge=0, le=10**6)
    """How often a lost worker group is started again, from its newest checkpoint, without getting any further."""

    @model_validator(mode="wrap")
    @classmethod
    def _all_mistakes_at_once(
        cls, values: Any, handler: ModelWrapValidatorHandler[JobSpec], info: ValidationInfo
    ) -> JobSpec:
        if not isinstance(values, Mapping):
            return handler(values)
        options = importlib.import_module("jobs.tasks.options")
        resolved, mistakes = options.in_their_place(values, list(DataSpec.model_fields), info.context or {})
        mistakes += [options.mistake(at, what, {}) for at, what in contradictions(values)]
        if values.get("phase") == "sweep":
            mistakes += importlib.import_module("jobs.sweep_mistakes").found(cls, values, info.context or {})
        try:
            spec = handler(resolved)
        except ValidationError as error:
            raise options.refusal(cls.__name__, mistakes, error) from None
        if mistakes:
            raise options.refusal(cls.__name__, mistakes)
        return spec

    @property
    def precision(self) -> Wanted:
        """What the section of the job's phase asks for."""
        if self.phase == "evaluate":
            return self.evaluate.precision
        if self.phase == "predict":
            return self.predict.precision
        return self.training.precision if self.training and self.phase != "quantize" else self.quantize.precision

    def resolved(self) -> dict[str, Any]:
        """Return the whole spec, defaults included, under the file's key names."""
        return self.model_dump(mode="json", by_alias=True)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of what decides the result: not where, how divided, or how often it is saved."""
        how = {"deepspeed", "micro_batch_size", "gradient_checkpointing", "parallel", "compile"}
        predicts = self.phase == "predict"  # the digests of other phases are those of before there was this one
        sweep = True if self.sweep is None else dict.fromkeys(("parallel", "time_budget_s"), True)
        what = self.model_dump(
            mode="json",
            by_alias=True,
            exclude={
                **dict.fromkeys(("resources", "storage", "register_", "max_failures", "failures", "checkpoint"), True),
                "model": {"export": True},
                "training": dict.fromkeys(how, True),
                "predict": {"batch_size": True} if predicts else True,
                "data": {"mixture": {"__all__": {"max_epochs"}}, **({} if predicts else {"predict": True})},
                "sweep": sweep,
            },
        )
        _forget_defaults(what)
        what["task"] = importlib.import_module("jobs.tasks.options").decisive(what["task"])
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


_CHOICES_SINCE: Mapping[tuple[str, ...], Any] = {
    ("data", "duplicates"): "keep",
    ("data", "mixture"): None,
    ("data", "start_early"): False,
    ("failures", "straggler"): "tell",
    ("model", "lora", "base"): "whole",
    ("model", "lora", "merge"): True,
    ("training", "optimizer"): "adamw",
}
"""Keys that came after digests were given, with what was done before there was a choice."""


def _forget_defaults(spec: dict[str, Any]) -> None:
    """Take later keys out where nothing else was chosen, so that a run goes on under the digest that it began with."""
    for (*path, key), before in _CHOICES_SINCE.items():
        section: Any = spec
        for part in path:
            section = (section or {}).get(part)
        if section and section.get(key) == before:
            del section[key]
