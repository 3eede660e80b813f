"""Packed rows without a mask of S x S: a model of transformers that attends within each document of a row.

transformers makes a mask where positions restart. This attention is told where each document ends in its row instead,
in place of a mask: `attention_mask` (B, 1, 1, M) int32, of at most M documents a row. A mask of four dimensions reaches
the attention as it is (transformers' masking_utils.py).

The ends are found where batches are made, on a thread of its own: to find them on a GPU, one has to wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.tasks import isolation

if TYPE_CHECKING:
    import torch

    from jobs.tasks import Batch

NAME = "tandem_packed"
"""What transformers knows the attention by."""
ENDS = "document_ends"
"""What a batch calls them: (B, M) int32 (jobs/tasks/document_attention.py, `ends_of`)."""
NOT_KNOWN = ("position_bias", "softcap", "s_aux")
"""What models may tell their attention besides, and this one has not learned."""


class Unknown(NotImplementedError):
    """The model's attention takes something that this one has not learned."""


def use(model: torch.nn.Module, longest: int) -> None:
    """Have a model attend so if what it makes of packed rows stays the same; else it stays as it is.

    Weights, mode and random state are left as they are.

    Args:
        model: whose packed pieces do not see each other.
        longest: tokens of a row.
    """
    inner = unadapted(model)
    before = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    if before != "sdpa" or not hasattr(inner, "set_attn_implementation"):
        return
    window = narrowest(inner.config.get_text_config())
    if window is not None and window < longest:
        return
    put(model, NAME, attention)
    try:
        apart = isolation.leak(model, longest, told=True) is None
    except (Unknown, TypeError, ValueError, RuntimeError):
        apart = False
    if not apart:
        inner.set_attn_implementation(before)


def is_used(model: Any) -> bool:
    """Say whether a model, also one that an engine holds, attends so."""
    return _says_so(getattr(getattr(model, "module", model), "config", None))


def put(model: torch.nn.Module, name: str, function: Any) -> None:
    """Have a model attend by a function that transformers then knows by `name`, as far as it can be told."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    unadapted(model).set_attn_implementation(name)


def unadapted(model: torch.nn.Module) -> Any:
    """Return the model that adapters were added to, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def inputs(model: Any, batch: Batch) -> Batch:
    """Return what a model is given of a batch (B, S): no labels, but where documents end if it can read that."""
    from jobs.tasks import document_attention

    given = {name: tensor for name, tensor in batch.items() if name not in ("labels", ENDS)}
    if "position_ids" in given and "attention_mask" not in given and is_used(model):
        ends = batch[ENDS] if ENDS in batch else document_attention.ends_of(given["position_ids"])
        given["attention_mask"] = ends[:, None, None, :]
    return given


def told(batch: Batch, config: Any) -> Batch:
    """Return a batch (B, S) with where documents end in its rows, (B, M), if a model of this config attends so."""
    from jobs.tasks import document_attention

    if "position_ids" not in batch or not _says_so(config):
        return batch
    return {**batch, ENDS: document_attention.ends_of(batch["position_ids"])}


def _says_so(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) == NAME


def ends(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the documents' ends, (B, M), where they stand in a mask's place (B, 1, 1, M)."""
    import torch

    return None if attention_mask is None or attention_mask.dtype != torch.int32 else attention_mask[:, 0, 0]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return what tokens make of each other, (B, S, H, V).

    Args:
        module: asks.
        query: (B, H, S, D).
        key, value: (B, G, S, D) and (B, G, S, V).
        attention_mask: where documents end, (B, 1, 1, M) int32, or a mask (B, 1, S, S).
        dropout: share of weights that is dropped.
        scaling: what products are multiplied by.
        others: what other attentions are told.

    Raises:
        Unknown: the attention takes more than that.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from jobs.tasks import document_attention

    check_known(others)
    documents = ends(attention_mask)
    if documents is None:
        how = {"dropout": dropout, "scaling": scaling, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    made = document_attention.attend(query, key, value, documents, dropout=dropout, scale=scaling)
    return made.transpose(1, 2).contiguous(), None


def check_known(others: dict[str, Any]) -> None:
    """Raise Unknown for what an attention takes besides masks."""
    if odd := [name for name in NOT_KNOWN if others.get(name) is not None]:
        raise Unknown(f"its scores take {odd[0]}")


def narrowest(config: Any) -> int | None:
    """Return the fewest tokens that a layer of a text config sees; None where all see whole rows."""
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) == {"full_attention"}:
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((int(width) for width in found if isinstance(width, int) and width > 0), default=None)
