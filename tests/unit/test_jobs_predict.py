"""Batch inference without a model: rows are numbered, cut, written and put together again; each once, in order."""

import json
import math
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from cluster import stores
from cluster.errors import UserError
from jobs.data import sources
from jobs.data.examples import BadRow, Example
from jobs.predict import fold, parts
from jobs.predict.columns import KeptColumns
from jobs.predict.desk import Desk, TooOften
from jobs.predict.parts import Done, Entry, Form
from jobs.predict.rows import Shard, Tolerance, shards, survey
from jobs.tasks import get
from tests.support import s3_server

TASK = get("text-classification")({"tokenizer": {"train": "word"}})


def opened(folder: Path, content: str, name: str = "in.jsonl"):
    (folder / name).write_text(content)
    return sources.open_source(str(folder / name), folder)


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def surveyed(source, format="parquet", most=100, most_rows=2, wanted=None, known=None):
    return survey(source, TASK, KeptColumns(format, wanted, known or {}), Tolerance(most), most_rows)


def form_of(found, format="parquet", prefix="p_", where=False, wanted=None):
    return Form(format, prefix, where, wanted, found.columns.schema() if format == "parquet" else None)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_gets_a_number_whether_it_can_be_read_or_not(tmp_path):
    source = opened(tmp_path, '{"text": "a"}\nnot json\n{"text": ""}\n{"text": "d"}\n{"other": 1}\n')
    found = surveyed(source, "jsonl")
    assert (found.rows, found.shards) == (5, 3)
    assert {number: row.where.rpartition(":")[2] for number, row in found.bad.items()} == {1: "2", 2: "3", 4: "5"}
    cut = list(shards(source, TASK, found, 2))
    assert [(shard.number, shard.first, len(shard.rows)) for shard in cut] == [(0, 0, 2), (1, 2, 2), (2, 4, 1)]
    assert isinstance(cut[0].rows[1], BadRow)
    assert isinstance(cut[1].rows[0], Example), "it can be read; the worker finds that it says nothing"


def test_shards_depend_on_the_rows_alone_and_change_with_them(tmp_path):
    rows = [{"text": f"text {number}", "n": number} for number in range(9)]
    one = opened(tmp_path, lines(*rows), "a.jsonl")
    other = opened(tmp_path, lines(*rows[:5], {"text": "text  5", "n": 5}, *rows[6:]), "b.jsonl")
    digests = [
        [shard.digest for shard in shards(source, TASK, surveyed(source, most_rows=4), 4)]
        for source in (one, one, other)
    ]
    assert digests[0] == digests[1]
    assert [a == b for a, b in zip(digests[0], digests[2], strict=True)] == [True, False, True], (
        "two spaces are another row"
    )


def test_shards_end_after_four_mib_too(tmp_path):
    source = opened(tmp_path, lines(*({"text": "x" * (3 << 20)} for _ in range(3))))
    found = surveyed(source, most_rows=1000)
    assert found.shards == 2
    assert [len(shard.rows) for shard in shards(source, TASK, found, 1000)] == [2, 1]


def test_rows_that_make_one_example_are_one_row_and_those_that_cannot_come_last(tmp_path):
    task = get("recommendation")({})
    rows = [
        {"user": user, "item": item, "time": time} for user, item, time in (("a", "x", 2), ("b", "y", 1), ("a", "z", 1))
    ]
    source = opened(tmp_path, lines(rows[0], {"user": "a"}, *rows[1:]))
    found = survey(source, task, KeptColumns("parquet"), Tolerance(9), 9)
    (shard,) = shards(source, task, found, 9)
    assert [row if isinstance(row, BadRow) else dict(row) for row in shard.rows] == [
        {"user": "a", "item": ["z", "x"], "time": [1, 2]},
        {"user": "b", "item": ["y"], "time": [1]},
        shard.rows[2],
    ]
    assert shard.rows[2].where.endswith(":2")
    assert list(found.bad) == [2]


def test_a_series_whose_last_row_cannot_be_used_is_not_forecast_from_the_row_before(tmp_path):
    task = get("forecasting")({"series_column": "shop", "horizon": 1})
    rows = [{"shop": shop, "time": at, "target": at} for shop in "ab" for at in range(4)]
    source = opened(tmp_path, lines(*rows[:3], {**rows[3], "target": None}, *rows[4:]))
    found = survey(source, task, KeptColumns("jsonl"), Tolerance(9), 9)
    (shard,) = shards(source, task, found, 9)
    assert [row["shop"] for row in shard.rows if isinstance(row, Example)] == ["b"]
    assert [row.reason.partition(";")[0] for row in shard.rows if isinstance(row, BadRow)] == [
        "column 'target' holds no value",
        f"it lacks the row {shard.rows[1].where}, which cannot be used: what comes next would be another step",
    ]


def test_a_line_that_cannot_be_read_is_a_row_of_the_only_series(tmp_path):
    task = get("forecasting")({"horizon": 1})
    rows = [{"time": at, "target": at} for at in range(4)]
    found = survey(opened(tmp_path, lines(*rows), "a.jsonl"), task, KeptColumns("jsonl"), Tolerance(9), 9)
    assert (found.rows, found.bad) == (1, {})
    with pytest.raises(UserError, match=r"none of its 2 rows can be used; .*:5"):
        survey(opened(tmp_path, lines(*rows) + "{", "b.jsonl"), task, KeptColumns("jsonl"), Tolerance(9), 9)


def test_rows_that_change_between_two_readings_end_the_job(tmp_path):
    source = opened(tmp_path, lines({"text": "a"}, {"text": "b"}))
    found = surveyed(source)
    (tmp_path / "in.jsonl").write_text(lines({"text": "a"}, {"text": "c"}))
    with pytest.raises(UserError, match="has changed while it was read"):
        list(shards(source, TASK, found, 2))


@pytest.mark.parametrize(
    ("content", "most", "said"),
    [
        (
            '{"text": "a"}\nnot json\n',
            0,
            r"in.jsonl:2: not valid JSON.*with data.bad_rows: skip it would be in the output",
        ),
        ('{"text": "a"}\nno\nno\nno\n', 2, r"in.jsonl:4: .*it is bad row number 3, and data.max_bad_rows is 2"),
        ("", 9, "holds no row"),
        ("no\nno\n", 9, "none of its 2 rows can be used"),
    ],
)
def test_what_ends_the_job_before_a_worker_starts(tmp_path, content, most, said):
    with pytest.raises(UserError, match=said):
        surveyed(opened(tmp_path, content), most=most)


def test_errors_are_counted_by_kind():
    tolerance = Tolerance(9)
    for number in range(3):
        tolerance.add(number, BadRow(f"a:{number}", "not valid JSON: column 7"))
    tolerance.add(3, BadRow("a:3", "the text is empty"))
    tolerance.add(3, BadRow("a:3", "the text is empty"))
    said = tolerance.said(50)
    assert [line.partition(" rows ")[0] for line in said] == ["3 of 50", "1 of 50"]
    assert said[0].endswith("as a:0: not valid JSON: column 7")


# -- columns ---------------------------------------------------------------------------------------------------------


def test_parquet_takes_the_types_of_all_rows(tmp_path):
    found = surveyed(opened(tmp_path, lines({"text": "a", "n": 1, "o": None}, {"text": "b", "n": 2.5, "more": [1]})))
    kinds = {field.name: str(field.type) for field in found.columns.schema()}
    assert kinds == {"text": "string", "n": "double", "o": "null", "more": "list<item: int64>"}


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_column_of_numbers_and_texts_is_refused_for_parquet_and_kept_in_json(tmp_path, rows):
    source = opened(tmp_path, lines(*[{"text": "a", "n": 1}] * rows, {"text": "b", "n": "two"}))
    with pytest.raises(UserError, match=r"column 'n' holds values of different kinds.*predict.format: jsonl"):
        surveyed(source)
    assert surveyed(source, "jsonl").bad == {}


def test_what_a_format_has_no_form_for_is_refused_by_column_and_never_becomes_a_text(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "at": pyarrow.array([Decimal("1.5"), None]), "raw": [b"x", b"y"]})
    parquet.write_table(table, tmp_path / "in.parquet")
    source = sources.open_source(str(tmp_path / "in.parquet"), tmp_path)
    with pytest.raises(UserError, match=r"column 'at' holds Decimal, which JSON has not; predict.format: parquet"):
        surveyed(source, "jsonl")
    found = surveyed(source, "jsonl", wanted=["text"])
    assert found.columns.left_out == {"at": 2, "raw": 2}
    assert [str(field.type) for field in surveyed(source).columns.schema()] == ["string", "decimal128(2, 1)", "binary"]


def test_a_row_that_alone_cannot_be_written_is_a_bad_row(tmp_path):
    content = '{"text": "a", "n": NaN}\n{"text": "b", "n": 2}\n'
    found = surveyed(opened(tmp_path, content), "jsonl")
    assert {number: row.reason for number, row in found.unwritable.items()} == {
        0: "NaN or infinity, which JSON has not"
    }
    content = '{"text": "a", "s": "\\ud800"}\n{"text": "b", "s": "x"}\n'
    found = surveyed(opened(tmp_path, content, "half.jsonl"))
    assert list(found.unwritable) == [0]
    assert "half a character" in found.unwritable[0].reason


@pytest.mark.parametrize(
    ("wanted", "prefix", "said"),
    [
        (["id"], "p_", r"no row has a column 'id'; there are \['label', 'text'\]"),
        (None, "", "the input has a column 'label'"),
        (["text"], "", None),
        (None, "p_", None),
    ],
)
def test_columns_that_are_missing_or_there_twice_are_refused(tmp_path, wanted, prefix, said):
    found = surveyed(opened(tmp_path, lines({"text": "a", "label": "b"})), wanted=wanted)
    if said is None:
        found.columns.check(["label", "score"], prefix, where=True)
        return
    with pytest.raises(UserError, match=said):
        found.columns.check(["label", "score"], prefix, where=True)


# -- parts and the output --------------------------------------------------------------------------------------------


def written(folder, source, found, form, answer, most_rows=2):
    """Write all parts by `answer(number, row)`; return what is done."""
    done = Done(folder)
    done.open()
    for shard in shards(source, TASK, found, most_rows):
        answers = [
            row if isinstance(row, BadRow) else answer(number, row)
            for number, row in enumerate(shard.rows, shard.first)
        ]
        done.add(parts.write(done.folder, shard, answers, form))
    return done


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_output_has_each_row_once_in_order_with_its_columns_and_an_error_where_there_is_no_prediction(
    tmp_path, format
):
    source = opened(
        tmp_path, lines({"text": "a", "n": 1}) + "not json\n" + lines(*({"text": "b", "n": n} for n in (2, 3)))
    )
    found = surveyed(source, format)
    form = form_of(found, format, where=True)
    done = written(
        tmp_path, source, found, form, lambda number, row: {"label": row["text"] * 2, "score": np.float32(0.5)}
    )
    about = {"run": "r", "rows": found.rows}
    output = tmp_path / "out" / f"o.{format}"
    made = fold.fold(done.folder, done.in_order(), output, form.format, about, form.prefix)
    table = read(output)
    assert [row.get("n") for row in table] == [1, None, 2, 3]
    assert [row.get("p_label") for row in table] == ["aa", None, "bb", "bb"]
    assert [bool(row["p_error"]) for row in table] == [False, True, False, False]
    assert table[1]["p_error"].startswith("not valid JSON")
    assert [row["p_where"].rpartition(":")[2] for row in table] == ["1", "2", "3", "4"]
    assert made == json.loads(fold.manifest_of(output).read_text())
    assert [(shard["first"], shard["rows"], shard["failed"]) for shard in made["shards"]] == [(0, 2, 1), (2, 2, 0)]
    assert [path.name for path in output.parent.iterdir() if path.name.endswith(".partial")] == []
    assert fold.check_free(output, "r")
    with pytest.raises(UserError, match="is there already, and is not overwritten"):
        fold.check_free(output, "another")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_parts_and_output_in_a_store_are_those_of_a_disk(tmp_path, monkeypatch, format):
    source = opened(tmp_path, lines(*({"text": str(n), "n": n} for n in range(5))))
    found = surveyed(source, format)
    form, about = form_of(found, format), {"run": "r", "rows": found.rows}

    def answer(number, row):
        return {"label": row["text"] * 2}

    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    near = written(tmp_path / "near", source, found, form, answer)
    whole = fold.fold(near.files, near.in_order(), tmp_path / f"o.{format}", format, about, form.prefix)
    with s3_server.running(monkeypatch) as server:
        run, output = server.uri("bucket/runs/r"), server.uri(f"bucket/out/o.{format}")
        far = Done(tmp_path / "far", stores.joined(run, parts.STORED))
        far.open()
        for shard in shards(source, TASK, found, 2):
            answers = [answer(n, row) for n, row in enumerate(shard.rows, shard.first)]
            far.add(parts.write(far.files, shard, answers, form))
        assert len(far.in_order()) == 3
        server.objects["bucket/runs/r/shards/unknown"] = b"of a worker that was lost"
        lost = far.entries[1].file
        server.objects[f"bucket/runs/r/shards/{lost}"] += b"damaged"
        again = Done(tmp_path / "far", stores.joined(run, parts.STORED))
        assert again.open() == ["1 shards are done again: their files are damaged or gone"]
        assert sorted(again.entries) == [0, 2]
        assert len([key for key in server.objects if "/shards/0" in key or "unknown" in key]) == 2, (
            "what nobody knows is removed"
        )
        with pytest.raises(RuntimeError, match="the prediction is not whole"):
            fold.fold(again.files, again.in_order(), output, format, about, form.prefix)
        assert not fold.check_free(output, "r")
        third = list(shards(source, TASK, found, 2))[1]
        again.add(parts.write(again.files, third, [answer(0, row) for row in third.rows], form))
        made = fold.fold(again.files, again.in_order(), output, format, about, form.prefix)
        assert made == whole
        assert server.objects[f"bucket/out/o.{format}"] == (tmp_path / f"o.{format}").read_bytes()
        assert fold.check_free(output, "r")
        with pytest.raises(UserError, match=rf"s3://bucket/out/o.{format} is there already"):
            fold.check_free(output, "another")
        again.clear()
        assert not [key for key in server.objects if "/shards/" in key]


def in_a_store(tmp_path, server):
    """Write the parts of one row to a store; return them, and the URI that they are to become."""
    source = opened(tmp_path, lines({"text": "a"}))
    found = surveyed(source)
    done = Done(tmp_path, stores.joined(server.uri("bucket/runs/r"), parts.STORED))
    done.open()
    form = form_of(found, "jsonl")
    (shard,) = shards(source, TASK, found, 2)
    done.add(parts.write(done.files, shard, [{"label": "b"}], form))
    return done, server.uri("bucket/out/o.jsonl"), {"run": "r", "rows": 1}


def test_an_output_that_came_to_a_store_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    with s3_server.running(monkeypatch) as server:
        done, output, about = in_a_store(tmp_path, server)

        def come(_):
            server.objects["bucket/out/o.jsonl"] = b"another's"
            server.objects["bucket/out/o.jsonl.manifest.json"] = b'{"run": "another"}'

        with pytest.raises(UserError, match="is there now, and is not overwritten"):
            fold.fold(done.files, done.in_order(), output, "jsonl", about, say=come)
        there = {key: content for key, content in server.objects.items() if key.startswith("bucket/out/o")}
        assert there == {
            "bucket/out/o.jsonl": b"another's",
            "bucket/out/o.jsonl.manifest.json": b'{"run": "another"}',
        }


def test_an_output_that_came_to_a_disk_meanwhile_is_not_taken_for_this_runs(tmp_path):
    source = opened(tmp_path, lines({"text": "a"}))
    found = surveyed(source)
    done = written(tmp_path, source, found, form_of(found, "jsonl"), lambda number, row: {"label": "b"})
    output = tmp_path / "out" / "o.jsonl"
    with pytest.raises(UserError, match="is there now, and is not overwritten"):
        fold.fold(
            done.folder, done.in_order(), output, "jsonl", {"run": "r", "rows": 1}, say=lambda _: output.write_text("x")
        )
    assert output.read_text() == "x"
    with pytest.raises(UserError, match="is there already, and is not overwritten"):
        fold.check_free(output, "r")


def test_a_damaged_part_leaves_what_has_the_name_of_the_output_in_a_store(tmp_path, monkeypatch):
    with s3_server.running(monkeypatch) as server:
        done, output, about = in_a_store(tmp_path, server)
        server.objects[f"bucket/runs/r/shards/{done.in_order()[0].file}"] += b"damaged"
        server.objects["bucket/out/o.jsonl"] = b"another's"
        with pytest.raises(fold.DamagedPart):
            fold.fold(done.files, done.in_order(), output, "jsonl", about)
        there = {key: content for key, content in server.objects.items() if key.startswith("bucket/out/o")}
        assert there == {"bucket/out/o.jsonl": b"another's"}


@pytest.mark.parametrize("copies", [True, False])
def test_an_output_gets_its_name_in_a_store_that_copies_it_and_in_one_that_does_not(tmp_path, monkeypatch, copies):
    with s3_server.running(monkeypatch) as server:
        done, output, about = in_a_store(tmp_path, server)
        server.copies = copies
        fold.fold(done.files, done.in_order(), output, "jsonl", about)
        there = [key for key in server.objects if key.startswith("bucket/out/o")]
        assert sorted(there) == ["bucket/out/o.jsonl", "bucket/out/o.jsonl.manifest.json"]
        (row,) = map(json.loads, server.objects["bucket/out/o.jsonl"].splitlines())
        assert "b" in row.values()


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parquet_takes_the_types_of_the_predictions_of_all_parts(tmp_path):
    source = opened(tmp_path, lines(*({"text": "a"} for _ in range(6))))
    found = surveyed(source)
    form = form_of(found)
    said = [{"x": None}, {"x": None}, {"x": 1, "of": {"a": 1}}, {"x": 2}, {"x": 2.5, "of": {"b": 0.5}}, {"x": 3.0}]
    done = written(tmp_path, source, found, form, lambda number, row: said[number])
    fold.fold(done.folder, done.in_order(), tmp_path / "o.parquet", "parquet", {"rows": 6}, "p_")
    table = parquet.read_table(tmp_path / "o.parquet")
    assert table.column("p_x").to_pylist() == [None, None, 1, 2, 2.5, 3]
    assert table.column("p_of").to_pylist()[2:5] == [{"a": 1, "b": None}, None, {"a": None, "b": 0.5}]
    assert table.column_names[-1] == "p_error"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([{"x": 1}, {"x": "one"}], r"column 'p_x' holds values of different kinds \(int64 and string\)"),
        ([{"x": 1}, {"x": object()}], r"column 'p_x' cannot be written to Parquet: Could not convert"),
    ],
)
def test_a_prediction_that_parquet_does_not_take_ends_the_job_by_its_column(tmp_path, said, reason):
    source = opened(tmp_path, lines({"text": "a"}, {"text": "b"}))
    found = surveyed(source)
    with pytest.raises(UserError, match=reason):
        written(tmp_path, source, found, form_of(found), lambda number, row: said[number])


def test_whole_numbers_that_no_float_holds_are_not_rounded_beside_floats(tmp_path):
    source = opened(tmp_path, lines({"text": "a", "n": 0.5}) + lines({"text": "b", "n": 2**53 + 1}))
    with pytest.raises(UserError, match="column 'n'"):
        surveyed(source)


def test_a_prediction_that_json_has_no_form_for_is_an_error_of_its_row(tmp_path):
    source = opened(tmp_path, lines({"text": "a"}, {"text": "b"}))
    found = surveyed(source, "jsonl")
    form = form_of(found, "jsonl")
    done = written(tmp_path, source, found, form, lambda number, row: {"score": math.nan if number else 0.5})
    (entry,) = done.in_order()
    assert entry.failed == ((1, f"{tmp_path}/in.jsonl:2", "the prediction holds NaN or infinity, which JSON has not"),)


def test_a_prediction_called_as_a_column_of_the_input_ends_the_job(tmp_path):
    source = opened(tmp_path, lines({"text": "a", "p_x": 1}))
    found = surveyed(source)
    with pytest.raises(UserError, match="the input has a column 'p_x'"):
        written(tmp_path, source, found, form_of(found), lambda number, row: {"x": 1})


def test_what_an_attempt_left_is_taken_over_as_far_as_it_is_whole(tmp_path):
    source = opened(tmp_path, lines(*({"text": str(n)} for n in range(8))))
    found = surveyed(source, "jsonl")
    done = written(tmp_path, source, found, form_of(found, "jsonl"), lambda number, row: {"x": number})
    files = [done.folder / entry.file for entry in done.in_order()]
    files[1].write_text("damaged")
    files[2].unlink()
    (done.folder / "000009-ffffffff.jsonl").write_text("of a worker whose driver was killed")
    with (done.folder / parts.DONE).open("a") as file:
        file.write('{"shard": 7, "fir')
    again = Done(tmp_path)
    assert again.open() == ["2 shards are done again: their files are damaged or gone"]
    assert list(again.entries) == [0, 3]
    assert {path.name for path in again.folder.iterdir()} == {files[0].name, files[3].name, parts.DONE}
    again.add(replace(again.entries[0], shard=1, first=2))
    third = Done(tmp_path)
    third.open()
    assert sorted(third.entries) == [0, 1, 3], "the line behind the half one is whole"


def test_a_part_that_is_damaged_when_it_is_wanted_ends_the_job(tmp_path):
    source = opened(tmp_path, lines({"text": "a"}))
    found = surveyed(source, "jsonl")
    done = written(tmp_path, source, found, form_of(found, "jsonl"), lambda number, row: {"x": 1})
    (done.folder / done.entries[0].file).write_text('{"text": "a", "x": 2}\n')
    with pytest.raises(fold.DamagedPart, match="damaged: submit the job again"):
        fold.fold(done.folder, done.in_order(), tmp_path / "o.jsonl", "jsonl", {"rows": 1})
    assert not (tmp_path / "o.jsonl").exists()


ENTRY = Entry(0, 0, 2, "", "f", 1, "d")


@pytest.mark.parametrize(
    ("entries", "rows", "said"),
    [
        ([ENTRY, replace(ENTRY, shard=1, first=2)], 4, None),
        ([ENTRY, replace(ENTRY, shard=1, first=2)], 5, "the parts hold 4 rows, the input 5"),
        ([ENTRY, replace(ENTRY, shard=2, first=4)], 6, "row 2 of shard 1 is next"),
        ([ENTRY, replace(ENTRY, shard=1, first=1)], 4, "shard 1 begins with row 1"),
        ([], 1, "the parts hold 0 rows"),
    ],
)
def test_rows_that_are_missing_or_there_twice_are_found(entries, rows, said):
    found = parts.missing(entries, rows)
    assert (found is None) == (said is None)
    assert said is None or said in found


def test_an_entry_is_what_its_line_says(tmp_path):
    entry = replace(ENTRY, failed=((1, "a:2", "no"),), counts={"truncated": 1})
    done = Done(tmp_path)
    done.open()
    done.add(entry)
    (line,) = (done.folder / parts.DONE).read_text().splitlines()
    assert json.loads(line)["failed"] == [[1, "a:2", "no"]]
    assert parts.Entry(**{**json.loads(line), "failed": ((1, "a:2", "no"),)}) == entry
    assert asdict(entry)["counts"] == {"truncated": 1}


# -- who works on what -----------------------------------------------------------------------------------------------


def desk(count: int, most: int = 1) -> Desk:
    rows = (Example({}, "in:1"),)
    return Desk((Shard(number, number, rows, "") for number in range(count)), most)


def given(desk: Desk) -> list[tuple[int, int]]:
    taken = []
    while (each := desk.next()) is not None:
        taken.append((each[0], each[1].number))
    return taken


def test_workers_have_one_shard_more_than_they_work_on_and_those_of_a_lost_one_come_first():
    work = desk(9)
    assert work.next() is None, "nobody is there"
    work.hire(0)
    work.hire(1)
    assert given(work) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    work.lost(0, "killed")
    work.done(1, Shard(1, 1, (Example({}, "in:1"),), ""))
    assert given(work) == [(1, 0)]
    work.hire(2)
    assert given(work) == [(2, 2), (2, 4)]
    assert not work.finished


def test_all_is_done_when_the_source_is_empty_and_nobody_has_anything():
    work = desk(1)
    work.hire(0)
    _, shard = work.next()
    assert work.next() is None
    assert not work.finished
    work.done(0, shard)
    assert work.finished


def test_a_shard_that_fails_too_often_is_named_and_the_one_that_only_waited_is_not_blamed():
    work = desk(2)
    for worker in (0, 1):
        work.hire(worker)
        assert given(work) == [(worker, 0), (worker, 1)]
        if worker:
            with pytest.raises(TooOften, match="failed 2 times on the same rows 0 to 0, from in:1: killed"):
                work.lost(worker, "killed")
        else:
            work.lost(worker, "killed")


def test_workers_that_never_become_ready_end_the_job():
    work = desk(1, most=2)
    work.lost(0, "no")
    work.hire(1)
    work.lost(1, "no")
    for worker in (2, 3):
        work.lost(worker, "no")
    with pytest.raises(TooOften, match="before it was ready, 3 times in a row: no"):
        work.lost(4, "no")
