"""The same training with Hugging Face Trainer and DeepSpeed. Run by benchmarks/training.py."""

import os
from collections.abc import Callable

import deepspeed
import torch
from rival import Rival
from transformers import Trainer, TrainerCallback, TrainingArguments

from jobs.spec import TrainingSpec
from jobs.worker.zero import deepspeed_config


class Clock(TrainerCallback):
    """Note when each step ends."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.ends: list[float] = []
        self._now = now

    def on_step_end(self, *arguments: object, **keywords: object) -> None:
        """Called by the Trainer."""
        self.ends.append(self._now())


class RandomTokens(torch.utils.data.Dataset):
    """Rows of random tokens."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.tokens = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    """Train and write the step times."""
    rival = Rival()
    told = rival.told
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero = {"zero_stage": told["stage"]}
    training = TrainingSpec(steps=told["steps"], global_batch_size=told["rows"], deepspeed=zero)
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=told["steps"],
        per_device_train_batch_size=rival.rows,
        bf16=rival.precision == "bf16",
        use_cpu=not rival.on_gpu,
        deepspeed=deepspeed_config(training, rival.rows, 1, precision=rival.precision, on_gpu=rival.on_gpu),
        optim="adamw_torch_fused",
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        logging_steps=10**6,
        disable_tqdm=True,
        torch_compile=told["compiled"],
    )
    clock = Clock(rival.now)
    data = RandomTokens(told["rows"] * told["steps"], told["length"], rival.config.vocab_size)
    Trainer(model=rival.model(), args=arguments, train_dataset=data, callbacks=[clock]).train()
    rival.end([b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)])


if __name__ == "__main__":
    main()
    torch.distributed.barrier()
    os._exit(0)  # at its usual end, the interpreter now and then finds a thread of the process group alive, and aborts
