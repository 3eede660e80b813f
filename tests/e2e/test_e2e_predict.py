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


def run(folder: Path, **spec: Any) -> submit.Outcome:
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump({"phase": "predict", **spec}))
    return submit.follow(submit.submit(path, []), lambda line, meaning: None)


@pytest.mark.usefixtures("cluster")
def test_each_row_of_a_table_is_answered_once_in_its_place(folder: Path) -> None:
    model = opinions.classifier(folder / "model")
    texts = ["a good film", "bad", "a bad film that is too long", "good"]
    lines = [f"{number}\t{texts[number % 4]}\n" for number in range(ROWS)]
    lines[1500] = "1500\t\n"
    lines[2100] = "2100\n"
    (folder / "reviews.tsv").write_text("id\treview\n" + "".join(lines))
    outcome = run(
        folder,
        name="predict-reviews",
        task={"name": "text-classification", "text_column": "review"},
        model={"from": str(model)},
        data={"predict": "reviews.tsv", "bad_rows": "skip"},
        predict={"output": "out/answers.parquet", "shard_rows": 500},
        resources={"workers": 2},
    )
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
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
    said = {text: answer for text, answer in zip(texts, task.predict(task.load_model(model), texts), strict=True)}
    labels = [None if at in errors else said[texts[at % 4]]["label"] for at in range(ROWS)]
    assert table.column("prediction_label").to_pylist() == labels
    manifest = json.loads((folder / "out" / "answers.parquet.manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [500] * 6
    assert any("750 of 3000 rows: truncated" in line for line in outcome.log) or manifest["counts"]["truncated"] == 750
    measured = _run(outcome.result["run_id"])
    assert measured.data.metrics["rows"] == ROWS
    assert measured.data.metrics["rows_per_second"] > 0
    assert measured.data.tags["tandem.model"] == str(model)
    assert measured.data.tags["tandem.dataset.predict"].startswith("reviews.tsv@")
    _refuse_what_is_there(folder, model, output)


def _refuse_what_is_there(folder: Path, model: Path, output: Path) -> None:
    before = output.read_bytes()
    again = run(
        folder,
        name="predict-again",
        task={"name": "text-classification", "text_column": "review"},
        model={"from": str(model)},
        data={"predict": "reviews.tsv", "bad_rows": "skip"},
        predict={"output": "out/answers.parquet"},
    )
    assert (again.status, again.exit_code) == ("FAILED", 2)
    assert "is there already, and is not overwritten" in str(again.error)
    assert output.read_bytes() == before


def test_questions_are_answered_by_the_engine_and_the_run_has_the_output(cluster: Connection, folder: Path) -> None:
    model = tiny_models.language_model(folder / "chat", context=128)
    rows = [{"id": number, "messages": [{"role": "user", "content": f"Say {number}."}]} for number in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run(
        folder,
        name="predict-questions",
        task={"name": "causal-lm", "sequence_length": 64},
        model={"from": str(model)},
        data={"predict": "questions.jsonl"},
        predict={"format": "jsonl", "generation": {"max_tokens": 5, "temperature": 1.0, "seed": 3}, "shard_rows": 4},
    )
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    output = Path(outcome.result["output"])
    assert output.parent == Path(outcome.result["manifest"]).parent
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(6))
    assert all(0 < row["prediction_completion_tokens"] <= 5 for row in found)
    assert all(row["messages"] == of["messages"] for row, of in zip(found, rows, strict=True))
    assert len({row["prediction_text"] for row in found}) > 1


def _run(run_id: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(connection().tracking_uri).get_run(run_id)
