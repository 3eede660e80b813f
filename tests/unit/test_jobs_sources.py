"""Raw examples from every kind of file, and errors that name file and line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs.data import sources
from jobs.data.examples import BadRows, Example


def read(where: str | list[str], base: Path) -> list[dict]:
    return sources.open_source(where, base).examples()


def test_every_file_format_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": "e"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.csv").write_text('prompt,completion\na,b\n"c, d",e\n')
    (tmp_path / "x.tsv").write_text("prompt\tcompletion\na\tb\nc, d\te\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert read(f"x.{suffix}", tmp_path) == rows, suffix


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert [e["text"] for e in read("*.txt", tmp_path)] == ["a.txt", "b.txt"]
    assert [e["text"] for e in read(["b.txt", "a.txt"], tmp_path)] == ["b.txt", "a.txt"]


def test_digest_follows_the_content_not_the_name(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    before = sources.open_source("a.txt", tmp_path).digest
    assert before == sources.open_source("b.txt", tmp_path).digest
    (tmp_path / "a.txt").write_text("y")
    assert before != sources.open_source("a.txt", tmp_path).digest


def test_image_folder_takes_labels_from_the_folders(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "pets" / label / "1.png")
    examples = read("pets", tmp_path)
    assert [e["label"] for e in examples] == ["cat", "dog"]
    assert examples[0]["image"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n[1]\n', r"x.jsonl:2: a line holds one object"),
        ("x.txt", b"fine\nb\xffd\n", r"x.txt:2: byte 0xff is not UTF-8"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x.csv:3: the row has not the 2 columns"),
        ("x.parquet", b"no", "not a readable Parquet"),
        ("x.jsonl", b"", "holds no example"),
        ("x.xyz", b"", "unknown kind '.xyz'"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(name, tmp_path)


def test_nothing_there_names_the_place(tmp_path):
    with pytest.raises(UserError, match=r"nothing matches 'none\.txt'"):
        read("none.txt", tmp_path)


def test_the_library_is_text_and_its_docstrings_are_conversations():
    docs = sources.open_source("python-stdlib", Path()).examples(limit=3)
    assert all(isinstance(d["text"], str) and d["text"] for d in docs)
    first = sources.open_source("python-stdlib-docstrings", Path()).examples(limit=1)[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"]
    assert first[0]["content"].startswith("def ")


def test_split_holds_out_whole_examples_by_the_seed():
    examples = [Example({"text": str(i)}) for i in range(100)]
    train, held_out = sources.split(examples, 0.1, 0, "text")
    assert len(held_out) == 10
    assert sorted(e["text"] for e in train + held_out) == sorted(e["text"] for e in examples)
    assert held_out == sources.split(examples, 0.1, 0, "text")[1]
    assert held_out != sources.split(examples, 0.1, 1, "text")[1]


def test_split_cuts_the_end_off_a_few_long_texts():
    train, held_out = sources.split([Example({"text": "0123456789"})], 0.2, 0, "text")
    assert (train[0]["text"], held_out[0]["text"]) == ("01234567", "89")


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n{"text": \n\n{"text": "\xff"}\n7\n{"text": "b"}\n'
    )
    bad = BadRows(most=3)
    examples = sources.open_source("x.jsonl", tmp_path).examples(bad=bad)
    assert examples == [{"text": "a"}, {"text": "b"}]
    assert [e.where for e in examples] == [f"{tmp_path}/x.jsonl:1", f"{tmp_path}/x.jsonl:6"]
    assert bad.count == 3
    assert [row.where.rsplit(":", 1)[1] for row in bad.first] == ["2", "4", "5"]
    with pytest.raises(UserError, match=r"x.jsonl:5: .* bad row number 3, and data.max_bad_rows is 2"):
        sources.open_source("x.jsonl", tmp_path).examples(bad=BadRows(most=2))


def test_a_table_that_is_not_utf8_is_named_with_the_line(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"a,b\n" + b"1,2\n" * 5000 + b"\xff,2\n")
    with pytest.raises(UserError, match=r"x.csv:5002: byte 0xff is not UTF-8"):
        read("x.csv", tmp_path)
