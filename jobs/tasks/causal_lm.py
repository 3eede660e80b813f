"""Task `causal-lm`: predict the next token. Pre-training on text, fine-tuning on conversations.

Rows (all int32, S = sequence_length):
    input_ids     (N, S+1)  a row overlaps the next by one token, so each token is predicted exactly once
    targets       (N,)      predictions that count towards the loss
    labels        (N, S+1)  conversations only: the token where it is part of an answer, else -100
    position_ids  (N, S+1)  conversations only: they start at 0 for each conversation packed into the row
"""

from __future__ import annotations

import bisect
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from jobs.tasks import Batch, Columns, TaskError, tokenization
from jobs.tasks.conversations import is_conversation, messages_of, render
from jobs.tasks.cross_entropy import IGNORED, cross_entropy_sum


class CausalLM:
    """Any transformers causal architecture. Options: sequence_length, tokenizer, text_column."""

    name: ClassVar[str] = "causal-lm"
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {"sequence_length": 256, "text_column": "text", **options}
        self.tokenizer: Any = None
        self._for_data = "sequence_length" in options
        """False where only a model directory is loaded: then rows have no length yet."""
        self._bytes_per_token: torch.Tensor | None = None

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example that is neither text nor a conversation with an answer."""
        if is_conversation(example):
            messages_of(example)
        else:
            self._text(example)

    def fit(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Train the tokenizer on the examples' text, or load the one named in `tokenizer.from`."""
        settings = self.options.get("tokenizer") or {}
        if settings.get("from"):
            self.tokenizer = tokenization.load(settings["from"])
            return
        self.tokenizer = tokenization.train(
            settings.get("train") or "bpe", settings.get("vocab_size", 4096), self._texts(examples)
        )

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self.tokenizer.save_pretrained(directory)

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> CausalLM:
        """Read the tokenizer of a model directory (or a hub id)."""
        task = cls(options or {})
        task.tokenizer = tokenization.load(directory)
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Tokenise and pack: text into consecutive windows, conversations whole into rows by best fit."""
        if examples and is_conversation(examples[0]):
            return self._encode_conversations(examples)
        return self._encode_texts(list(self._texts(examples)))

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and labels (B, S), shifted against each other; position_ids where rows are packed."""
        ids = torch.from_numpy(rows["input_ids"].astype(np.int64))
        batch = {"input_ids": ids[:, :-1]}
        if "labels" in rows:
            batch["labels"] = torch.from_numpy(rows["labels"][:, 1:].astype(np.int64))
            batch["position_ids"] = torch.from_numpy(rows["position_ids"][:, :-1].astype(np.int64))
        else:
            beyond = torch.arange(ids.shape[1] - 1) >= torch.from_numpy(rows["targets"].astype(np.int64))[:, None]
            batch["labels"] = ids[:, 1:].masked_fill(beyond, IGNORED)
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `architecture` (a transformers model type: llama, qwen3, gpt2, …) from a config, in fp32."""
        from transformers import AutoModelForCausalLM

        resolved = _config_for(architecture, {**self._config_defaults(), **config})
        self._check_fits(resolved)
        model = AutoModelForCausalLM.from_config(resolved, dtype=torch.float32)
        model.generation_config = self._generation_config()
        return model

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao) or a hub id, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=dtype or "auto", trust_remote_code=False, **(config or {})
            )
        except (OSError, ValueError) as error:
            raise TaskError(f"cannot load a model from {str(directory)!r}: {str(error).splitlines()[0]}") from error
        if self.tokenizer is not None:
            self._check_fits(model.config.get_text_config())
            model.generation_config = self._generation_config()
        return model.eval()

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the targets, in fp32."""
        logits = self._logits(model, batch)
        labels = batch["labels"]
        return cross_entropy_sum(logits, labels), (labels != IGNORED).sum()

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets, correct first guesses and the UTF-8 bytes of the targets."""
        logits = self._logits(model, batch)
        labels = batch["labels"]
        counted = labels != IGNORED
        if self._bytes_per_token is None:
            self._bytes_per_token = torch.from_numpy(tokenization.bytes_per_token(self.tokenizer))
        targets = labels[counted]
        return {
            "loss": cross_entropy_sum(logits, labels),
            "targets": counted.sum(),
            "correct": (logits[counted].argmax(-1) == targets).sum(),
            "bytes": self._bytes_per_token.to(targets.device)[targets].sum(),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy, and bits_per_byte = loss_sum / (ln 2 · bytes)."""
        loss = sums["loss"] / max(sums["targets"], 1)
        summary = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sums["correct"] / max(sums["targets"], 1),
        }
        if sums["bytes"]:
            summary["bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
        return summary

    # -- use --------------------------------------------------------------------------------------------------------

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Refuse: an engine generates for this task."""
        raise TaskError("causal-lm generates; serve it with a generative engine, not with `predict`")

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the prompt as the Open Inference Protocol would."""
        return [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _texts(self, examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        for example in examples:
            if is_conversation(example):
                yield "".join(m["content"] for m in messages_of(example))
            else:
                yield self._text(example)

    def _text(self, example: Mapping[str, Any]) -> str:
        column = self.options["text_column"]
        text = example.get(column)
        if isinstance(text, str):
            return text
        if column in example:
            raise TaskError(f"column {column!r} holds {type(text).__name__}, not text")
        raise TaskError(
            f"no text in column {column!r}; this example has {sorted(example)}{_close(column, example)}. "
            "Name the column in data.text_column"
        )

    def _encode_texts(self, texts: list[str]) -> Columns:
        length, end = self.options["sequence_length"], self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        stream = np.fromiter((t for ids in encoded for t in (*ids, end)), dtype=np.int32)
        rows = max(1, math.ceil((len(stream) - 1) / length))
        padded = np.full(rows * length + 1, self.tokenizer.pad_token_id, dtype=np.int32)
        padded[: len(stream)] = stream
        targets = np.full(rows, length, dtype=np.int32)
        targets[-1] = len(stream) - 1 - (rows - 1) * length
        return {
            "input_ids": np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length].copy(),
            "targets": targets,
        }

    def _encode_conversations(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        width = self.options["sequence_length"] + 1
        rendered = [render(self.tokenizer, messages_of(example)) for example in examples]
        encoded = self.tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pieces = []
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            labels = [t if _inside(o, spans) else IGNORED for t, o in zip(ids, offsets, strict=True)]
            pieces.append((ids[:width], labels[:width]))
        return self._pack([piece for piece in pieces if any(label != IGNORED for label in piece[1][1:])], width)

    def _pack(self, pieces: list[tuple[list[int], list[int]]], width: int) -> Columns:
        bins = best_fit([len(ids) for ids, _ in pieces], width)
        shape = (len(bins), width)
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int32)
        labels = np.full(shape, IGNORED, dtype=np.int32)
        position_ids = np.zeros(shape, dtype=np.int32)
        for row, members in enumerate(bins):
            start = 0
            for member in members:
                ids, targets = pieces[member]
                end = start + len(ids)
                input_ids[row, start:end], labels[row, start:end] = ids, targets
                position_ids[row, start:end] = np.arange(len(ids))
                start = end
            position_ids[row, start:] = np.arange(width - start)
        counted = (labels[:, 1:] != IGNORED).sum(axis=1).astype(np.int32)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "targets": counted}

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs, use_cache=False).logits

    def _check_fits(self, config: Any) -> None:
        """Refuse tokens or positions that the model has no embeddings for: some later step would fail."""
        if config.vocab_size < len(self.tokenizer):
            raise TaskError(
                f"the model's vocab_size is {config.vocab_size}, but the tokenizer has {len(self.tokenizer)} tokens"
            )
        positions, length = getattr(config, "max_position_embeddings", None), self.options["sequence_length"]
        if self._for_data and positions is not None and positions < length:
            raise TaskError(
                f"data.sequence_length is {length}, but the model has {positions} positions "
                "(model.config.max_position_embeddings)"
            )

    def _config_defaults(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self.tokenizer),
            "max_position_embeddings": self.options["sequence_length"],
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        vocabulary = self.tokenizer.get_vocab()
        ends = [self.tokenizer.eos_token_id, vocabulary.get("<|im_end|>")]
        return GenerationConfig(
            eos_token_id=sorted({end for end in ends if end is not None}),
            bos_token_id=self.tokenizer.bos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into bins of `width`: longest first, each into the fullest bin that takes it (best-fit decreasing).

    Returns:
        For each bin the indices of its items. Every item is in exactly one bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free width, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(room, (lengths[item], -1))
        if slot == len(room):
            bins.append([item])
            bisect.insort(room, (width - lengths[item], len(bins) - 1))
        else:
            free, index = room.pop(slot)
            bins[index].append(item)
            bisect.insort(room, (free - lengths[item], index))
    return bins


def _inside(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    start, end = offset
    return any(first <= start and end <= last for first, last in spans) and end > start


def _config_for(architecture: str, config: dict[str, Any]) -> Any:
    """Make the transformers config, refusing an unknown architecture or key: transformers itself ignores a typo."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if architecture not in KNOWN:
        raise TaskError(
            f"model.architecture: {architecture!r} is no causal architecture of transformers"
            f"{_close(architecture, KNOWN)}"
        )
    default = AutoConfig.for_model(architecture)
    for key in config:
        if not hasattr(default, key):
            raise TaskError(f"model.config: {architecture} has no {key!r}{_close(key, default.to_dict())}")
    try:
        return AutoConfig.for_model(architecture, **config)
    except Exception as error:  # transformers validates configs with several kinds of exception
        raise TaskError(f"model.config for {architecture}: {str(error).strip().splitlines()[-1].strip()}") from error


def _close(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
