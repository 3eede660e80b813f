"""Text classifiers: those of transformers, and a small one of ours in the same layout.

Ours is the mean of word and n-gram vectors, then one layer, after fastText (Joulin et al. 2017, arXiv:1607.01759).
N-grams of tokens are hashed into one table. Their vectors begin at zero, so that an n-gram never seen in training says
nothing; and tokens are left out at random while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from jobs.tasks import TaskError, loading
from jobs.tasks.architectures import check_builds, check_entries, config_for

TABLE = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
"""The name of transformers' own table of the architectures that classify texts."""


class NgramConfig(PretrainedConfig):
    """ngrams: longest n-gram, in tokens. buckets: vectors for n-grams. token_dropout: share of tokens left out."""

    model_type = "ngram"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 64,
        ngrams: int = 2,
        buckets: int = 1 << 15,
        dropout: float = 0.5,
        token_dropout: float = 0.3,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.ngrams, self.buckets = ngrams, buckets
        self.dropout, self.token_dropout = dropout, token_dropout
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class NgramForSequenceClassification(PreTrainedModel):
    """input_ids and attention_mask (B, S) int64 → logits (B, labels)."""

    config_class = NgramConfig

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.grams = torch.nn.Embedding(config.buckets, config.hidden_size)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.head = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Classify texts, token ids (B, S); `attention_mask` (B, S) is 0 at padding. Logits (B, labels)."""
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vectors, weights, hashed = [self.words(input_ids)], [seen], input_ids
        for n in range(1, min(self.config.ngrams, input_ids.shape[1])):
            hashed = (hashed[:, :-1] * 1_000_003 + input_ids[:, n:] * 7_919 + n) % self.config.buckets
            vectors.append(self.grams(hashed))
            weights.append(seen[:, n:])
        weight = self._thinned(torch.cat(weights, 1).to(vectors[0].dtype))
        total = torch.einsum("bsh,bs->bh", torch.cat(vectors, 1), weight)
        mean = total / torch.cat(weights, 1).sum(1, keepdim=True).clamp(min=1)
        return SequenceClassifierOutput(logits=self.head(self.dropout(mean)))

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the vectors of single tokens, as transformers asks for them."""
        return self.words

    def _thinned(self, weight: torch.Tensor) -> torch.Tensor:
        """Leave out some of the tokens (B, S) while training, and weigh the others up."""
        return torch.nn.functional.dropout(weight, self.config.token_dropout, self.training)

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self.grams:
            torch.nn.init.zeros_(self.grams.weight)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            torch.nn.init.zeros_(module.bias)


def register() -> None:
    """Make `ngram` known to transformers' Auto classes. Safe to call again."""
    AutoConfig.register(NgramConfig.model_type, NgramConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(NgramConfig, NgramForSequenceClassification, exist_ok=True)


def check(architecture: str, config: Mapping[str, Any]) -> None:
    """Raise TaskError for an unknown architecture, or an entry that its config has not."""
    register()
    if architecture != NgramConfig.model_type:
        resolved = config_for(architecture, dict(config), TABLE, "classifying")
        check_builds(AutoModelForSequenceClassification, architecture, resolved)
        return
    check_entries(architecture, NgramConfig(), config)


def build(
    architecture: str, config: Mapping[str, Any], tokenizer: Any, labels: Sequence[str], max_length: int
) -> PreTrainedModel:
    """Make `ngram` or an encoder of transformers with fresh weights, in fp32; `config` is the user's entries of it.

    Raises:
        TaskError: an unknown architecture or entry, or too few embeddings for the tokens or positions.
    """
    check(architecture, config)
    if architecture == NgramConfig.model_type:
        known = defaults(NgramConfig(), tokenizer, labels, max_length)
        resolved: Any = NgramConfig(**{**known, **config})
    else:
        known = defaults(config_for(architecture, {}, TABLE, "classifying"), tokenizer, labels, max_length)
        resolved = config_for(architecture, dict(config), TABLE, "classifying", known)
    check_fits(resolved, tokenizer, max_length)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(resolved, dtype=torch.float32)
    return model


def defaults(default: Any, tokenizer: Any, labels: Sequence[str], max_length: int) -> dict[str, Any]:
    """Return the entries of a config that follow from the tokenizer and the labels, where it has them."""
    padding, positions = tokenizer.pad_token_id, getattr(default, "max_position_embeddings", None)
    known = {
        "vocab_size": len(tokenizer),
        "pad_token_id": padding,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        # roberta counts positions from behind the padding's id
        "max_position_embeddings": positions and max(positions, max_length + padding + 1),
    }
    marks = {key for key in ("cls_token_id", "sep_token_id") if known[key] is None}  # some configs take no None there
    return {**{k: v for k, v in known.items() if k not in marks and hasattr(default, k)}, **named(labels)}


def named(labels: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a config that name the labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def check_fits(config: Any, tokenizer: Any, max_length: int) -> None:
    """Refuse tokens or positions that a model has no embeddings for: some later step would fail.

    Raises:
        TaskError: there are more of them than the model has.
    """
    if getattr(config, "vocab_size", len(tokenizer)) < len(tokenizer):  # canine hashes characters, and has none
        raise TaskError(f"the model's vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and 0 < positions < max_length:  # xlnet has -1: no limit
        raise TaskError(f"task.max_length is {max_length}, but the model has {positions} positions")


@torch.inference_mode()
def vectors(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean of the last hidden states of B texts at length 1: (B, H) fp32, on the CPU.

    Args:
        batch: input_ids and attention_mask (B, S) int64; padding does not count.

    Raises:
        TaskError: the model does not tell a state for each token.
    """
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    states = getattr(model.base_model(**inputs), "last_hidden_state", None)
    if states is None or states.shape[:2] != inputs["input_ids"].shape:
        raise TaskError(f"{type(model).__name__} does not tell a hidden state for each token")
    total = (states.float() * inputs["attention_mask"].unsqueeze(-1)).sum(1)
    return torch.nn.functional.normalize(total, dim=-1).cpu()


def pad_as(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """Give a model's config the padding of the tokenizer; return what is to be said.

    Some models look for a text's last token by that number in the config, whatever the attention mask says.
    """
    was, padding = getattr(model.config, "pad_token_id", None), tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = padding
    if was in (None, padding):
        return []
    return [f"the padding in the model's config was token {was}; it is that of the tokenizer, {padding}"]


def check_parent(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise TaskError for a model that classifies no texts, or an entry that its config has not."""
    register()
    loading.check_parent(directory, config, TABLE, "classifying")


def load(
    directory: Path, dtype: torch.dtype | None, settings: Mapping[str, Any], may_lack_head: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model directory or a hub id; return it and what is to be said (jobs/tasks/loading.py)."""
    register()
    return loading.load(AutoModelForSequenceClassification, directory, dtype, settings, may_lack_head)
