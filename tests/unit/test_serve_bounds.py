"""ServeSpec: numbers are finite and bounded, and a runtime environment says only what it may."""

from __future__ import annotations

import pytest

from cluster import specfile
from cluster.errors import UserError
from serve.deploy import plan
from serve.spec import ServeSpec

INNER = ("constrained", "function-", "tagged", "lax-or-strict")


@pytest.mark.parametrize(
    "setting",
    [
        "replicas: 1000000000",
        "replicas: true",
        "replicas: {max: 1.0e+9}",
        "replicas: {target_ongoing: .nan}",
        "replicas: many",
        "max_batch: 1000000000",
        "max_context: 1000000000000",
        "max_queued: true",
        "upscale_delay_s: .inf",
        "downscale_delay_s: .nan",
        "cache_gib: .inf",
        "resources: {cpus_per_replica: .nan}",
        "resources: {gpus_per_replica: 1.0e+9}",
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(setting: str) -> None:
    with pytest.raises(UserError) as caught:
        specfile.loads(f"models:\n  m:\n    model: d\n    {setting}", ServeSpec)
    message = str(caught.value)
    assert message.startswith(f"spec:4: `models.m.{setting.partition(':')[0]}"), message
    assert not any(name in message for name in INNER), message


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        *(("torch", f"cache_gib: {value}") for value in ("-1", "0", ".inf", ".nan", "true", "1.0e+30", "many")),
        *(("vllm", f"cache_gib: {value}") for value in ("0", "1.5", "99999999999")),
        *(("task", f"max_wait_ms: {value}") for value in ("-1", ".inf", "1.0e+12", "true")),
        ("torch", "compile: 3"),
        ("torch", "pooling: max"),
        ("torch", "runner: 3"),
        ("torch", "tool_format: xml"),
    ],
)
def test_options_of_engines_that_cannot_be_are_refused_by_name(engine: str, option: str) -> None:
    with pytest.raises(UserError) as caught:
        specfile.loads(f"models:\n  m:\n    model: d\n    engine:\n      name: {engine}\n      {option}", ServeSpec)
    message = str(caught.value)
    assert message.startswith(f"spec:6: `models.m.engine.{option.partition(':')[0]}`: "), message
    assert "Input should be a valid" not in message


def test_all_mistakes_of_a_model_are_told_at_once() -> None:
    text = "models:\n  m:\n    model: d\n    engine: {name: torch, cache_gib: -1, compile: 3}\n    max_batch: 0"
    with pytest.raises(UserError) as caught:
        specfile.loads(text, ServeSpec)
    told = str(caught.value)
    assert [name in told for name in ("engine.cache_gib", "engine.compile", "max_batch")] == [True] * 3
    assert len(told.splitlines()) == 3


RESERVED = ("PYTHONPATH", "LD_PRELOAD", "RAY_X", "MLFLOW_TRACKING_URI", "TANDEM_HOME")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *(
            (f"{{env_vars: {{{name}: x}}}}", f"env_vars.{name}`: is reserved")
            for name in ("PYTHONPATH", "LD_PRELOAD", "RAY_X")
        ),
        *(
            (f"{{env_vars: {{{name}: x}}}}", f"env_vars.{name}`: is reserved")
            for name in ("MLFLOW_TRACKING_URI", "TANDEM_HOME")
        ),
        ("{env_vars: {A: 1}}", "`models.m.runtime_env.env_vars.A`: must be a text"),
        ("{env_vars: [A]}", "`models.m.runtime_env.env_vars`: must be a mapping"),
        ("{pip: [einops, 3]}", "`models.m.runtime_env.pip.1`: must be one requirement"),
        ("{pips: [einops]}", "did you mean 'pip'?"),
        ("{working_dir: .}", "code of your own is sent from beside the spec"),
        ("{pip: [einops, '-r more.txt']}", "`models.m.runtime_env.pip.1`: names a file, which the nodes do not have"),
        ("{pip: [./wheel.whl]}", "`models.m.runtime_env.pip.0`: names a file, which the nodes do not have"),
        ("{container: {image: a}}", "cannot be set: name the image as image_uri"),
        ("{env_vars: {__RAY_X: '1'}}", "`models.m.runtime_env.env_vars.__RAY_X`: is reserved"),
        ("{image_uri: 5}", "`models.m.runtime_env.image_uri`: must be a text"),
    ],
)
def test_a_runtime_environment_is_refused_with_its_place(given: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        specfile.loads(f"models: {{m: {{model: d, runtime_env: {given}}}}}", ServeSpec)
    assert wanted in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    text = "models: {m: {model: d, replicas: 0, runtime_env: {env_vars: {RAY_A: x, PYTHONHOME: y}}}}\ndrain_s: .inf"
    with pytest.raises(UserError) as caught:
        specfile.loads(text, ServeSpec)
    assert len(str(caught.value).splitlines()) == 4


def test_what_is_documented_is_accepted() -> None:
    given = "{pip: [einops], env_vars: {A: 'b'}}"
    spec = specfile.loads(f"models: {{m: {{model: d, runtime_env: {given}}}}}", ServeSpec)
    assert spec.models["m"].runtime_env == {"pip": ["einops"], "env_vars": {"A": "b"}}
    assert ServeSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_context_that_the_model_cannot_have_is_refused_before_a_replica_starts():
    plan.check_context("chat", None, True, {})
    plan.check_context("chat", 256, True, {"max_position_embeddings": 256})
    plan.check_context("chat", 9999, True, {"model_type": "mamba"})
    for config in ({"max_position_embeddings": 256}, {"text_config": {"max_position_embeddings": 256}}):
        with pytest.raises(UserError, match=r"models\.chat\.max_context: 257 is above the 256 positions"):
            plan.check_context("chat", 257, True, config)
    with pytest.raises(UserError, match="generates no text"):
        plan.check_context("mood", 5, False, {})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("models: {m: {model: d, upscale_delay_s: 3}}", "models.m.upscale_delay_s"),
        ("models: {m: {model: d, replicas: 2, downscale_delay_s: 3}}", "models.m.downscale_delay_s"),
        ("models: {m: {model: d, replicas: {min: 2, max: 2}, downscale_delay_s: 3}}", "models.m.downscale_delay_s"),
        ("models: {m: {model: d}}\ngateway: {replicas: {target_ongoing: 3}}", "gateway.replicas.target_ongoing"),
        ("models: {m: {model: d}}\ngateway: {upscale_delay_s: 3}", "gateway.upscale_delay_s"),
    ],
)
def test_how_to_scale_beside_a_fixed_number_of_replicas_is_refused_by_name(text: str, place: str) -> None:
    with pytest.raises(UserError) as refused:
        specfile.loads(text, ServeSpec)
    assert place in str(refused.value)
    assert "does nothing where the number of replicas is fixed" in str(refused.value)


def test_a_part_of_a_second_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"gpus_per_replica.*whole number"):
        specfile.loads("models: {m: {model: d, resources: {gpus_per_replica: 1.5}}}", ServeSpec)
