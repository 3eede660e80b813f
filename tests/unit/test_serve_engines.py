"""The table of engines: one entry is all that an engine needs, in the table or beside a user's spec."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster import shipping
from cluster.errors import UserError
from serve.deploy import environment, plan, warm
from serve.deploy.model_replica import load_replica
from serve.deploy.own_code import CodeWanted, OwnCode, Unpacked
from serve.engines import table
from serve.engines.table import ENGINES, EngineEntry, Mistake
from serve.spec import ServeSpec
from serve.wire import InferCall, Inferred
from tests.support import own_engine, tiny_models

MY_TASK = """
from jobs.tasks.image_classification import ImageClassification


class Shapes(ImageClassification):
    name = "my_shapes:Shapes"
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a user's code, on the path as a Ray job's working directory is."""
    folder = tmp_path / "beside"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield folder
    for module in ("my_engine", "my_shapes"):
        sys.modules.pop(module, None)


def code(folder: Path) -> OwnCode:
    return OwnCode("/home/me/specs", folder, shipping.pack(folder))


def spec(directory: Path, **settings: object) -> ServeSpec:
    return ServeSpec.model_validate({"models": {"m": {"model": str(directory), **settings}}})


def as_own_task(directory: Path) -> Path:
    """Have an exported model say that its task is the user's own."""
    path = directory / "tandem.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": "my_shapes:Shapes"}))
    return directory


# -- the table -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_engine_made_for_the_task_or_the_first_of_its_kind() -> None:
    assert [table.choose(kind).name for kind in ("generative", "predictive")] == ["torch", "task"]
    assert [table.choose("generative", task=task).name for task in ("causal-lm", "seq2seq")] == ["torch", "seq2seq"]
    assert [entry.name for entry in table.possible("auto")] == ["torch", "task", "seq2seq"]


@pytest.mark.parametrize("entry", ENGINES.values(), ids=ENGINES)
def test_every_entry_loads_with_what_is_installed_here(entry: EngineEntry) -> None:
    module, _, function = entry.load.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert all(field.description for field in entry.options.model_fields.values())


def test_one_more_entry_is_one_more_engine() -> None:
    class Options(table.EngineOptions):
        speed: int = 1

    fast = EngineEntry("fast", frozenset({"generative"}), "fast:load", Options, ("bf16",), preload=("fast_kernels",))
    engines = {**ENGINES, "fast": fast}
    assert table.get("fast", engines) is fast
    assert table.mistakes(fast, {"speed": 2}, "bf16", engines) == []
    assert table.mistakes(fast, {"runner": "native", "speed": "x"}, "auto", engines) == [
        Mistake(("precision",), "the fast engine has no 'auto', only bf16", "auto"),
        Mistake(("speed",), "takes a whole number", "x"),
        Mistake(("runner",), "`runner` is an option of the torch engine; fast has: speed", "native"),
    ]
    (mistake,) = table.mistakes(ENGINES["torch"], {"speed": 2}, "auto", engines)
    assert (
        mistake.message
        == "`speed` is an option of the fast engine; torch has: cache_gib, compile, pooling, runner, tool_format"
    )
    assert "fast_kernels" in warm.preloaded(engines)
    assert "fast_kernels" not in warm.preloaded({**ENGINES, "fast": replace(fast, forked=False)})


def test_the_fork_server_imports_each_module_once_and_finds_it() -> None:
    modules = warm.preloaded(ENGINES)
    assert len(modules) == len(set(modules))
    assert "serve.engines.vllm" not in modules
    for module in modules:
        importlib.import_module(module)


# -- an engine beside the spec ---------------------------------------------------------------------------------------


def test_an_engine_beside_the_spec_is_planned_and_loaded(beside: Path, tmp_path: Path) -> None:
    own_engine.write(beside)
    directory = tiny_models.image_classifier(tmp_path / "shapes")
    sent = code(beside)
    wanted = spec(directory, engine={"name": "my_engine:ENGINE", "threshold": 99})
    (planned,) = plan.resolve(wanted, sent)
    assert (planned.engine, planned.options) == ("my_engine:ENGINE", {"threshold": 99})
    assert planned.code == shipping.digest(sent.packed)
    images = np.full((2, 8, 8, 1), 100, dtype=np.uint8)
    images[1, :4] = 98

    async def ask() -> object:
        replica = load_replica(planned)
        await replica.start()
        return await replica.infer(InferCall("1", {"image": images}))  # type: ignore[attr-defined]

    answer = asyncio.run(ask())
    assert isinstance(answer, Inferred)
    assert answer.predictions == [{"bright": 64}, {"bright": 32}]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {"engine": {"name": "my_engine:ENGINE", "treshold": 9}},
            r"models\.m\.engine\.treshold: the bright engine has no option `treshold`; did you mean `threshold`\?",
        ),
        (
            {"engine": {"name": "my_engine:ENGINE", "threshold": 999}},
            r"models\.m\.engine\.threshold: Input should be less",
        ),
        (
            {"engine": "my_engine:ENGINE", "runner": "torch"},
            r"models\.m\.runner: `runner` is an option of the torch engine",
        ),
        ({"engine": "my_engine:ENGINE", "precision": "int8"}, r"models\.m\.precision: the bright engine has no 'int8'"),
        ({"engine": "my_engine:ENGIN"}, r"'my_engine:ENGIN' cannot be used: .*'ENGIN' in module 'my_engine' is no"),
        (
            {"engine": "my_dark:ENGINE"},
            r"models\.m\.engine: 'my_dark:ENGINE' is code of your own, and /home/me/specs has no my_dark\.py or my",
        ),
        (
            {"engine": "jobs.mine:ENGINE"},
            r"'jobs\.mine:ENGINE' cannot lie in jobs, the name of one .*: rename it in /home",
        ),
        ({"engine": "my_lame:ENGINE"}, r"cannot be imported: No module named 'not_installed'; install it on"),
    ],
)
def test_what_an_own_engine_has_not_is_refused_in_the_plan(
    settings: dict[str, object], wanted: str, beside: Path, tmp_path: Path
) -> None:
    own_engine.write(beside)
    (beside / "my_lame.py").write_text("import not_installed\n")
    (beside / "jobs").mkdir()
    (beside / "jobs" / "mine.py").write_text((beside / "my_engine.py").read_text())
    with pytest.raises(UserError, match=wanted):
        plan.resolve(spec(tiny_models.image_classifier(tmp_path / "shapes"), **settings), code(beside))


# -- a task beside the spec ------------------------------------------------------------------------------------------


def test_an_own_task_asks_for_its_code_and_gets_it(beside: Path, tmp_path: Path) -> None:
    (beside / "my_shapes.py").write_text(MY_TASK)
    wanted = spec(as_own_task(tiny_models.image_classifier(tmp_path / "shapes")))
    with pytest.raises(CodeWanted, match=r"models\.m: its task 'my_shapes:Shapes'"):
        plan.resolve(wanted)
    (planned,) = plan.resolve(wanted, code(beside))
    assert (planned.task, planned.engine, planned.generates) == ("my_shapes:Shapes", "task", False)
    (beside / "my_shapes.py").write_text(MY_TASK + "\nMORE = 1\n")
    (changed,) = plan.resolve(wanted, code(beside))
    assert changed.code != planned.code
    assert changed.digest() != planned.digest()


def test_code_in_a_model_directory_is_never_imported(beside: Path, tmp_path: Path) -> None:
    directory = as_own_task(tiny_models.image_classifier(tmp_path / "shapes"))
    (directory / "my_shapes.py").write_text(MY_TASK)
    with pytest.raises(UserError, match=r"its task 'my_shapes:Shapes' is code of your own, and /home/me/specs has no"):
        plan.resolve(spec(directory), code(beside))
    assert "my_shapes" not in sys.modules


def test_a_plain_model_carries_no_code(beside: Path, tmp_path: Path) -> None:
    (beside / "my_shapes.py").write_text(MY_TASK)
    wanted = spec(tiny_models.image_classifier(tmp_path / "shapes"))
    assert plan.resolve(wanted, code(beside)) == plan.resolve(wanted)


def test_a_replica_imports_what_came_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_shapes.py").write_text("import json\nVALUE = json.load(open('value.json'))\n")
    (tmp_path / "value.json").write_text("7")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    packed = shipping.pack(tmp_path)
    (tmp_path / "my_shapes.py").unlink()
    unpacked = Unpacked(packed)
    try:
        module = importlib.import_module("my_shapes")
        assert module.VALUE == 7
        assert Path(module.__file__ or "").is_file()
    finally:
        unpacked.remove()
        sys.modules.pop("my_shapes", None)
    assert not Path(module.__file__ or "").exists()


def test_a_models_own_environment_leaves_tandem_its_code() -> None:
    everywhere = {"env_vars": {"A": "1", "B": "1"}, "py_modules": ["gcs://tandem.zip"]}
    own = {"env_vars": {"B": "2"}, "pip": ["x"]}
    assert environment.merged(everywhere, own) == {
        "env_vars": {"A": "1", "B": "2"},
        "py_modules": ["gcs://tandem.zip"],
        "pip": ["x"],
    }
    assert environment.merged({"env_vars": {}}, {}) == {"env_vars": {}}
