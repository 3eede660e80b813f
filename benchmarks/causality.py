"""How far the logits of small random models move with later tokens, for each causal architecture of transformers.

    python benchmarks/causality.py

jobs/tasks/causality.py refuses what moves them by more than rounding. Architectures that are made of several models,
are large whatever their config, or need settings of their own are named and passed over.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jobs.tasks import causality

MOST = 30_000_000
HALF = 12
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "decoder_attention_heads", "encoder_attention_heads"), 2),
    **{"vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8, "state_size": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def influence(architecture: str) -> float | str:
    """Return what the model shows, or why it is passed over."""
    default = AutoConfig.for_model(architecture)
    if default.get_text_config() is not default:
        return "made of several models"
    config = AutoConfig.for_model(architecture, **{key: v for key, v in SMALL.items() if hasattr(default, key)})
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        return f"{size:,} parameters"
    with torch.no_grad():
        return causality.influence(AutoModelForCausalLM.from_config(config).eval(), HALF)


def main() -> None:
    """Print each architecture's figure, the largest last."""
    found: dict[str, float] = {}
    for architecture in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            told = influence(architecture)
        except Exception as error:  # its config needs more than SMALL has
            told = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        if isinstance(told, str):
            print(f"{architecture}: passed over, {told}")
        else:
            found[architecture] = told
    for architecture, moved in sorted(found.items(), key=lambda item: item[1]):
        print(f"{moved:8.1e} {'sees ahead' if moved > causality.ROUNDING else 'causal    '} {architecture}")
    print(f"{len(found)} architectures, {sum(moved > causality.ROUNDING for moved in found.values())} see ahead")


if __name__ == "__main__":
    main()
