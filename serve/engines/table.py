"""The table of engines: one entry each says what it serves, which options it has, and how a replica loads it.

A new engine is one file, one entry here, a test and a passage in docs/engine.md. An engine of the user's own is an
`EngineEntry` in a module beside the serve spec, named there as `my_pkg.my_engine:ENGINE`.

Only pydantic and the standard library are imported, so a spec is checked without Ray, torch or a cluster.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from cluster.errors import UserError
from cluster.mistakes import TAKES
from cluster.names import suggest
from cluster.strict import Strict
from serve.wire import Identity

AUTO = "auto"
MOST_GIB = 100_000
"""More memory than a node has."""
Kind = Literal["generative", "predictive"]
"""What a task asks of its engine: to generate tokens, or to answer at once."""


class EngineOptions(Strict):
    """The settings that one engine has and others have not; an engine's model derives from this one."""


ToolFormat = Literal["auto", "hermes", "llama3", "mistral", "json"]


class TorchOptions(EngineOptions):
    """Options of the `torch` engine."""

    runner: Literal["auto", "native", "torch"] = "auto"
    """What it computes with: `native` kernels on x86 CPUs (bf16, int8, int4), `torch` for the rest."""
    compile: bool = False
    """torch.compile the model of the `torch` runner. Its start takes a minute, which is logged, and on CPUs its steps
    were not faster."""
    cache_gib: Annotated[float, Field(gt=0, le=MOST_GIB)] | None = None
    """Most memory for keys and values in one replica; half of what is free at most when left out."""
    pooling: Literal["mean", "last"] = "mean"
    """How /v1/embeddings makes a vector of a text: the mean of its tokens' last hidden states, or the last token's."""
    tool_format: ToolFormat = "auto"
    """How the model writes calls of functions; `auto` asks its chat template."""


class VllmOptions(EngineOptions):
    """Options of the `vllm` engine."""

    compile: bool = False
    """Let vLLM compile the model, which takes half a minute at least."""
    cache_gib: Annotated[int, Field(ge=1, le=MOST_GIB)] | None = None
    """Memory for keys and values on a CPU, in whole GiB; vLLM's own choice when left out."""
    tool_format: ToolFormat = "auto"
    """How the model writes calls of functions; `auto` asks its chat template."""


class TaskOptions(EngineOptions):
    """Options of the `task` engine."""

    max_wait_ms: float = Field(default=2.0, ge=0, le=60_000)
    """How long the first request of a batch waits for others to share it."""


@dataclass(frozen=True)
class ReplicaSetup:
    """What a replica is to load; an engine's `load` gets it."""

    directory: Path
    """An exported model: Hugging Face layout and tandem.json."""
    identity: Identity
    """What every answer says of its origin."""
    task: str
    """The task's name, as `jobs.tasks.get` takes it."""
    options: EngineOptions
    """An instance of the engine's own model of options."""
    precision: str
    max_context: int | None
    """Most tokens of prompt and completion; None: the model's own limit."""
    max_batch: int
    threads: int


@dataclass(frozen=True)
class EngineEntry:
    """One entry of the table."""

    name: str
    serves: frozenset[Kind]
    load: str
    """`module:function`, imported and called in the replica, with a ReplicaSetup. It returns what
    `serve.engines.replica` calls a Replica."""
    options: type[EngineOptions] = EngineOptions
    precisions: tuple[str, ...] = ("auto", "bf16", "fp32")
    """The values of the spec's `precision` that it knows."""
    forked: bool = True
    """Whether a replica may be forked from the node's fork server: not where the engine runs in an environment of its
    own, or starts threads while it is imported."""
    tasks: frozenset[str] = frozenset()
    """Tasks that it is made for: `auto` takes it for these, and for no other."""
    adapters: bool = True
    """Whether it loads adapters that lie apart from their base: whatever loads through the task does."""
    infers: bool = False
    """Whether a generative engine's replicas answer /v2/models/{name}/infer too."""
    preload: tuple[str, ...] = ()
    """Modules that the fork server imports ahead. They must not import ray, nor compute. Those of an engine of the
    user's own are imported after the fork: the server knows Tandem's code only."""

    def __post_init__(self) -> None:
        assert "name" not in self.options.model_fields, "`name` is the engine's own key in a spec"


class Mistake(NamedTuple):
    """Something a spec asks of an engine that it cannot give. `place` starts at the option, or is ("precision",)."""

    place: tuple[str | int, ...]
    message: str
    value: Any


ENGINES: dict[str, EngineEntry] = {
    engine.name: engine
    for engine in (
        EngineEntry(
            name="torch",
            serves=frozenset({"generative"}),
            load="serve.engines.torch.load:load",
            options=TorchOptions,
            precisions=("auto", "bf16", "fp32", "int8", "int4"),
            preload=("serve.engines.torch.load", "llguidance"),
        ),
        EngineEntry(
            name="vllm",
            serves=frozenset({"generative"}),
            load="serve.engines.vllm:load",
            options=VllmOptions,
            forked=False,
            adapters=False,
        ),
        EngineEntry(
            name="task",
            serves=frozenset({"predictive"}),
            load="serve.engines.predictive:load",
            options=TaskOptions,
            preload=("serve.engines.predictive", "jobs.tasks", "torch"),
        ),
        EngineEntry(
            name="seq2seq",
            serves=frozenset({"generative"}),
            load="serve.engines.seq2seq.load:load",
            tasks=frozenset({"seq2seq"}),
            infers=True,
            preload=("serve.engines.seq2seq.load", "torch"),
        ),
    )
}
"""By name; `auto` takes the one made for the task, or the first that serves its kind."""


def kind(generates: bool) -> Kind:
    """Return what a task asks of its engine."""
    return "generative" if generates else "predictive"


def is_own(name: str) -> bool:
    """Say whether `name` is code, `module:NAME`, rather than a key of a table."""
    return ":" in name


def get(name: str, engines: Mapping[str, EngineEntry] = ENGINES) -> EngineEntry:
    """Return the engine of that name; one of the user's own (`my_pkg.my_engine:ENGINE`) is imported.

    Raises:
        UserError: there is none, or what the name leads to is no EngineEntry.
        ModuleNotFoundError: the module, or one that it imports, is not on the path.
    """
    check_name(name, engines)
    if not is_own(name):
        return engines[name]
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, EngineEntry):
        raise UserError(f"engine {name!r}: {attribute!r} in module {module!r} is no serve.engines.table.EngineEntry")
    return found


def check_name(name: str, engines: Mapping[str, EngineEntry] = ENGINES) -> None:
    """Raise UserError if a spec cannot name an engine so; what a name of the user's own leads to is seen later."""
    module, colon, attribute = name.partition(":")
    well_formed = all(part.isidentifier() for part in (*module.split("."), attribute))
    if not well_formed if colon else name not in (AUTO, *engines):
        hint = "write your own as my_pkg.my_engine:ENGINE" if colon else suggest(name, [AUTO, *engines])
        raise UserError(f"unknown engine {name!r}; {hint}")


def choose(wanted: Kind, engines: Mapping[str, EngineEntry] = ENGINES, task: str | None = None) -> EngineEntry:
    """Return the engine that `auto` takes for a task of a kind: the one made for the task, or the first for any."""
    fitting = [engine for engine in engines.values() if wanted in engine.serves]
    made = (engine for engine in fitting if task in engine.tasks)
    return next(made, None) or next(engine for engine in fitting if not engine.tasks)


def possible(name: str, engines: Mapping[str, EngineEntry] = ENGINES) -> list[EngineEntry]:
    """List the engines that a name in a spec may turn out to be, as far as that is known without the model.

    Empty for an engine of the user's own: its code is imported where it runs.
    """
    if is_own(name):
        return []
    if name != AUTO:
        return [engines[name]]
    kinds: tuple[Kind, ...] = ("generative", "predictive")
    made = [engine for engine in engines.values() if engine.tasks]
    general = {wanted for engine in engines.values() if not engine.tasks for wanted in engine.serves}
    return [*(choose(wanted, engines) for wanted in kinds if wanted in general), *made]


def mistakes(
    engine: EngineEntry, options: Mapping[str, Any], precision: str, engines: Mapping[str, EngineEntry] = ENGINES
) -> list[Mistake]:
    """List what is wrong with options and precision for an engine: options of other engines, typos, wrong values."""
    found = []
    if precision not in engine.precisions:
        known = ", ".join(engine.precisions)
        found.append(Mistake(("precision",), f"the {engine.name} engine has no {precision!r}, only {known}", precision))
    return [*found, *wrong_options(engine, options, engines)]


def wrong_options(
    engine: EngineEntry, options: Mapping[str, Any], engines: Mapping[str, EngineEntry] = ENGINES
) -> list[Mistake]:
    """List what is wrong with options for an engine."""
    try:
        engine.options.model_validate(dict(options))
    except ValidationError as error:
        return [_mistake(engine, detail, engines) for detail in error.errors(include_url=False)]
    return []


def _mistake(engine: EngineEntry, detail: Any, engines: Mapping[str, EngineEntry]) -> Mistake:
    place, message = tuple(detail["loc"]), detail["msg"].removeprefix("Value error, ")
    if detail["type"] in TAKES:
        message = f"takes {TAKES[detail['type']]}"
    if detail["type"] == "extra_forbidden" and len(place) == 1:
        message = _not_an_option(engine, str(place[0]), engines)
    return Mistake(place, message, detail.get("input"))


def _not_an_option(engine: EngineEntry, option: str, engines: Mapping[str, EngineEntry]) -> str:
    own = sorted(engine.options.model_fields)
    others = [other.name for other in engines.values() if option in other.options.model_fields]
    if others:
        has = f"{engine.name} has: {', '.join(own)}" if own else f"{engine.name} has no options"
        return f"`{option}` is an option of the {' and the '.join(others)} engine; {has}"
    if not own:
        return f"the {engine.name} engine has no options"
    hint = suggest(option, own).replace("'", "`")
    return f"the {engine.name} engine has no option `{option}`; {hint}"
