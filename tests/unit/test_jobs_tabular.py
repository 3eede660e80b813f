"""Tables: what their columns are, how missing and strange values are read, what a network answers."""

from __future__ import annotations

import datetime
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, root_mean_squared_error

from cluster.errors import UserError
from jobs.data import chunks
from jobs.data.examples import Example
from jobs.data.sources import open_source
from jobs.spec import TaskSpec
from jobs.tasks import TaskError, get, roc
from jobs.tasks.cells import read, spelling
from jobs.tasks.row_sample import RowSample
from jobs.tasks.table_columns import Column, scaling
from jobs.tasks.tabular import Tabular
from serve.engines.inputs import blank, rows
from tests.support.measured import sums, train


def task(examples: list[dict[str, Any]], **options: Any) -> tuple[Tabular, list[str]]:
    """Return the task, fitted to the examples, and what it said."""
    made = get("tabular")(options)
    assert isinstance(made, Tabular)
    for example in examples:
        made.check(example)
    return made, made.fit(made.observe(examples))


def table(count: int = 60) -> list[dict[str, Any]]:
    """Return rows of a number, a category, a date, a flag, a text that names the row, and a constant."""
    draw = np.random.default_rng(0)
    return [
        {
            "age": float(draw.normal(50, 10)) if at % 7 else None,
            "city": ["Rome", "Paris", "Bonn"][at % 3],
            "since": f"20{at % 20:02}-0{1 + at % 9}-15",
            "member": bool(at % 2),
            "key": f"row {at}",
            "version": 3,
            "target": "yes" if at % 3 else "no",
        }
        for at in range(count)
    ]


def test_dates_without_a_time_zone_beside_others_with_one_are_counted():
    rows_ = table()
    stamps = ["2024-01-01T05:00Z", "2024-01-02T05:00+0200", "2024-01-03T05:00", "2024-01-04", datetime.date(2024, 1, 5)]
    for at, row in enumerate(rows_):
        row["since"] = stamps[at % 5]
    _, said = task(rows_)
    dates = "column 'since' holds dates: they become days since 1970"
    assert f"{dates}; 36 of 60 name no time zone, as the others do, and are taken as UTC" in said
    assert dates in task([{**row, "since": row["since"] if at % 5 > 1 else None} for at, row in enumerate(rows_)])[1]


@pytest.mark.parametrize(
    ("value", "form", "number"),
    [
        (None, "missing", math.nan),
        (" ", "missing", math.nan),
        (math.nan, "missing", math.nan),
        ("NA", "marked", math.nan),
        ("?", "marked", math.nan),
        ("1e3", "number", 1000),
        (" -1.5 ", "number", -1.5),
        (Decimal("2.5"), "number", 2.5),
        (np.int64(3), "number", 3),
        ("inf", "number", math.inf),
        ("1_000", "text", math.nan),
        ("١", "text", math.nan),
        (True, "flag", math.nan),
        ("FALSE", "flag", math.nan),
        ("1970-01-02", "date", 1),
        ("1970-01-02T12:00:00Z", "date", 1.5),
        ("1970-01-01T12:00:00+1200", "date", 0),
        (datetime.date(1970, 1, 3), "date", 2),
        (datetime.datetime(1970, 1, 3, 6), "date", 2.25),
        ("2024-02-30", "text", math.nan),
    ],
)
def test_a_cell_is_read(value: Any, form: str, number: float) -> None:
    cell = read(value, "x")
    assert cell.form == form
    assert cell.number == pytest.approx(number, nan_ok=True)


def test_spellings_that_read_alike_are_one() -> None:
    assert [spelling(value) for value in (7, 7.0, Decimal("7.0"), "7 ")] == ["7"] * 4
    assert [spelling(value) for value in ("07", 7.5, True, "TRUE", np.True_)] == ["07", "7.5", "true", "true", "true"]


def test_what_no_cell_holds_is_refused() -> None:
    made = get("tabular")()
    with pytest.raises(TaskError, match=r"column 'x' holds \[1, 2\].*task.ignore"):
        made.check({"x": [1, 2], "target": 1})
    with pytest.raises(TaskError, match="column 'x' holds inf, which is no finite number"):
        made.check({"x": math.inf, "target": 1})
    with pytest.raises(TaskError, match="the target, is empty"):
        made.check({"x": 1, "target": ""})
    with pytest.raises(TaskError, match=r"no column 'target'.*task.target_column"):
        made.check({"x": 1, "targe": 2})
    get("tabular")({"ignore": ["x"]}).check({"x": [1, 2], "target": 1})


def test_columns_are_told_apart_and_what_is_left_out_is_said() -> None:
    made, said = task(table())
    assert [(column.name, column.kind) for column in made.columns] == [
        ("age", "number"),
        ("city", "category"),
        ("since", "date"),
        ("member", "category"),
    ]
    assert [column.missing for column in made.columns] == [True, False, False, False]
    assert made.columns[3].categories == ("false", "true")
    log = "\n".join(said)
    assert "2 labels: no, yes" in log
    assert "column 'key' is left out: its texts are names of rows, or prose (60 different ones in 60 rows)" in log
    assert "column 'version' is left out: it is 3 in every row" in log
    assert "column 'since' holds dates: they become days since 1970" in log
    assert "1 of numbers (age); 1 of dates (since); 2 of categories (city, member)" in log


def test_findings_do_not_depend_on_where_the_data_is_cut() -> None:
    examples = [*table(), *({"age": "7", "extra": at % 3, "target": "no"} for at in range(30))]
    learned = []
    for size in (90, 30, 7, 1):
        made = get("tabular")()
        found = made.observe(examples[:size])
        for start in range(size, len(examples), size):
            found = found.merged(made.observe(examples[start : start + size]))
        said = made.fit(found)
        learned.append((made.columns, made.labels, said))
    assert all(each == learned[0] for each in learned[1:])
    assert [column.name for column in learned[0][0] if not column.lacking] == ["age"]


def test_a_draw_of_rows_is_the_same_however_it_is_merged() -> None:
    values = np.random.default_rng(0).normal(size=500).round(1)
    whole = RowSample.of(values.tolist(), {"x": values}, most=100)
    for size in (3, 50, 333):
        parts = [values[at : at + size] for at in range(0, 500, size)]
        drawn = RowSample.of(parts[0].tolist(), {"x": parts[0]}, most=100)
        for part in parts[1:]:
            drawn = drawn.merged(RowSample.of(part.tolist(), {"x": part}, most=100))
        assert drawn["x"].tolist() == whole["x"].tolist()
    assert len(whole["x"]) == 100
    assert abs(whole["x"].mean() - values.mean()) < 0.3


def test_numbers_are_scaled_by_their_quartiles_and_held() -> None:
    column = Column("x", "number", True, False, *scaling(np.arange(101.0)))
    cells = [read(value, "x") for value in (50, 75, 25, 1e300, None)]
    scaled, gone = column.scaled(cells)
    assert scaled[0] == 0
    assert 0.6 < scaled[1] == -scaled[2] < 0.68
    assert scaled[3] == pytest.approx(3)
    assert (scaled[4], gone.tolist()) == (0, [0, 0, 0, 0, 1])
    assert scaling(np.array([0.0] * 9 + [4.0])) == (0.0, 0.5)


def test_a_mistake_in_a_column_of_numbers_is_a_bad_row_with_its_line(tmp_path: Path) -> None:
    examples: list[dict[str, Any]] = [{"x": str(at), "target": str(at * 1.5)} for at in range(50)]
    examples[7]["x"] = "seven"
    made, _ = task(examples, kind="regression")
    made.save(tmp_path)
    with pytest.raises(TaskError, match=r"column 'x' holds 'seven', and it is one of numbers.*task.categorical"):
        made.encode(examples)
    (tmp_path / "task").mkdir()
    made.save(tmp_path / "task")
    spec = TaskSpec.model_validate({"name": "tabular", "kind": "regression"})
    numbered = [Example(row, f"table.csv:{line}") for line, row in enumerate(examples, 2)]
    encoded = chunks.encode(spec, tmp_path, ("train-00000.arrow", numbered))
    assert (encoded.rows, [row.where for row in encoded.left_out]) == (49, ["table.csv:9"])
    for value in ("inf", "1e999"):
        with pytest.raises(TaskError, match=f"column 'x' holds '{value}', which is no finite number"):
            made.encode([{"x": value, "target": 1}])


def test_missing_spellings_count_as_missing_among_numbers_and_as_names_among_names() -> None:
    examples = [{"x": ["1", "2", "NA"][at % 3], "c": ["EU", "NA"][at % 2], "target": at % 2} for at in range(30)]
    made, said = task(examples)
    assert [column.missing for column in made.columns] == [True, False]
    assert made.columns[1].categories == ("EU", "NA")
    assert "column 'x': 10 texts such as NA are taken as missing" in said
    assert made.encode(examples)["missing"].sum() == 10


def test_numbers_with_separators_are_refused_not_taken_for_names() -> None:
    examples = [{"price": f"{at},{at:03}.50", "x": at, "target": at % 2} for at in range(30)]
    with pytest.raises(TaskError, match=r"column 'price' holds numbers with separators.*1234\.5"):
        task(examples)
    assert len(task(examples, categorical=["price"])[0].columns[0].categories) == 30
    assert [column.name for column in task(examples, ignore=["price"])[0].columns] == ["x"]


def test_mixed_columns_are_names_and_said() -> None:
    examples = [{"code": "7" if at % 2 else "A4", "target": at % 3} for at in range(60)]
    made, said = task(examples)
    assert made.columns[0].categories == ("7", "A4")
    assert any("holds 30 numbers among 60 values: all are taken as names; task.numeric" in each for each in said)
    numeric, _ = task(examples, numeric=["code"])
    with pytest.raises(TaskError, match="column 'code' holds 'A4'"):
        numeric.encode(examples)


def test_row_numbers_are_pointed_out() -> None:
    _, said = task([{"id": at, "x": at % 5, "target": at % 2} for at in range(40)])
    assert any("column 'id' counts the rows" in each for each in said)


def test_rare_categories_are_one_and_counted() -> None:
    examples = [{"c": "abc"[min(at % 10, 2)] if at > 1 else f"rare {at}", "target": at % 2} for at in range(40)]
    made, said = task(examples, max_categories=2)
    assert made.columns[0].categories == ("a", "c")
    assert any(
        "has 5 categories: the 2 most frequent are told apart, and the others, in 5 rows" in each for each in said
    )
    assert made.encode(examples)["unknown"].sum() == 5
    assert made.encode([{"c": "a", "target": 1}])["categories"].tolist() == [[2]]


def test_wishes_that_name_no_column_are_refused() -> None:
    for option in ("categorical", "numeric", "ignore"):
        with pytest.raises(TaskError, match=f"task.{option} names 'agee', and there are age"):
            task(table(), **{option: ["agee"]})
    with pytest.raises(TaskError, match="column 'age' stands in target_column and in ignore"):
        get("tabular")({"target_column": "age", "ignore": ["age"]})


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([0, 1] * 10, "classification", "2 different whole numbers, taken as labels.*task.kind: regression"),
        ([1.0, 2.0, 3.0] * 5, "classification", "3 different whole numbers"),
        ([1, 2, 3, 4] * 2, "regression", "4 different whole numbers, taken as amounts.*task.kind: classification"),
        (list(range(30)), "regression", "30 different whole numbers, taken as amounts"),
        ([0.5, 1.0] * 10, "regression", "holds numbers"),
        (["1.5", "2"] * 10, "regression", "holds numbers"),
        (["good", "bad"] * 10, "classification", "2 labels: bad, good"),
        ([True, False] * 10, "classification", "2 labels: false, true"),
    ],
)
def test_what_the_target_is(values: list[Any], kind: str, said: str) -> None:
    examples = [{"x": at % 7, "target": value} for at, value in enumerate(values)]
    made, log = task(examples)
    assert made.kind == kind
    assert re.search(said, "\n".join(log))


def test_a_target_can_be_told_what_it_is() -> None:
    examples = [{"x": at % 7, "target": at % 5} for at in range(50)]
    assert task(examples, kind="regression")[0].kind == "regression"
    assert task(examples, kind="classification")[0].labels == ["0", "1", "2", "3", "4"]
    with pytest.raises(TaskError, match=r"holds 45 numbers and 5 other values: say with task.kind"):
        task([*examples[:45], *({"x": 1, "target": "many"} for _ in range(5))])
    with pytest.raises(TaskError, match="holds dates, which are no amounts"):
        task([{"x": at, "target": f"2024-01-{at + 1:02}"} for at in range(20)])
    with pytest.raises(TaskError, match="is different in each of 20 rows: no label can be learned"):
        task([{"x": at % 5, "target": f"name {at}"} for at in range(20)])
    with pytest.raises(TaskError, match="is 3 in every row: there is nothing to learn"):
        task([{"x": at, "target": 3.0} for at in range(20)], kind="regression")


def test_a_regression_by_no_number_is_refused() -> None:
    with pytest.raises(TaskError, match=r"task.kind is regression, and column 'target', the target, holds no number"):
        task([{"a": at, "target": at % 2 == 0} for at in range(9)], kind="regression")


def test_a_column_of_another_name_is_not_taken_for_an_empty_one() -> None:
    made, _ = task([{"age": at if at % 3 else None, "target": at % 2} for at in range(60)])
    assert made.instance({"age": None}) == {"age": None}
    with pytest.raises(TaskError, match="no column 'age', which all rows in training had; this row has \\['Age'\\]"):
        made.instance({"Age": 3})
    lacking, _ = task([{**({"age": at} if at % 3 else {}), "target": at % 2} for at in range(60)])
    assert lacking.instance({"target": 1}) == {}


def test_a_column_that_is_the_target_in_another_unit_is_said() -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"metres": at, "feet": at * 3.28084, "near": at + generator.normal() / 10} for at in generator.normal(size=50)
    ]
    said = [note for note in task(rows, target_column="metres")[1] if "exactly" in note]
    assert said == [
        "column 'feet' tells 'metres' exactly, whatever the other columns are: leave it out with task.ignore, unless "
        "it will be known where there is no answer yet"
    ]
    labels = [{"copy": at % 2, "other": at % 3, "target": at % 2} for at in range(60)]
    assert [note.split()[1] for note in task(labels)[1] if "exactly" in note] == ["'copy'"]


def test_what_training_has_not_seen_is_counted_or_refused() -> None:
    made, _ = task(table())
    row = {**table()[1], "city": "Oslo"}
    encoded = made.encode([row, {**row, "city": None, "mood": 1}, {**row, "since": None}])
    assert encoded["unknown"].tolist() == [1, 1, 1]
    assert encoded["newly_missing"].tolist() == [0, 0, 1]
    assert encoded["unread"].tolist() == [0, 1, 0]
    assert encoded["categories"][0].tolist() == [0, 3]
    with pytest.raises(TaskError, match="no column 'city', which all rows in training had"):
        made.encode([{key: value for key, value in row.items() if key != "city"}])
    with pytest.raises(TaskError, match="labels \\['maybe'\\] are not among the 2 labels"):
        made.encode([{**row, "target": "maybe"}])


def test_copies_are_known_without_target_and_ignored_columns() -> None:
    made = get("tabular")({"ignore": ["key"]})
    first, second = ({"x": 1, "key": at, "target": at} for at in (1, 2))
    assert made.content(first) == made.content(second) == {"x": 1}
    assert (made.answer(first), made.unused(first)) == ("1", ["key"])


def trained(made: Tabular, examples: list[dict[str, Any]], architecture: str, config: dict[str, Any]) -> Any:
    """Return a network that was trained for a moment."""
    torch.manual_seed(0)
    return train(made.build(architecture, config), made, examples, steps=60)


SMALL = {
    "mlp": {"hidden_size": 16, "layers": 1, "embedding_size": 4, "frequencies": 4},
    "ft-transformer": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "frequencies": 4},
}


@pytest.mark.parametrize("architecture", ["mlp", "ft-transformer"])
def test_labels_are_learned_from_a_category_and_answered(architecture: str, tmp_path: Path) -> None:
    examples = table()
    made, _ = task(examples)
    made.check_model(architecture, SMALL[architecture])
    model = trained(made, examples, architecture, SMALL[architecture])
    found = made.summarise(sums(made, model, examples))
    assert found["accuracy"] > 0.95
    assert found["auc"] > 0.99
    assert found.keys() == {"loss", "accuracy", "auc", "calibration_error"}
    pictures = made.figures(sums(made, model, examples))
    assert sorted(pictures) == ["confusion.png", "reliability.png", "roc.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())

    made.save(tmp_path)
    model.save_pretrained(tmp_path)
    served = get("tabular").load(tmp_path)
    loaded = served.load_model(tmp_path)
    given = [made.instance(row) for row in examples[:3]]
    assert [answer["label"] for answer in served.predict(loaded, given)] == ["no", "yes", "yes"]
    assert served.predict(loaded, given) == made.predict(model, given)


def test_amounts_are_learned_and_answered_on_their_own_scale(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    examples = [{"x": float(x), "target": float(5000 + 300 * x + draw.normal(0, 10))} for x in draw.normal(size=80)]
    made, _ = task(examples)
    model = trained(made, examples, "mlp", SMALL["mlp"])
    found = made.summarise(sums(made, model, examples))
    answers = [answer["value"] for answer in made.predict(model, [{"x": row["x"]} for row in examples])]
    assert [part["name"] for part in made.outputs()] == ["value"], "there are no categories that could be unknown"
    truths = [row["target"] for row in examples]
    assert found["r2"] == pytest.approx(r2_score(truths, answers), abs=1e-4)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truths, answers), rel=1e-3)
    assert found["r2"] > 0.95
    assert made.predict(model, [0.25]) == made.predict(model, [{"x": 0.25}])
    assert list(made.figures(sums(made, model, examples))) == ["predicted.png"]


def test_what_a_client_may_send() -> None:
    examples = table()
    made, _ = task(examples)
    model = made.build("mlp", SMALL["mlp"]).eval()
    parts = {part["name"]: part for part in made.inputs()}
    assert {name: part["datatype"] for name, part in parts.items()} == {
        "age": "FP64",
        "city": "BYTES",
        "since": "BYTES",
        "member": "BYTES",
    }
    assert [name for name, part in parts.items() if part["parameters"].get("optional")] == ["age"]
    assert parts["city"]["parameters"]["categories"] == ["Bonn", "Paris", "Rome"]
    sent = {"city": ["Rome", "Oslo"], "since": [b"2004-05-15", "2010-01-01"], "member": ["true", "false"]}
    rome, oslo = made.predict(model, rows(sent, made.inputs()))
    assert (rome["unknown_category"], oslo["unknown_category"]) == (False, True), "no row in training was of Oslo"
    assert made.predict(model, [{**made.instance(examples[1]), "age": math.nan}])[0]["label"] in made.labels
    with pytest.raises(TaskError, match="column 'city' is empty, and no row in training was"):
        made.predict(model, [{**made.instance(examples[1]), "city": " "}])
    with pytest.raises(TaskError, match="the model reads no column 'town'"):
        made.predict(model, [{**made.instance(examples[1]), "town": "Rome"}])
    with pytest.raises(TaskError, match=r"column 'since' holds 'yesterday', and it is one of dates as 2024-12-31$"):
        made.predict(model, [{**made.instance(examples[1]), "since": "yesterday"}])
    with pytest.raises(TaskError, match="no text in UTF-8"):
        made.predict(model, [{**made.instance(examples[1]), "city": b"\xff"}])
    assert {part["name"] for part in made.outputs()} == {"label", "score", "scores", "unknown_category"}
    assert set(blank(made.inputs())) == set(parts) - {"age"}


def test_a_job_that_goes_on_keeps_columns_and_scales(tmp_path: Path) -> None:
    made, _ = task([{"x": at * 1.0, "c": "ab"[at % 2], "target": at % 2} for at in range(40)])
    made.save(tmp_path)
    later = get("tabular")()
    assert later.inherit(tmp_path)
    assert (later.columns, later.labels, later.kind) == (made.columns, made.labels, made.kind)
    assert later.inherited() == ["classification by the 2 columns of the model it starts from, scaled as there"]
    with pytest.raises(TaskError, match=r"task.kind is regression, but the model it starts from"):
        get("tabular")({"kind": "regression"}).inherit(tmp_path)
    (tmp_path / "columns.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no table model of Tandem: columns\.json"):
        get("tabular").load(tmp_path)


def test_configs_that_make_no_network_are_refused() -> None:
    made = get("tabular")()
    with pytest.raises(TaskError, match="task tabular has mlp, ft-transformer, and no 'mpl'; did you mean 'mlp'"):
        made.check_model("mpl", {})
    with pytest.raises(TaskError, match="mlp has no 'hidden'"):
        made.check_model("mlp", {"hidden": 3})
    with pytest.raises(TaskError, match="'outputs' is no entry for a job to set"):
        made.check_model("mlp", {"outputs": 3})
    with pytest.raises(TaskError, match="hidden_size 30 is no multiple of heads 4"):
        made.check_model("ft-transformer", {"hidden_size": 30})


def test_hidden_categories_teach_what_unknown_means() -> None:
    made, _ = task([{"c": "ab"[at % 2], "target": at % 2} for at in range(40)])
    model = made.build("mlp", {**SMALL["mlp"], "hide_categories": 0.5}).train()
    total, _ = made.loss(model, made.collate(made.encode([{"c": "a", "target": 0}] * 40)))
    total.backward()  # type: ignore[no-untyped-call]
    assert isinstance(model.embedded.table, torch.nn.Embedding)
    gradient = model.embedded.table.weight.grad
    assert gradient is not None
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_auc_counts_ties_half_and_leaves_out_classes_that_do_not_occur() -> None:
    one = np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])
    assert roc.auc(one, np.array([0, 1, 1])) == pytest.approx(0.75)
    assert roc.auc(one, np.array([1, 1, 1])) is None
    three = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    assert roc.auc(three, np.array([0, 1, 1])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "target", "count", "first"),
    [("sklearn-breast-cancer", "diagnosis", 569, "malignant"), ("sklearn-diabetes", "progression", 442, "151")],
)
def test_the_built_in_tables_are_as_they_were_taken(name: str, target: str, count: int, first: str) -> None:
    source = open_source(name, Path())
    examples = [row for row in source.read() if isinstance(row, Example)]
    assert len(examples) == count
    made = get("tabular")({"target_column": target})
    assert made.answer(examples[0]) == first
    assert len(source.digest) == 64
    assert all(isinstance(value, float) for key, value in examples[0].items() if key != target)
    if name == "sklearn-diabetes":
        assert (examples[0]["age"], examples[0]["bmi"]) == (59, 32.1)
