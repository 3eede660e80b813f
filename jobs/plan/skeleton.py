"""The model that a spec describes, built without its weights, and where it can be without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.errors import UserError
from jobs import hub_folder, parents
from jobs.data import sources
from jobs.data.examples import BadRows, Example
from jobs.data.grouping import grouped
from jobs.data.tables import TableForm
from jobs.spec import JobSpec
from jobs.tasks import Task, get, language_models, loading, tokenization
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import lora, start

EXAMPLES = 2000
"""So many are looked at for what a task learns from its data, such as the number of classes."""
GROUPED_ROWS = 100_000
"""So many rows, where an example is made of several."""
CHARACTERS = 256
"""The vocabulary of a tokenizer of characters whose text has not been seen."""


def build(spec: JobSpec, base: Path, without_data: bool = False) -> tuple[torch.nn.Module, Task, list[str]]:
    """Return the model, its parameters on the meta device where it can be made so, its task, and what was assumed.

    Args:
        base: where relative paths start.
        without_data: refuse a model whose size depends on data, instead of reading some.

    Raises:
        UserError: it cannot be built, its parent is not to be found, or its size depends on data that is not here.
    """
    task = get(spec.task.name, base)(spec.task.options)
    parent = _parent(spec, base)
    if parent is not None:
        task.inherit(parent)
        model, said = _of_parent(spec, task, parent), list[str]()
    elif isinstance(task, CausalLM):
        model, said = _language_model(spec, task, base)
    elif without_data:
        raise UserError(f"the size of a model of task {spec.task.name} depends on its data")
    else:
        said = _fit(spec, task, base)
        model = _fitted(spec, task)
    if spec.model.lora is not None:
        with start.described(spec), _without_memory():
            model = lora.add_lora(model, spec.model.lora)
    return model, task, said


def _parent(spec: JobSpec, base: Path) -> Path | None:
    found = parents.find(spec, base)
    if not isinstance(found, str):
        return found
    folder = hub_folder.cached(found)
    if folder is None:
        raise UserError(f"model.from: {found} is not in this machine's cache of the hub, so its size is not known here")
    return folder


def _of_parent(spec: JobSpec, task: Task, parent: Path) -> torch.nn.Module:
    """Build what a parent's config describes; its weights are not read."""
    with _without_memory(), loading.without_weights():
        return task.load_model(parent, torch.float32, spec.model.config)


def _language_model(spec: JobSpec, task: CausalLM, base: Path) -> tuple[torch.nn.Module, list[str]]:
    """Build a causal model for the vocabulary that the spec names: there is no tokenizer yet."""
    assert spec.model.architecture is not None
    length = task.options.sequence_length
    size, said = _vocabulary(spec, task, base)
    defaults = {"vocab_size": size, **dict.fromkeys(language_models.LENGTHS, length)}
    config = language_models.config_of(spec.model.architecture, spec.model.config, defaults)
    language_models.check_length(config, length)
    with start.described(spec), _without_memory():
        return language_models.build(config), said


def _vocabulary(spec: JobSpec, task: CausalLM, base: Path) -> tuple[int, list[str]]:
    """Return the tokens of the tokenizer that there will be, and what is to be said of that number."""
    options = task.options.tokenizer
    if "vocab_size" in spec.model.config:
        return int(spec.model.config["vocab_size"]), []
    if options.source is not None:
        return len(tokenization.load(tokenization.located(options.source, base))), []
    if options.train == "char":
        return CHARACTERS, [f"a vocabulary of {CHARACTERS} characters is assumed; model.config.vocab_size sets it"]
    return options.vocab_size, [
        f"a vocabulary of {options.vocab_size:,} tokens is assumed (task.tokenizer.vocab_size); "
        "model.config.vocab_size sets it"
    ]


def _fit(spec: JobSpec, task: Task, base: Path) -> list[str]:
    """Have the task learn what its model's size depends on from the first examples; say of how many."""
    places = list(spec.data.trained_on().values())
    try:
        assert places, "phases that train name data"
        examples = [example for where in places for example in _first(spec, task, where, base, len(places))]
        task.fit(task.observe(examples))
    except Exception as error:  # of whatever kind: the job itself would say it better
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"data.train: the size of a model of task {spec.task.name} depends on its data, which a plan cannot read "
            f"here: {said}"
        ) from error
    return [f"labels, columns and words are those of the first {len(examples):,} examples: more data may have more"]


def _first(spec: JobSpec, task: Task, where: str | list[str], base: Path, places: int) -> list[Example]:
    """Return the first examples of one of so many places."""
    source = sources.open_source(where, base, TableForm(spec.data.columns, spec.data.quotes))
    grouping = task.grouping()
    if grouping is None:
        return list(source.examples(-(-EXAMPLES // places)))
    rows = source.examples(-(-GROUPED_ROWS // places))
    return list(grouped(rows, grouping, task.check, BadRows()))


def _fitted(spec: JobSpec, task: Task) -> torch.nn.Module:
    """Build the model of a task that has seen data; whole, where it cannot be built without memory."""
    architecture = spec.model.architecture
    assert architecture is not None
    with start.described(spec):
        try:
            with _without_memory():
                return task.build(architecture, spec.model.config)
        except (NotImplementedError, RuntimeError):  # it looks at its own numbers
            return task.build(architecture, spec.model.config)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Have tensors made on the meta device, and leave torch's random state as it was."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        yield
