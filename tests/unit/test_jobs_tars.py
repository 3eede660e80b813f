"""Tars of samples: what is a sample, the rows that the same files give in a folder, and nothing lost in silence."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs import first_look
from jobs.data import prepare
from jobs.data.examples import BadRow
from jobs.data.ranges import Sizes, ranges_of
from jobs.data.sources import open_source
from jobs.data.tables import PLAIN
from jobs.spec import JobSpec
from jobs.tasks import get
from tests.support import tones

Files = Iterable[tuple[str, bytes]]


def packed(files: Files, form: int = tarfile.PAX_FORMAT) -> bytes:
    kept = io.BytesIO()
    with tarfile.open(fileobj=kept, mode="w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return kept.getvalue()


def rows(base: Path, where: str | list[str] = "x.tar") -> list[Any]:
    return list(open_source(where, base).read())


def read(tmp_path: Path, files: Files) -> list[Any]:
    (tmp_path / "x.tar").write_bytes(packed(files))
    return rows(tmp_path)


# -- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("1.jpg", b"a"), ("1.cls", b"cat\n"), ("2.JPG", b"b"), ("2.cls", b"7")], [("a", "cat"), ("b", "7")]),
        ([("./d/1.png", b"a"), ("d/1.cls", b"x"), ("e/1.png", b"b"), ("e/1.cls", b"y")], [("a", "x"), ("b", "y")]),
        ([("d.1/2.png", b"a"), ("d.1/2.cls", b"x")], [("a", "x")]),
    ],
)
def test_members_that_share_a_name_up_to_the_first_dot_are_a_sample(tmp_path, files, expected):
    assert [(row["image"].decode(), row["label"]) for row in read(tmp_path, files)] == expected


def test_what_follows_the_first_dot_names_the_field(tmp_path):
    files = [
        ("a.left.png", b"1"),
        ("a.json", b'{"score": 0.5, "who": "x"}'),
        ("a.box.json", b'{"w": 1}'),
        ("a.prompt.txt", "\ufeffQ\n".encode()),
        ("a.NPY", b"\x00\x01"),
        ("d/b.flac", b"2"),
        ("d/b.txt", b" said \n"),
        ("c.txt", b" text \n"),
    ]
    found = read(tmp_path, files)
    assert found == [
        {"left": b"1", "score": 0.5, "who": "x", "box": {"w": 1}, "prompt": "Q\n", "npy": b"\x00\x01"},
        {"audio": b"2", "path": "d/b.flac", "text": "said"},
        {"text": " text \n"},
    ]
    assert [row.where for row in found] == [f"{tmp_path}/x.tar:{name}" for name in ("a", "d/b", "c")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_whole(tmp_path, form):
    name = "ordner/" + "ä" * 20 + "/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 180)
    (tmp_path / "x.tar").write_bytes(packed([(f"{name}.txt", b"x"), (f"{name}.cls", b"y"), ("z.txt", b"z")], form))
    assert [(dict(row), row.where) for row in rows(tmp_path)] == [
        ({"text": "x", "label": "y"}, f"{tmp_path}/x.tar:{name}"),
        ({"text": "z"}, f"{tmp_path}/x.tar:z"),
    ]


@pytest.mark.parametrize(
    ("files", "where", "said"),
    [
        ([("1.jpg", b"a"), ("1.png", b"b")], "1.png", "gives it the field 'image' too"),
        ([("1.txt", b"a"), ("1.json", b'{"text": "b"}')], "1.json", "gives it the field 'text' too"),
        ([("1.txt", b"a"), ("1.txt", b"b")], "1.txt", "gives it the field 'text' too"),
        ([("1.json", b'{"a": 1, "a": 2}')], "1.json", 'the key "a" is given twice'),
        ([("1.json", b"[1]")], "1.json", "a sample's JSON holds one object, this is a list"),
        ([("1.txt", b"\xff")], "1.txt", "byte 0xff is not UTF-8"),
        ([("1.cls", b"a\0b")], "1.cls", "a NUL byte"),
        ([("1", b"a")], "1", "no dot in its name"),
    ],
)
def test_a_sample_that_cannot_be_used_is_a_bad_row_with_its_place(tmp_path, files, where, said):
    bad, *others = read(tmp_path, [*files, ("9.txt", b"fine")])
    assert others == [{"text": "fine"}]
    assert isinstance(bad, BadRow)
    assert bad.where == f"{tmp_path}/x.tar:{where}"
    assert said in bad.reason


def test_a_link_has_no_content_of_its_own(tmp_path):
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").hardlink_to(tmp_path / "1.txt")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("1.txt", "2.txt"):
            archive.add(tmp_path / name, name)
    first, second = rows(tmp_path)
    assert first == {"text": "one"}
    assert (second.where, "a link" in second.reason) == (f"{tmp_path}/x.tar:2.txt", True)


def test_a_sample_without_its_label_is_a_bad_row_of_the_task(tmp_path):
    (tmp_path / "x.tar").write_bytes(packed([*pictures(("a", "b")), ("z.png", b"x")]))
    with pytest.raises(UserError, match=r"x\.tar:z: no column 'label'"):
        made(tmp_path, "x.tar", "image-classification")


# -- nothing is lost in silence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compressed", [False, True])
def test_wherever_an_archive_breaks_off_that_is_said(tmp_path, form, compressed):
    whole = packed([(f"{'n' * 120}{n}.txt", b"x" * 300 * n) for n in range(6)], form)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "x.tar").write_bytes(whole)
    assert len(rows(tmp_path)) == 6
    for at in [0, 1, *range(256, end, 256)]:
        cut = whole[:at]
        name = "x.tar.gz" if compressed else "x.tar"
        (tmp_path / name).write_bytes(gzip.compress(cut, 1) if compressed else cut)
        said = ""
        try:
            said = "".join(str(row) for row in rows(tmp_path, name) if isinstance(row, BadRow))
        except UserError as error:
            said = str(error)
        assert name in said, at


def test_a_compressed_archive_whose_sum_is_wrong_is_damaged(tmp_path):
    content = bytearray(gzip.compress(packed([("1.txt", b"a"), ("2.txt", b"b")])))
    content[-6] ^= 1
    (tmp_path / "x.tgz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tgz:2\.txt: .* CRC"):
        rows(tmp_path, "x.tgz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole[:1024] + b"?" * 512 + whole[1536:], "what follows 1.txt is no member"),
        (lambda whole: whole + packed([("3.txt", b"c")]), "more behind its end, which follows 2.txt"),
        (lambda whole: whole[:2048], "nothing follows 2.txt: its end is not marked"),
    ],
)
def test_what_is_no_member_ends_the_job(tmp_path, change, said):
    (tmp_path / "x.tar").write_bytes(change(packed([("1.txt", b"a"), ("2.txt", b"b")])))
    with pytest.raises(UserError, match=rf"x\.tar:\d\.txt: the archive cannot be read on behind it: .*{said}"):
        rows(tmp_path)


def test_what_is_no_archive_is_one_bad_row(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no archive " * 100)
    (bad,) = rows(tmp_path)
    assert "it is no tar archive" in bad.reason
    (tmp_path / "x.tar").write_bytes(gzip.compress(packed([("1.txt", b"a")])))
    (bad,) = rows(tmp_path)
    assert "end its name in .gz" in bad.reason


def test_members_that_belong_to_no_sample_are_counted(tmp_path):
    extra = [("._1.txt", b"?"), (".DS_Store", b"?"), ("__classes__", b"?"), ("README.md", b"?")]
    (tmp_path / "x.tar").write_bytes(packed([("1.txt", b"a"), *extra, ("1.cls", b"b")]))
    source = open_source("x.tar", tmp_path)
    assert list(source.read()) == [{"text": "a", "label": "b"}]
    (note,) = source.notes
    assert note.startswith("x.tar: 4 entries left out (members of an archive that are hidden")
    (tmp_path / "y.tar").write_bytes(packed(extra))
    with pytest.raises(UserError, match=r"y\.tar holds no sample \(\._1\.txt, \.DS_Store"):
        open_source("y.tar", tmp_path)


def test_an_archive_beside_the_files_it_may_hold_is_left_out(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.tar").write_bytes(packed([("1.txt", b"a")]))
    (tmp_path / "d/1.txt").write_bytes(b"a")
    source = open_source("d", tmp_path)
    assert list(source.read()) == [{"text": "a"}]
    assert any("an archive beside other data" in note and "x.tar" in note for note in source.notes)
    assert len(rows(tmp_path, ["d/1.txt", "d/x.tar"])) == 2


def test_braces_and_globs_name_archives_in_order(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number:03d}.tar").write_bytes(packed([(f"{number}.txt", str(number).encode())]))
    for where in ("s-{000..002}.tar", "s-*.tar", "s-00{0,1,2}.tar", ["s-{000..001}.tar", "s-002.tar"]):
        assert [row["text"] for row in rows(tmp_path, where)] == ["0", "1", "2"], where
    with pytest.raises(UserError, match=r"nothing matches 's-003\.tar'"):
        rows(tmp_path, "s-{000..003}.tar")
    with pytest.raises(UserError, match="counts backwards"):
        rows(tmp_path, "s-{003..000}.tar")
    (tmp_path / "{a,b}.txt").write_text("a name with braces")
    assert len(rows(tmp_path, "{a,b}.txt")) == 1


def test_validate_refuses_an_archive_of_which_the_task_can_use_nothing(tmp_path):
    (tmp_path / "x.tar").write_bytes(packed([("1.npy", b"a"), ("2.npy", b"b")]))
    with pytest.raises(UserError, match=r"x\.tar: none of its first 2 samples can be used; .*x\.tar:2: no column"):
        first_look.look_at_data(spec("x.tar", "image-classification"), tmp_path)
    (tmp_path / "x.tar").write_bytes(packed(pictures(("a", "b"))))
    assert first_look.look_at_data(spec("x.tar", "image-classification"), tmp_path) == []


# -- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_parts_of_an_archive_are_its_samples(tmp_path, seed):
    draw = random.Random(seed)
    names = [f"{'n' * draw.choice([1, 150])}{number}" for number in range(20)]
    files = [(f"{name}.{kind}", b"x" * draw.choice([0, 10, 512, 3000])) for name in names for kind in ("txt", "cls")]
    (tmp_path / "x.tar").write_bytes(packed(files))
    size = draw.choice([1, 1024, 5000])
    source = open_source("x.tar", tmp_path, PLAIN, size)
    parts = ranges_of(source, get("causal-lm")(), None, Sizes(size))
    assert len(parts) > 3
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    found = [row for part in sent for single in part.singles for row in single.read()]
    assert [(dict(row), row.where) for row in found] == [(dict(row), row.where) for row in rows(tmp_path)]


# -- the same files in a folder -------------------------------------------------------------------------------------


def pictures(labels: Iterable[str]) -> list[tuple[str, bytes]]:
    """Members of samples, named as the files of a folder of labels are ordered."""
    files = []
    for at, label in enumerate(labels):
        for number in range(6):
            kept = io.BytesIO()
            Image.fromarray(np.full((4, 4), 40 * number + at, np.uint8)).save(kept, "png")
            files += [(f"{label}/{number}.png", kept.getvalue()), (f"{label}/{number}.cls", f"{label}\n".encode())]
    return files


def spec(where: str, task: str, **options: Any) -> JobSpec:
    model = {"image-classification": "cnn", "causal-lm": "llama"}.get(task, "crnn")
    values = {"name": "x", "phase": "pretrain", "model": {"architecture": model}, "training": {"steps": 1}}
    return JobSpec.model_validate({**values, "task": {"name": task, **options}, "data": {"train": where}})


def made(base: Path, where: str, task: str, **options: Any) -> prepare.Prepared:
    own = spec(where, task, **options)
    return prepare.prepare(own, base, base / "storage", parent=None, on_progress=lambda *_: None)


def test_images_encode_as_those_of_a_folder(tmp_path):
    members = pictures(("cat", "dog"))
    for name, content in members[::2]:
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(content)
    (tmp_path / "x.tar").write_bytes(packed(members))
    of_folder, of_tar = (made(tmp_path, where, "image-classification") for where in ("pets", "x.tar"))
    assert of_tar.rows == of_folder.rows
    assert (of_tar.train_rows, of_tar.eval_rows) == (of_folder.train_rows, of_folder.eval_rows)
    assert of_tar.digest != of_folder.digest


def test_recordings_and_their_texts_encode_as_those_of_a_folder(tmp_path):
    files = []
    for number, said in enumerate("abacab"):
        files += [
            (f"{number}.txt", f"{said}\n".encode()),
            (f"{number}.wav", tones.wav(tones.spoken(said, 1 + number / 9))),
        ]
    (tmp_path / "said").mkdir()
    for name, content in files:
        (tmp_path / "said" / name).write_bytes(content)
    (tmp_path / "x.tar").write_bytes(packed(files))
    of_folder, of_tar = (made(tmp_path, where, "speech-recognition") for where in ("said", "x.tar"))
    assert of_tar.rows == of_folder.rows


def test_texts_encode_as_those_of_a_folder_however_they_are_compressed(tmp_path):
    files = [(f"{number}.txt", f"\ufeff text number {number}\n".encode() * 3) for number in range(8)]
    (tmp_path / "texts").mkdir()
    for name, content in files:
        (tmp_path / "texts" / name).write_bytes(content)
    whole = packed(files)
    (tmp_path / "x.tar").write_bytes(whole)
    (tmp_path / "x.tgz").write_bytes(gzip.compress(whole))
    (tmp_path / "x.tar.zst").write_bytes(pa.compress(whole, "zstd", asbytes=True))
    own = {"sequence_length": 16, "tokenizer": {"train": "char"}}
    of = [made(tmp_path, where, "causal-lm", **own) for where in ("texts", "x.tar", "x.tgz", "x.tar.zst")]
    assert len({one.rows for one in of}) == 1
    assert len({one.digest for one in of}) == 4
