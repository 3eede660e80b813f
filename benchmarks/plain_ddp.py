"""The same training in plain PyTorch: DistributedDataParallel, compiled or not. Run by benchmarks/training.py."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.precision import resolve, this_cpu


def main() -> None:
    """Train on random tokens and write the step times."""
    settings = json.loads(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = settings["rows"] // world_size
    config = AutoConfig.for_model("llama", **settings["model"], tie_word_embeddings=True)
    torch.manual_seed(0)
    model = DistributedDataParallel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    called = torch.compile(model) if settings["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    in_bf16 = resolve("auto", [this_cpu()]) == "bf16"
    generator = torch.Generator().manual_seed(rank)
    times = []
    for _ in range(settings["steps"]):
        tokens = torch.randint(0, config.vocab_size, (rows, settings["length"]), generator=generator)
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16) if in_bf16 else nullcontext():
            loss = called(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(settings["result"]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
