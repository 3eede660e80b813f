"""The folder of a preparation that is not whole: who works in it, and after what it stays."""

import errno
from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.data import unfinished


def test_two_at_a_time_work_in_folders_of_their_own(tmp_path):
    place = tmp_path / "data" / "abc"
    with unfinished.folder_for(place) as first, unfinished.folder_for(place) as second:
        assert first.name == "abc.partial"
        assert second.parent == first.parent
        assert second != first
        unfinished.keep_record(second, "x", {"digest": ""})
        assert unfinished.finished(first, "x") is None
        for folder in (first, second):
            (folder / unfinished.META).touch()
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "stays"),
    [(OSError(errno.ENOSPC, "no space left"), True), (UserError("a bad row"), False), (KeyboardInterrupt(), False)],
)
def test_what_is_not_the_datas_fault_leaves_the_folder_to_the_next_one(tmp_path, error, stays):
    place = tmp_path / "abc"
    with pytest.raises(type(error)):
        _ended(place, error)
    assert (tmp_path / "abc.partial").is_dir() is stays
    with unfinished.folder_for(place) as folder:
        unfinished.keep_if(folder, "one layout")
        assert (unfinished.finished(folder, "x") is not None) is stays
        unfinished.keep_if(folder, "another layout")
        assert unfinished.finished(folder, "x") is None


def test_what_was_encoded_is_kept_only_with_what_was_learned(tmp_path):
    with unfinished.folder_for(tmp_path / "abc") as folder:
        unfinished.keep_if(folder, "a layout")
        (folder / "task" / "tokenizer.json").write_text("{}")
        unfinished.keep_learned(folder, ["said"])
        _encoded(folder)
        assert unfinished.learned(folder) == ["said"]
        assert unfinished.finished(folder, "x.arrow") is not None
        (folder / "task" / "tokenizer.json").write_text("{ }")
        assert unfinished.learned(folder) is None
        assert unfinished.finished(folder, "x.arrow") is None
        assert not (folder / "x.arrow").exists()


def _encoded(folder: Path) -> None:
    (folder / "x.arrow").write_bytes(b"rows")
    unfinished.keep_record(folder, "x.arrow", {"digest": unfinished.file_digest(folder / "x.arrow")})


def _ended(place: Path, error: BaseException) -> None:
    with unfinished.folder_for(place) as folder:
        unfinished.keep_if(folder, "one layout")
        unfinished.keep_record(folder, "x", {"digest": ""})
        raise error
