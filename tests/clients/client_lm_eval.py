"""lm-eval: both API models, and log-likelihoods against the transformers backend on the same directory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import tried
from lm_eval.tasks import TaskManager

FOLDER = Path(tempfile.mkdtemp(prefix="lm-eval-"))
ROWS = [
    {"question": "the quick brown", "choices": [" fox jumps", " dog", " über 10"], "answer": 0},
    {"question": "for i in range(10):", "choices": [" print(i)", " return"], "answer": 0},
    {"question": "def add(a, b):\n", "choices": ["    return a + b", "é"], "answer": 0},
]
COMMON = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(FOLDER / "rows.jsonl")}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "num_fewshot": 0,
}
CHOICE = {
    **COMMON,
    "task": "tandem_choice",
    "output_type": "multiple_choice",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    **COMMON,
    "task": "tandem_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
UNTIL = {
    **COMMON,
    "task": "tandem_until",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}
HF = {"pretrained": tried.DIRECTORY, "dtype": "float32", "device": "cpu"}
API = {"model": tried.TEXT, "num_concurrent": 2, "max_retries": 1, "tokenizer": tried.DIRECTORY}
COMPLETIONS = {**API, "base_url": f"{tried.URL}/completions", "tokenizer_backend": "huggingface"}
CHAT = {**API, "base_url": f"{tried.URL}/chat/completions"}

(FOLDER / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _responses(model: str, arguments: dict[str, Any], task: dict[str, Any], **fields: Any) -> list[Any]:
    """Return what the model said of each document, in their order."""
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=[dict(task)], task_manager=manager, log_samples=True, bootstrap_iters=0,
        **fields,
    )  # fmt: skip
    samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ROWS)
    return [sample["filtered_resps"] for sample in samples]


def _numbers(responses: list[Any]) -> list[float]:
    if isinstance(responses, (list, tuple)):
        return [number for part in responses for number in _numbers(part)]
    return [float(responses)]


def _same(task: dict[str, Any]) -> None:
    own, reference = (_responses(*model, task) for model in (("local-completions", COMPLETIONS), ("hf", HF)))
    worst = max(abs(a - b) for a, b in zip(_numbers(own), _numbers(reference), strict=True))
    assert worst < 1e-3, f"log-likelihoods differ by {worst}"


def likelihoods() -> None:
    """local-completions: log-likelihoods and greedy flags equal to hf's to 1e-3"""
    _same(CHOICE)


def rolling() -> None:
    """local-completions: rolling log-likelihoods equal to hf's to 1e-3"""
    _same(ROLLING)


def generation() -> None:
    """local-completions: generate_until equal to hf's"""
    own, reference = (_responses(*model, UNTIL) for model in (("local-completions", COMPLETIONS), ("hf", HF)))
    assert own == reference, (own, reference)


def chat() -> None:
    """local-chat-completions: generate_until equal to hf's with the chat template"""
    own = _responses("local-chat-completions", CHAT, UNTIL, apply_chat_template=True)
    reference = _responses("hf", HF, UNTIL, apply_chat_template=True)
    assert own == reference, (own, reference)


tried.run(likelihoods, rolling, generation, chat)
