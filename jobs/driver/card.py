"""The model card: one page of Markdown beside the weights, and the description of the version in the registry.

Made of what is known: the manifest, the task's own words, the data's figures. Pure.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.tasks import Task
from tracking.manifest import ModelManifest

FILE_NAME = "README.md"
MOST_ZEROS = 16


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the manifest."""

    phase: str
    parameters: int | None
    """How many weights the model has; None where they are quantised, or adapters alone."""
    size: int
    """Bytes of the files of weights."""
    train_rows: int
    eval_rows: int
    notes: Sequence[str]
    """What was left out of the data, or chosen, in sentences."""
    bad_rows: int
    first_bad: Sequence[str]
    training: Mapping[str, Any] | None
    """The spec's section; None where nothing was trained."""


def text(manifest: ModelManifest, task: Task, facts: Facts) -> str:
    """Return the card."""
    parts = [
        _front(manifest),
        f"# {manifest.name}\n",
        f"{_about(task)}\n",
        *_made(manifest, facts),
        *_data(manifest, facts),
        *_metrics(manifest, task),
        *_limits(manifest),
        *_call(manifest, task),
    ]
    return "\n".join(parts)


def _front(manifest: ModelManifest) -> str:
    """Return the head that model hubs read, in YAML, of which JSON is a part."""
    entries = {
        "library_name": "peft" if manifest.base else "transformers",
        "tags": ["tandem", manifest.task, manifest.architecture],
    }
    parent = {"base_model": manifest.parent} if manifest.parent else {}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in {**entries, **parent}.items()]
    return "\n".join(["---", *lines, "---", ""])


def _about(task: Task) -> str:
    """Return what the task says of itself."""
    return inspect.cleandoc(type(task).__doc__ or f"A model of the task {task.name}.")


def _made(manifest: ModelManifest, facts: Facts) -> Iterator[str]:
    yield "| | |\n| --- | --- |"
    yield f"| task | `{manifest.task}` |"
    yield f"| architecture | `{manifest.architecture}`{_counted(facts.parameters, facts.size)} |"
    if manifest.base:
        yield f"| weights | adapters alone; their base is `{manifest.base.reference}` |"
    if manifest.parent:
        yield f"| made from | `{manifest.parent}` |"
    if facts.training is not None:
        keys = ("steps", "epochs", "global_batch_size", "learning_rate", "schedule", "seed")
        told = ", ".join(f"{key} {facts.training[key]}" for key in keys if facts.training.get(key) is not None)
        yield f"| {facts.phase} | {told} |"
    if manifest.quantization:
        yield f"| weights | {manifest.quantization.get('method')} |"
    if manifest.sweep:
        yield f"| sweep | `{manifest.sweep.get('sweep')}`, trial {manifest.sweep.get('trial')} |"
    if manifest.precision:
        yield f"| computed in | {manifest.precision} |"
    if manifest.run_id:
        yield f"| run | `{manifest.run_id}` |"
    yield f"| made at | {manifest.created_at} |\n"


def _counted(parameters: int | None, size: int) -> str:
    told = [f"{parameters:,} parameters"] if parameters else []
    told += [f"{size / 2**20:,.1f} MiB"] if size else []
    return f", {', '.join(told)}" if told else ""


def _data(manifest: ModelManifest, facts: Facts) -> Iterator[str]:
    if manifest.dataset is None:
        return
    yield "## Data\n"
    rows = f"{facts.train_rows:,} rows to learn from, {facts.eval_rows:,} held out"
    yield f"`{manifest.dataset.name}` (SHA-256 `{manifest.dataset.digest[:16]}`): {rows}.\n"
    said = list(facts.notes)
    if facts.bad_rows:
        said.append(f"{facts.bad_rows} bad rows were left out; the first: {facts.first_bad[0]}")
    yield from (f"- {_line(sentence)}" for sentence in said)
    yield ""


def _metrics(manifest: ModelManifest, task: Task) -> Iterator[str]:
    yield "## Metrics\n"
    if not manifest.evaluation:
        yield "Nothing was held out: what the model does on data that it has not seen is not known.\n"
        return
    yield "On the held-out rows:\n\n| metric | value | better |\n| --- | --- | --- |"
    ways = {"max": "higher", "min": "lower"}
    for name, value in manifest.evaluation.items():
        yield f"| {name} | {value:.4g} | {ways.get(task.metrics.get(name.partition('/')[0], ''), '')} |"
    yield ""


def _limits(manifest: ModelManifest) -> Iterator[str]:
    yield "## Limits\n"
    yield "- It was measured on held-out rows of its own data; on other data it may do worse."
    if manifest.sweep:
        yield f"- A sweep chose it by {manifest.sweep.get('metric')} on these rows, which flatters its figures."
    yield from (f"- {_line(remark)}" for remark in manifest.remarks)
    yield ""


def _call(manifest: ModelManifest, task: Task) -> Iterator[str]:
    yield "## How to call it\n"
    yield "`tandem serve up` with this spec (or a version in the registry, `models:/NAME@ALIAS`):\n"
    yield f"```yaml\nmodels:\n  {manifest.name}:\n    model: PATH-OF-THIS-DIRECTORY\n```\n"
    path, body = _request(manifest, task)
    sent = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    yield f"```sh\ncurl $ENDPOINT{path} -H 'content-type: application/json' -d '{sent}'\n```"
    if not task.generates:
        yield "\nInputs:\n\n| name | datatype | shape | |\n| --- | --- | --- | --- |"
        for part in task.inputs():
            told = ", ".join(f"{key} {json.dumps(value)}" for key, value in part.get("parameters", {}).items())
            yield f"| {part['name']} | {part['datatype']} | {part['shape']} | {told} |"
    yield ""


def _request(manifest: ModelManifest, task: Task) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request, with blanks for the data."""
    if task.generates and not getattr(getattr(task, "tokenizer", None), "chat_template", True):
        return "/v1/completions", {"model": manifest.name, "prompt": "…"}
    if task.generates:
        messages = [{"role": "user", "content": "…"}]
        return "/v1/chat/completions", {"model": manifest.name, "messages": messages}
    inputs = [_blank(part) for part in task.inputs() if not part.get("parameters", {}).get("optional")]
    return f"/v2/models/{manifest.name}/infer", {"inputs": inputs}


def _blank(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return an input with zeros for numbers, if they are not too many to be read, and … for anything else."""
    shape = [1 if size == -1 else size for size in part["shape"]]
    few = part["datatype"] != "BYTES" and math.prod(shape) <= MOST_ZEROS
    data = [0] * math.prod(shape) if few else ["…"]
    return {"name": part["name"], "datatype": part["datatype"], "shape": shape, "data": data}


def _line(sentence: str) -> str:
    return " ".join(sentence.split())
