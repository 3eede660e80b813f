"""WHAT is learned: the table of our tasks, and the base class of all (jobs/tasks/task.py).

Training, evaluation, quantisation and serving all call a task, so encoding and post-processing exist once. A task is
one file here plus one line in `TASKS`, or a class of the user's own, named in the spec as `my_pkg.my_task:MyTask`;
docs/tasks.md shows how to write one. This package imports nothing of Tandem's but the base class of errors, and
neither ray, deepspeed nor mlflow: a server can load it alone. A task's module imports torch and transformers inside
its methods only, since its options are looked up wherever a spec is checked.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from jobs.tasks.task import IGNORED, Batch, Better, Columns, Task, TaskError, TaskOptions, TaskSetupError

__all__ = [
    "IGNORED",
    "TASKS",
    "Batch",
    "Better",
    "Columns",
    "Task",
    "TaskError",
    "TaskOptions",
    "TaskSetupError",
    "get",
    "is_ours",
]

TASKS = {
    "causal-lm": "jobs.tasks.causal_lm:CausalLM",
    "forecasting": "jobs.tasks.forecasting:Forecasting",
    "gan": "jobs.tasks.gan:Gan",
    "image-classification": "jobs.tasks.image_classification:ImageClassification",
    "image-embedding": "jobs.tasks.image_embedding:ImageEmbedding",
    "object-detection": "jobs.tasks.object_detection:ObjectDetection",
    "policy": "jobs.tasks.policy:Policy",
    "recommendation": "jobs.tasks.recommendation:Recommendation",
    "seq2seq": "jobs.tasks.seq2seq:Seq2Seq",
    "speech-recognition": "jobs.tasks.speech_recognition:SpeechRecognition",
    "tabular": "jobs.tasks.tabular:Tabular",
    "text-classification": "jobs.tasks.text_classification:TextClassification",
}

OURS = ("cluster", "jobs", "serve", "tracking")
"""Tandem's own packages."""


def get(name: str, folder: Path | None = None) -> type[Task]:
    """Import the class of the task `name`: a key of `TASKS`, or `package.module:Class`.

    Args:
        folder: where a module of the user's own is looked for besides Python's path: the spec's folder.

    Raises:
        TaskError: no such task, or its module or class cannot be imported.
    """
    target = TASKS.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise TaskError(f"unknown task {name!r}; {_hint(name)}")
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: what lies beside a spec hides none of ours
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise TaskError(f"task {name!r}: its module needs {error.name!r}, which is not installed here") from error
        top = module_name.partition(".")[0]
        hint = f"; {top!r} is the name of one of Tandem's own packages, so rename yours" if top in OURS else ""
        raise TaskError(f"task {name!r}: there is no module {error.name!r} on the path{hint}") from error
    except AttributeError as error:
        raise TaskError(f"task {name!r}: module {module_name!r} has no {class_name!r}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TaskError(f"task {name!r}: {class_name} is no task: derive it from jobs.tasks.Task")
    return found


def is_ours(task: Task) -> bool:
    """Tell whether a task is one of `TASKS` itself, not derived from it."""
    return TASKS.get(task.name) == f"{type(task).__module__}:{type(task).__qualname__}"


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, TASKS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known tasks: {', '.join(TASKS)}, or my_pkg.my_task:MyTask"
