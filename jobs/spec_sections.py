"""The sections of a job's spec, one class each; jobs/spec.py puts them together.

Frozen, typo-proof, and free of everything but pydantic and the standard library.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from cluster.names import Alias, Name
from cluster.precision import Wanted
from cluster.strict import Strict, Text, Texts
from jobs.spec_mixture import MixedSource
from jobs.spec_schedule import LEARNING_RATE, schedule, too_long

Positive = Annotated[int, Field(gt=0, le=10**12)]
"""A whole number from 1; the bound is far above anything real, and below what arithmetic in 64 bits takes."""
Count = Annotated[int, Field(ge=0, le=10**12)]
"""A whole number from 0."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Workers = Annotated[int, Field(gt=0, le=100_000)]


class LoraSpec(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained through peft."""

    rank: int = Field(8, gt=0, le=65_536)
    """Width of the adapters."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training."""
    target_modules: Literal["all-linear"] | Texts = "all-linear"
    """Names of the layers that get adapters, or every linear layer but the head."""
    merge: bool = True
    """The export is one whole model with the adapters in its weights; false: the adapters alone, as peft keeps them,
    and the name and digest of the model in `from`, which whoever loads them needs too."""
    base: Literal["whole", "int8", "nf4"] = "whole"
    """How each worker holds the frozen weights of linear layers (QLoRA): as they are, or in 8 or about 4.5 bits. Needs
    `merge: false` and a ZeRO stage below 3."""


class TaskSpec(BaseModel):
    """What is learned. Besides `name`, the options of that task: docs/tasks.md lists them."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "causal-lm"
    """causal-lm, image-classification, …, or your own as my_pkg.my_task:MyTask."""

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """The task's options as its own model has checked them, defaults included."""
        return dict(self.model_extra or {})


class OrItsName:
    """Tells an editor that a section may be written as a name; the section's own keys stay what they are."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


class ModelSpec(Strict):
    """The model: an architecture with a config, or weights to start from."""

    architecture: Text | None = None
    """A transformers model type (llama, qwen3, gpt2, vit, …), or one of the task's own (cnn)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Entries of the transformers config; what is left out keeps the architecture's default."""
    source: Text | None = Field(None, alias="from")
    """Weights to start from: models:/name@alias, models:/name/3, a directory, one in a store (s3://…), or a hub id."""
    lora: LoraSpec | None = None
    export: Text | None = None
    """Where the trained weights go, if not to the job's own folder: any URI that pyarrow knows (s3://, gs://, hdfs://),
    or an absolute path. The job's folder keeps the rest of the model, and says where they are."""

    @model_validator(mode="after")
    def _config_is_finite(self) -> ModelSpec:
        if wrong := [key for key, value in self.config.items() if isinstance(value, float) and not isfinite(value)]:
            raise ValueError(f"config.{wrong[0]} is {self.config[wrong[0]]}, which is no setting")
        return self


class DataSpec(Strict):
    """What to learn from, and what to hold out. Options of the task may stand here too: `task` is their place."""

    train: Text | Texts | None = None
    """Files, globs or folders (text, JSONL, CSV, Parquet, tars, images, recordings), here or in a store (s3://, gs://,
    abfs://, hdfs://); of the hub, files (hf://datasets/owner/name/…) or a data set (hf://owner/name); or a built-in
    corpus that docs/jobs.md lists. docs/sources.md says more. Relative paths start at the spec's folder."""
    mixture: list[MixedSource] | None = None
    """Instead of `train`: several sources, and the share of the rows that a run takes from each (docs/jobs.md)."""
    eval: Text | Texts | None = None
    """The held-out data, if it has a source of its own."""
    predict: Text | Texts | None = None
    """What phase `predict` makes predictions of; the same kinds as in `train`. It needs no labels or answers."""
    eval_fraction: float = Field(0.02, ge=0, lt=1)
    """Otherwise this share of the training examples is held out."""
    split_seed: Seed = 0
    """Decides which examples are held out; jobs with the same data, share and seed hold the same ones out."""
    eval_max_rows: Positive | None = 512
    """At most this many held-out rows are evaluated, drawn by `split_seed`."""
    max_examples: Positive | None = None
    """Use only the first examples of the training source."""
    columns: Texts | None = None
    """Names for the columns of CSV and TSV files that have no header line."""
    quotes: bool = True
    """A field of CSV and TSV files may stand in quotes ("); false: a quote is a character like others."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A line that is no JSON, bytes that are no UTF-8, a missing column: stop before any worker starts, or leave the
    row out and count it."""
    max_bad_rows: Positive = 100
    """With `bad_rows: skip`: more than so many stop the job all the same."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Examples that are equal in all that is learned from them, white space aside: keep and count them, or keep the
    first one only. Copies are on one side of the split in any case."""
    start_early: bool = False
    """Training begins when the first rows are encoded. Their order depends on the data and `training.seed` alone; in
    the first pass they are shuffled within 16 files, about 64 MiB of raw data, not all over. Needs `training.steps`."""

    def trained_on(self) -> dict[str, str | list[str]]:
        """Return where what a job is to learn from lies, by the key that says so."""
        mixed = {f"data.mixture.{number}.train": source.train for number, source in enumerate(self.mixture or [])}
        return mixed if self.train is None else {"data.train": self.train}


class DeepSpeedSpec(Strict):
    """The part of DeepSpeed's configuration people change; everything else follows from the spec."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """What is sharded over the workers: nothing, optimizer states, gradients too, parameters too. auto: the lowest
    stage whose planned memory fits what a worker has, decided when the run begins."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states (and at stage 3 parameters) live when they do not fit the accelerator; not at stage 0.
    nvme, at stage 3: optimizer states in files below `nvme_path`."""
    offload_parameters: Literal["cpu", "nvme"] = "cpu"
    """Where parameters live at stage 3 with `offload`: the host's memory, or files below `nvme_path`."""
    nvme_path: Text | None = None
    """A folder on a fast disk of each node, for what is on NVMe. Each run makes a folder of its own in it."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> DeepSpeedSpec:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload: {self.offload} has no effect at zero_stage: 0; set zero_stage to 1, 2 or 3")
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError(
                f"offload: nvme is for zero_stage: 3, not {self.zero_stage}; offload: cpu is for 1 and 2 too"
            )
        if self.offload_parameters == "nvme" and (self.zero_stage != 3 or self.offload == "none"):
            raise ValueError(
                "offload_parameters: nvme is for zero_stage: 3 with offload: cpu or nvme, not "
                f"zero_stage: {self.zero_stage} with offload: {self.offload}"
            )
        if self.on_nvme != (self.nvme_path is not None):
            raise ValueError(
                "offload: nvme or offload_parameters: nvme, and nvme_path: /a/folder/on/a/fast/disk, go together; give "
                "both or neither"
            )
        if self.nvme_path is not None and not self.nvme_path.startswith("/"):
            raise ValueError(f"nvme_path: {self.nvme_path} is a place on every node: give its whole path, from / on")
        return self

    @property
    def on_nvme(self) -> bool:
        """Whether anything is in files."""
        return "nvme" in (self.offload, self.offload_parameters)


class ParallelSpec(Strict):
    """How workers share the rows of a step, besides each taking rows of its own."""

    sequence: int = Field(1, ge=1, le=65_536)
    """So many workers share each row, a part of its tokens each (Ulysses sequence parallelism, arXiv:2309.14509): for
    rows whose activations do not fit one worker. Results are those of 1. The number of workers is a multiple of it."""


class TrainingSpec(Strict):
    """The optimisation."""

    steps: Positive | None = None
    """Optimiser steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the training rows, also parts of one; of a mixture, over as many rows as its sources have together.
    """
    global_batch_size: Positive = 32
    """Rows per optimiser step, at any number of workers (G)."""
    micro_batch_size: Positive | Literal["auto"] | None = None
    """Rows per forward pass on one worker; left out, as many as a worker gets, up to 16. auto: the most that fit its
    memory, found by plan and trial when the run begins. It changes speed and memory, no result."""
    learning_rate: Rate = LEARNING_RATE
    """The highest one, after the warm-up."""
    min_learning_rate: float = Field(0.0, ge=0, le=100)
    """Where the schedule ends."""
    schedule: Literal["constant", "cosine", "linear", "warmup-stable-decay"] = "cosine"
    """How it goes on from there."""
    warmup_steps: Count = 0
    """Steps in which it rises from 0 in a line."""
    decay_steps: Positive | Share | None = None
    """warmup-stable-decay: length of the final decay, in steps or, below 1, as a share of all (default: a fifth)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of hidden layers learn by the orthogonal part of their momentum (Muon, 0.95), all else by
    AdamW. learning_rate and weight_decay go for both."""
    weight_decay: float = Field(0.1, ge=0, le=100)
    """AdamW's, on matrices; not on biases and norms."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's two decay rates."""
    epsilon: float = Field(1e-8, gt=0, lt=1)
    """AdamW's term in the denominator."""
    clip: float = Field(1.0, ge=0, le=1e9)
    """Largest norm of the gradient; 0 switches clipping off."""
    precision: Wanted = "auto"
    """What the model computes in: auto is bf16 where the workers' CPUs or GPUs do, else fp32, decided when the run
    begins. Master weights and optimizer states are fp32 in any case."""
    seed: Seed = 0
    """Decides initial weights, dropout and the order of the rows."""
    eval_every: Positive | None = None
    """Evaluate on the held-out rows every so many steps, besides before the first and after the last."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time. selective: all
    but the outputs of matrix products, convolutions and fused attention, which cost most time."""
    compile: bool = False
    """Run the model through torch.compile: faster steps, after a start that takes up to minutes longer. What is
    compiled is kept in `storage` for later starts. Not at ZeRO stage 3 on CPUs."""
    deepspeed: DeepSpeedSpec | Text = DeepSpeedSpec()
    """Settings, or the path of a DeepSpeed JSON: docs/deepspeed.md says which of its keys are let through."""
    parallel: ParallelSpec = ParallelSpec()
    """How workers share rows."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSpec:
        if wrong := next(schedule(dict(self)), None):
            raise ValueError(wrong)
        return self

    def too_long_for(self, steps: int) -> str | None:
        """Return which part of the schedule does not fit into so many steps, in a sentence; None if all do."""
        return too_long(dict(self), steps, self.schedule)


class WorkersSpec(Strict):
    """As many workers as the cluster has room for, between these: a run shrinks and grows with it."""

    min: Workers = 1
    """The job waits for so many."""
    max: Workers
    """It makes use of no more."""
    resize_every_s: float = Field(30.0, gt=0, le=1e6)
    """How often to look whether more workers fit."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkersSpec:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ResourcesSpec(Strict):
    """The worker group: one process per worker."""

    workers: Workers | WorkersSpec = 1
    """How many, or `{min: 1, max: 8}`."""
    cpus_per_worker: float = Field(1, gt=0, le=10_000)
    """CPUs that Ray reserves for each; its threads follow from them."""
    gpus_per_worker: float = Field(0, ge=0, le=1_000)
    """GPUs that Ray reserves for each."""

    @property
    def fewest(self) -> int:
        """The number of workers without which the job does not run."""
        return self.workers.min if isinstance(self.workers, WorkersSpec) else self.workers

    @property
    def most(self) -> int:
        """The number of workers it can make use of."""
        return self.workers.max if isinstance(self.workers, WorkersSpec) else self.workers


class CheckpointSpec(Strict):
    """When to save, and what to keep."""

    every_steps: Positive | None = None
    """Left out: only when the job is stopped or asked to save; a run that ends leaves its model."""
    keep: Positive = 2
    """The newest ones stay …"""
    keep_best: Count = 0
    """… and these that did best on the held-out rows (with training.eval_every)."""
    metric: str = "loss"
    """What `keep_best` goes by: one of the task's metrics. The task knows which way is better."""
    directory: Text | None = None
    """Where they go, if not to the job's own folder: a path, or any URI that pyarrow knows (s3://, gs://, hdfs://)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a spec submitted again goes on from its newest valid checkpoint, unless it had finished."""


class FailuresSpec(Strict):
    """What to do about failures that a plain restart does not mend."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite, or a spike: stop, or go back to the newest checkpoint and leave the batch out."""
    loss_spike: float | None = Field(None, gt=1, le=1e9)
    """A loss of more than so many times the median of the last 64 is a spike. Left out: none is."""
    max_skipped: Count = 10
    """So many batches may be left out."""
    out_of_memory: Literal["halve", "stop"] = "halve"
    """Halve the micro-batch, which changes no result, or stop."""
    exclude_node_after: Positive = 2
    """So many failures in a row on one node, and it gets no worker any more, where the others have room."""
    straggler: Literal["tell", "exclude"] = "tell"
    """A node whose workers take 1.3 times as long for their own part of each step as the others do is told by name;
    exclude: besides, the run saves and goes on without it, where at least three nodes show that it is this one, and the
    others have room."""
    hang_after_s: Positive = 1800
    """A worker, or the preparation of data, that does nothing for so long is taken to hang. Within training, three
    median steps and 8 s suffice."""


class EvaluateSpec(Strict):
    """How phase `evaluate` measures."""

    precision: Wanted = "auto"
    """What the model computes in, as in `training`."""


class QuantizeSpec(Strict):
    """How the weights shrink."""

    precision: Wanted = "auto"
    """What both versions are measured in, as in `training`; what is written does not depend on it."""

    method: Literal["int8-weight-only"] = "int8-weight-only"
    """Int8 weights with a scale for each row, through torchao."""


class RegisterSpec(Strict):
    """The version in the model registry that the job leaves."""

    model: Name
    """The registered model's name; the version is the next one."""
    alias: Alias | None = None
    """An alias that moves to the version, such as champion."""
