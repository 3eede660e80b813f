"""Packed rows with a mask of S x S and without: CPU time of a step, and the memory that it adds.

    python benchmarks/packed_rows.py [TOKENS] [TOKENS OF A DOCUMENT]

One row of random tokens through a Llama of 14M parameters, forward and backward, in fp32; each way in a process of its
own. The peak is that of resident memory above what the process had before the first step.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

STEPS = 2
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 2048}


def measured(way: str, tokens: int, document: int) -> str:
    """Return what one way takes, as a line."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from jobs.tasks import packed_attention
    from jobs.worker.peak_memory import peak_bytes

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SIZES, max_position_embeddings=tokens), attn_implementation="sdpa"
    )
    batch = {"input_ids": torch.randint(SIZES["vocab_size"], (1, tokens))}
    batch["position_ids"] = torch.arange(tokens)[None] % document
    if way == "documents":
        packed_attention.use(model, tokens)
        assert packed_attention.is_used(model)
        batch = packed_attention.inputs(model, batch)
    warm = {name: tensor[:, :16] for name, tensor in batch.items() if name != "attention_mask"}
    model(**warm, use_cache=False).logits.sum().backward()
    before, times, losses = peak_bytes(torch.device("cpu")), [], []
    for _ in range(STEPS):
        began = time.process_time()
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])
        loss.backward()
        times.append(time.process_time() - began)
        losses.append(loss.item())
    added = (peak_bytes(torch.device("cpu")) - before) / 2**20
    return f"{way:>9}: {min(times):6.2f} s of CPU a step, {added:6.0f} MiB added, loss {losses[0]:.6f}"


def main() -> None:
    """Print both ways, one after the other."""
    tokens, document = (int(given) for given in (*sys.argv[1:3], *("4096", "256")[len(sys.argv) - 1 :]))
    print(f"{tokens} tokens in documents of {document}")
    for way in ("mask", "documents"):
        command = [sys.executable, __file__, str(tokens), str(document), way]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(measured(sys.argv[3], int(sys.argv[1]), int(sys.argv[2])))
    else:
        main()
