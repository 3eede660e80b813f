"""Files that are opened side by side: their order, what is told of them, and what becomes of errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.data import file_digests, opening, sources, unchanged
from jobs.data.tables import PLAIN

FILES = 40


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of which few are much already."""
    monkeypatch.setattr(opening, "SMALL_BYTES", 1000)
    monkeypatch.setattr(unchanged, "SETTLED_S", -3600.0)
    for number in range(FILES):
        (tmp_path / f"{number:02d}.jsonl").write_text(json.dumps({"text": f"{number} " * 5000}) + "\n")
    return tmp_path


def test_files_are_opened_as_one_after_the_other(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = sources.open_source("*.jsonl", base, PLAIN, 10_000)
    monkeypatch.setattr(opening, "SMALL_BYTES", 1 << 40)
    one_by_one = sources.open_source("*.jsonl", base, PLAIN, 10_000)
    assert [each.digest for each in side_by_side.singles] == [each.digest for each in one_by_one.singles]
    assert [row["text"].split()[0] for row in side_by_side.examples()] == [str(number) for number in range(FILES)]


def test_how_far_they_are_is_told_and_files_that_are_known_count_as_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Mapping[str, float]]] = []
    size = sum(path.stat().st_size for path in base.glob("*.jsonl"))
    for again in (False, True):
        told.clear()
        if again:
            monkeypatch.setattr(file_digests, "_chunks", None)  # nothing is read
        with unchanged.kept_in(base / "notes"), opening.told(lambda phase, *_: told.append((phase, _[-1]))):
            sources.open_source("*.jsonl", base, PLAIN, 10_000)
        assert told[-1] == ("digest", {"bytes": size})


def test_what_one_file_raises_ends_the_reading_of_the_others(base: Path) -> None:
    files, begun = sorted(base.glob("*.jsonl")), threading.Event()

    def open_one(path: Path) -> None:
        if path == files[0]:  # for ever, if nobody ends it
            begun.set()
            while True:
                opening.count(1)
        begun.wait()
        raise UserError(f"{path.name} is no file")

    with pytest.raises(UserError, match=r"01\.jsonl"):
        opening.each(open_one, files[:2])


def test_what_is_read_is_added_up_as_often_as_it_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each file: there may be millions."""
    asked = []
    done = opening._Count.done.fget
    monkeypatch.setattr(opening._Count, "done", property(lambda count: asked.append(0) or done(count)))
    monkeypatch.setattr(opening, "EVERY_S", 1e9)
    with opening.told(lambda *_: None):
        assert opening.each(str, sorted(base.glob("*.jsonl"))) == sorted(map(str, base.glob("*.jsonl")))
    assert len(asked) == 1
