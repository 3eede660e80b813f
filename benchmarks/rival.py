"""What the scripts beside Tandem share: device, precision, model and tokens. Started by benchmarks/training.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.precision import Precision, gpu, resolve, this_cpu


def precision_here() -> Precision:
    """Return what `auto` picks on this machine."""
    return resolve("auto", [gpu(torch.cuda.get_device_capability()) if torch.cuda.is_available() else this_cpu()])


class Rival:
    """One process of a script: what it was told, where it computes and in what."""

    def __init__(self) -> None:
        """Read what this process was told, and choose as Tandem does."""
        self.told: dict[str, Any] = json.loads(sys.argv[1])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        if self.told["on_gpu"]:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.precision = precision_here()
        self.backend = "nccl" if self.on_gpu else "gloo"
        self.rows = self.told["rows"] // self.world_size
        """Of this process in a step."""
        self.config = AutoConfig.for_model("llama", **self.told["model"], tie_word_embeddings=True, use_cache=False)

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on one."""
        return self.device.type == "cuda"

    def model(self) -> torch.nn.Module:
        """Return the model, in fp32, where it is to be trained."""
        torch.manual_seed(0)
        with self.device:
            made: torch.nn.Module = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        return made

    def tokens(self, seed: int) -> torch.Tensor:
        """Return random tokens (rows, length), here."""
        shape, generator = (self.rows, self.told["length"]), torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config.vocab_size, shape, generator=generator).to(self.device)

    def now(self) -> float:
        """Return the time in seconds, once the device has done what it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def end(self, times_s: list[float]) -> None:
        """Write the step times down on the first rank."""
        if torch.distributed.get_rank() == 0:
            Path(self.told["result"]).write_text(json.dumps(times_s))
