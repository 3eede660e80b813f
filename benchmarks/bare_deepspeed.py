"""The same training in a bare DeepSpeed script: model, optimizer and loop. Run by benchmarks/training.py."""

import json
import sys
import time
from pathlib import Path

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.precision import resolve, this_cpu
from jobs.spec import TrainingSpec
from jobs.worker.zero import deepspeed_config


def main() -> None:
    """Train on random tokens and write the step times."""
    settings = json.loads(sys.argv[1])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; used for inference only
    deepspeed.init_distributed("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = settings["rows"] // world_size
    zero = {"zero_stage": settings["stage"]}
    training = TrainingSpec(steps=settings["steps"], global_batch_size=settings["rows"], deepspeed=zero)
    config = AutoConfig.for_model("llama", **settings["model"], tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(training, rows, 1, precision=resolve("auto", [this_cpu()]), on_gpu=False),
    )
    generator = torch.Generator().manual_seed(rank)
    times = []
    for _ in range(settings["steps"]):
        tokens = torch.randint(0, config.vocab_size, (rows, settings["length"]), generator=generator)
        began = time.perf_counter()
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(settings["result"]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
