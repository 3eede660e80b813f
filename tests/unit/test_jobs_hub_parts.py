"""A data set of the hub's client in parts: any process reads them, and the rows are those of the whole."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from huggingface_hub import HfFileSystem

from jobs.data import remote, shares
from jobs.data.ranges import Sizes, can_be_sent, ranges_of
from jobs.data.sources import open_source
from jobs.data.tables import PLAIN
from jobs.tasks import get
from tests.support import dataset_hub, hub


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    for shard in range(2):
        rows = [{"text": f"{shard} {n}", "meta": {"n": n} if n % 2 else None} for n in range(250)]
        (tmp_path / f"set/train-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf://{tmp_path}/set"


def test_parts_are_the_rows_of_the_whole_wherever_they_are_read(where: str, tmp_path: Path) -> None:
    whole, source = open_source(where, tmp_path), open_source(where, tmp_path, PLAIN, 1_000)
    assert (whole.cuts, whole.size, whole.origin) == ((), None, f"{where}:train"), "a small one is read as ever"
    assert source.digest == whole.digest
    task = get("causal-lm")()
    parts = [pickle.loads(pickle.dumps(part)) for part in ranges_of(source, task, None, Sizes(1_000))]
    assert len(parts) > 3
    assert all(map(can_be_sent, parts))
    found = [row for part in parts for single in part.singles for row in single.read()]
    assert [(dict(row), row.where, row.padded) for row in found] == [
        (dict(row), row.where, row.padded) for row in whole.read()
    ]
    assert len(np.unique([len(list(part.singles[0].read())) for part in parts])) <= 2, "parts are of a size"
    share = shares.Share("x", parts[0], task, None, tmp_path / "s", 0, lambda *_: None)
    assert shares.sees(share)
    Path(source.origin).rename(tmp_path / "elsewhere")
    assert not shares.sees(share), "a machine without the client's files leaves them to the driver"


def test_a_slice_is_read_as_the_rows_that_it_is(where: str, tmp_path: Path) -> None:
    for slices in (["train[:90%]", "train[90%:]"], ["train[10%:]+train[:10%]"]):
        names = [f"{where}:{each}" for each in slices]
        whole, source = open_source(names, tmp_path), open_source(names, tmp_path, PLAIN, 1_000)
        parts = ranges_of(source, get("causal-lm")(), None, Sizes(1_000))
        found = [row["text"] for part in parts for single in part.singles for row in single.read() if "text" in row]
        assert found == [row["text"] for row in whole.read() if "text" in row]
        assert len(found) == 500
        assert source.notes == (), "nothing is taken for the same twice"


def test_files_of_the_hub_are_read_by_ranges_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {n}", "pad": "x" * 500 + str(n)} for n in range(4000)]
    table = pa.Table.from_pylist(rows)
    for shard in range(2):
        part = table.slice(shard * 2000, 2000)
        pyarrow.parquet.write_table(part, tmp_path / f"{shard}.parquet", row_group_size=500, compression="none")
    files = {f"data/train-{shard}.parquet": (tmp_path / f"{shard}.parquet").read_bytes() for shard in range(2)}
    remote.opened_store.cache_clear()
    HfFileSystem.clear_instance_cache()
    with dataset_hub.served("owner/set", files) as (address, fetched):
        hub.use(tmp_path / "cache", monkeypatch, address)
        source = open_source("hf://datasets/owner/set/data/train-*.parquet", tmp_path, PLAIN, 250_000)
        assert sum(fetched) < sum(map(len, files.values())) / 2, "its ends say where the row groups are"
        parts = ranges_of(source, get("causal-lm")(), None, Sizes(250_000))
        assert len(parts) == 8
        fetched.clear()
        found = list(parts[5].singles[0].read())
        assert found == rows[2500:3000]
        assert sum(fetched) < len(files["data/train-1.parquet"]) / 2
        assert found[0].where == f"hf://datasets/owner/set@{dataset_hub.COMMIT}/data/train-1.parquet: row 501"
        assert [dict(row) for part in parts for single in part.singles for row in single.read()] == rows
        assert not list((tmp_path / "cache").glob("**/*.parquet")), "nothing is kept of it"
    remote.opened_store.cache_clear()
    HfFileSystem.clear_instance_cache()
