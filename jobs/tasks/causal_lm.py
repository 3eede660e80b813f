"""Task `causal-lm`: predict the next token. Pre-training on text, fine-tuning on conversations.

Rows (all int32, S = sequence_length):
    input_ids     (N, S+1)  a row overlaps the next by one token, so each token is predicted exactly once
    targets       (N,)      predictions that count towards the loss
    labels        (N, S+1)  conversations only: the token where it is part of an answer, else -100
    position_ids  (N, S+1)  conversations only: they start at 0 for each conversation packed into the row
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from jobs.tasks import IGNORED, Batch, Better, Columns, Task, TaskError, TaskOptions, conv1d, packing, tokenization
from jobs.tasks.architectures import close, config_for
from jobs.tasks.conversations import is_conversation, messages_of, render
from jobs.tasks.tokenization import TextFindings, TokenizerOptions

if TYPE_CHECKING:
    import torch


class CausalLMOptions(TaskOptions):
    """How text becomes rows."""

    text_column: str = "text"
    """The column that holds the text, where an example is no conversation."""
    sequence_length: int = Field(256, ge=2, le=2**22)
    """Tokens per row (S)."""
    tokenizer: TokenizerOptions = TokenizerOptions()


class CausalLM(Task):
    """Any transformers causal architecture."""

    name: ClassVar[str] = "causal-lm"
    Options: ClassVar[type[TaskOptions]] = CausalLMOptions
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "perplexity": "min",
        "accuracy": "max",
        "bits_per_byte": "min",
    }
    learned_files: ClassVar[tuple[str, ...]] = tokenization.FILES

    options: CausalLMOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.tokenizer: Any = None
        self._for_data = options is not None
        """False where only a model directory is loaded: then rows have no length yet."""
        self._bytes_per_token: torch.Tensor | None = None

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example that is neither text nor a conversation with an answer."""
        if is_conversation(example):
            messages_of(example)
        else:
            self._text(example)

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Cut a text after the share `at` of its characters."""
        column = self.options.text_column
        text = example.get(column)
        if is_conversation(example) or not isinstance(text, str):
            return None
        end = int(len(text) * at)
        return {**example, column: text[:end]}, {**example, column: text[end:]}

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the messages, or the text."""
        return messages_of(example) if is_conversation(example) else self._text(example)

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> TextFindings | None:
        """Draw a share of the sample that a tokenizer is trained on."""
        return tokenization.observe(self.options.tokenizer, self._texts(examples))

    def fit(self, findings: TextFindings | None) -> list[str]:
        """Train the tokenizer on the sample, or load the one named in `tokenizer.from`."""
        self.tokenizer, said = tokenization.obtain(self.options.tokenizer, findings)
        return said

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's tokenizer, unless the options name another."""
        return not self.options.tokenizer.is_given and super().inherit(parent)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self.tokenizer.save_pretrained(directory)

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> CausalLM:
        """Read the tokenizer of a model directory (or a hub id)."""
        task = cls(options)
        task.tokenizer = tokenization.load(directory)
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Tokenise and pack: text into consecutive windows, conversations whole into rows by best fit.

        Returns:
            input_ids (N, S+1) and targets (N,); for conversations labels and position_ids (N, S+1) too. All int32.
        """
        if examples and is_conversation(examples[0]):
            return self._encode_conversations(examples)
        return self._encode_texts(list(self._texts(examples)))

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and labels (B, S) int64, shifted against each other; position_ids where rows are packed.

        Args:
            rows: input_ids (B, S+1) and targets (B,); packed ones labels and position_ids (B, S+1) too. All int32.
        """
        import torch

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

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture or an entry that its config has not."""
        config_for(architecture, dict(config), "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal")

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `architecture` (a transformers model type: llama, qwen3, gpt2, …) from a config, in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        given = {**self._config_defaults(), **config}
        resolved = config_for(architecture, given, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal")
        self._check_fits(resolved)
        model = AutoModelForCausalLM.from_config(resolved, dtype=torch.float32)
        model.generation_config = self._generation_config()
        return model

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao) or a hub id, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        settings = {"dtype": dtype or "auto", "trust_remote_code": False, **(config or {})}
        try:
            model = conv1d.load(directory, **settings)
            if model is None:
                model = AutoModelForCausalLM.from_pretrained(str(directory), **settings)
        except (OSError, ValueError) as error:
            raise TaskError(f"cannot load a model from {str(directory)!r}: {str(error).splitlines()[0]}") from error
        if self.tokenizer is not None:
            self._check_fits(model.config.get_text_config())
            model.generation_config = self._generation_config()
        return model.eval()

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the targets: () fp32 nats, and their number () int64.

        Args:
            batch: as `collate` makes it: input_ids, labels and perhaps position_ids, each (B, S) int64.
        """
        from jobs.tasks.cross_entropy import cross_entropy_sum

        logits = self._logits(model, batch)
        labels = batch["labels"]
        return cross_entropy_sum(logits, labels), (labels != IGNORED).sum()

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets, correct first guesses and the UTF-8 bytes of the targets: four scalars ()."""
        import torch

        from jobs.tasks.cross_entropy import cross_entropy_sum

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
        column = self.options.text_column
        text = example.get(column)
        if isinstance(text, str):
            return text
        if column in example:
            raise TaskError(f"column {column!r} holds {type(text).__name__}, not text")
        raise TaskError(
            f"no text in column {column!r}; this example has {sorted(example)}{close(column, example)}. "
            "Name the column in task.text_column"
        )

    def _encode_texts(self, texts: list[str]) -> Columns:
        end = self.tokenizer.eos_token_id
        tokens = (token for ids in tokenization.ids_of(self.tokenizer, texts) for token in (*ids, end))
        stream = np.fromiter(tokens, dtype=np.int32)
        return packing.windows(stream, self.options.sequence_length, self.tokenizer.pad_token_id)

    def _encode_conversations(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        width = self.options.sequence_length + 1
        rendered = [render(self.tokenizer, messages_of(example)) for example in examples]
        encoded = self.tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pieces = []
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            labels = [t if _inside(o, spans) else IGNORED for t, o in zip(ids, offsets, strict=True)]
            pieces.append((ids[:width], labels[:width]))
        kept = [piece for piece in pieces if any(label != IGNORED for label in piece[1][1:])]
        return packing.pack(kept, width, self.tokenizer.pad_token_id)

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, S, V) in the model's own type."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs, use_cache=False).logits

    def _check_fits(self, config: Any) -> None:
        """Refuse tokens or positions that the model has no embeddings for: some later step would fail."""
        if config.vocab_size < len(self.tokenizer):
            raise TaskError(
                f"the model's vocab_size is {config.vocab_size}, but the tokenizer has {len(self.tokenizer)} tokens"
            )
        positions, length = getattr(config, "max_position_embeddings", None), self.options.sequence_length
        if self._for_data and positions is not None and positions < length:
            raise TaskError(
                f"task.sequence_length is {length}, but the model has {positions} positions "
                "(model.config.max_position_embeddings)"
            )

    def _config_defaults(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self.tokenizer),
            "max_position_embeddings": self.options.sequence_length,
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


def _inside(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    start, end = offset
    return any(first <= start and end <= last for first, last in spans) and end > start
