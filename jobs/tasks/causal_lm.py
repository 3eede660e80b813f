"""Task `causal-lm`: predict the next token. Pre-training on text, fine-tuning on conversations, or on preferences.

Rows of preferences are described in preference_rows.py; the others (all int32, S = sequence_length):
    input_ids     (N, S+1)  text: a row overlaps the next by one token, so each token is predicted exactly once
    targets       (N,)      predictions that count towards the loss
    labels        (N, S+1)  packed rows only: the token where it is learned, else -100
    position_ids  (N, S+1)  packed rows only: they start at 0 for each conversation or document in the row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import (
    IGNORED,
    Batch,
    Better,
    Columns,
    TaskError,
    TaskOptions,
    balance,
    causality,
    chat_rows,
    document_tokens,
    generation,
    isolation,
    language_models,
    packed_attention,
    packing,
    preference_figures,
    preference_learning,
    preference_loss,
    preference_rows,
    scores,
    tokenization,
)
from jobs.tasks.causal_lm_options import CausalLMOptions
from jobs.tasks.conversations import conversation_of
from jobs.tasks.examples import ExampleReader, PreferenceReader
from jobs.tasks.preferences import preference_of
from jobs.tasks.prompts import prompt_of
from jobs.tasks.shared_rows import SharesRows
from jobs.tasks.text_sample import TextFindings

if TYPE_CHECKING:
    import torch


class CausalLM(SharesRows):
    """Writes on from a text, or answers in a conversation, token by token.

    It knows what was in its training data, by chance and by frequency, and says what is likely, not what is true.
    """

    name: ClassVar[str] = "causal-lm"
    Options: ClassVar[type[TaskOptions]] = CausalLMOptions
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "perplexity": "min",
        "accuracy": "max",
        "bits_per_byte": "min",
        **preference_loss.METRICS,
    }
    learned_files: ClassVar[tuple[str, ...]] = tokenization.FILES
    counted: ClassVar[Mapping[str, str]] = {
        **chat_rows.COUNTED,
        **document_tokens.COUNTED,
        **preference_rows.COUNTED,
    }
    version: ClassVar[int] = 5

    options: CausalLMOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.tokenizer: Any = None
        self._pairs = preference_learning.of(self.options)
        self._reader = PreferenceReader() if self._pairs else ExampleReader(self.options.text_column)
        if self._pairs:
            vars(self)["unit"] = self._pairs.unit  # the class says what the loss counts otherwise
        self._for_data = options is not None
        """False where only a model directory is loaded: then rows have no length yet."""
        self._parent: Path | str | None = None
        self._separate = False  # true where the model would let packed pieces see each other
        self._config: Any = None  # the model's, once `prepare_model` has seen it
        self._bytes_per_token: np.ndarray | None = None

    # -- data -------------------------------------------------------------------------------------------------------

    @classmethod
    def check_options(cls, options: TaskOptions, starts_from: str | None) -> None:
        """Refuse to train a tokenizer for weights that were learned with another, and a comparison with no model."""
        tokenization.check_origin(options, starts_from)
        assert isinstance(options, CausalLMOptions)
        preference_learning.check_origin(options.objective, starts_from)

    @classmethod
    def metrics_of(cls, options: TaskOptions) -> Mapping[str, Better]:
        """Return those of the objective: of preferences, or of tokens."""
        assert isinstance(options, CausalLMOptions)
        of_pairs = options.objective != "likelihood"
        wanted = preference_learning.metrics(options.objective) if of_pairs else scores.OF_TOKENS
        return {name: better for name, better in cls.metrics.items() if name in wanted}

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example that the objective cannot learn from."""
        self._reader.check(example)

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Cut a text after the share `at` of its characters; conversations and preferences are whole."""
        return self._reader.cut(example, at)

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the messages, or the text; of a preference, both conversations, whichever is preferred."""
        return self._reader.content(example)

    def together(self, example: Mapping[str, Any]) -> Any:
        """Return the prompt of a preference: none is held out while others of one prompt are learned."""
        return self._reader.together(example)

    def answer(self, example: Mapping[str, Any]) -> str | None:
        """Return which answer a preference prefers; None of other examples, whose content says all."""
        return self._reader.answer(example)

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are no part of the text, the conversation or the preference."""
        return self._reader.unused(example)

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> TextFindings | None:
        """Draw a share of the sample that a tokenizer is trained on."""
        return tokenization.observe(self.options.tokenizer, map(self._reader.words, examples), self.expected_bytes)

    def learns(self) -> bool:
        """Return whether a tokenizer is trained."""
        return not self.options.tokenizer.source

    def fit(self, findings: TextFindings | None) -> list[str]:
        """Train the tokenizer on the sample, or load the one named in `tokenizer.from`."""
        self.tokenizer, said = tokenization.obtain(self.options.tokenizer, findings)
        if self._parent is not None:
            said += tokenization.difference(self.tokenizer, self._parent)
        return said

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's tokenizer, unless the options name another."""
        taken = not self.options.tokenizer.is_given and super().inherit(parent)
        self._parent = parent
        return taken

    def inherited(self) -> list[str]:
        """Say whether the parent's tokenizer had to be given a chat template."""
        return tokenization.said_of_template(self.tokenizer, self._parent or "")

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
        """Tokenise and pack, each example by its own shape: texts into windows, conversations whole by best fit.

        Returns:
            Of preferences, what preference_rows.py says. Else input_ids (N, S+1) and targets (N,); of conversations and
            separate documents labels and position_ids (N, S+1) too; and what was counted. All int32.
        """
        end, width = tokenization.end_of_text(self.tokenizer), self.options.sequence_length + 1
        if self._pairs:
            return preference_rows.encode(self.tokenizer, [*map(preference_of, examples)], width)
        texts = [self._reader.text(example) for example in examples if not self._reader.is_conversation(example)]
        conversations = [conversation_of(example) for example in examples if self._reader.is_conversation(example)]
        pieces, counts = chat_rows.encode(self.tokenizer, conversations, width) if conversations else ([], {})
        documents, counted = document_tokens.encode(self.tokenizer, texts)
        counts |= counted
        if self.options.documents == "separate":
            pieces, documents = packing.documents([ids.tolist() for ids in documents], end, width) + pieces, []
        parts = [self._windows(documents, end)] if documents else []
        if pieces or not parts:
            parts.append(packing.pack(pieces, width, self.tokenizer.pad_token_id, self.options.pack))
        return {**packing.joined(parts), **counts}

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and labels (B, S) int64, shifted against each other; position_ids where rows are packed.

        A model that attends by documents is told where they end: document_ends (B, M) int32.
        For a model that would let packed pieces see each other: a row for each piece, as wide as the longest.

        Of preferences, what `preference_rows.collate` returns.

        Args:
            rows: input_ids (B, S+1) and targets (B,); packed ones labels and position_ids (B, S+1) too. All int32.
        """
        if self._pairs:
            return preference_rows.collate(rows)
        if "labels" not in rows:
            return packing.windows_batch(rows)
        rows = packing.complete(rows)
        if self._separate:
            rows = packing.separate(rows, self.tokenizer.pad_token_id)
        elif not self.options.pack:  # from the beginning on is what every model assumes, and some can be told nothing
            rows = {name: column for name, column in rows.items() if name != "position_ids"}
        return packed_attention.told(packing.packed_batch(rows), self._config)

    # -- model ------------------------------------------------------------------------------------------------------

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        language_models.check(architecture, config)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that is no causal one, is too short, or has no place for an entry of `config`."""
        language_models.check_length(language_models.check_parent(directory, config).get_text_config(), self._length())

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `architecture` (lstm, or a model type of transformers: llama, qwen3, …) from a config, in fp32."""
        defaults = language_models.defaults(self.tokenizer, self.options.sequence_length)
        resolved = language_models.config_of(architecture, config, defaults)
        language_models.check_fits(resolved, self.tokenizer, self._length())
        model: Any = language_models.build(resolved)
        model.generation_config = generation.fresh(self.tokenizer)
        built: torch.nn.Module = model
        return built

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao) or a hub id, in evaluation mode."""
        model, self.said = language_models.load(directory, dtype, config or {})
        if self.tokenizer is not None:
            language_models.check_fits(model.config.get_text_config(), self.tokenizer, self._length())
            if self.options.tokenizer.is_given:
                of_parent = tokenization.of_model(directory)
                self.said = [*self.said, *generation.renumbered(model, of_parent, self.tokenizer)]
            model.generation_config = generation.completed(model.generation_config, self.tokenizer)
        return model

    def prepare_model(self, model: torch.nn.Module, columns: Set[str]) -> list[str]:
        """Compare packed rows with their pieces alone; where the model confuses them, batches hold pieces only.

        Raises:
            TaskError: the model sees tokens that come later.
        """
        is_trained = model.training  # what is only measured has no training loss to speak of
        causality.check(model, self.options.sequence_length)
        self._config = getattr(model, "config", None)
        said = balance.remark(self._config) if self._config is not None and is_trained else None
        return [*filter(None, [said]), *self._told_apart(model, columns)]

    def _told_apart(self, model: torch.nn.Module, columns: Set[str]) -> list[str]:
        if self._pairs:
            return self._pairs.remarks(self._config)
        if "position_ids" not in columns or not self.options.pack:
            return []
        seen = isolation.leak(model, self.options.sequence_length)
        self._separate = seen is not None
        if self._separate:
            return [isolation.remark(model)]
        packed_attention.use(model, self.options.sequence_length)
        return []

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the targets: () fp32 nats, and their number () int64. Preferences: over the pairs.

        A mixture's balancing loss is in it where the config asks for that (jobs/tasks/balance.py); `measure` has none.

        Args:
            batch: as `collate` makes it: input_ids, labels and perhaps position_ids, each (B, S) int64.
        """
        from jobs.tasks.cross_entropy import cross_entropy_sum

        if self._pairs:
            return self._pairs.loss(model, batch)
        output, labels = self._forward(model, batch), batch["labels"]
        targets = (labels != IGNORED).sum()
        extra = balance.added(self._config, output) if self._config is not None else 0.0
        return cross_entropy_sum(output.logits, labels) + extra * targets, targets

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets, correct first guesses and the UTF-8 bytes of the targets: four scalars ().

        Of preferences, what `preference_loss.sums` returns.
        """
        if self._pairs:
            return self._pairs.measure(model, batch)
        if self._bytes_per_token is None:
            self._bytes_per_token = document_tokens.bytes_per_token(self.tokenizer)
        return scores.token_sums(self._forward(model, batch).logits, batch["labels"], self._bytes_per_token)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy, and bits_per_byte = loss_sum / (ln 2 · bytes).

        Of preferences, what `preference_loss.summary` returns.
        """
        return preference_loss.summary(sums) if "preferred" in sums else scores.of_tokens(sums)

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw the margins of preferences; of tokens there is nothing to be seen."""
        if "preferred" not in sums:
            return {}
        return {"margins.png": preference_figures.margins(scores.array(sums, "histogram"))}

    def refers(self) -> bool:
        """Return whether the objective compares with a reference."""
        return self._pairs is not None and self._pairs.refers

    def reference(self, model: torch.nn.Module, rows: Columns) -> Columns:
        """Return `reference` (B, 2) float32: the log-probability of both answers of B pairs, in nats."""
        assert self._pairs is not None, "other objectives compare with nothing"
        return self._pairs.reference(model, rows)

    def verdict(self, metrics: Mapping[str, float]) -> list[str]:
        """Say where the chosen answers have become unlikely."""
        return preference_loss.collapse(metrics)

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> str | tuple[dict[str, Any], ...]:
        """Return what an engine goes on from: a text, or the messages of a conversation before its answer."""
        return prompt_of(example, self._reader, self.options.text_column is not None)

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Refuse: an engine generates for this task."""
        raise TaskError("causal-lm generates; serve it with a generative engine, not with `predict`")

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the prompt as the Open Inference Protocol would."""
        return [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _windows(self, documents: list[np.ndarray], end: int) -> Columns:
        ends = np.array([end], dtype=np.int32)
        stream = np.concatenate([part for ids in documents for part in (ids, ends)])
        return packing.windows(stream, self.options.sequence_length, self.tokenizer.pad_token_id)

    def _forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Return the model's output; its logits (B, S, V) are in the model's own type."""
        return model(**packed_attention.inputs(model, batch), use_cache=False)

    def _length(self) -> int | None:
        """Return how long rows are; None where only a model directory is loaded."""
        return self.options.sequence_length if self._for_data else None
