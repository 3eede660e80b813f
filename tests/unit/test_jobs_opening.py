"""Files that are opened side by side: their order, what is told of them, and what becomes of errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.data import opening, sources, unchanged
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


def test_how_far_they_are_is_told_and_files_that_are_known_count_as_read(base: Path) -> None:
    told: list[tuple[str, Mapping[str, float]]] = []
    size = sum(path.stat().st_size for path in base.glob("*.jsonl"))
    for _ in range(2):  # the second time nothing is read
        told.clear()
        with unchanged.kept_in(base / "notes"), opening.told(lambda phase, *_: told.append((phase, _[-1]))):
            sources.open_source("*.jsonl", base, PLAIN, 10_000)
        assert told[-1] == ("digest", {"bytes": size})


def test_the_files_of_one_that_fails_are_not_waited_for(base: Path) -> None:
    (base / "07.jsonl").unlink()
    (base / "07.jsonl").mkdir()
    with pytest.raises(UserError, match=r"07\.jsonl"):
        opening.each(lambda path: sources.open_source(str(path), base), sorted(base.iterdir()))
