"""What the sections of a job's spec must have of each other; each section's own rules are its own.

Read from the spec as it was written, so that these mistakes are listed beside those within the sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from jobs.spec_mixture import contradictions as of_mixture
from jobs.spec_predict import PredictSpec
from jobs.spec_schedule import schedule
from jobs.spec_sections import CheckpointSpec, DataSpec, EvaluateSpec, FailuresSpec, QuantizeSpec
from jobs.spec_sweep import phase_of

Location = tuple[str | int, ...]
ALL_PHASES = ("pretrain", "finetune", "evaluate", "quantize", "predict", "sweep")
OF_PHASES = {
    "training": ("pretrain", "finetune", "sweep"),
    "evaluate": ("evaluate",),
    "quantize": ("quantize",),
    "predict": ("predict",),
    "sweep": ("sweep",),
}
"""Sections that only some phases read."""
OF_TRAINING: Mapping[str, tuple[type[BaseModel], Sequence[str]]] = {
    "checkpoint": (CheckpointSpec, ("every_steps", "keep", "keep_best", "metric", "directory")),
    "failures": (
        FailuresSpec,
        ("non_finite", "loss_spike", "max_skipped", "out_of_memory", "exclude_node_after"),
    ),
}
"""Keys of sections that all phases read, for phases that train; others read `resume` and `hang_after_s` alone."""
REFERRING = ("dpo", "ipo")
"""Objectives that compare with what the model was before."""
DEFAULTS = {
    "evaluate": EvaluateSpec().model_dump(),
    "quantize": QuantizeSpec().model_dump(),
    "predict": PredictSpec().model_dump(),
}


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what a phase lacks or cannot honour, each with its place; sections of a wrong type are passed over."""
    written, phase = values.get("phase"), phase_of(values)
    yield from _model(phase, section(values, "model"))
    yield from _export(written, section(values, "model"))
    yield from _in_few_bits(values)
    yield from _on_nvme(section(values, "training"))
    if phase in ("pretrain", "finetune"):
        yield from _training(phase, values)
    elif phase in ("evaluate", "quantize"):
        data = section(values, "data")
        if not (data.get("eval") or (_trained_on(data) and data.get("eval_fraction", True))):
            yield (), f"phase {phase} needs `data.eval`, or `data.train` with an `eval_fraction` above 0"
    yield from _data(section(values, "data"))
    yield from of_mixture(section(values, "data"))
    yield from _predict(phase, section(values, "data"))
    if section(values, "data").get("start_early"):
        yield from _early(written, values)
    if phase in ("evaluate", "predict") and values.get("register", values.get("register_")) is not None:
        yield (
            ("register",),
            f"phase {phase} makes no model that `register` could name; promote the one that it starts from",
        )
    yield from _without_effect(written, values)
    yield from _parallel(section(values, "training"), section(values, "resources"))
    if written == "sweep":
        yield from _open(section(values, "training"))
    training, checkpoint = values.get("training"), section(values, "checkpoint")
    yield from ((("training",), wrong) for wrong in schedule(section(values, "training")))
    yield from _compile(values)
    if checkpoint.get("keep_best") and isinstance(training, Mapping) and training.get("eval_every") is None:
        yield (
            ("checkpoint", "keep_best"),
            "`checkpoint.keep_best` needs `training.eval_every`: without, no checkpoint is measured",
        )
    if checkpoint.get("keep_best") and holds_nothing_out(section(values, "data")):
        yield ("checkpoint", "keep_best"), "nothing is held out to be measured: give `data.eval`, or an `eval_fraction`"


def _without_effect(phase: Any, values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what is set and would do nothing: whoever set it believes that it does. A default sets nothing."""
    for name, phases in OF_PHASES.items():
        if phase in ALL_PHASES and phase not in phases and _changed(values.get(name), DEFAULTS.get(name)):
            instead = f" (what it measures in is `{phase}.precision`)" if name == "training" else ""
            yield (name,), f"phase {phase} takes nothing from `{name}`: leave it out{instead}"
    if phase in ALL_PHASES and phase not in OF_PHASES["training"]:
        for where, (model, keys) in OF_TRAINING.items():
            for key in (key for key in keys if is_set(model, section(values, where), key)):
                yield (where, key), f"is for phases that train, and this is phase {phase}: leave it out"
    data, failures = section(values, "data"), section(values, "failures")
    if data.get("bad_rows", "stop") == "stop" and is_set(DataSpec, data, "max_bad_rows"):
        yield ("data", "max_bad_rows"), "is for `data.bad_rows: skip`; as it is, the first bad row ends the job"
    if failures.get("non_finite", "stop") == "stop" and is_set(FailuresSpec, failures, "max_skipped"):
        yield ("failures", "max_skipped"), "is for `failures.non_finite: skip`; as it is, nothing is skipped"


def _compile(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield that stage 3 is not compiled on CPUs; a stage in a file of DeepSpeed's is known to the workers."""
    training = section(values, "training")
    stage = section(training, "deepspeed").get("zero_stage")
    if training.get("compile") is True and stage == 3 and not section(values, "resources").get("gpus_per_worker"):
        yield (
            ("training", "compile"),
            "ZeRO stage 3 on CPUs is compiled again at each hook that gathers weights, for minutes: take stage 1 or 2",
        )


def _open(training: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what a trial of a sweep cannot find out for itself: others run beside it, and take memory meanwhile."""
    beside = "trials run beside each other, and each would count with memory that the others take"
    if training.get("micro_batch_size") == "auto":
        yield ("training", "micro_batch_size"), f"phase sweep takes no `auto` here: {beside}; give a number"
    if section(training, "deepspeed").get("zero_stage") == "auto":
        yield ("training", "deepspeed", "zero_stage"), f"phase sweep takes no `auto` here: {beside}; name a stage"


def _changed(given: Any, defaults: Mapping[str, Any] | None) -> bool:
    if not given or defaults is None or not isinstance(given, Mapping):
        return bool(given)
    return any(defaults.get(key) != value for key, value in given.items())


def is_set(model: type[BaseModel], values: Mapping[str, Any], key: str) -> bool:
    """Say whether a key was given another value than its default."""
    return values.get(key) is not None and values[key] != model.model_fields[key].default


def _training(phase: str, values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    if values.get("training") is None:
        yield (), f"phase {phase} needs a `training` section, at least `training: {{steps: 100}}`"
    if _trained_on(section(values, "data")) is None:
        yield (), f"phase {phase} needs `data.train`: files, a glob, or python-stdlib"


def _trained_on(data: Mapping[str, Any]) -> Any:
    return data.get("train") if data.get("mixture") is None else data["mixture"]


def _parallel(training: Mapping[str, Any], resources: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield which numbers of workers cannot be divided into groups that share rows."""
    sequence, workers = section(training, "parallel").get("sequence", 1), resources.get("workers", 1)
    if not isinstance(sequence, int) or sequence <= 1:
        return
    if training.get("micro_batch_size") == "auto":
        yield ("training", "micro_batch_size"), "is not found by trial where workers share rows: give a number"
    numbers = {"min": 1, **workers} if isinstance(workers, Mapping) else {"": workers}
    for key, number in numbers.items():
        if key in ("", "min", "max") and isinstance(number, int) and number % sequence:
            yield (
                ("training", "parallel", "sequence"),
                f"so many workers share each row, and {'.'.join(filter(None, ['resources.workers', key]))}, {number}, "
                f"is no multiple of {sequence}",
            )


def holds_nothing_out(data: Mapping[str, Any]) -> bool:
    """Say whether no row is held out."""
    return not data.get("eval") and data.get("eval_fraction", True) == 0


def _data(data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    columns = data.get("columns")
    if isinstance(columns, list) and (twice := [name for name in columns if columns.count(name) > 1]):
        yield ("data", "columns"), f"the column {twice[0]!r} is there twice"
    if data.get("max_examples") is not None and _trained_on(data) is None and data.get("eval") is not None:
        yield ("data", "max_examples"), "is for `data.train`, and there is none; `data.eval_max_rows` limits `eval`"


def _predict(phase: Any, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield where phase `predict` lacks its data, or is given that of another phase, and the other way round."""
    if phase != "predict":
        if data.get("predict") is not None:
            yield ("data", "predict"), f"is for phase predict, and this is phase {phase}"
        return
    if not data.get("predict"):
        yield (), "phase predict needs `data.predict`: files, a glob, a folder, or a built-in corpus"
    others = ("train", "mixture", "eval", "eval_fraction", "split_seed", "eval_max_rows", "max_examples", "duplicates")
    for key in others:
        if is_set(DataSpec, data, key):
            yield ("data", key), "phase predict takes all rows of `data.predict` and nothing else: leave it out"


def _early(written: Any, values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield where training cannot begin before its data is prepared."""
    at, data, training = ("data", "start_early"), section(values, "data"), section(values, "training")
    if written not in ("pretrain", "finetune"):
        yield at, f"is for phases that train, and this is phase {written}: leave it out"
        return
    if training.get("steps") is None:
        yield (
            at,
            "needs `training.steps`: what `epochs` come to, and with it the learning rate of each step, is known once "
            "all rows are; give `steps`, or leave it out",
        )
    if training.get("micro_batch_size") == "auto":
        yield (
            ("training", "micro_batch_size"),
            "is not found by trial with `data.start_early`: the longest rows may come later; give a number",
        )
    if data.get("mixture") is not None:
        yield at, "is not offered with `data.mixture`: the share of each source is taken of all its rows; leave one out"
    if (objective := _objective(values)) in REFERRING:
        yield at, f"is not offered with objective {objective}: its reference reads all rows first; leave it out"


def _objective(values: Mapping[str, Any]) -> Any:
    """Return the task's objective, which may stand in `data` as its other options may."""
    return section(values, "task").get("objective", section(values, "data").get("objective"))


def _model(phase: Any, model: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    source, architecture = model.get("from", model.get("source")), model.get("architecture")
    if source is None and phase in ("finetune", "evaluate", "quantize", "predict"):
        yield (), f"phase {phase} needs `model.from`: models:/name@alias or a directory"
    elif source is None and architecture is None:
        yield (), "give `model.architecture` (with `config`) or `model.from`"
    if source is not None and architecture is not None:
        yield ("model",), "give either `model.architecture` or `model.from`, not both"
    yield from _lora(source, section(model, "lora"))
    if phase in ("evaluate", "quantize", "predict"):
        given = {"lora": model.get("lora") is not None, "config": bool(model.get("config"))}
        for key in (key for key, is_given in given.items() if is_given):
            yield ("model", key), f"phase {phase} takes the model as it is, without `model.{key}`"


def _export(phase: Any, model: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield why weights are not to go to a store."""
    wanted = model.get("export")
    if not isinstance(wanted, str):
        return
    if phase not in ("pretrain", "finetune") and phase in ALL_PHASES:
        yield ("model", "export"), f"phase {phase} exports nothing to a store: leave `model.export` out"
    if section(model, "lora").get("merge") is False:
        yield (
            ("model", "export"),
            "adapters that are kept apart (`model.lora.merge: false`) are small and stay in the job's folder: leave it "
            "out, or merge them",
        )
    if "://" not in wanted and not wanted.startswith("/"):
        yield ("model", "export"), f"{wanted!r} is neither a URI (s3://bucket/models) nor an absolute path"
    elif urlsplit(wanted).password is not None:
        yield (
            ("model", "export"),
            "a password would be written beside every model: leave it out of the URI; the store's credentials come "
            "from the environment of the nodes (AWS_ACCESS_KEY_ID, …)",
        )


def _lora(source: Any, lora: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    if source is None and lora.get("merge") is False:
        yield (
            ("model", "lora", "merge"),
            "adapters are kept apart from a model that is there already: give `model.from`, or leave it out",
        )
    if lora.get("base", "whole") != "whole" and lora.get("merge", True):
        yield (
            ("model", "lora", "base"),
            "needs `model.lora.merge: false`: what is trained beside a base of few bits is not merged into whole "
            "weights that nobody has measured",
        )


def _in_few_bits(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield where a base of few bits would have to be divided, or compared with the whole one."""
    lora = section(section(values, "model"), "lora")
    if lora.get("base", "whole") == "whole":
        return
    if (objective := _objective(values)) in REFERRING:
        yield (
            ("model", "lora", "base"),
            f"is not offered with objective {objective}: it compares with answers of the model as it is, and training "
            f"would begin with another one, in {lora['base']}; leave it out",
        )
    if section(section(values, "training"), "deepspeed").get("zero_stage") == 3:
        yield (
            ("training", "deepspeed", "zero_stage"),
            f"stage 3 divides weights, and `model.lora.base: {lora['base']}` is held whole by every worker: take stage "
            "2, or leave `base` out",
        )


def _on_nvme(training: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what nobody has shown to be right with optimizer states or parameters on NVMe."""
    deepspeed = section(training, "deepspeed")
    keys = [key for key in ("offload", "offload_parameters") if deepspeed.get(key) == "nvme"]
    if not keys:
        return
    states = f"with `training.deepspeed.{keys[0]}: nvme`"
    if training.get("optimizer") == "muon":
        yield ("training", "optimizer"), f"muon is not offered {states}: take adamw, or {keys[0]}: cpu"
    if training.get("micro_batch_size") == "auto":
        yield (
            ("training", "micro_batch_size"),
            f"auto is not offered {states}: what a trial leaves would be in the files; give a number",
        )
    if training.get("compile") is True:
        yield ("training", "compile"), f"is not offered {states}: leave it out, or take {keys[0]}: cpu"


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section as it was written; empty where there is none, or something else."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
