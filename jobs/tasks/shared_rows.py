"""Rows of tokens that several ranks share, a part of each row on each rank: sequence parallelism as the task sees it.

A part is input_ids, labels and position_ids of a run of tokens, labels shifted before. Which tokens see each other is
told in place of an attention mask, of the whole row, as in packed_attention.py: jobs/worker/sequence.py sets an
attention that knows how to read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.tasks import IGNORED, Batch, Task, TaskError, TaskOptions, balance, language_models, packed_attention
from jobs.tasks.causal_lm_options import CausalLMOptions

_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the largest position that a forward pass sees."""


class SharesRows(Task):
    """A task whose batches are those of a causal language model."""

    @classmethod
    def check_shared_rows(cls, options: TaskOptions) -> None:
        """Refuse tasks derived from ours, whose batches are not known, and preferences.

        Raises:
            TaskError: it is one.
        """
        assert isinstance(options, CausalLMOptions)
        if not cls.__module__.startswith("jobs.tasks."):
            raise TaskError(f"how workers share rows of {cls.__name__} is not known: leave it out, or set it to 1")
        if options.objective != "likelihood":
            raise TaskError(
                f"pairs of objective {options.objective!r} cannot be shared by several workers: leave it out, or set "
                "it to 1"
            )

    def check_shared_by(self, parts: int, origin: Path | str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that `parts` ranks cannot run on parts of a row; before `fit`.

        Args:
            origin: the directory of the model that the job starts from, or an architecture.
            config: entries of its config.
        """
        if isinstance(origin, Path):
            found = language_models.check_parent(origin, config)
        else:
            found = language_models.config_of(origin, config, {})
        check_config(found, parts, self.options.sequence_length)

    def part(self, batch: Batch, index: int, parts: int) -> Batch:
        """Return the part of a micro-batch (B, S) that is for one of the `parts` ranks that share its rows: see `part`.

        What `loss` and `measure` sum over the parts is what they sum over the whole.
        """
        return part(batch, index, parts)


def part(batch: Batch, index: int, parts: int) -> Batch:
    """Return the tokens [index * S / parts, (index + 1) * S / parts) of each row.

    Rows whose length no multiple of `parts` is are padded at their ends: nothing before sees it, and it has no targets.

    Args:
        batch: input_ids, labels and perhaps position_ids, each (B, S) int64.

    Returns:
        input_ids, labels and position_ids (B, S / parts) int64; attention_mask (B, 1, 1, M) int32: where documents end
        in the whole row (jobs/tasks/packed_attention.py).
    """
    import torch

    from jobs.tasks import document_attention

    ids, labels = batch["input_ids"], batch["labels"]
    rows, length = ids.shape
    missing = -length % parts
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=ids.device).expand(rows, length)
    padded = {
        name: torch.nn.functional.pad(tensor, (0, missing), value=filling)
        for name, tensor, filling in (
            ("input_ids", ids, 0),
            ("labels", labels, IGNORED),
            ("position_ids", positions, 0),
        )
    }
    if "position_ids" in batch:
        ends = document_attention.ends_of(padded["position_ids"])
    else:
        ends = torch.full((rows, 1), length + missing, dtype=torch.int32, device=ids.device)
    each = (length + missing) // parts
    mine = {name: tensor[:, index * each : (index + 1) * each] for name, tensor in padded.items()}
    return {**mine, "attention_mask": ends[:, None, None, :]}


def check_config(config: Any, parts: int, length: int) -> None:
    """Refuse a transformers config of which it is known that `parts` ranks cannot run it on parts of a row.

    Args:
        length: tokens of a row.

    Raises:
        TaskError: it is one.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    what = f"training.parallel.sequence is {parts}, and {text.model_type}"
    if not isinstance(heads, int):
        raise TaskError(f"{what} has no attention heads that workers could share: leave it out, or set it to 1")
    if heads % parts:
        able = ", ".join(str(each) for each in range(2, heads + 1) if heads % each == 0) or "1"
        raise TaskError(f"{what} has {heads} attention heads, which must be a multiple of it: choose one of {able}")
    kinds = _rope_types(getattr(text, "rope_parameters", None))
    if changing := sorted(kinds & set(_ROPES)):
        raise TaskError(
            f"{what} has positions of kind {changing[0]}, which depend on the length of a row, and no worker sees it: "
            "leave it out, or set it to 1"
        )
    if (window := packed_attention.narrowest(text)) is not None and window < length:
        raise TaskError(
            f"{what} has layers that see {window} tokens of a row's {length}: workers can share rows only where each "
            "token sees its whole row: leave it out, or set it to 1"
        )
    if balance.is_wanted(config):
        raise TaskError(
            f"{what} balances its experts over all tokens of a micro-batch (output_router_logits), of which a worker "
            "sees a part: leave one of the two out"
        )


def _rope_types(parameters: Any) -> set[str]:
    """Return the kinds of rotary embeddings of a config's `rope_parameters`: one, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    each = [inner for inner in parameters.values() if isinstance(inner, Mapping)] or [parameters]
    return {str(inner.get("rope_type", "default")) for inner in each}
