"""Digits into French number words, in their order."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.workloads import Endpoint, Workload

WORDS = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")


def translated(digits: str) -> str:
    """Return the words of digits with spaces between them."""
    return " ".join(WORDS[int(digit)] for digit in digits.split())


def write(folder: Path) -> None:
    """Write a TSV of pairs, two to four digits each, without a header line."""
    draw = random.Random(0)
    sources = sorted({" ".join(draw.choices("0123456789", k=draw.choice((2, 3, 4)))) for _ in range(900)})
    lines = [f"{source}\t{translated(source)}\n" for source in sources]
    (folder / "digits.tsv").write_text("".join(lines), encoding="utf-8")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["accuracy"] > 0.8
    assert metrics["chrf"] > 60
    assert metrics["bleu"] > 20


def asked(endpoint: Endpoint) -> None:
    sources = ["1 2", "9 0 4"]
    assert endpoint.infer(text=("BYTES", [2], sources))["text"] == [translated(source) for source in sources]
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": sources[1]}], "num_beams": 3}
    reply = endpoint.client.post("/v1/chat/completions", json=body)
    assert reply.json()["choices"][0]["message"]["content"] == translated(sources[1]), reply.text


LAYERS = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
          {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip

WORKLOAD = Workload(
    name="digit-words",
    task={
        **{"name": "seq2seq", "source_column": "digits", "target_column": "words"},
        **{"max_source_length": 8, "max_target_length": 8, "tokenizer": {"train": "bpe", "vocab_size": 340}},
    },
    model={
        "architecture": "marian",
        "config": {**LAYERS, "d_model": 64, "dropout": 0.0, "scale_embedding": True, "max_position_embeddings": 16},
    },
    data={"train": "digits.tsv", "columns": ["digits", "words"], "eval_fraction": 0.1},
    write=write,
    learned=learned,
    asked=asked,
    training={
        **{"steps": 240, "global_batch_size": 64, "learning_rate": 5e-3},
        **{"schedule": "linear", "warmup_steps": 20, "weight_decay": 0.0},
    },
)
