"""Data of an object store: the rows that the same files give on a disk, read by ranges, known by their ETags."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.errors import UserError
from jobs import first_look
from jobs.data import shares
from jobs.data.examples import BadRow
from jobs.data.ranges import Sizes, can_be_sent, ranges_of
from jobs.data.sources import open_source
from jobs.data.tables import PLAIN
from jobs.tasks import get
from tests.support import s3_server
from tests.support.s3_server import S3Server
from tests.unit.test_jobs_tars import packed, spec

ROWS = [{"text": f"row {n}", "pad": "x" * (n % 70)} for n in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Bucket:
    """What a server holds in one bucket, by name."""

    def __init__(self, server: S3Server) -> None:
        self.server = server

    def hold(self, objects: dict[str, bytes]) -> None:
        """Hold these, and nothing else."""
        self.server.objects = {f"bucket/{name}": content for name, content in objects.items()}

    def uri(self, name: str) -> str:
        """Return the URI of an object, a folder or a glob, with a password."""
        return self.server.uri(f"reader:secret@bucket/{name}")


@pytest.fixture(scope="module")
def _served() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server.running(monkeypatch) as server:
        yield server


@pytest.fixture
def store(_served: S3Server) -> Bucket:
    _served.sends = True
    return Bucket(_served)


def rows(source) -> list:
    return [row for single in source.singles for row in single.read()]


def of_disk(base: Path, name: str, content: bytes) -> list[dict]:
    (base / name).write_bytes(content)
    return [dict(row) for row in open_source(name, base).read()]


def test_each_kind_of_file_gives_the_rows_that_it_gives_on_a_disk(store, tmp_path):
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet", row_group_size=30)
    objects = {
        "x.jsonl": LINES,
        "x.jsonl.gz": gzip.compress(LINES),
        "x.jsonl.bz2": bz2.compress(LINES),
        "x.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
        "x.csv": b'a,b\n1,"c\nd"\n',
        "x.json": json.dumps(ROWS).encode(),
        "x.txt": b"a text\n",
        "x.parquet": (tmp_path / "t.parquet").read_bytes(),
        "x.tar": packed([("1.txt", b"a"), ("1.cls", b"b"), ("2.txt", b"c" * 3000)]),
        "x.tgz": gzip.compress(packed([("1.txt", b"a"), ("2.txt", b"c")])),
    }
    store.hold(objects)
    for name, content in objects.items():
        source = open_source(store.uri(name), tmp_path)
        assert [dict(row) for row in source.read()] == of_disk(tmp_path, name, content), name
        assert next(source.read()).where.startswith(f"s3://bucket/{name}")


def test_lines_and_row_groups_are_read_in_the_parts_of_a_disk_and_not_before(store, tmp_path):
    big = LINES * 60
    (tmp_path / "x.jsonl").write_bytes(big)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet", row_group_size=30)
    store.hold({name: (tmp_path / name).read_bytes() for name in ("x.jsonl", "x.parquet")})
    for name, size in (("x.jsonl", 400_000), ("x.parquet", 2_000)):
        source, local = (open_source(where, tmp_path, PLAIN, size) for where in (store.uri(name), name))
        assert [(cut.start, cut.end) for cut in source.cuts] == [(cut.start, cut.end) for cut in local.cuts]
        assert len(source.cuts) >= 4
        parts = ranges_of(source, get("causal-lm")(), None, Sizes(size))
        sent = [pickle.loads(pickle.dumps(part)) for part in parts]
        assert all(map(can_be_sent, sent))
        assert [dict(row) for part in sent for row in rows(part)] == [dict(row) for row in rows(local)]
    before = store.server.sent
    source = open_source(store.uri("x.jsonl"), tmp_path, PLAIN, len(big) // 2)
    assert 0 < store.server.sent - before < len(big)
    row = rows(ranges_of(source, get("causal-lm")(), None, Sizes(len(big) // 2))[1])[0]
    at = int(row.where.rpartition(": byte ")[2])
    assert json.loads(big[at : big.index(b"\n", at)]) == row


def test_a_digest_is_that_of_the_etag(store, tmp_path):
    store.hold({"x.jsonl": LINES, "y.jsonl": LINES})
    digest = open_source(store.uri("x.jsonl"), tmp_path).digest
    assert open_source(store.uri("y.jsonl"), tmp_path).digest == digest
    store.hold({"x.jsonl": LINES[:-3] + b'!"}\n'[:3]})
    assert open_source(store.uri("x.jsonl"), tmp_path).digest != digest


def test_folders_globs_and_braces_of_a_store(store, tmp_path):
    one = {
        name: f'{{"text": "{name}"}}\n'.encode() for name in ("a/1.jsonl", "a/b/2.jsonl", "a/b/3.jsonl", "c/4.jsonl")
    }
    store.hold({**one, "a/README.md": b"about", "a/.x.jsonl": b"{}", "a/x.tar": packed([("1.txt", b"a")])})
    for where, found in (
        ("a", ["a/1.jsonl", "a/b/2.jsonl", "a/b/3.jsonl"]),
        ("a/*.jsonl", ["a/1.jsonl"]),
        ("**/*.jsonl", ["a/1.jsonl", "a/b/2.jsonl", "a/b/3.jsonl", "c/4.jsonl"]),
        ("a/b", ["a/b/2.jsonl", "a/b/3.jsonl"]),
        ("{c,a}/*.jsonl", ["c/4.jsonl", "a/1.jsonl"]),
    ):
        assert [row["text"] for row in open_source(store.uri(where), tmp_path).read()] == found, where
    notes = "\n".join(open_source(store.uri("a"), tmp_path).notes)
    assert "README.md" in notes
    assert "a/x.tar" in notes
    assert "secret" not in notes
    with pytest.raises(UserError, match=r"nothing matches 's3://bucket/none/\*'"):
        open_source(store.uri("none/*"), tmp_path)
    store.hold({"d/cat/1.png": b"x"})
    with pytest.raises(UserError, match="Images and recordings are read from tars there"):
        open_source(store.uri("d"), tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.tar"])
def test_a_store_that_fails_ends_the_job_and_is_no_bad_row(store, tmp_path, name):
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    of = {"x.parquet": (tmp_path / "t.parquet").read_bytes(), "x.tar": packed([("1.txt", b"a")])}
    store.hold({name: of.get(name, gzip.compress(LINES) if name.endswith("gz") else LINES)})
    source = open_source(store.uri(name), tmp_path)
    assert not isinstance(next(source.read()), BadRow)
    store.server.sends = False
    with pytest.raises(UserError, match=rf"s3://bucket/{name}"):
        list(source.read())


def test_any_machine_is_taken_to_see_a_store(store, tmp_path):
    store.hold({"x.jsonl": LINES})
    source = open_source(store.uri("x.jsonl"), tmp_path)
    share = shares.Share("x", source, get("causal-lm")(), None, tmp_path / "s", 0, lambda *_: None)
    assert shares.sees(share)


def test_a_look_at_data_asks_no_store(tmp_path):
    def looked(where: str) -> list[str]:
        return first_look.look_at_data(spec(where, "causal-lm", sequence_length=16), tmp_path)

    for where in ("s3://nowhere.invalid/x.jsonl", "hf://datasets/a/b/*.parquet", "hf://a/b:train"):
        assert looked(where) == [f"data.train: {where!r} lies behind a network, so it was not looked at"]
    with pytest.raises(UserError, match=r"'https://host/a\.jsonl' is a URL that is not read"):
        looked("https://host/a.jsonl")


def test_a_file_uri_is_a_path(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINES)
    assert open_source(f"file://{tmp_path}/x.jsonl", Path()).digest == open_source("x.jsonl", tmp_path).digest
