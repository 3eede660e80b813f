"""A source in ranges gives the rows, the split and the sentences that it gives as a whole, wherever they are read."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.errors import UserError
from jobs.data import prepare, sources, splitting, spread, tally
from jobs.data.examples import BadRow
from jobs.data.file_digests import digest_and_cuts, file_digest
from jobs.data.prepare import Prepared
from jobs.data.ranges import Sizes, ranges_of
from jobs.data.tables import PLAIN
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.tasks.text_sample import drawn

HERE, SPREAD = Sizes(4_000, 1 << 40), Sizes(4_000, 0)
TASK = """
import numpy as np
from jobs.tasks import Task, TaskError

class Numbers(Task):
    name = "numbers"

    def check(self, example):
        if not isinstance(example.get("n"), int):
            raise TaskError(f"n is {example.get('n')!r}, no number")

    def content(self, example):
        return example["n"] if "text" not in example else example["text"]

    def cut(self, example, at):
        return None

    def encode(self, examples):
        numbers = np.array([example["n"] for example in examples], np.int32)
        return {"n": numbers, "targets": np.ones_like(numbers)}
"""


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    (tmp_path / "own_numbers.py").write_text(TASK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_numbers", raising=False)
    return "own_numbers:Numbers"


@pytest.fixture
def by_processes(monkeypatch):
    """Processes see the modules written here; the tasks of a cluster that a test before connected to would not."""
    monkeypatch.setattr(spread, "elsewhere", lambda: "processes")


def spec_for(task: str | dict, **data) -> JobSpec:
    values = {"name": "x", "phase": "pretrain", "task": task, "model": {"architecture": "llama"}}
    return JobSpec.model_validate({**values, "data": {"train": "x.jsonl", **data}, "training": {"steps": 1}})


def made(spec: JobSpec, base: Path, storage: str, sizes: Sizes = HERE) -> Prepared:
    return prepare.prepare(spec, base, base / storage, parent=None, on_progress=lambda *_: None, sizes=sizes)


def column(done: Prepared, files: list[str], name: str) -> list:
    return prepare.rows_of(done, files).take(np.arange(sum(_rows(done, file) for file in files)))[name].tolist()


def _rows(done: Prepared, file: str) -> int:
    return len(prepare.rows_of(done, [file]))


def lines(count: int, start: int = 0) -> str:
    return "".join(json.dumps({"n": n, "pad": "x" * (n % 50)}) + "\n" for n in range(start, start + count))


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_a_file_of_lines_are_its_lines(tmp_path, seed):
    draw = random.Random(seed)
    ends = [draw.choice(["\n", "\r\n"]) for _ in range(draw.randrange(40))]
    rows = [json.dumps({"n": n, "pad": "x" * draw.choice([0, 3, 3, 200])}) if draw.random() < 0.8 else "" for n in ends]
    content = "".join(row + end for row, end in zip(rows, ends, strict=True)) + draw.choice(["", '{"n": 1}'])
    (tmp_path / "x.jsonl").write_text(content, newline="")
    size = draw.choice([1, 7, 40, 1000])
    digest, cuts = digest_and_cuts(tmp_path / "x.jsonl", size)
    assert digest == file_digest(tmp_path / "x.jsonl")
    assert sum(cut.size for cut in cuts) == len(content)
    source = sources.open_source("x.jsonl", tmp_path, PLAIN, size)
    whole = sources.open_source("x.jsonl", tmp_path)
    by_parts = [row for part in ranges_of(source, get("causal-lm")(), None, Sizes(size)) for row in read(part)]
    assert [(dict(row), row.where) for row in by_parts] == [(dict(row), row.where) for row in read(whole)]


def read(source) -> list:
    return [row for single in source.singles for row in single.read()]


def test_a_large_file_is_cut_at_multiples_of_the_size_whatever_is_read_at_a_time(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(300_000)))  # read in four steps
    _, cuts = digest_and_cuts(tmp_path / "x.jsonl", 1_000_000)
    content = (tmp_path / "x.jsonl").read_bytes()
    for number, cut in enumerate(cuts):
        before = content[: cut.start]
        assert not before or before.endswith(b"\n")
        assert cut.before == before.count(b"\n")
        assert 0 <= cut.start - number * 1_000_000 < 20


def test_parts_of_a_parquet_file_are_its_rows(tmp_path):
    table = pa.table({"n": list(range(1000)), "text": [f"row {n}" for n in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=70)
    source = sources.open_source("x.parquet", tmp_path, PLAIN, 2_000)
    parts = ranges_of(source, get("causal-lm")(), None, Sizes(2_000))
    rows = [row for part in parts for row in read(part)]
    whole = read(sources.open_source("x.parquet", tmp_path))
    assert 1 < len(parts) < 15
    assert [(row, row.where) for row in rows] == [(row, row.where) for row in whole]


def test_neighbouring_files_make_a_range_and_a_compressed_one_is_not_cut(tmp_path):
    import gzip

    for name in "abcdefgh":
        (tmp_path / f"{name}.jsonl").write_text(lines(20))
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(lines(3000).encode()))
    (tmp_path / "j.jsonl").write_text(lines(500))
    parts = ranges_of(sources.open_source("*.jsonl*", tmp_path, PLAIN, 4_000), get("causal-lm")(), None, HERE)
    names = [[single.name for single in part.singles] for part in parts]
    assert names[0][:2] == ["a.jsonl", "b.jsonl"]
    assert ["i.jsonl.gz"] in [name[-1:] for name in names]
    assert names[-1] == ["j.jsonl"]
    assert names.count(["j.jsonl"]) > 2
    read_ = [row for part in parts for row in read(part)]
    assert not any(isinstance(row, BadRow) for row in read_)
    assert len(read_) == 8 * 20 + 3000 + 500


def test_a_file_that_is_something_else_is_one_bad_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"PK\x03\x04" + b"junk\n" * 5000)
    source = sources.open_source("x.jsonl", tmp_path, PLAIN, 4_000)
    rows = [row for part in ranges_of(source, get("causal-lm")(), None, HERE) for row in read(part)]
    assert [type(row) for row in rows] == [BadRow]
    assert "the file holds a zip archive" in str(rows[0])


def test_ranges_give_the_rows_and_the_split_of_the_whole(tmp_path, numbers):
    (tmp_path / "x.jsonl").write_text(lines(3000) + lines(100, 2950))
    spec = spec_for(numbers, eval_fraction=0.1)
    whole, ranged = made(spec, tmp_path, "whole", Sizes()), made(spec, tmp_path, "ranged")
    assert len(whole.train_files) == 1
    assert len(ranged.train_files) > 10
    for files in ("train_files", "eval_files"):
        rows = [column(done, getattr(done, files), "n") for done in (whole, ranged)]
        assert rows[0] == rows[1]
    assert ranged.notes == whole.notes
    assert any("50 of 3100 examples are copies" in note for note in whole.notes)
    assert whole.digest != ranged.digest, "rows are in other files"


def test_processes_give_what_one_process_gives(tmp_path, numbers, by_processes):
    bad = '{"n": "seven"}\n{"n": \n'
    (tmp_path / "x.jsonl").write_text(lines(1500) + bad + lines(1500, 1500) + bad)
    (tmp_path / "y.jsonl").write_text(lines(200, 100) + lines(100, 5000))
    spec = spec_for(numbers, eval="y.jsonl", bad_rows="skip")
    here, there = (made(spec, tmp_path, name, sizes) for name, sizes in (("here", HERE), ("spread", SPREAD)))
    assert here.rows == there.rows
    assert (here.notes, here.first_bad, here.bad_reasons) == (there.notes, there.first_bad, there.bad_reasons)
    assert [bad.split(": ")[0].rsplit("/")[-1] for bad in there.first_bad] == [
        "x.jsonl:1501", "x.jsonl:1502", "x.jsonl:3003", "x.jsonl:3004",
    ]  # fmt: skip
    assert "200 of 300 held-out examples are also in the training data" in there.notes
    with pytest.raises(UserError, match=r"x\.jsonl:3003: .* bad row number 3, and data.max_bad_rows is 2"):
        made(spec_for(numbers, eval="y.jsonl", bad_rows="skip", max_bad_rows=2), tmp_path, "few", SPREAD)
    assert list((tmp_path / "few" / "data").iterdir()) == []


def test_what_only_this_process_can_read_makes_the_same_rows(tmp_path, numbers, by_processes):
    """Its chunks go out, cut where its ranges would cut them."""
    (tmp_path / "x.jsonl").write_text(lines(1500))
    (tmp_path / "own_closure.py").write_text(
        "from own_numbers import Numbers\nclass Closure(Numbers):\n    name = 'closure'\n"
        "    def __init__(self, options=None):\n        super().__init__(options)\n        self.hidden = lambda: 0\n"
    )
    rows = [made(spec_for("own_closure:Closure"), tmp_path, name, s) for name, s in (("a", HERE), ("b", SPREAD))]
    assert rows[0].rows == rows[1].rows == made(spec_for(numbers), tmp_path, "c").rows
    assert len(rows[1].train_files) > 5


HIDING = """
import multiprocessing
from pathlib import Path
from own_numbers import Numbers

file, away, once = (Path(__file__).with_name(name) for name in ("x.jsonl", "away", "once"))
in_child = multiprocessing.parent_process() is not None
if in_child and not once.exists():
    once.touch()
    file.rename(away)

class Hiding(Numbers):
    name = "hiding"

    def grouping(self):
        if not in_child and away.exists():
            away.rename(file)
        return None
"""


def test_what_others_do_not_see_is_read_by_the_driver(tmp_path, numbers, by_processes, capsys):
    """The first process that is to read hides the file, and the driver finds it again."""
    (tmp_path / "x.jsonl").write_text(lines(1500))
    (tmp_path / "own_hiding.py").write_text(HIDING)
    found = made(spec_for("own_hiding:Hiding"), tmp_path, "spread", SPREAD)
    assert "not every machine of the cluster sees x.jsonl: the driver reads it for them" in capsys.readouterr().out
    assert found.rows == made(spec_for(numbers), tmp_path, "here").rows


def test_copies_are_dropped_where_that_is_asked_for(tmp_path, numbers):
    (tmp_path / "x.jsonl").write_text(lines(1000) + lines(500, 900))
    kept, dropped = (made(spec_for(numbers, duplicates=how), tmp_path, how) for how in ("keep", "drop"))
    assert kept.train_rows + kept.eval_rows == 1500
    rows = column(dropped, dropped.train_files, "n") + column(dropped, dropped.eval_files, "n")
    assert sorted(rows) == list(range(1400))
    assert (
        "100 of 1500 examples are copies of an earlier one, and are left out (data.duplicates: drop)" in dropped.notes
    )
    assert not any("are kept on its side" in note for note in dropped.notes)
    assert any("100 of 1500 examples are copies of an earlier one, and are kept" in note for note in kept.notes)


def test_a_copy_with_another_answer_is_not_dropped(tmp_path):
    rows = [{"text": f"text {n % 10}", "label": "ab"[n % 3 == 0]} for n in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "text-classification", "tokenizer": {"train": "word"}}
    done = made(spec_for(task, duplicates="drop", eval_fraction=0.2), tmp_path, "s", Sizes(1 << 20, 1 << 40))
    assert done.train_rows + done.eval_rows == 20
    assert "10 of 20 examples are copies of an earlier one with another target" in done.notes


def test_a_file_that_changes_between_the_readings_is_refused(tmp_path, numbers):
    (tmp_path / "x.jsonl").write_text(lines(1000))

    def change(phase: str, done: int, total: int, counts: dict) -> None:
        if phase == "encode" and not done and not counts["rows"]:
            (tmp_path / "x.jsonl").write_text(lines(1000).replace('\n{"n": 500,', '{"n": 500,'))

    with pytest.raises(UserError, match=r"x\.jsonl has changed while it was read"):
        prepare.prepare(
            spec_for(numbers, bad_rows="skip"), tmp_path, tmp_path / "s", parent=None, on_progress=change, sizes=HERE
        )


def test_hashes_in_parts_are_counted_as_in_one():
    draw = np.random.default_rng(0)
    several = [draw.integers(0, 700, size, dtype=np.uint64) * np.uint64(2654435761) for size in (400, 0, 900, 300)]
    whole, marks = np.concatenate(several), {}
    for listed in (1 << 20, 100):
        assert tally.different(lambda: several, len(whole), listed) == len(np.unique(whole))
        found = tally.among(lambda: several[:1], lambda: several[2:], len(whole), listed)
        assert found == np.isin(several[0], np.concatenate(several[2:])).sum() > 0
        marks[listed] = np.zeros(len(whole), dtype=bool)
        tally.mark_copies(lambda: several, marks[listed], listed)
    seen: set[int] = set()
    expected = [n in seen or seen.add(n) is not None for n in whole.tolist()]
    assert marks[100].tolist() == marks[1 << 20].tolist() == expected


def test_each_of_many_is_held_out_by_its_own_hash(tmp_path, numbers):
    many = Sizes(4_000, 1 << 40, listed=1000)
    (tmp_path / "x.jsonl").write_text(lines(3000) + lines(1000, 500))
    first = made(spec_for(numbers, eval_fraction=0.1), tmp_path, "a", many)
    sides = [set(column(first, files, "n")) for files in (first.train_files, first.eval_files)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(3000))
    assert 200 < len(sides[1]) < 400
    assert f"{first.eval_rows} of 4000 examples are held out, whole, each by a hash of its content" in first.notes
    (tmp_path / "x.jsonl").write_text(lines(4000))
    grown = made(spec_for(numbers, eval_fraction=0.1), tmp_path, "b", many)
    assert sides[1] <= set(column(grown, grown.eval_files, "n")), "what is held out stays so when data is added"
    other = made(spec_for(numbers, eval_fraction=0.1, split_seed=1), tmp_path, "c", many)
    assert not sides[1] <= set(column(other, other.eval_files, "n"))
    dropped = made(spec_for(numbers, eval_fraction=0.1, duplicates="drop"), tmp_path, "d", many)
    assert set(column(dropped, dropped.eval_files, "n")) == set(column(grown, grown.eval_files, "n"))


def test_the_share_that_is_taken_is_the_share_that_was_asked_for():
    hashes = np.array([splitting.content_of(n) for n in range(20_000)], dtype=np.uint64)
    for seed in (0, 1):
        assert abs(splitting.taken(hashes, 0.02, seed).mean() - 0.02) < 0.004
    both = splitting.taken(hashes, 0.5, 0) & splitting.taken(hashes, 0.5, 1)
    assert abs(both.mean() - 0.25) < 0.02, "seeds draw independently"
    with pytest.raises(UserError, match="holds out none of 10 examples"):
        splitting.check_taken(0, 10, 0.02)


def test_a_sample_of_much_text_is_that_of_all_of_it():
    texts = [f"text {n} " * 20 for n in range(5000)]
    size = sum(map(len, texts))
    whole, early = drawn(texts, 20_000, 7), drawn(texts, 20_000, 7, expected_bytes=size)
    assert len(early.texts) < len(whole.texts) / 3
    assert early.suffices
    assert early.sample == whole.sample
    halves = drawn(texts[:2500], 20_000, 7, size).merged(drawn(texts[2500:], 20_000, 7, size))
    assert halves.sample == whole.sample
    same = drawn(["the same"] * 5000, 5_000, 7, expected_bytes=10**9)
    assert not same.suffices, "all of them have one hash, which is none of the lowest"
