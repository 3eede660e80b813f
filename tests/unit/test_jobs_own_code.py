"""The code of a user's own task is its module and all that this imports from beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import lineage
from jobs.tasks import get, own_code
from serve.api.gateway import ModelCard, _model_status
from serve.deploy import plan
from serve.deploy.own_code import OwnCode
from serve.spec import ServeSpec
from tests.support import tiny_models
from tracking import manifest

TASK = """
import json
from pathlib import Path
from own_helpers.clean import tidy
from jobs.tasks.image_classification import ImageClassification

class Mine(ImageClassification):
    name = "mine"

    def encode(self, examples):
        import own_lazy
        words = json.loads((Path(__file__).parent / "own_words.json").read_text())
        return super().encode(tidy(examples))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task in a single module, with a package, a folder without __init__.py, a module and a file beside it."""
    files = {
        "own_single.py": TASK,
        "own_helpers/__init__.py": "",
        "own_helpers/clean.py": "from own_deep.part import twice\n\ndef tidy(x):\n    return x\n",
        "own_deep/part.py": "twice = 2\n",
        "own_lazy.py": "",
        "own_words.json": "[]",
        "elsewhere.py": "",
        "notes.json": "[]",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    get("own_single:Mine")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("own_single.py", True),
        ("own_helpers/clean.py", True),
        ("own_helpers/__init__.py", True),
        ("own_deep/part.py", True),
        ("own_lazy.py", True),
        ("own_words.json", True),
        ("elsewhere.py", False),
        ("notes.json", False),
        ("own_helpers/.cached", False),
    ],
)
def test_what_counts(folder: Path, changed: str, counts: bool) -> None:
    before = own_code.code_digest("own_single:Mine")
    with (folder / changed).open("a") as file:
        file.write("\n# changed\n")
    assert (own_code.code_digest("own_single:Mine") != before) == counts


def test_all_modules_beside_count_for_rows(folder: Path) -> None:
    before = own_code.code_digest("own_single:Mine", beside=True)
    (folder / "elsewhere.py").write_text("# changed")
    assert own_code.code_digest("own_single:Mine", beside=True) != before
    assert own_code.code_digest("causal-lm") is None


def test_a_package_may_import_what_lies_beside_it(folder: Path) -> None:
    (folder / "own_package").mkdir()
    (folder / "own_package" / "task.py").write_text(TASK)
    before = own_code.code_digest("own_package.task:Mine")
    (folder / "own_deep" / "part.py").write_text("twice = 3\n")
    assert own_code.code_digest("own_package.task:Mine") != before


@pytest.mark.parametrize(
    ("change", "warned"), [(lambda text: text, False), (lambda text: text.replace("tidy(examples)", "examples"), True)]
)
def test_other_code_than_the_trained_models_is_warned_of(
    folder: Path, change: Callable[[str], str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder / "model"
    tiny_models.image_classifier(model)
    about = manifest.read(model).model_copy(
        update={"task": "own_single:Mine", "code": own_code.code_digest("own_single:Mine")}
    )
    manifest.write(model, about)
    (folder / "own_single.py").write_text(change(TASK))
    monkeypatch.chdir(folder)
    spec = ServeSpec.model_validate({"models": {"m": {"model": str(model)}}})
    (planned,) = plan.resolve(spec, OwnCode.here(str(folder)))
    now = own_code.code_digest("own_single:Mine")
    said = planned.details.get("warning")
    assert (said is not None) == warned
    card = ModelCard("m", planned.task, planned.version, False, 0, planned.details)
    assert _model_status(card, [], 0)["warning"] == said
    assert lineage.said_of_code("own_single:Mine", model) == ([said] if said else [])
    if said:
        assert f"(digest {str(now)[:12]}, then {str(about.code)[:12]})" in said


def test_a_model_of_an_older_tandem_is_not_warned_of(folder: Path) -> None:
    assert own_code.difference("own_single:Mine", None) is None
    assert own_code.difference("causal-lm", "0" * 64) is None
