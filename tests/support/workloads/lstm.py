"""A recurrent language model learns a few sentences by heart."""

from __future__ import annotations

from pathlib import Path

from tests.support.workloads import Endpoint, Workload

SENTENCES = {"the colour of snow is": " white", "the colour of grass is": " green", "the colour of coal is": " black"}


def write(folder: Path) -> None:
    """Write texts of the sentences in many orders."""
    (folder / "colours").mkdir()
    told = [f"{begin}{end}.\n" for begin, end in SENTENCES.items()]
    for number in range(60):
        turned = told[number % 3 :] + told[: number % 3]
        (folder / "colours" / f"{number}.txt").write_text(f"text {number}\n" + "".join(turned) * 3)


def learned(metrics: dict[str, float]) -> None:
    assert metrics["accuracy"] > 0.6


def asked(endpoint: Endpoint) -> None:
    for prompt, end in SENTENCES.items():
        body = {"model": endpoint.model, "prompt": prompt, "temperature": 0, "max_tokens": 8, "stop": ["."]}
        reply = endpoint.client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == end


WORKLOAD = Workload(
    name="colours",
    task={"name": "causal-lm", "sequence_length": 32, "tokenizer": {"train": "bpe", "vocab_size": 300}},
    model={"architecture": "lstm", "config": {"hidden_size": 96, "num_hidden_layers": 1, "dropout": 0.0}},
    data={"train": "colours", "eval_fraction": 0.1},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 120, "global_batch_size": 8, "learning_rate": 1e-2},
    unquantised="phase quantize changes no layer",
)
