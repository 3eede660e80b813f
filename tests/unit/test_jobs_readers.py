"""Files as people have them: compressed, JSON lines under another name, tables with odd cells. A bad row is one row."""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.errors import UserError
from jobs.data import sources
from jobs.data.examples import BadRow, BadRows, Example, bounded
from jobs.data.tables import TableForm
from jobs.tasks import TaskError, TaskSetupError

ROWS = [{"text": f"line {n}", "n": str(n)} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}
KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(ROWS),
    ".csv": "text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in ROWS),
    ".tsv": "text\tn\n" + "".join(f"{row['text']}\t{row['n']}\n" for row in ROWS),
}


def read(name: str, base: Path, bad: BadRows | None = None) -> list[Example]:
    return list(sources.open_source(name, base).examples(bad=bad))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_are_read_as_what_they_hold(tmp_path, kind, suffix):
    (tmp_path / f"X{kind.upper()}{suffix}").write_bytes(COMPRESS[suffix](KINDS[kind].encode()))
    assert read(f"X{kind.upper()}{suffix}", tmp_path) == ROWS


@pytest.mark.parametrize(("suffix", "compress"), COMPRESS.items())
def test_a_damaged_archive_is_an_error_with_its_name_even_where_bad_rows_are_left_out(tmp_path, suffix, compress):
    whole = compress(LINES.encode() * 100)
    for content in (whole[:-9], whole[: len(whole) // 2], LINES.encode(), b""):
        (tmp_path / f"x.jsonl{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.jsonl\{suffix}: a \{suffix} file that is damaged or cut off"):
            read(f"x.jsonl{suffix}", tmp_path, BadRows(most=99))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (LINES, ROWS),
        (json.dumps(ROWS, indent=2), ROWS),
        (json.dumps({"text": "one"}), [{"text": "one"}]),
        (json.dumps({"text": "one"}, indent=2), [{"text": "one"}]),
        (json.dumps({"messages": [{"role": "user"}]}), [{"messages": [{"role": "user"}]}]),
        ('{"text": broken}\n' + LINES, ROWS),
    ],
)
def test_a_json_file_is_read_by_what_it_holds(tmp_path, content, wanted):
    (tmp_path / "x.json").write_text(content)
    assert read("x.json", tmp_path, BadRows(most=1)) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"data": ROWS}), "its list is under 'data'"),
        (json.dumps({"version": 1, "rows": ROWS}, indent=1), "its list is under 'rows'"),
        (json.dumps(ROWS[0], indent=1) + json.dumps(ROWS[1], indent=1), "Extra data; one object a line is .jsonl"),
        ("3", "expected a list of objects, this is a int"),
        ("", "x.json:1: not valid JSON"),
    ],
)
def test_a_json_file_that_is_no_list_says_what_to_do(tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read("x.json", tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a", "text": "b"}', 'the key "text" is given twice in one object'),
        (b'{"text": {"a": 1, "a": 2}}', 'the key "a" is given twice in one object'),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable JSON: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"text": "a"}]', "this is a list; a list of objects is a .json"),
    ],
)
def test_a_line_that_is_no_plain_object_is_one_bad_row(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_bytes(LINES.encode() + line + b"\n" + LINES.encode())
    bad = BadRows(most=1)
    assert read("x.jsonl", tmp_path, bad) == ROWS * 2
    assert bad.first[0].where.endswith("x.jsonl:6")
    assert said in bad.first[0].reason


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"caf\xe9,x", "byte 0xe9 is not UTF-8"),
        (b"a\0b,x", "NUL"),
        (b'"a"b,x', "',' expected after '\"'"),
        (b"a,b,c", "has not the 2 columns"),
    ],
)
def test_a_bad_row_of_a_table_is_one_bad_row(tmp_path, row, said):
    (tmp_path / "x.csv").write_bytes(b'text,n\n"two\nlines",1\n' + row + b"\n\nlast,2\n")
    bad = BadRows(most=1)
    assert read("x.csv", tmp_path, bad) == [{"text": "two\nlines", "n": "1"}, {"text": "last", "n": "2"}]
    assert bad.first[0].where.endswith("x.csv:4")
    assert said in bad.first[0].reason


def test_a_record_that_swallows_lines_ends_the_reading(tmp_path):
    (tmp_path / "x.csv").write_text('text,n\n"open,1\nb,2\nc,3\n')
    with pytest.raises(UserError, match=r"x\.csv:2: unexpected end of data, in a record up to line 4"):
        read("x.csv", tmp_path, BadRows(most=9))


def test_a_cell_may_hold_a_whole_document(tmp_path):
    (tmp_path / "x.csv").write_text("text,n\n" + "word " * 40_000 + ",1\n")
    assert len(read("x.csv", tmp_path)[0]["text"]) == 200_000


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match=r"x\.csv:1: the column 'text' is there twice"):
        read("x.csv", tmp_path)
    with pytest.raises(UserError, match=r"data\.columns: the column 'a' is there twice"):
        list(sources.open_source("x.csv", tmp_path, TableForm(["a", "a"])).examples())
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="the column 'text' is there twice"):
        read("x.parquet", tmp_path)


def test_a_parquet_row_that_no_python_object_can_hold_is_one_bad_row(tmp_path):
    far = pa.array([0, 2**60, 1], pa.int64()).cast(pa.timestamp("ms"))
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b", "c"], "when": far}), tmp_path / "x.parquet")
    bad = BadRows(most=1)
    assert [row["text"] for row in read("x.parquet", tmp_path, bad)] == ["a", "c"]
    assert bad.first[0].where.endswith("x.parquet: row 2")


@pytest.mark.parametrize(("content", "said"), [(b"", "no text"), (b"\xef\xbb\xbf \n", "no text"), (b"h\0i\0", "NUL")])
def test_a_text_file_without_text_is_a_bad_row(tmp_path, content, said):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.txt.*{said}"):
        read("x.txt", tmp_path)


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), OverflowError("far"), AssertionError(), OSError(5)])
def test_no_exception_of_a_row_passes_the_boundary(error):
    found = bounded(failing(error), "x:1")
    assert isinstance(found, BadRow)
    assert found.reason.startswith(type(error).__name__)
    assert "raise error" in found.trace
    assert bounded(failing(TaskError("no text")), "x:1") == BadRow("x:1", "no text")


@pytest.mark.parametrize("error", [TaskSetupError("no template"), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_row_passes_the_boundary(error):
    with pytest.raises(type(error)):
        bounded(failing(error), "x:1")


def test_what_ones_own_code_did_not_foresee_is_shown_once_with_its_traceback(capsys):
    bad = BadRows(most=9, own_code=True)
    for number in range(3):
        found = bounded(failing(KeyError(f"column {number}")), f"x:{number}")
        assert isinstance(found, BadRow)
        bad.add(found)
    shown = capsys.readouterr().out
    assert shown.count("Traceback") == 1
    assert "x:0 failed so:" in shown


def test_a_quote_that_quotes_nothing_swallows_no_rows(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\nfine\tpos\n"Loved it\tpos\nso-so\tneg\nreally"\tneg\n')
    with pytest.raises(UserError, match=r"x.tsv:3: by its quotes a field goes on to line 5, over 3 lines .*quotes: f"):
        read("x.tsv", tmp_path)
    plain = sources.open_source("x.tsv", tmp_path, TableForm(quotes=False))
    texts = [example["text"] for example in plain.examples()]
    assert texts == ["fine", '"Loved it', "so-so", 'really"']


def test_a_quoted_text_of_several_lines_is_one_text(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n"one, two\n\nthree",pos\n"a\nb",neg\n')
    assert [example["text"] for example in read("x.csv", tmp_path)] == ["one, two\n\nthree", "a\nb"]


def test_a_quote_within_a_field_is_said_with_the_way_out(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\n"Fine" film\tpos\n')
    with pytest.raises(UserError, match=r"x.tsv:2: .*data.quotes: false"):
        read("x.tsv", tmp_path)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.csv"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2147483648\n")
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        read(name, tmp_path)


def test_the_column_of_a_mistake_is_in_its_own_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: not valid JSON: .* \(column 13\)"):
        read("x.jsonl", tmp_path)


OTHERS = {
    "gzip: end its name in .gz": gzip.compress(LINES.encode()),
    "bzip2: end its name in .bz2": bz2.compress(LINES.encode()),
    "xz: end its name in .xz": lzma.compress(LINES.encode()),
    "Zstandard: end its name in .zst": zstandard(LINES.encode()),
    "a zip archive, or a workbook: unpack it": b"PK\3\4....",
    "text in UTF-16: convert it to UTF-8": LINES.encode("utf-16"),
}


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_file_that_is_not_what_its_name_says_is_an_error_with_the_way_out(tmp_path, what, kind):
    content = gzip.compress(OTHERS[what]) if kind.endswith(".gz") else OTHERS[what]
    (tmp_path / f"x{kind}").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\{kind}: the file holds {what}"):
        read(f"x{kind}", tmp_path, BadRows(most=99))


@pytest.mark.parametrize("what", OTHERS)
def test_a_text_that_is_none_is_a_bad_row(tmp_path, what):
    (tmp_path / "x.txt").write_bytes(OTHERS[what])
    assert next(sources.open_source("x.txt", tmp_path).read()).reason == f"the file holds {what}"


@pytest.mark.parametrize("text", ["BZhang wrote this", "PAR1 is a gene", "PK is a name"])
def test_a_text_that_begins_like_another_kind_is_a_text(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert read("x.txt", tmp_path) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "mark"), [("x.csv", "text;n\na;1\n", "';'"), ("x.csv", "text\tn\na\t1\n", r"'\\t'"),
                                  ("x.csv", "text|n\na|1\n", r"'\|'"), ("x.tsv", "text,n\na,1\n", "','")]
)  # fmt: skip
def test_a_table_with_another_separator_is_named(tmp_path, name, content, mark):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"x\....:1: the header is one column, .*are separated by {mark}"):
        read(name, tmp_path)


def test_a_single_column_may_have_the_tables_own_separator_in_its_name(tmp_path):
    (tmp_path / "x.csv").write_text('"text, in full"\nhello\n')
    assert read("x.csv", tmp_path) == [{"text, in full": "hello"}]


def test_a_header_beside_named_columns_is_found_whatever_its_case(tmp_path):
    (tmp_path / "x.csv").write_text("Text, N \na,1\n")
    with pytest.raises(UserError, match=r"x\.csv:1: the line is a header with the names of data\.columns"):
        list(sources.open_source("x.csv", tmp_path, TableForm(["text", "n"])).examples())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a", "text": "b"}', r"x\.json\[2\]: the key .text. is given twice"),
        (b'{"text": "a", "of": {"n": 1, "n": 2}}', r"x\.json\[2\]: the key .n. is given twice"),
        (b'{"n": ' + b"1" * 5000 + b"}", r"x\.json\[2\]: not readable JSON: Exceeds the limit"),
        (b'{"text": "caf\xe9"}', r"x\.json\[2\]: byte 0xe9 is not UTF-8"),
        (b"3", r"x\.json\[2\]: not an object"),
        (b"[{}]", r"x\.json\[2\]: not an object"),
    ],
)
@pytest.mark.parametrize("form", [b"[%s]", b"[\n%s\n]", b" [ %s ] "])
def test_an_entry_of_a_list_in_json_that_cannot_be_read_is_one_bad_row(tmp_path, content, said, form):
    entries = [json.dumps(row).encode() for row in ROWS]
    (tmp_path / "x.json").write_bytes(form % b"\n,".join([*entries[:2], content, *entries[2:]]))
    bad = BadRows(most=1)
    assert read("x.json", tmp_path, bad) == ROWS
    assert re.search(said, str(bad.first[0]))
    with pytest.raises(UserError, match=said):
        read("x.json", tmp_path)


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.json", b'[{"text": "a"},\n {"text": ]', r"b\.json:2: not valid JSON"),
        ("b.json", b'[{"text": "a"}, {"text": "b"}', r"b\.json:1: not valid JSON"),
        ("b.json", b'[{"text": "a"},]', r"b\.json:1: not valid JSON"),
        ("b.json", b'[{"text": "a"}] [{"text": "b"}]', r"b\.json:1: not valid JSON: Extra data"),
        ("b.json", b"[" * 100_000, r"b\.json: nested too deeply"),
        ("b.json", b'{"data": [{"text": "a"}]}', r"its list is under 'data'"),
        ("b.json", b"3", r"expected a list of objects"),
        ("b.json", b"", r"b\.json:1: not valid JSON"),
        ("b.jsonl.gz", b"", r"a \.gz file that is damaged"),
        ("b.jsonl.gz", b"no archive", r"a \.gz file that is damaged"),
        ("b.jsonl", b"PK\x03\x04", r"holds a zip archive"),
        ("b.csv", b"text,text\n1,2\n", r"b\.csv:1: the column 'text' is there twice"),
        ("b.csv", b"text;n\na;1\n", r"b\.csv:1: the header is one column"),
        ("b.csv", b"te\0xt,n\na,1\n", r"b\.csv:1: a NUL byte"),
        ("b.parquet", b"no", r"b\.parquet: not a readable Parquet file"),
        ("b.parquet", parquet(ROWS).replace(b"text", b"te\xfft"), r"b\.parquet: not a readable Parquet file"),
        ("b.parquet", parquet(ROWS)[:-9], r"b\.parquet: not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_bad_row_that_names_it(tmp_path, name, content, said):
    (tmp_path / "d").mkdir()
    for other in ("a", "c"):
        (tmp_path / "d" / f"{other}.jsonl").write_text(LINES)
    (tmp_path / "d" / name).write_bytes(content)
    bad = BadRows(most=1)
    assert read("d", tmp_path, bad) == ROWS * 2
    assert re.search(said, str(bad.first[0]))
    assert "how many rows it holds is not known" in bad.first[0].reason
    with pytest.raises(UserError, match=said):
        read("d", tmp_path)


def test_the_number_that_stands_for_no_class_is_no_class(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    described = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"},
                                       "n": {"dtype": "int64", "_type": "Value"}}}}  # fmt: skip
    table = pa.table({"label": [0, -1, 1], "n": [-1, -1, -1]})
    (tmp_path / "set").mkdir()
    for metadata, labels in ((described, [0, None, 1]), ({}, [0, -1, 1]), ({"info": None}, [0, -1, 1])):
        held = table.replace_schema_metadata({"huggingface": json.dumps(metadata)} if metadata else None)
        pyarrow.parquet.write_table(held, tmp_path / "set" / "train.parquet")
        for where in ("set/train.parquet", f"hf://{tmp_path}/set")[: 1 + (metadata is described)]:
            assert [row["label"] for row in read(where, tmp_path)] == labels
            assert [row["n"] for row in read(where, tmp_path)] == [-1, -1, -1]
            said = "the numbers in column 'label' stand for names, which are not used (0: no, 1: yes)"
            assert sources.open_source(where, tmp_path).notes == ((said,) if metadata is described else ())
    for shard in "ab":
        held = table.replace_schema_metadata({"huggingface": json.dumps(described)})
        pyarrow.parquet.write_table(held, tmp_path / f"{shard}.parquet")
    assert len(sources.open_source("?.parquet", tmp_path).notes) == 1, "once for all shards"


def test_numbers_that_stand_for_names_are_told_within_lists_and_mappings_too(tmp_path):
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    box, kind = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "List"}, {"_type": "List"}
    forms = [
        {"objects": {"bbox": {"feature": box, **kind}, "category": {"feature": names, **kind}}},
        {"objects": {"feature": {"bbox": box, "category": names}, "_type": "Sequence"}},
        {"objects": [{"bbox": box, "category": names}]},
    ]
    rows = pa.table({"objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1]}]})
    for features in forms:
        described = {"huggingface": json.dumps({"info": {"features": features}})}
        pyarrow.parquet.write_table(rows.replace_schema_metadata(described), tmp_path / "a.parquet")
        assert sources.open_source("a.parquet", tmp_path).notes == (
            "the numbers in column 'objects.category' stand for names, which are not used (0: cat, 1: dog)",
        )


def test_tables_that_were_joined_keep_no_header_and_no_mark_among_their_rows(tmp_path):
    part = b'\xef\xbb\xbf"text",n\n"\xef\xbb\xbf a",1\n'
    (tmp_path / "x.csv").write_bytes(part + part)
    bad = BadRows(most=1)
    assert read("x.csv", tmp_path, bad) == [{"text": "\ufeff a", "n": "1"}] * 2
    assert str(bad.first[0]).endswith("x.csv:3: the line is the header once more: files were joined")
    (tmp_path / "words.csv").write_text("text\na\ntext\n")
    assert read("words.csv", tmp_path) == [{"text": "a"}, {"text": "text"}], "a list of words may hold this one"
