"""ServeSpec: defaults that work, mistakes that are named, and every example in the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import specfile
from cluster.errors import UserError
from serve import runtime_env
from serve.deploy import plan
from serve.spec import ServeSpec
from tests.support import tiny_models
from tracking import manifest as manifests

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
    assert (model.bounds.min, model.bounds.max, model.scales) == (1, 1, False)
    assert spec.http.port is None


def test_replicas_as_bounds() -> None:
    spec = specfile.loads("models: {m: {model: d, replicas: {min: 0, max: 3}}, k: {model: d}}", ServeSpec)
    assert (spec.models["m"].bounds.max, spec.models["m"].scales, spec.models["m"].at_start) == (3, True, 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("models: {}", "not empty"),
        ("models: {m: {model: d, replica: 2}}", "did you mean `replicas`?"),
        ("models: {m: {model: d, replicas: {min: 3, max: 2}}}", "`max` is 2, less than `min`, which is 3"),
        ("models: {m: {model: d, replicas: 0}}", "greater than or equal to 1"),
        ("models: {m: {model: d, replicas: {min: 0, max: 0}}}", "greater than or equal to 1"),
        (
            "models: {m: {model: d}}\ngateway: {replicas: {min: 0, max: 2}}",
            "a gateway that is not there cannot be woken",
        ),
        (
            "models: {m: {model: d, replicas: {max: 2, target_ongoing: 8}}}",
            "`models.m.replicas.target_ongoing`: does nothing for a model",
        ),
        ("models: {../m: {model: d}}", "is not a valid name"),
        ("models: {m: {model: d}}\nname: a/b", "is not a valid name"),
        ("models: {m: {model: d}}\nhttp: {port: 70000}", "65535"),
        ("models: {m: {model: d, engine: vlm}}", "unknown engine 'vlm'; did you mean 'vllm'?"),
        (
            "models: {m: {model: d, engine: my-engine.py}}",
            "unknown engine 'my-engine.py'; known: auto, seq2seq, task, torch, vllm",
        ),
        ("models: {m: {model: d, engine: my-engine:X}}", "write your own as my_pkg.my_engine:ENGINE"),
        ("models: {m: {model: d, engine: 3}}", "must be an engine's name, or a mapping"),
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


ENGINE_SPEC = """\
models:
  m:
    model: d
    precision: {precision}
    engine:
      name: {name}
      {option}
    {beside}
"""


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        (
            {"name": "torch", "option": "cach_gib: 2"},
            "s.yaml:7: `models.m.engine.cach_gib`: the torch engine has no option `cach_gib`; "
            "did you mean `cache_gib`?",
        ),
        (
            {"name": "torch", "option": "cache_gib: -1"},
            "s.yaml:7: `models.m.engine.cache_gib`: Input should be greater",
        ),
        (
            {"name": "vllm", "option": "runner: native"},
            "s.yaml:7: `models.m.engine.runner`: `runner` is an option of the torch engine; "
            "vllm has: cache_gib, compile",
        ),
        (
            {"name": "vllm", "beside": "runner: native"},
            "s.yaml:8: `models.m.runner`: `runner` is an option of the torch engine",
        ),
        (
            {"name": "task", "beside": "cache_gib: 2"},
            "is an option of the torch and the vllm engine; task has: max_wait_ms",
        ),
        (
            {"name": "torch", "beside": "runer: native"},
            "s.yaml:8: unknown key `runer` in models.m; did you mean `runner`?",
        ),
        ({"name": "torch", "beside": "runner: nativ"}, "s.yaml:8: `models.m.runner`: Input should be 'auto', 'native'"),
        (
            {"name": "torch", "option": "cache_gib: 2", "beside": "cache_gib: 2"},
            "s.yaml:8: `models.m.cache_gib`: also given under `engine`; keep it there",
        ),
        (
            {"name": "vllm", "precision": "int4"},
            "s.yaml:4: `models.m.precision`: the vllm engine has no 'int4', only auto",
        ),
        ({"name": "auto", "option": "waits: 2"}, "s.yaml:7: `models.m.engine.waits`: the torch engine has no option"),
    ],
)
def test_options_of_other_engines_and_typos_are_refused_in_their_line(engine: dict[str, str], wanted: str) -> None:
    text = ENGINE_SPEC.format(**{"precision": "auto", "option": "", "beside": "", **engine})
    with pytest.raises(UserError) as caught:
        specfile.loads(text, ServeSpec, name="s.yaml")
    assert wanted in str(caught.value)


def test_options_survive_the_way_to_the_cluster() -> None:
    own = "{model: d, engine: 'my.engine:E', runner: torch}"
    text = f"models: {{a: {{model: d, engine: {{name: torch, cache_gib: 2}}}}, b: {own}}}"
    spec = specfile.loads(text, ServeSpec, ["models.a.engine.runner=torch"])
    again = ServeSpec.model_validate_json(spec.model_dump_json(exclude_unset=True))
    assert again == spec
    assert again.models["a"].engine_options == {"cache_gib": 2, "runner": "torch"}
    assert (again.models["b"].engine.name, again.models["b"].engine_options) == ("my.engine:E", {"runner": "torch"})


@pytest.mark.parametrize(
    "given",
    [{"engine": {"runner": "torch", "cache_gib": 0.5}}, {"engine": "torch", "runner": "torch", "cache_gib": 0.5}],
)
def test_what_a_model_says_of_its_engine_reaches_the_engine(given: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny_models.language_model(tmp_path / "tiny")
    model = {"model": str(directory), "precision": "int8", **given}
    (planned,) = plan.resolve(ServeSpec.model_validate({"models": {"m": model}}))
    assert (planned.engine, planned.precision, planned.code) == ("torch", "int8", None)
    assert planned.options == {"runner": "torch", "compile": False, "cache_gib": 0.5, **LEFT}


LEFT = {"tool_format": "auto", "pooling": "mean"}
"""What an engine is told where the spec says nothing."""


def test_vllm_gets_what_it_understands(tmp_path: Path) -> None:
    directory = str(tiny_models.language_model(tmp_path / "tiny"))
    spec = {"models": {"m": {"model": directory, "engine": "vllm", "cache_gib": 2, "compile": True}}}
    (planned,) = plan.resolve(ServeSpec.model_validate(spec))
    assert (planned.engine, planned.options) == ("vllm", {"compile": True, "cache_gib": 2, "tool_format": "auto"})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"precision": "int8"}, r"models\.m\.precision: the task engine has no 'int8', only auto, bf16, fp32"),
        ({"runner": "torch"}, r"models\.m\.runner: `runner` is an option of the torch engine; task has: max_wait_ms"),
        (
            {"engine": {"compile": True}},
            r"models\.m\.engine\.compile: `compile` is an option of the torch and the vllm",
        ),
        ({"engine": "torch"}, r"models\.m\.engine: 'torch' cannot serve image-classification; use 'task' or leave"),
    ],
)
def test_what_auto_settles_late_is_refused_before_anything_is_deployed(
    given: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    directory = tiny_models.image_classifier(tmp_path / "shapes")
    spec = ServeSpec.model_validate({"models": {"m": {"model": str(directory), **given}}})
    with pytest.raises(UserError, match=wanted):
        plan.resolve(spec)


def test_origins_are_let_in_only_where_they_are_named() -> None:
    model = "models: {m: {model: x}}\n"
    assert specfile.loads(model, ServeSpec).cors.origins == []
    named = ["https://app.example", "http://localhost:3000", "http://[::1]:3000", "*"]
    assert specfile.loads(f"{model}cors: {{origins: {named}}}", ServeSpec).cors.origins == named


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://A.example", "null", "https://*.a", "", 3]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: Any) -> None:
    with pytest.raises(UserError, match=r"cors\.origins"):
        specfile.loads(f"models: {{m: {{model: x}}}}\ncors: {{origins: [{origin!r}]}}", ServeSpec)


@pytest.mark.parametrize(
    ("given", "place", "said"),
    [
        ({"env_vars": {"PYTHONPATH": "/x"}}, ("env_vars", "PYTHONPATH"), "reserved"),
        ({"env_vars": {"LD_PRELOAD": "/x.so"}}, ("env_vars", "LD_PRELOAD"), "reserved"),
        ({"env_vars": {"RAY_ADDRESS": "x"}}, ("env_vars", "RAY_ADDRESS"), "reserved"),
        ({"env_vars": {"MLFLOW_TRACKING_URI": "x"}}, ("env_vars", "MLFLOW_TRACKING_URI"), "reserved"),
        ({"env_vars": {"pythonpath": "/x"}}, ("env_vars", "pythonpath"), "would be PYTHONPATH in capitals"),
        ({"env_vars": {"Ray_Address": "x"}}, ("env_vars", "Ray_Address"), "reserved"),
        ({"env_vars": {" LD_PRELOAD": "x"}}, ("env_vars", " LD_PRELOAD"), "no name"),
        ({"env_vars": {"A": {"B": "x"}}}, ("env_vars", "A"), "must be a text"),
        ({"pip": {"packages": ["a"]}}, ("pip",), "a list"),
        ({"pip": ["a"], "py_executable": "python3"}, ("pip",), "beside py_executable"),
        ({"env_vars": {"THREADS": 2}}, ("env_vars", "THREADS"), "in quotes"),
        ({"env_vars": {"A B": "x"}}, ("env_vars", "A B"), "no name"),
        ({"env_vars": None}, ("env_vars",), "a mapping"),
        ({"pip": "torch"}, ("pip",), "a list"),
        ({"pip": ["a", 3]}, ("pip", 1), "one requirement"),
        ({"working_dir": "."}, ("working_dir",), "beside the spec"),
        ({"nope": 1}, ("nope",), "known are image_uri"),
        ({"image_uri": "x:1", "pip": ["a"]}, ("image_uri",), "stands alone"),
    ],
)
def test_what_a_runtime_env_cannot_hold_is_refused_with_its_place(
    given: dict[str, Any], place: tuple[str | int, ...], said: str
) -> None:
    (found,) = runtime_env.mistakes(given)
    assert found.place == place
    assert said in found.message
    with pytest.raises(ValidationError) as refused:
        ServeSpec.model_validate({"models": {"a": {"model": "/m", "runtime_env": given}}})
    assert refused.value.errors()[0]["loc"] == ("models", "a", "runtime_env", *place)


def test_a_runtime_env_may_hold_what_is_documented() -> None:
    assert not list(runtime_env.mistakes({"pip": ["a==1"], "env_vars": {"HF_HUB_OFFLINE": "1", "RAYON": "2"}}))
    assert not list(runtime_env.mistakes({"image_uri": "a:1", "env_vars": {}}))


def test_a_failed_runtime_env_is_a_sentence() -> None:
    raised = (
        "Failed to set up runtime environment.\nTraceback (most recent call last):\n  File x, line 1\n"
        "ERROR: No matching distribution found for nope==9\n\n  raise RuntimeError(\n"
    )
    said = runtime_env.sentence(raised)
    assert said == "its runtime_env cannot be set up on a node: ERROR: No matching distribution found for nope==9"
    assert runtime_env.sentence("the model is too large") == "the model is too large"


def test_clients_are_not_told_where_a_model_lies(tmp_path: Path) -> None:
    folder = tiny_models.image_classifier(tmp_path / "shapes")
    manifest = manifests.read(folder)
    for parent, told in ((str(tmp_path / "before"), "before"), ("org/name", "org/name"), (None, None)):
        manifests.write(folder, manifest.model_copy(update={"parent": parent}))
        (planned,) = plan.resolve(ServeSpec.model_validate({"models": {"m": {"model": str(folder)}}}))
        assert planned.directory == str(folder)
        assert (planned.details["uri"], planned.details["parent"]) == ("shapes", told)
        assert str(tmp_path) not in str(planned.details)
