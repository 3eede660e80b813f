"""What generation_config.json asks for is a default, or is said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from serve.engines import sampling_defaults


def folder(tmp_path: Path, **config) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return tmp_path


def test_sampling_is_a_default(tmp_path: Path) -> None:
    directory = folder(tmp_path, temperature=0.6, top_k=20, do_sample=True, eos_token_id=[1, 2], top_p=None)
    assert sampling_defaults.read(directory) == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults.left_out(directory) is None


def test_a_model_that_says_it_is_greedy_is(tmp_path: Path) -> None:
    assert sampling_defaults.read(folder(tmp_path, do_sample=False, temperature=1.0)) == {"temperature": 0.0}


def test_none_and_no_file_ask_for_nothing(tmp_path: Path) -> None:
    assert sampling_defaults.read(tmp_path) == {}
    assert sampling_defaults.left_out(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1]),
        ("max_new_tokens", 64),
        ("typical_p", 0.9),
    ],
)
def test_what_is_not_honoured_is_named(tmp_path: Path, name: str, value: object) -> None:
    said = sampling_defaults.left_out(folder(tmp_path, **{name: value}))
    assert said is not None
    assert f"{name}: {json.dumps(value)}" in said


def test_values_that_change_nothing_are_not(tmp_path: Path) -> None:
    neutral = {"num_beams": 1, "typical_p": 1.0, "bad_words_ids": [], "min_length": 0, "penalty_alpha": 0.0}
    assert sampling_defaults.left_out(folder(tmp_path, **neutral)) is None


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_file_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json: not"):
        sampling_defaults.read(tmp_path)
