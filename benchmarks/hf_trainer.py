"""The same training with Hugging Face Trainer and DeepSpeed. Run by benchmarks/training.py."""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cluster.precision import resolve, this_cpu
from jobs.spec import TrainingSpec
from jobs.worker.zero import deepspeed_config


class Clock(TrainerCallback):
    """Note when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: object, **keywords: object) -> None:
        """Called by the Trainer."""
        self.ends.append(time.perf_counter())


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
    settings = json.loads(sys.argv[1])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rows = settings["rows"] // int(os.environ["WORLD_SIZE"])
    zero = {"zero_stage": settings["stage"]}
    training = TrainingSpec(steps=settings["steps"], global_batch_size=settings["rows"], deepspeed=zero)
    precision = resolve("auto", [this_cpu()])  # as Tandem does
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=settings["steps"],
        per_device_train_batch_size=rows,
        bf16=precision == "bf16",
        use_cpu=True,
        deepspeed=deepspeed_config(training, rows, 1, precision=precision, on_gpu=False),
        optim="adamw_torch_fused",
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        logging_steps=10**6,
        disable_tqdm=True,
    )
    config = AutoConfig.for_model("llama", **settings["model"], tie_word_embeddings=True)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clock = Clock()
    data = RandomTokens(settings["rows"] * settings["steps"], settings["length"], config.vocab_size)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    if torch.distributed.get_rank() == 0:
        times = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
        Path(settings["result"]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
    torch.distributed.barrier()
    os._exit(0)  # at its usual end, the interpreter now and then finds a thread of the process group alive, and aborts
