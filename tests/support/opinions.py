"""A classifier of texts small enough to make in a test: which of two words a text holds."""

from __future__ import annotations

from pathlib import Path

from tracking.manifest import ModelManifest, write

TEXTS = {"a good film": "good", "a bad film": "bad"}
LONGEST = 4
"""Tokens of the longest text; more are cut."""


def classifier(directory: Path) -> Path:
    """Export a classifier of labels `good` and `bad`, with weights that nobody has trained, to `directory`."""
    import torch

    from jobs.tasks import get

    task = get("text-classification")({"tokenizer": {"train": "word"}, "max_length": LONGEST})
    task.fit(task.observe([{"text": text, "label": label} for text, label in TEXTS.items()] * 2))
    torch.manual_seed(0)
    task.build("ngram", {"hidden_size": 8, "buckets": 16}).save_pretrained(directory)  # type: ignore[operator]
    task.save(directory)
    write(directory, ModelManifest(name="opinions", task="text-classification", architecture="ngram"))
    return directory
