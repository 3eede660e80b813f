"""Notes of how a run ended: those that are damaged are named, and stop nobody else's run from being told."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tracking import outbox
from tracking.cli import app

HERE = json.dumps({"host": socket.gethostname(), "pid": 1 << 22, "started_at": 1.0, "if_gone": None})
"""A process that is gone (no pid is that large), and no word of how its run ended."""
ENDING = {"key": "k", "name": "n", "status": "FAILED"}


def spool_with(runs: Path, run: str, **notes: str) -> Path:
    spool = runs / run / "spool"
    spool.mkdir(parents=True)
    for name, content in notes.items():
        (spool / f"{name}.json").write_text(content)
    return spool


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("owner", '{"host": "x"', "delimiter"),
        ("owner", "[]", "holds no mapping"),
        ("owner", "{}", "dictionary"),
        ("owner", HERE, "dictionary"),
        ("owner", HERE.replace("4194304", '"one"'), "dictionary"),
        ("owner", HERE.replace("null", json.dumps(ENDING | {"status": "FINISHD"})), "status: .*'FINISHED'"),
        ("ending", "", "Expecting value"),
        ("ending", '{"key": 1}', "key: "),
        ("ending", json.dumps(ENDING | {"colour": 1}), "colour: "),
        ("ending", json.dumps(ENDING | {"status": "OVER"}), "status: "),
        ("ending", json.dumps(ENDING | {"tags": ["a"]}), "tags: "),
    ],
)
def test_a_damaged_note_waits_and_is_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    spool = spool_with(tmp_path, "bad-1", **{name: content})
    assert outbox.pending(tmp_path) == [spool]
    with pytest.raises(outbox.DamagedNote, match=rf"bad-1/spool/{name}\.json is damaged \(.*{reason}"):
        outbox.settle(spool)


def test_an_owner_elsewhere_and_one_that_lives_do_not_wait(tmp_path: Path) -> None:
    spool_with(tmp_path, "elsewhere-1", owner=json.dumps(json.loads(HERE) | {"host": "no-such-host"}))
    outbox.own(tmp_path / "alive-1" / "spool", outbox.Ending("alive-1", "alive", "FAILED"))
    assert outbox.pending(tmp_path) == []


def test_sync_names_each_damaged_run_and_exits_1(tmp_path: Path) -> None:
    spool_with(tmp_path, "bad-1", owner="{")
    spool_with(tmp_path, "bad-2", ending="[]")
    result = CliRunner().invoke(app, ["sync", str(tmp_path)])
    assert result.exit_code == 1, result.output
    for named in ("bad-1: not told: ", "bad-2: not told: ", "2 of 2 runs could not be told"):
        assert named in result.output
