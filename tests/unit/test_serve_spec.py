"""ServeSpec: defaults that work, mistakes that are named, and every example in the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster import specfile
from cluster.errors import UserError
from serve.deploy import plan
from serve.spec import ServeSpec
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "serve" / "specs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    spec = specfile.load(path, ServeSpec)
    assert spec.models
    assert spec.http.host == "127.0.0.1"


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"chat", "digits", "both"}


def test_a_model_alone_is_enough() -> None:
    spec = specfile.loads("models: {m: {model: 'models:/m@champion'}}", ServeSpec)
    model = spec.models["m"]
    assert (model.bounds.min, model.bounds.max, model.target_ongoing) == (1, 1, 8)
    assert spec.http.port is None


def test_replicas_as_bounds() -> None:
    spec = specfile.loads("models: {m: {model: d, max_batch: 4, replicas: {min: 1, max: 3}}}", ServeSpec)
    assert (spec.models["m"].bounds.max, spec.models["m"].target_ongoing) == (3, 2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("models: {}", "at least 1 item"),
        ("models: {m: {model: d, replica: 2}}", "did you mean `replicas`?"),
        ("models: {m: {model: d, replicas: {min: 3, max: 2}}}", "`max` is 2, less than `min`, which is 3"),
        ("models: {m: {model: d, replicas: 0}}", "greater than 0"),
        ("models: {../m: {model: d}}", "is not a valid name"),
        ("models: {m: {model: d}}\nname: a/b", "is not a valid name"),
        ("models: {m: {model: d}}\nhttp: {port: 70000}", "65535"),
        ("models: {m: {model: d, engine: vlm}}", "'auto', 'torch', 'vllm' or 'task'"),
        ("models: {m: {}}", "`models.m.model` is missing"),
    ],
)
def test_mistakes_are_named(text: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        specfile.loads(text, ServeSpec, name="spec.yaml")
    assert wanted in str(caught.value)


def test_a_spec_cannot_change() -> None:
    spec = ServeSpec.model_validate({"models": {"m": {"model": "d"}}})
    with pytest.raises(ValidationError):
        spec.name = "other"  # type: ignore[misc]


def test_a_spec_survives_the_way_to_the_cluster() -> None:
    spec = specfile.loads("models: {m: {model: d, replicas: {min: 1, max: 2}}}\nhttp: {port: 9000}", ServeSpec)
    assert ServeSpec.model_validate_json(spec.model_dump_json(exclude_unset=True)) == spec


def test_relative_directories_lie_beside_the_spec(tmp_path: Path) -> None:
    spec = ServeSpec.model_validate({"models": {"a": {"model": "sub/a"}, "b": {"model": "models:/b/3"}}})
    found = plan.absolute(spec, tmp_path)
    assert found.models["a"].model == str(tmp_path / "sub" / "a")
    assert found.models["b"].model == "models:/b/3"


def test_reading_a_spec_loads_nothing_heavy() -> None:
    code = (
        "import sys; import serve.spec, serve.cli; "
        "print([m for m in ('ray','torch','fastapi','mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_model_says_of_its_engine_reaches_the_engine(tmp_path: Path) -> None:
    directory = tiny_models.language_model(tmp_path / "tiny")
    model = {"model": str(directory), "precision": "int8", "runner": "torch", "cache_gib": 0.5}
    (planned,) = plan.resolve(ServeSpec.model_validate({"models": {"m": model}}))
    assert planned.options == {
        "precision": "int8",
        "runner": "torch",
        "compile": False,
        "cache_memory_bytes": 2**29,
    }


def test_vllm_gets_what_it_understands(tmp_path: Path) -> None:
    directory = str(tiny_models.language_model(tmp_path / "tiny"))
    spec = {"models": {"m": {"model": directory, "engine": "vllm", "cache_gib": 2, "compile": True}}}
    (planned,) = plan.resolve(ServeSpec.model_validate(spec))
    assert planned.engine == "vllm"
    assert planned.options == {"precision": "auto", "compile": True, "cache_memory_bytes": 2**31}
    for field, value in (("precision", "int4"), ("runner", "native")):
        wrong = {"models": {"m": {"model": directory, "engine": "vllm", field: value}}}
        with pytest.raises(UserError, match=rf"models\.m\.{field}: '{value}' is for the torch engine"):
            plan.resolve(ServeSpec.model_validate(wrong))


def test_quantised_weights_are_refused_where_nothing_is_generated(tmp_path: Path) -> None:
    directory = tiny_models.image_classifier(tmp_path / "shapes")
    spec = ServeSpec.model_validate({"models": {"m": {"model": str(directory), "precision": "int8"}}})
    with pytest.raises(UserError, match=r"models\.m\.precision: 'int8' is for the torch engine"):
        plan.resolve(spec)
