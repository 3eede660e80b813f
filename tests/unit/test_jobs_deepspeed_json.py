"""A DeepSpeed JSON of the user's own: what is let through, what is taken out, and what is refused with its way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from jobs.worker import deepspeed_json
from jobs.worker.deepspeed_keys import LEAF, OFFLOAD, SPEC, STAGE3_NAMES, TOP, ZERO, Refused


def read(folder: Path, content: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_json.read(path)


def refused(folder: Path, content: Any) -> list[str]:
    """Return the sentences, without the path before each."""
    with pytest.raises(UserError) as found:
        read(folder, content)
    return [line.removeprefix(f"{folder / 'ds.json'}: ") for line in str(found.value).splitlines()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds a list, not an object"),
        ("{", "cannot read"),
        ('{"log_level": "info", "log_level": "debug"}', 'the key "log_level" is given twice'),
    ],
)
def test_a_file_that_is_no_object_or_says_a_thing_twice(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such\.json"):
        deepspeed_json.read(tmp_path / "no-such.json")


@pytest.mark.parametrize(("key", "place"), SPEC.items())
def test_what_the_spec_decides_is_refused_with_its_place(tmp_path: Path, key: str, place: str) -> None:
    (said,) = refused(tmp_path, {key: {"enabled": True}})
    assert said == f"`{key}`: the spec's `training` section decides that ({place}); remove it"


@pytest.mark.parametrize("key", [key for key, rule in TOP.items() if isinstance(rule, Refused)])
def test_what_would_change_the_result_or_do_nothing_is_refused_with_a_way_out(tmp_path: Path, key: str) -> None:
    (said,) = refused(tmp_path, {key: {"enabled": True}})
    assert said.startswith(f"`{key}`: ")
    assert "; " in said or ": " in said.removeprefix(f"`{key}`: ")


@pytest.mark.parametrize("key", [key for key, rule in ZERO.items() if isinstance(rule, Refused)])
def test_the_same_inside_zero_optimization(tmp_path: Path, key: str) -> None:
    (said,) = refused(tmp_path, {"zero_optimization": {"stage": 3, key: 4}})
    assert said.startswith(f"`zero_optimization.{key}`: ")


@pytest.mark.parametrize("key", [key for key, rule in OFFLOAD.items() if isinstance(rule, Refused)])
def test_the_same_inside_an_offload(tmp_path: Path, key: str) -> None:
    (said,) = refused(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", key: 0.5}}})
    assert said.startswith(f"`zero_optimization.offload_param.{key}`: ")


def test_what_asks_for_nothing_is_taken_out(tmp_path: Path) -> None:
    """As in the templates of other tools: "auto", null, sections that are off, and what a key is anyway."""
    content = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "auto", "params": {"lr": "auto"}},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "flops_profiler": {"enabled": False},
        "sparse_attention": None,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "reduce_bucket_size": "auto",
            "offload_param": {"device": "cpu", "pin_memory": True, "fast_init": False},
            "zero_quantized_weights": False,
        },
    }
    kept = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
    assert read(tmp_path, content) == kept


def test_off_is_a_precision_too(tmp_path: Path) -> None:
    (said,) = refused(tmp_path, {"bf16": {"enabled": False}})
    assert "training.precision" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {}}, "; did you mean `zero_optimization`?"),
        ({"steps_per_prnt": 1}, "; did you mean `steps_per_print`?"),
        ({"curriculum_lerning": 1}, "; did you mean `curriculum_learning`?"),
        ({"zero_optimization": {"stage": 3, "reduce_buket_size": 1}}, "mean `zero_optimization.reduce_bucket_size`?"),
        ({"zero_optimization": {"stage3_max_live_params": 1}}, "did you mean `zero_optimization.stage3_max_live_par"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"divice": "cpu"}}},
            "zero_optimization.offload_param.device`?",
        ),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"nams": []}}}, "zero_optimization.leaf_module.names`?"),
        ({"overlap_comm": True}, "there: `zero_optimization.overlap_comm` is one; move it"),
        ({"zero_optimization": {"log_level": "info"}}, "there: `log_level` is one; move it"),
        ({"xyzzy": 1}, "`xyzzy` is no key that DeepSpeed 0.19 knows; remove it"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_one(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, content)[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": True}, "`zero_optimization` is true; it takes an object"),
        ({"zero_optimization": {"stage": "3"}}, '`zero_optimization.stage` is "3"; it takes 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, "`zero_optimization.stage` is true; it takes 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "is 0; it takes a whole number from 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1.5}}, "is 1.5; it takes a whole number from 1"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, 'is "yes"; it takes true or false'),
        ({"communication_data_type": "bf16"}, 'is "bf16"; it takes "fp32"'),
        ({"log_level": "chatty"}, 'is "chatty"; it takes "debug" or "info"'),
        ({"steps_per_print": 10}, '`steps_per_print` prints nothing unless `log_level` is "info"; set that too'),
        (
            {"zero_optimization": {"stage": 2, "leaf_module": {}}},
            "has an effect at ZeRO stage 3 alone, and the stage is 2",
        ),
        (
            {"zero_optimization": {"overlap_comm": True}},
            "at ZeRO stage 1 and 2 and 3 alone, and the stage is 0; remove",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "at ZeRO stage 3 alone"),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
            "`zero_optimization.prefetch_bucket_size` and `stage3_prefetch_bucket_size` are one setting",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            '`zero_optimization.offload_optimizer.device`: device "nvme" needs a folder',
        ),
    ],
)
def test_a_value_that_does_not_fit_or_has_no_effect_is_named(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refused(tmp_path, content)[0]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = refused(
        tmp_path, {"amp": {"enabled": True}, "zero_optimization": {"stage": 2, "ratio": 1, "leaf_module": {}}}
    )
    assert [line.split(" ")[0].strip(":") for line in said] == [
        "`amp`",
        "`zero_optimization.ratio`",
        "`zero_optimization.leaf_module`",
    ]


def test_the_page_says_of_each_key_what_becomes_of_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    named = {*TOP, *SPEC, *ZERO, *OFFLOAD, *LEAF, *(f"stage3_{name}" for name in STAGE3_NAMES if name not in page)}
    assert [key for key in sorted(named) if f"`{key}`" not in page] == []
