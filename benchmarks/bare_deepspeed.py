"""The same training in a bare DeepSpeed script: model, optimizer and loop. Run by benchmarks/training.py."""

import deepspeed
import torch
from rival import Rival

from jobs.spec import TrainingSpec
from jobs.worker.zero import deepspeed_config


def main() -> None:
    """Train on random tokens and write the step times."""
    rival = Rival()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; used for inference only
    deepspeed.init_distributed(rival.backend)
    zero = {"zero_stage": rival.told["stage"]}
    training = TrainingSpec(steps=rival.told["steps"], global_batch_size=rival.told["rows"], deepspeed=zero)
    model = rival.model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        config=deepspeed_config(training, rival.rows, 1, precision=rival.precision, on_gpu=rival.on_gpu),
    )
    times, rank = [], torch.distributed.get_rank()
    for step in range(rival.told["steps"]):
        tokens = rival.tokens(step * rival.world_size + rank)
        began = rival.now()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        times.append(rival.now() - began)
    rival.end(times)


if __name__ == "__main__":
    main()
