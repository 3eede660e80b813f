"""The model card says what is known of a model, and how to call it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.driver import card
from jobs.tasks.image_classification import ImageClassification
from jobs.tasks.text_classification import TextClassification
from tests.support import tiny_models
from tracking import version_tags
from tracking.manifest import BaseRef, DatasetRef, ModelManifest

FACTS = card.Facts(
    "pretrain", 1234, 2**20, 90, 10, ["2 of 100 examples\nare copies"], 3, ["a.csv:7: no label"], {"steps": 5}
)


def manifest(**changes: Any) -> ModelManifest:
    known = {"name": "m", "task": "text-classification", "architecture": "bert", "evaluation": {"loss": 0.25}}
    return ModelManifest(**{**known, "dataset": DatasetRef(name="a.csv", digest="d" * 64), **changes})


def test_a_card_tells_data_metrics_limits_and_what_was_left_out() -> None:
    text = card.text(manifest(remarks=["its tokenizer is a word's"], parent="models:/p/1"), TextClassification(), FACTS)
    assert text.startswith('---\nlibrary_name: "transformers"\ntags: ["tandem", "text-classification", "bert"]\n')
    for told in (
        "`bert`, 1,234 parameters, 1.0 MiB",
        "| made from | `models:/p/1` |",
        "| pretrain | steps 5 |",
        "90 rows to learn from, 10 held out",
        "- 2 of 100 examples are copies",
        "- 3 bad rows were left out; the first: a.csv:7: no label",
        "| loss | 0.25 | lower |",
        "- its tokenizer is a word's",
    ):
        assert told in text, told


def test_a_card_shows_a_request_of_the_model_s_own_inputs() -> None:
    task = ImageClassification()
    task.size, task.channels = (4, 6), 3
    text = card.text(manifest(task="image-classification", name="it's"), task, FACTS)
    assert "/v2/models/it's/infer" in text
    assert (
        json.dumps({"name": "image", "datatype": "UINT8", "shape": [1, 4, 6, 3], "data": ["…"]}, ensure_ascii=False)
        in text
    )
    assert "| image | UINT8 | [-1, 4, 6, 3] |" in text


@pytest.mark.parametrize(("template", "path"), [("{{ messages }}", "/v1/chat/completions"), (None, "/v1/completions")])
def test_a_model_that_generates_is_called_as_its_tokenizer_allows(template: str | None, path: str) -> None:
    from jobs.tasks.causal_lm import CausalLM

    task = CausalLM()
    task.tokenizer = tiny_models.tokenizer()
    task.tokenizer.chat_template = template
    assert f"curl $ENDPOINT{path} " in card.text(manifest(task="causal-lm"), task, FACTS)


def test_nothing_held_out_and_nothing_trained_are_said() -> None:
    facts = card.Facts("quantize", None, 0, 0, 0, [], 0, [], None)
    text = card.text(manifest(evaluation={}, quantization={"method": "int8-weight-only"}), TextClassification(), facts)
    assert "Nothing was held out" in text
    assert "| weights | int8-weight-only |" in text
    assert "steps" not in text


def test_the_registry_s_description_is_the_card_without_its_head(tmp_path: Path) -> None:
    assert version_tags.description_of(tmp_path) is None
    (tmp_path / card.FILE_NAME).write_text(card.text(manifest(), TextClassification(), FACTS))
    told = version_tags.description_of(tmp_path)
    assert told is not None
    assert told.startswith("# m\n")
    (tmp_path / card.FILE_NAME).write_text("# m\n" + "x" * 10_000)
    told = version_tags.description_of(tmp_path)
    assert told is not None
    assert len(told) < 5000
    assert told.endswith("(the rest is in README.md beside the weights)")


def test_a_card_says_which_sweep_chose_the_model_and_what_that_does_to_its_figures() -> None:
    text = card.text(manifest(sweep={"sweep": "s-1", "trial": 3, "metric": "loss"}), TextClassification(), FACTS)
    assert "| sweep | `s-1`, trial 3 |" in text
    assert "- A sweep chose it by loss on these rows, which flatters its figures." in text


def test_a_card_of_adapters_alone_names_their_base() -> None:
    base = BaseRef(reference="models:/lm/3", digest="e" * 64)
    text = card.text(manifest(base=base, parent="models:/lm/3"), TextClassification(), replace(FACTS, parameters=None))
    assert text.startswith('---\nlibrary_name: "peft"\n')
    assert 'base_model: "models:/lm/3"' in text
    assert "| weights | adapters alone; their base is `models:/lm/3` |" in text
