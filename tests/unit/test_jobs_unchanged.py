"""A second start reads the files that changed, and no others: counted by the bytes that this thread asks for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data import identity, sources, unchanged
from jobs.data.examples import Source
from jobs.data.tables import PLAIN
from jobs.spec import JobSpec

BYTES = 300_000
"""Of a file: far more than a note, and what Python reads on its own."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust files that were written just now, as these are."""
    monkeypatch.setattr(unchanged, "SETTLED_S", -3600.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of each kind that a source is."""
    for name in ("images/cat/1.png", "images/dog/2.png", "said/one.wav", "said/two.wav", "told/one.wav", "two.json.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode().ljust(BYTES, b"."))
    (tmp_path / "told" / "metadata.csv").write_text("file_name,text\none.wav,one\n")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"{n} " * 900}) for n in range(200)))
    return tmp_path


def opened(where: str | list[str], base: Path) -> Source:
    with unchanged.kept_in(base / "notes"):
        return sources.open_source(where, base, PLAIN, 100_000)


def read_by(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what is made, and how many bytes this thread asked the system for meanwhile."""
    before = _asked()
    return work(), _asked() - before


def _asked() -> int:
    return int(Path("/proc/thread-self/io").read_text().split()[1])


@pytest.mark.parametrize("where", ["images", "said", "told", "x.jsonl", "two.json.gz", "*.jsonl", ["images", "said"]])
def test_a_second_start_reads_no_file_again(base: Path, where: str | list[str]) -> None:
    first, read = read_by(lambda: opened(where, base))
    assert read > BYTES
    again, read = read_by(lambda: opened(where, base))
    assert read < BYTES // 2
    assert (again.digest, [single.cuts for single in again.singles]) == (
        first.digest,
        [single.cuts for single in first.singles],
    )
    assert first.digest == sources.open_source(where, base, PLAIN, 100_000).digest, "as without notes"
    assert bool(first.singles[0].cuts) == ("jsonl" in str(where))


def wait_for_tick(path: Path) -> None:
    """Wait until the file system's clock, which ticks slowly, gives a change another time than the file's last one."""
    probe = path.with_name(".probe")
    while True:
        probe.touch()
        later = probe.stat().st_ctime_ns > path.stat().st_ctime_ns
        probe.unlink()
        if later:
            return


def overwritten(path: Path) -> None:
    """Change a byte, and give the file its size and its old mtime again."""
    wait_for_tick(path)
    about = path.stat()
    with path.open("r+b") as file:
        file.write(b"#")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put a copy in its place, which has its times as far as they can be set, with another byte."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    overwritten(copy)
    copy.rename(path)


def pointed_elsewhere(path: Path) -> None:
    """Have a link in its place lead to another file."""
    other = path.parents[2] / "other"
    other.write_bytes(b"#" + path.read_bytes()[1:])
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [overwritten, replaced, pointed_elsewhere])
def test_a_file_that_changed_is_read_again_and_no_other(base: Path, change: Callable[[Path], None]) -> None:
    before = opened("images", base).digest
    change(base / "images" / "cat" / "1.png")
    found, read = read_by(lambda: opened("images", base))
    assert BYTES < read < 1.5 * BYTES
    assert before != found.digest == sources.open_source("images", base).digest


def test_nothing_is_kept_of_a_file_that_changed_just_now(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "SETTLED_S", 1e6)
    opened("images", base)
    assert read_by(lambda: opened("images", base))[1] > 2 * BYTES


def test_a_file_that_changes_while_it_is_read_is_not_kept(base: Path) -> None:
    path = base / "x.jsonl"

    def read() -> str:
        overwritten(path)
        return "of before"

    with unchanged.kept_in(base / "notes"), unchanged.noted_for("x", base):
        assert unchanged.found(path, "sha256", read) == "of before"
        assert unchanged.found(path, "sha256", lambda: "of after") == "of after"


@pytest.fixture
def note(base: Path) -> Path:
    opened("images", base)
    (found,) = (base / "notes").iterdir()
    return found


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 0, "files": {}}', b'{"format": 1, "files": [1]}'])
def test_a_damaged_note_is_none(base: Path, note: Path, content: bytes) -> None:
    before = opened("images", base).digest
    note.write_bytes(content)
    found, read = read_by(lambda: opened("images", base))
    assert (found.digest, read > 2 * BYTES) == (before, True)
    assert read_by(lambda: opened("images", base))[1] < BYTES, "and is written anew"


def test_a_note_forgets_what_is_gone_and_keeps_what_a_failure_leaves_unread(base: Path, note: Path) -> None:
    def files() -> list[str]:
        return sorted(path.rpartition("/")[2] for path in json.loads(note.read_text())["files"])

    assert files() == ["1.png", "2.png"]
    with pytest.raises(RuntimeError), unchanged.kept_in(note.parent), unchanged.noted_for("images", base):
        raise RuntimeError
    assert files() == ["1.png", "2.png"]
    (base / "images" / "dog" / "2.png").unlink()
    opened("images", base)
    assert files() == ["1.png"]


def test_files_that_rows_name_are_not_read_again(base: Path) -> None:
    rows = [{"image": str(base / "images" / name), "label": name[:3]} for name in ("cat/1.png", "dog/2.png")]
    (base / "named.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"name": "x", "phase": "pretrain", "task": "image-classification", "model": {"architecture": "resnet"}}
    spec = JobSpec.model_validate({**values, "data": {"train": "named.jsonl"}, "training": {"steps": 1}})

    def files() -> str:
        with unchanged.kept_in(base / "notes"):
            source = sources.open_source("named.jsonl", base)
            return identity.parts_of(spec, source, None, None, base)["files"]

    first, read = read_by(files)
    assert read > 2 * BYTES
    again, read = read_by(files)
    assert (again, read < BYTES) == (first, True)
    overwritten(base / "images" / "cat" / "1.png")
    assert files() != first
