"""Batch inference on the real stack: a classifier over a table with bad rows, and a language model over questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from cluster.connect import Connection, connection
from jobs import submit
from jobs.tasks import get
from tests.support import opinions, tiny_models

ROWS = 3000


TEXTS = ["a good film", "bad", "a bad film that is too long", "good"]
QUESTIONS = [{"id": n, "messages": [{"role": "user", "content": f"Say {n}."}]} for n in range(6)]


@pytest.fixture(scope="module")
def outcomes(cluster: Connection, folder: Path) -> dict[str, submit.Outcome]:
    """Run both jobs side by side; return how each ended."""
    jobs = [_reviews(folder), _questions(folder)]
    ids = {}
    for spec in jobs:
        path = folder / f"{spec['name']}.yaml"
        path.write_text(yaml.safe_dump({"phase": "predict", **spec}))
        ids[spec["name"]] = submit.submit(path, [])
    found = {name: submit.follow(job, lambda line, meaning: None) for name, job in ids.items()}
    assert [found[name].status for name in ids] == ["SUCCEEDED"] * 2, [found[name].log for name in ids]
    return found


def _reviews(folder: Path) -> dict[str, Any]:
    """A table of which one row has no text, and one no second column."""
    lines = [f"{number}\t{TEXTS[number % 4]}\n" for number in range(ROWS)]
    lines[1500] = "1500\t\n"
    lines[2100] = "2100\n"
    (folder / "reviews.tsv").write_text("id\treview\n" + "".join(lines))
    return {
        "name": "predict-reviews",
        "task": {"name": "text-classification", "text_column": "review"},
        "model": {"from": str(opinions.classifier(folder / "model"))},
        "data": {"predict": "reviews.tsv", "bad_rows": "skip"},
        "predict": {"output": "out/answers.parquet", "shard_rows": 500},
        "resources": {"workers": 2},
    }


def _questions(folder: Path) -> dict[str, Any]:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return {
        "name": "predict-questions",
        "task": {"name": "causal-lm", "sequence_length": 64},
        "model": {"from": str(tiny_models.language_model(folder / "chat", context=128))},
        "data": {"predict": "questions.jsonl"},
        "predict": {"format": "jsonl", "generation": {"max_tokens": 5, "temperature": 1.0, "seed": 3}, "shard_rows": 4},
    }


def test_each_row_of_a_table_is_answered_once_in_its_place(outcomes: dict[str, submit.Outcome], folder: Path) -> None:
    outcome, model = outcomes["predict-reviews"], folder / "model"
    output = folder / "out" / "answers.parquet"
    assert {key: outcome.result[key] for key in ("output", "rows", "failed_rows")} == {
        "output": str(output), "rows": ROWS, "failed_rows": 2,
    }  # fmt: skip
    table = parquet.read_table(output)
    assert table.column_names == [
        "id", "review", "prediction_label", "prediction_score", "prediction_scores", "prediction_truncated",
        "prediction_error",
    ]  # fmt: skip
    whole = [str(number) for number in range(ROWS)]
    assert table.column("id").to_pylist() == [*whole[:2100], None, *whole[2101:]]
    errors = {at: why for at, why in enumerate(table.column("prediction_error").to_pylist()) if why}
    assert list(errors) == [1500, 2100]
    task = get("text-classification").load(model)
    said = dict(zip(TEXTS, task.predict(task.load_model(model), TEXTS), strict=True))
    labels = [None if at in errors else said[TEXTS[at % 4]]["label"] for at in range(ROWS)]
    assert table.column("prediction_label").to_pylist() == labels
    manifest = json.loads((folder / "out" / "answers.parquet.manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [500] * 6
    assert manifest["counts"] == {"truncated": 750}
    assert f"tandem: 750 of {ROWS} rows: truncated" in outcome.log
    measured = _run(outcome.result["run_id"])
    assert measured.data.metrics["rows"] == ROWS
    assert measured.data.metrics["rows_per_second"] > 0
    assert measured.data.tags["tandem.model"] == str(model)
    assert measured.data.tags["tandem.dataset.predict"].startswith("reviews.tsv@")


def test_questions_are_answered_by_the_engine_and_the_run_has_the_output(outcomes: dict[str, submit.Outcome]) -> None:
    outcome = outcomes["predict-questions"]
    output = Path(outcome.result["output"])
    assert output.parent == Path(outcome.result["manifest"]).parent
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(6))
    assert all(0 < row["prediction_completion_tokens"] <= 5 for row in found)
    assert all(row["messages"] == of["messages"] for row, of in zip(found, QUESTIONS, strict=True))
    assert len({row["prediction_text"] for row in found}) > 1


def _run(run_id: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(connection().tracking_uri).get_run(run_id)
