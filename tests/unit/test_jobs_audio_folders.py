"""Folders of recordings as data: names, tables, texts beside them, LibriSpeech's lists, and globs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from jobs.data.hub import open_hub
from jobs.data.sources import open_source
from jobs.tasks import audio
from tests.support import tones

SOUND = tones.wav(tones.spoken("a"))


def recordings(folder: Path, *names: str) -> None:
    for at, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(tones.wav(tones.spoken("a", 1 + at / 10)))


def rows(where: str | list[str], base: Path) -> list[dict]:
    return [
        {key: value for key, value in each.items() if key != "audio"} for each in open_source(where, base).examples()
    ]


def test_a_flat_folder_gives_recordings_by_name(tmp_path: Path) -> None:
    recordings(tmp_path / "said", "yes_anna_0.wav", "no_ben_1.flac", "deep/no_ben_2.wav")
    (tmp_path / "said/README.md").write_text("about")
    (tmp_path / "said/cover.png").write_bytes(b"x")
    source = open_source("said", tmp_path)
    found = list(source.examples())
    assert [each["path"] for each in found] == ["deep/no_ben_2.wav", "no_ben_1.flac", "yes_anna_0.wav"]
    assert found[2]["audio"] == (tmp_path / "said/yes_anna_0.wav").read_bytes()
    assert found[2].where == str(tmp_path / "said/yes_anna_0.wav")
    assert source.name == "said"
    assert any("cover.png" in note for note in source.notes)


def test_globs_keep_a_speaker_aside_and_a_file_is_read_once(tmp_path: Path) -> None:
    recordings(tmp_path, *(f"{digit}_{who}_0.wav" for digit in "01" for who in ("anna", "ben", "carl")))
    assert len(rows("*_ben_*.wav", tmp_path)) == 2
    assert [each["path"] for each in rows("*_[!b]*_*.wav", tmp_path)] == [
        *("0_anna_0.wav", "0_carl_0.wav", "1_anna_0.wav", "1_carl_0.wav")
    ]
    both = open_source(["*_anna_*.wav", "0_*.wav"], tmp_path)
    assert len(list(both.examples())) == 4
    assert any("each file is read once" in note for note in both.notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transcripts.csv", "file,text,age\nclips/one.wav,eins,30\ntwo.wav,zwei,40\n"),
        ("transcripts.tsv", "path\tsentence\none.wav\teins\ntwo\tzwei\n"),
        ("metadata.jsonl", '{"file_name": "one.wav", "text": "eins"}\n{"file_name": "two.wav", "text": "zwei"}\n'),
    ],
)
def test_tables_name_recordings(tmp_path: Path, name: str, content: str) -> None:
    recordings(tmp_path / "said", "clips/one.wav", "clips/two.wav", "clips/three.wav")
    (tmp_path / "said" / name).write_text(content)
    source = open_source("said", tmp_path)
    found = list(source.examples())
    assert [each.get("text", each.get("sentence")) for each in found] == ["eins", "zwei"]
    assert [each["path"] for each in found] == ["clips/one.wav", "clips/two.wav"]
    assert found[0]["audio"] == (tmp_path / "said/clips/one.wav").read_bytes()
    assert found[1].where.endswith(f"{name}:{3 if 'jsonl' not in name else 2}")
    assert any("does not name" in note and "three.wav" in note for note in source.notes)


def test_a_row_without_its_recording_is_named(tmp_path: Path) -> None:
    recordings(tmp_path / "said", "one.wav", "two.wav")
    (tmp_path / "said/transcripts.csv").write_text("file,text\none.wav,eins\nnone.wav,nichts\n")
    with pytest.raises(UserError, match=r"transcripts\.csv:3: there is no recording 'none\.wav'"):
        list(open_source("said", tmp_path).examples())
    (tmp_path / "said/transcripts.csv").write_text("sound,text\none.wav,eins\n")
    with pytest.raises(UserError, match=r"transcripts\.csv:2: no column names the recording"):
        list(open_source("said", tmp_path).examples())


def test_texts_beside_recordings_and_librispeechs_lists(tmp_path: Path) -> None:
    recordings(tmp_path / "a", "one.wav", "two.wav")
    (tmp_path / "a/one.txt").write_text("eins\n")
    (tmp_path / "a/two.txt").write_text("zwei")
    assert [each["text"] for each in rows("a", tmp_path)] == ["eins", "zwei"]
    recordings(tmp_path / "b", "84/121/84-121-0000.flac", "84/121/84-121-0001.flac")
    (tmp_path / "b/84/121/84-121.trans.txt").write_text("84-121-0000 HELLO THERE\n84-121-0001 YES\n")
    assert [each["text"] for each in rows("b", tmp_path)] == ["HELLO THERE", "YES"]


def test_the_digest_changes_with_sounds_names_and_texts(tmp_path: Path) -> None:
    recordings(tmp_path / "said", "one.wav", "two.wav")
    digests = [open_source("said", tmp_path).digest]
    (tmp_path / "said/one.txt").write_text("eins")
    digests.append(open_source("said", tmp_path).digest)
    (tmp_path / "said/two.wav").write_bytes(SOUND + b"\0\0")
    digests.append(open_source("said", tmp_path).digest)
    (tmp_path / "said/two.wav").rename(tmp_path / "said/three.wav")
    digests.append(open_source("said", tmp_path).digest)
    assert len(set(digests)) == 4


def test_a_recording_among_many_texts_is_no_folder_of_recordings(tmp_path: Path) -> None:
    recordings(tmp_path / "mixed", "one.wav")
    for at in range(3):
        (tmp_path / f"mixed/{at}.jsonl").write_text('{"text": "a"}\n')
    source = open_source("mixed", tmp_path)
    assert [dict(each) for each in source.examples()] == [{"text": "a"}] * 3
    assert any("one.wav" in note for note in source.notes)


def test_recordings_of_the_hub_stay_files(tmp_path: Path) -> None:
    features = {"audio": {"sampling_rate": 8000, "_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    made = pa.table({"audio": [{"bytes": SOUND, "path": "a.wav"}], "text": ["a"]})
    (tmp_path / "voices").mkdir()
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(made.replace_schema_metadata(metadata), tmp_path / "voices/train-00000.parquet")
    (found,) = open_hub(str(tmp_path / "voices")).examples()
    assert found["audio"] == {"bytes": SOUND, "path": "a.wav"}
    assert audio.content_of(found["audio"]) == SOUND
