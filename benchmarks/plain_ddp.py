"""The same training in plain PyTorch: DistributedDataParallel, compiled or not. Run by benchmarks/training.py."""

from contextlib import nullcontext

import torch
from rival import Rival
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train on random tokens and write the step times."""
    rival = Rival()
    torch.distributed.init_process_group(rival.backend)
    model = DistributedDataParallel(rival.model())
    called = torch.compile(model) if rival.told["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    in_bf16 = rival.precision == "bf16"
    times, rank = [], torch.distributed.get_rank()
    for step in range(rival.told["steps"]):
        tokens = rival.tokens(step * rival.world_size + rank)
        began = rival.now()
        with torch.autocast(rival.device.type, dtype=torch.bfloat16) if in_bf16 else nullcontext():
            loss = called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(rival.now() - began)
    rival.end(times)


if __name__ == "__main__":
    main()
