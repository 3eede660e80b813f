"""A model with random weights learns which of two answers is preferred, and gives it."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.tasks.causal_lm import CausalLM
from jobs.worker.export import save
from tests.support import tiny_models
from tests.support.workloads import Endpoint, Workload


def write(folder: Path) -> None:
    """Write preferences, and the model that is their reference."""
    import torch

    pairs = ({"prompt": f"i = {n}", "chosen": "the quick fox", "rejected": "the lazy dog"} for n in range(80))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = CausalLM({"sequence_length": 32})
    task.tokenizer = tiny_models.tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    save(task.build("llama", sizes), folder / "base")
    task.save(folder / "base")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["preference_accuracy"] == 1
    assert metrics["chosen_change"] > 0


def asked(endpoint: Endpoint) -> None:
    messages = [{"role": "user", "content": "i = 7"}]
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": 12}
    reply = endpoint.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "the quick fox"


WORKLOAD = Workload(
    name="preferences",
    task={"name": "causal-lm", "objective": "dpo", "chosen_weight": 1.0, "sequence_length": 32},
    model={"from": "base"},
    data={"train": "pairs.jsonl", "eval_fraction": 0.1},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 40, "global_batch_size": 8, "learning_rate": 1e-2},
    pictures=("margins.png",),
)
