"""A model that is fine-tuned with another tokenizer ends where that one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.tasks.causal_lm import CausalLM
from jobs.worker.export import save
from serve.engines.torch.torch_engine import eos_tokens
from tests.support import tiny_models

ENDS = {"eos_token_id": [2, 1], "bos_token_id": 0, "pad_token_id": 0, "bad_words_ids": [[7]], "top_k": 9}


def moved() -> Any:
    """Return a tokenizer with the special tokens of `tiny_models.tokenizer()` under other numbers, one renamed.

    <|im_end|> is 0 (before: 2), <|pad|> 1, and there is no <|im_start|>.
    """
    fast = tiny_models.tokenizer(300)
    raw = json.loads(fast.backend_tokenizer.to_str())
    swap = {"<|im_end|>": 0, "<|endoftext|>": 2}
    vocabulary = {("<|pad|>" if token == "<|im_start|>" else token): swap.get(token, at)
                  for token, at in raw["model"]["vocab"].items()}  # fmt: skip
    raw["model"]["vocab"] = vocabulary
    for token in raw["added_tokens"]:
        token["content"] = token["content"].replace("<|im_start|>", "<|pad|>")
        token["id"] = vocabulary[token["content"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|im_end|>", pad_token="<|pad|>"
    )


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    fast = tiny_models.tokenizer(300)
    model = tiny_models.decoder("llama", vocab_size=300, num_hidden_layers=1, eos_token_id=2, pad_token_id=0)
    folder = tiny_models.export(tmp_path / "parent", fast, model)
    (folder / "generation_config.json").write_text(json.dumps(ENDS))
    return folder


def test_end_tokens_are_those_of_the_new_tokenizer(parent: Path, tmp_path: Path) -> None:
    moved().save_pretrained(tmp_path / "tok")
    task = CausalLM({"sequence_length": 16, "tokenizer": {"from": str(tmp_path / "tok")}})
    task.inherit(parent)
    task.fit(None)
    model = task.load_model(parent, torch.float32)
    ends = model.generation_config
    assert (ends.eos_token_id, ends.bos_token_id, ends.pad_token_id) == ([0], 2, 2)
    assert (ends.top_k, ends.bad_words_ids) == (9, None)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 2)
    (said,) = [sentence for sentence in task.said if "generation config" in sentence]
    assert "eos_token_id 2 ('<|im_end|>'), 1 ('<|im_start|>') becomes 0" in said
    assert "bad_words_ids is left out" in said

    child = tmp_path / "child"
    child.mkdir()
    save(model, child)
    task.save(child)
    served = CausalLM.load(child)
    loaded = served.load_model(child, torch.float32)
    assert eos_tokens(loaded, served.tokenizer) == {0}
    again = CausalLM.load(child, task.options)
    again.load_model(child, torch.float32)
    assert list(again.said) == [], "its own tokenizer is no other one"


def test_the_models_own_tokenizer_changes_nothing(parent: Path) -> None:
    task = CausalLM.load(parent, {"sequence_length": 16, "tokenizer": {"from": str(parent)}})
    model = task.load_model(parent, torch.float32)
    assert model.generation_config.eos_token_id == [2, 1]
    assert model.generation_config.bad_words_ids == [[7]]
    assert list(task.said) == []


def test_a_parent_without_a_tokenizer_says_nothing_of_its_numbers(parent: Path, tmp_path: Path) -> None:
    tiny_models.tokenizer(300).save_pretrained(tmp_path / "tok")
    for path in parent.glob("*token*"):
        path.unlink()
    task = CausalLM.load(tmp_path / "tok", {"sequence_length": 16, "tokenizer": {"from": str(tmp_path / "tok")}})
    model = task.load_model(parent, torch.float32)
    assert model.generation_config.eos_token_id == [2]
    assert "eos_token_id 2 (None), 1 (None) becomes what the tokenizer says" in " ".join(task.said)


def test_a_classifier_pools_before_the_padding_of_its_tokenizer(tmp_path: Path) -> None:
    """transformers looks for the last token by the number that the config gives the padding, whatever the mask says."""
    from jobs.tasks import text_rows
    from jobs.tasks.text_classification import TextClassification

    fast = tiny_models.tokenizer(300)
    model = tiny_models.decoder("llama", spread=0.3, vocab_size=300, num_hidden_layers=1, pad_token_id=5)
    parent = tiny_models.export(tmp_path / "parent", fast, model)
    task = TextClassification({"max_length": 16})
    task.tokenizer, task.labels, task.max_length = fast, ["a", "b"], 16
    torch.manual_seed(0)
    loaded = task.load_model(parent, torch.float32)
    assert loaded.config.pad_token_id == fast.pad_token_id
    alone = task._logits(loaded, text_rows.batch_of(text_rows.tokenise(fast, [("fox",)], 16)))
    both = text_rows.tokenise(fast, [("fox",), ("the quick brown fox jumps",)], 16)
    beside = task._logits(loaded, text_rows.batch_of(both))
    torch.testing.assert_close(beside[0], alone[0])
    assert any("padding" in sentence for sentence in task.said)
