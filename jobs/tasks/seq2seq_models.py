"""Encoder-decoders of transformers for texts: configs, weights, and the tokens that answers begin and end with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError, loading
from jobs.tasks.architectures import check_builds, config_for

if TYPE_CHECKING:
    import torch

TABLE = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
"""The name of transformers' own table of the architectures that write one text for another; some of them hear."""
KIND = "encoder-decoder"
LENGTHS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
"""What configs call the number of their positions; T5 has none."""


def check(architecture: str, config: Mapping[str, Any]) -> None:
    """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no such model."""
    from transformers import AutoModelForSeq2SeqLM

    resolved = config_for(architecture, dict(config), TABLE, KIND)
    _check_kind(resolved, f"model.architecture: {architecture!r}")
    check_builds(AutoModelForSeq2SeqLM, architecture, resolved)


def check_parent(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise TaskError for a model that is no encoder-decoder for texts, or an entry that its config has not."""
    _check_kind(loading.check_parent(directory, config, TABLE, KIND), repr(str(directory)))


def build(architecture: str, config: Mapping[str, Any], tokenizer: Any, longest: int) -> torch.nn.Module:
    """Make a model with fresh weights, in fp32.

    Args:
        config: the user's entries of it; what follows from the tokenizer goes behind them.
        longest: tokens of the longest text on either side.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    default = config_for(architecture, {}, TABLE, KIND)
    start = _first(tokenizer.bos_token_id, tokenizer.pad_token_id)
    known = {
        **dict.fromkeys(("vocab_size", "decoder_vocab_size"), config.get("vocab_size", len(tokenizer))),
        **{name: max(getattr(default, name, 0) or 0, longest) for name in LENGTHS},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        **{"decoder_start_token_id": start, "forced_eos_token_id": None},  # a text that is cut does not end
    }
    resolved = config_for(architecture, dict(config), TABLE, KIND, known)
    if "decoder_start_token_id" not in config:
        resolved.decoder_start_token_id = start  # T5's config has no place of its own for it, and its files have it
    check_fits(resolved, tokenizer, longest)
    model: torch.nn.Module = AutoModelForSeq2SeqLM.from_config(resolved, dtype=torch.float32)
    return model


def load(directory: Path, dtype: torch.dtype | None, config: Mapping[str, Any]) -> tuple[torch.nn.Module, list[str]]:
    """Load a model directory (also one quantised by torchao) or a hub id; return it and what is to be said of it."""
    from transformers import AutoModelForSeq2SeqLM

    model, said = loading.load(AutoModelForSeq2SeqLM, directory, dtype, config)
    if "quantization_config" in config:
        _leave_out_bias(model, directory)
    return model, said


def _leave_out_bias(model: torch.nn.Module, directory: Path) -> None:
    """Have a model that is being quantised not write the bias of its logits, which BART's kin have, where it is zero.

    torchao 0.18 cannot read a file with a tensor whose name has no dot, and models are made with a bias of zero.

    Raises:
        TaskError: it is not zero.
    """
    bias = dict(model.named_buffers(recurse=False)).get("final_logits_bias")
    if bias is None:
        return
    if bias.any():
        raise TaskError(
            f"{str(directory)!r} has a final_logits_bias that is not zero, which cannot be stored beside int8 weights; "
            "serve the model as it is"
        )
    model.register_buffer("final_logits_bias", bias, persistent=False)


def check_fits(config: Any, tokenizer: Any, longest: int | None) -> None:
    """Refuse tokens or positions that a model has no embeddings for: some later step would fail.

    Args:
        longest: tokens of the longest text on either side; None: nothing is to be encoded.

    Raises:
        TaskError: there are more of them than the model has.
    """
    for name in ("vocab_size", "decoder_vocab_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size < len(tokenizer):
            raise TaskError(f"the model's {name} is {size}, but the tokenizer has {len(tokenizer)} tokens")
    for name in LENGTHS:
        positions = getattr(config, name, None)
        if longest is not None and isinstance(positions, int) and positions < longest:
            raise TaskError(f"texts may have {longest} tokens, but the model has {positions} positions (its {name})")


def generation(model: Any, tokenizer: Any, most: int) -> Any:
    """Return a copy of a model's generation config with what it lacks: where texts begin and end, how long they are.

    What it says itself stays.
    """
    from transformers import GenerationConfig

    said = {key: value for key, value in model.generation_config.to_dict().items() if not key.startswith("_")}
    if said.get("max_length") in (None, GenerationConfig().max_length, 20) and not said.get("max_new_tokens"):
        said["max_length"] = most + 1  # with the token that the decoder begins with
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if said.get(name) is None:
            said[name] = getattr(tokenizer, name)
    if said.get("decoder_start_token_id") is None:
        said["decoder_start_token_id"] = start_token(model, tokenizer)
    return GenerationConfig(**said)


def not_greedy(model: Any) -> list[str]:
    """Say what of a model's generation config makes a server's answers others than those that are measured."""
    config = getattr(model, "generation_config", None)
    usual = {"do_sample": (None, False), "repetition_penalty": (None, 1)}
    asked = [f"{name} {value}" for name in usual if (value := getattr(config, name, None)) not in usual[name]]
    if not asked:
        return []
    return [
        f"bleu and chrf are of greedy answers; the model's generation config asks for {' and '.join(asked)}, with "
        "which a server answers unless a request says otherwise"
    ]


def start_token(model: Any, tokenizer: Any) -> int:
    """Return the token that the decoder begins with, as config, generation config or tokenizer say."""
    sources = (model.config, getattr(model, "generation_config", None))
    told = (getattr(source, "decoder_start_token_id", None) for source in sources)
    return _first(*told, tokenizer.bos_token_id, tokenizer.pad_token_id)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text, as the generation config and the tokenizer say."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = found if isinstance(found, list | tuple) else [found]
    return frozenset({*told, tokenizer.eos_token_id} - {None})


def shifted(labels: torch.Tensor, start: int, padding: int, ignored: int) -> torch.Tensor:
    """Return what the decoder reads for labels (B, T) int64: the start token, then all but the last of them.

    Args:
        ignored: the label of what is no target; the decoder reads `padding` there.
    """
    read = labels.new_full(labels.shape, start)
    read[:, 1:] = labels[:, :-1]
    return read.masked_fill(read == ignored, padding)


def _check_kind(config: Any, what: str) -> None:
    if not getattr(config, "is_encoder_decoder", False):
        raise TaskError(f"{what} has no encoder beside its decoder: seq2seq trains t5, marian, bart and their kin")


def _first(*tokens: int | None) -> int:
    return next(token for token in tokens if token is not None)
