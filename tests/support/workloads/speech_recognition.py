"""Tones that spell letters, in two voices, read out of a folder of WAV files."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tests.support import tones
from tests.support.workloads import Endpoint, Workload

TEXTS = ["".join(letters) for length in (1, 2, 3) for letters in product("ab", repeat=length)]


def write(folder: Path) -> None:
    """Write 140 recordings of 1 to 3 letters."""
    tones.write(folder / "tones", TEXTS, {"low": 1.0, "high": 1.15}, takes=5)


def learned(metrics: dict[str, float]) -> None:
    assert metrics["cer"] < 0.1


def asked(endpoint: Endpoint) -> None:
    file = tones.wav(tones.spoken("bab", 1.05))
    form = {"model": endpoint.model, "response_format": "text"}
    answer = endpoint.client.post("/v1/audio/transcriptions", data=form, files={"file": ("said.wav", file)})
    assert (answer.status_code, answer.text) == (200, "bab\n"), answer.text
    sound = tones.spoken("ab")
    assert endpoint.infer(audio=("FP32", [1, len(sound)], sound.tolist()))["text"] == ["ab"]


WORKLOAD = Workload(
    name="tones",
    task={"name": "speech-recognition", "transcript_from": "{text}_{voice}_{take}", "max_seconds": 1.0},
    model={
        "architecture": "conv-transformer",
        "config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "dropout": 0.0},
    },
    data={"train": "tones", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 60, "global_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 5},
    pictures=("recordings.png",),
)
