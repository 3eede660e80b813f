"""Raw examples from every kind of file, and errors that name file and line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs.data import sources, stream
from jobs.data.examples import BadRows, Example, Source
from jobs.data.tables import TableForm
from jobs.spec import DataSpec
from jobs.tasks import get


def read(where: str | list[str], base: Path) -> list[dict]:
    return list(sources.open_source(where, base).examples())


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
    docs = list(sources.open_source("python-stdlib", Path()).examples(limit=3))
    assert len(docs) == 3
    assert all(isinstance(d["text"], str) and d["text"] for d in docs)
    first = next(sources.open_source("python-stdlib-docstrings", Path()).examples(limit=1))["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"]
    assert first[0]["content"].startswith("def ")


def apart(texts: list[str], **data) -> tuple[list[str], list[str]]:
    source = Source("x", "", lambda: (Example({"text": text}) for text in texts))
    reading = stream.Stream(source, get("causal-lm")())
    survey = reading.survey(BadRows())
    found = list(stream.divided(reading, survey, stream.division_of(survey, DataSpec.model_validate(data))))
    train, held_out = ([e["text"] for s, e in found if s == split] for split in ("train", "eval"))
    return train, held_out


def test_split_holds_out_whole_examples_by_the_seed():
    texts = [str(i) for i in range(100)]
    train, held_out = apart(texts, eval_fraction=0.1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(texts)
    assert held_out == apart(texts, eval_fraction=0.1)[1]
    assert held_out != apart(texts, eval_fraction=0.1, split_seed=1)[1]


def test_split_cuts_the_end_off_a_few_long_texts():
    assert apart(["0123456789"], eval_fraction=0.2) == (["01234567"], ["89"])


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"eval_fraction 0\.99 leaves nothing of 20 example"):
        apart([str(i) for i in range(20)], eval_fraction=0.99)


def test_a_table_without_a_header_gets_its_columns_from_the_spec(tmp_path):
    (tmp_path / "x.tsv").write_text("fine\t1\nbad\t0\n")
    found = list(sources.open_source("x.tsv", tmp_path, TableForm(["text", "label"])).examples())
    assert found == [{"text": "fine", "label": "1"}, {"text": "bad", "label": "0"}]
    with pytest.raises(UserError, match=r"x.tsv:1: the row has not the 3 columns of data.columns"):
        list(sources.open_source("x.tsv", tmp_path, TableForm(["a", "b", "c"])).examples())


def test_chunks_keep_every_example_in_the_order_of_its_split():
    examples = [("eval" if i % 3 == 0 else "train", Example({"text": "x" * 300_000, "i": i})) for i in range(50)]
    found = {"train": [], "eval": []}
    for split, chunk in stream.split_chunks(iter(examples)):
        found[split].append([e["i"] for e in chunk])
    assert [i for chunk in found["train"] for i in chunk] == [i for i in range(50) if i % 3]
    assert [i for chunk in found["eval"] for i in chunk] == list(range(0, 50, 3))
    assert {len(chunk) for chunk in found["train"][:-1]} == {14}, "4 MiB each, whatever else is read between"


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n{"text": \n\n{"text": "\xff"}\n7\n{"text": "b"}\n'
    )
    bad = BadRows(most=3)
    examples = list(sources.open_source("x.jsonl", tmp_path).examples(bad=bad))
    assert examples == [{"text": "a"}, {"text": "b"}]
    assert [e.where for e in examples] == [f"{tmp_path}/x.jsonl:1", f"{tmp_path}/x.jsonl:6"]
    assert bad.count == 3
    assert [row.where.rsplit(":", 1)[1] for row in bad.first] == ["2", "4", "5"]
    with pytest.raises(UserError, match=r"x.jsonl:5: .* bad row number 3, and data.max_bad_rows is 2"):
        list(sources.open_source("x.jsonl", tmp_path).examples(bad=BadRows(most=2)))


def test_a_table_that_is_not_utf8_is_named_with_the_line(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"a,b\n" + b"1,2\n" * 5000 + b"\xff,2\n")
    with pytest.raises(UserError, match=r"x.csv:5002: byte 0xff is not UTF-8"):
        read("x.csv", tmp_path)
