"""The newest checkpoint that verifies is taken, and what was skipped is said."""

import json
from pathlib import Path

import pytest

from jobs import checkpoint


def make(root: Path, step: int) -> Path:
    directory = checkpoint.folder(root, step)
    (directory / "shards").mkdir(parents=True)
    (directory / "shards" / "rank-0.pt").write_bytes(bytes(range(256)) * 10)
    (directory / "state.json").write_text(json.dumps({"step": step, "world_size": 2, "zero_stage": 1}))
    checkpoint.write_manifest(directory)
    return directory


def truncate(directory: Path) -> None:
    (directory / "shards" / "rank-0.pt").write_bytes(b"short")


def flip_a_byte(directory: Path) -> None:
    content = bytearray((directory / "shards" / "rank-0.pt").read_bytes())
    content[100] ^= 1
    (directory / "shards" / "rank-0.pt").write_bytes(content)


def remove_shard(directory: Path) -> None:
    (directory / "shards" / "rank-0.pt").unlink()


def remove_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").unlink()


def break_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").write_text('{"files": ')


def test_newest_whole_checkpoint_wins(tmp_path):
    make(tmp_path, 9)
    make(tmp_path, 10)
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found is not None
    assert (found.state.step, skipped) == (10, [])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "has 5 bytes instead of 2560"),
        (flip_a_byte, "is corrupt"),
        (remove_shard, "is missing"),
        (remove_manifest, "no manifest"),
        (break_manifest, "unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, harm, said):
    make(tmp_path, 9)
    harm(make(tmp_path, 10))
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found is not None
    assert found.state.step == 9
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000010: ")
    assert said in skipped[0]


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest_valid(tmp_path / "none") == (None, [])
