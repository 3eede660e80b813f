"""The task `speech-recognition`: rows, networks, loss, error rates, what is kept with the model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from cluster.errors import UserError
from jobs.data import prepare, splitting
from jobs.data.examples import Example
from jobs.spec import JobSpec
from jobs.tasks import TaskError, ctc, transcripts
from jobs.tasks.speech_recognition import SpeechRecognition
from jobs.worker.loop import step_seed
from tests.support import hub, tones

SMALL = {"hidden_size": 16, "num_hidden_layers": 1}
NETWORKS = {"conv-transformer": {**SMALL, "intermediate_size": 16, "num_attention_heads": 2}, "crnn": SMALL}


def example(text: str, said: str | None = None, **others: Any) -> dict[str, Any]:
    return {"audio": tones.wav(tones.spoken(said or text)), "text": text, **others}


def fitted(texts: list[str], **options: Any) -> SpeechRecognition:
    task = SpeechRecognition(options)
    task.fit(task.observe([example(text) for text in texts]))
    return task


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[SpeechRecognition, Any]:
    torch.manual_seed(0)
    task = fitted(["ab", "b", "aaa"])
    return task, task.build(request.param, NETWORKS[request.param]).eval()


# -- data --------------------------------------------------------------------------------------------------------------


def test_rows_hold_samples_and_symbols() -> None:
    task = fitted(["ab", "ba b"])
    rows = task.encode([example("ab"), example("ba b")])
    sounds = [tones.spoken("ab"), tones.spoken("ba b")]
    assert rows["length"].tolist() == [len(sound) for sound in sounds]
    assert rows["samples"].shape == (2, len(sounds[1]))
    np.testing.assert_allclose(rows["samples"][0, : len(sounds[0])] / 32767, sounds[0], atol=1e-4)
    assert not rows["samples"][0, len(sounds[0]) :].any()
    assert task.symbols == ["", "\ufffd", " ", "a", "b"]
    assert [row[:n].tolist() for row, n in zip(rows["label"], rows["label_length"], strict=True)] == [
        *([3, 4], [4, 3, 2, 4])
    ]
    assert rows["targets"].tolist() == [2, 4]
    batch = task.collate(rows)
    assert batch["waveform"].shape == (2, len(sounds[1]))
    assert batch["labels"].shape == (2, 4)
    assert batch["waveform"].dtype == torch.float32


def test_what_is_left_out_or_made_otherwise_is_counted() -> None:
    task = fitted(["ab", "aaa"])
    stereo = tones.wav(np.stack([tones.spoken("a", rate=16_000)] * 2, 1), 16_000)
    rows = task.encode(
        [
            example("ab"),
            {"audio": stereo, "text": "a"},
            example("aaaaa"),  # longer than the longest
            example("abababab", said="a"),  # more characters than frames
            example("c", said="a"),
            {"audio": tones.wav(np.zeros(900)), "text": "a"},
            example("a\ufffd", said="aa"),  # a character that was lost when the file was made
        ]
    )
    counts = {name: rows[name].tolist() for name in task.counted}
    assert counts == {
        "resampled": [0, 1, 0, 0, 0, 0, 0],
        "averaged": [0, 1, 0, 0, 0, 0, 0],
        "silent": [0, 0, 0, 0, 0, 1, 0],
        "ambiguous": [0] * 7,
        "too_long": [0, 0, 1, 0, 0, 0, 0],
        "too_fast": [0, 0, 0, 1, 0, 0, 0],
        "unknown": [0, 0, 0, 0, 1, 0, 1],
    }
    assert len(rows["samples"]) == 5
    assert rows["label"][2, 0] == 1
    nothing = task.encode([example("aaaaa")])
    assert (nothing["samples"].shape, len(nothing["targets"])) == ((0, rows["samples"].shape[1]), 0)


def test_max_seconds_and_rate_are_those_asked_for() -> None:
    task = SpeechRecognition({"max_seconds": 0.5, "sample_rate": 16_000})
    examples = [example("a"), example("aaaa")]
    said = task.fit(task.observe(examples))
    assert said[0].startswith("1 recordings")
    rows = task.encode(examples)
    assert rows["samples"].shape == (1, 8_000)
    assert rows["resampled"].tolist() == [1, 0]
    assert rows["too_long"].tolist() == [0, 1]
    assert rows["length"][0] == pytest.approx(0.24 * 16_000, abs=2)


def test_findings_do_not_depend_on_chunks() -> None:
    task, examples = SpeechRecognition(), [example("a"), example("ab"), example("c b")]
    whole = task.observe(examples)
    parts = task.observe(examples[:1]).merged(task.observe(examples[1:]))
    assert (parts.rate, parts.longest_s, parts.characters, parts.count) == (
        *(whole.rate, whole.longest_s, whole.characters, whole.count),
    )
    assert parts.seconds == pytest.approx(whole.seconds)


@pytest.mark.parametrize(
    ("path", "pattern", "text"),
    [
        ("0_george_12.wav", "{text}_{speaker}_{take}", "0"),
        ("new york_anna.flac", "{text}_{speaker}", "new york"),
        ("yes/0a7c2a8d_nohash_0.wav", "{text}/{name}", "yes"),
        ("deep/down/take-3.hello.wav", "take-{n}.{text}", "hello"),
    ],
)
def test_names_of_files_say_what_was_said(path: str, pattern: str, text: str) -> None:
    task = SpeechRecognition({"transcript_from": pattern})
    assert task.answer({"audio": b"x", "path": path}) == text


def test_names_that_could_be_read_otherwise_are_counted() -> None:
    task = SpeechRecognition({"transcript_from": "{text}_{voice}_{take}"})
    rows = [{"audio": tones.wav(tones.spoken("ab")), "path": name} for name in ("a_low_0.wav", "a_b_low_0.wav")]
    task.fit(task.observe(rows))
    assert task.encode(rows)["ambiguous"].tolist() == [0, 1]
    assert [task.answer(row) for row in rows] == ["a", "a"]


def test_names_and_patterns_that_do_not_fit_are_refused() -> None:
    task = SpeechRecognition({"transcript_from": "{text}_{speaker}"})
    with pytest.raises(TaskError, match=r"'nothing' does not fit task\.transcript_from"):
        task.check({"audio": b"x", "path": "nothing.wav"})
    for pattern in ("{word}_{speaker}", "{text}{speaker}", "{text}_{text}"):
        with pytest.raises(TaskError, match="transcript_from"):
            SpeechRecognition({"transcript_from": pattern})
    with pytest.raises(TaskError, match=r"no task\.transcript_from"):
        SpeechRecognition().check({"audio": b"x", "path": "yes_anna.wav"})


def test_transcripts_are_tidied_and_empty_ones_refused() -> None:
    task = SpeechRecognition({"lowercase": True})
    assert task.answer({"audio": b"x", "text": "  Cafe\u0301 \n OLÉ "}) == "café olé"
    for wrong in ("", "  ", None, 3):
        with pytest.raises(TaskError, match="transcript"):
            task.check({"audio": b"x", "text": wrong})


@pytest.mark.parametrize("text", ["\u200b", "a\ud800", None, 7, float("nan")])
def test_transcripts_that_show_nothing_or_are_no_text_are_refused(text: Any) -> None:
    with pytest.raises(TaskError, match=r"transcript( is empty|' holds half of| is .*, and not a text)"):
        transcripts.tidy(text)


def test_a_column_beside_names_of_files_is_refused() -> None:
    with pytest.raises(TaskError, match="text_column has no effect beside transcript_from"):
        SpeechRecognition({"text_column": "words", "transcript_from": "{text}_{take}"})


def test_copies_under_other_names_are_copies() -> None:
    task, sound = SpeechRecognition(), tones.spoken("a")
    files = [task.content({"audio": {"bytes": tones.wav(sound), "path": name}, "text": "a"}) for name in ("x", "y")]
    assert files[0] == files[1] == tones.wav(sound)
    arrays = [
        task.content({"audio": {"array": sound, "sampling_rate": rate, "path": name}, "text": "a"})
        for name, rate in (("x", 8000), ("y", 8000), ("z", 16_000))
    ]
    hashes = [splitting.content_of(each) for each in arrays]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_quiet_recording_is_heard_as_it_is_learned() -> None:
    file = io.BytesIO()
    soundfile.write(file, tones.spoken("ab") / 8000, 8000, format="WAV", subtype="PCM_24")  # a peak of two steps of 16
    recording = {"audio": file.getvalue(), "text": "ab"}
    task = fitted(["ab"])
    learned = task.collate(task.encode([recording]))["waveform"][0].numpy()
    samples = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]
    array = {"array": samples, "sampling_rate": 8000}
    assert np.abs(samples - learned).max() > 1e-5  # rounding to 16 bits is heard
    for instance in (task.instance(recording), task.instance({"audio": array}), samples):
        np.testing.assert_array_equal(task._sent(instance), learned)


def test_a_table_names_files_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("audio,text\na.wav,a\n")
    (tmp_path / "a.wav").write_bytes(tones.wav(tones.spoken("a")))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/b.wav").write_bytes(b"x")
    voice = Example({"path": "b.wav", "sentence": "b"}, f"{tmp_path}/table.tsv:2")
    (tmp_path / "table.tsv").write_text("path\tsentence\nb.wav\tb\n")
    other = SpeechRecognition({"audio_column": "path", "text_column": "sentence"})
    assert list(other.files(voice)) == [tmp_path / "clips/b.wav"]
    row = Example({"audio": "a.wav", "text": "a", "age": "30"}, f"{tmp_path}/table.csv:2")
    task = SpeechRecognition()
    assert list(task.files(row)) == [tmp_path / "a.wav"]
    assert task.content(row) == (tmp_path / "a.wav").read_bytes()
    assert task.unused(row) == ["age"]
    assert task.observe([row]).count == 1
    assert task.instance(row) == (tmp_path / "a.wav").read_bytes()


def test_what_was_learned_is_read_back(tmp_path: Path) -> None:
    task = fitted(["ab", "c"])
    task.save(tmp_path)
    again = SpeechRecognition.load(tmp_path)
    assert (again.rate, again.longest_s, again.symbols) == (task.rate, task.longest_s, task.symbols)
    child = SpeechRecognition({"max_seconds": 9})
    assert child.inherit(tmp_path)
    assert (child.longest_s, child.symbols) == (9, task.symbols)
    with pytest.raises(TaskError, match="hears 8000"):
        SpeechRecognition({"sample_rate": 16_000}).inherit(tmp_path)
    with pytest.raises(TaskError, match=r"speech\.json"):
        SpeechRecognition.load(tmp_path / "nowhere")


# -- CTC ---------------------------------------------------------------------------------------------------------------


def test_best_paths_are_spelled_without_repeats_and_blanks() -> None:
    symbols = ["", "?", "a", "b", " "]
    assert transcripts.text_of([0, 2, 2, 0, 2, 3, 3, 4, 4, 0, 4, 3], symbols) == "aab b"
    assert transcripts.text_of([0, 0], symbols) == ""
    assert ctc.onsets([0, 2, 2, 0, 2, 3], 0) == [(1, 2), (4, 2), (5, 3)]
    assert transcripts.frames_needed(np.array([2, 2, 3, 3, 3])) == 8
    assert transcripts.frames_needed(np.array([], int)) == 0


def test_edits_are_counted() -> None:
    counts = transcripts.edits(["the cat sat", "yes"], ["the bat sat down", ""])
    assert counts == {"word_edits": 3, "words": 4, "character_edits": 9, "characters": 14}


def test_the_loss_is_that_of_all_alignments() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 3, 3).log_softmax(-1)
    probabilities = scores[0].exp()
    paths = [path for path in np.ndindex(3, 3, 3) if transcripts.text_of(path, ["", "a", "b"]) == "ab"]
    total = sum(float(np.prod([probabilities[t, s] for t, s in enumerate(path)])) for path in paths)
    found = ctc.loss(scores, torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([2]), 0)
    assert float(found) == pytest.approx(-np.log(total), rel=1e-5)


def test_a_recording_too_short_for_its_transcript_adds_nothing() -> None:
    scores = torch.randn(1, 2, 3, requires_grad=True)
    found = ctc.loss(scores.log_softmax(-1), torch.tensor([2]), torch.tensor([[1, 1]]), torch.tensor([2]), 0)
    found.backward()
    assert found.item() == 0
    assert not scores.grad.any()


# -- networks ----------------------------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_what_it_is_batched_with(network: tuple[SpeechRecognition, Any]) -> None:
    task, model = network
    rows = task.encode([example("b"), example("aaa")])
    with torch.no_grad():
        both, frames = task._heard(model, *(task.collate(rows)[name] for name in ("waveform", "samples")))
        alone = task.collate({name: column[:1] for name, column in rows.items()})
        one, count = task._heard(model, alone["waveform"], alone["samples"])
    assert both.shape[2] == len(task.symbols)
    assert frames.tolist() == [-(-(int(n) // 80 + 1) // 4) for n in rows["length"]]
    assert count[0] == frames[0] == one.shape[1]
    torch.testing.assert_close(both[0, : frames[0]], one[0], atol=1e-4, rtol=1e-4)


def test_it_learns_tones(network: tuple[SpeechRecognition, Any]) -> None:
    task, model = network
    texts = ["ab", "b", "aaa", "ba", "bb", "a", "bab"]
    rows = task.encode([example(text) for text in texts])
    batch, optimizer = task.collate(rows), torch.optim.AdamW(model.parameters(), lr=2e-2)
    before = task.summarise({k: v for k, v in task.measure(model, batch).items() if k not in task.gathered})
    model.train()
    for step in range(100):
        torch.manual_seed(step_seed(0, step, 0))
        loss, count = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        sums = task.measure(model, batch)
    after = task.summarise({k: float(v) for k, v in sums.items() if k not in task.gathered})
    assert before["wer"] >= 0.9
    assert after["cer"] < 0.2
    assert after["loss"] < before["loss"] / 4
    answers = task.predict(model, [tones.wav(tones.spoken("bab")), tones.spoken("ab")])
    assert [answer["text"] for answer in answers] == ["bab", "ab"]
    assert answers[0]["seconds"] == pytest.approx(0.6, abs=1e-3)
    assert 0 < answers[0]["confidence"] <= 1
    picture = task.figures({name: sums[name].numpy() for name in task.gathered})["recordings.png"]
    assert picture.startswith(b"\x89PNG")


def test_training_draws_what_the_step_is_seeded_with(network: tuple[SpeechRecognition, Any]) -> None:
    task, model = network
    batch = task.collate(task.encode([example("ab"), example("b")]))
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch)[0].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_networks_are_saved_and_loaded(network: tuple[SpeechRecognition, Any], tmp_path: Path) -> None:
    task, model = network
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    served = SpeechRecognition.load(tmp_path)
    again = served.load_model(tmp_path)
    sound = tones.spoken("ab")
    assert served.predict(again, [sound]) == task.predict(model, [sound])
    served.check_parent(tmp_path, {})
    with pytest.raises(TaskError, match="vocab_size"):
        served.check_parent(tmp_path, {"vocab_size": 3})


def test_in_bf16_the_loss_is_fp32() -> None:
    task = fitted(["ab", "b"])
    batch = task.collate(task.encode([example("ab"), example("b")]))
    for name, config in NETWORKS.items():
        model = task.build(name, config).to(torch.bfloat16).train()
        loss, count = task.loss(model, batch)
        loss.backward()
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert int(count) == 3


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("conv-transformer", {"hiden_size": 3}, "hidden_size"),
        ("conv-transformer", {"hidden_size": 30}, "multiple of twice num_attention_heads"),
        ("conv-transformer", {"conv_kernel": 4}, "must be odd"),
        ("crnn", {"hidden_size": 31}, "must be even"),
        ("crnn", {"vocab_size": 3}, "follows from the data"),
        ("whisper", {}, "token by token"),
        ("wav2vec", {}, "did you mean 'wav2vec2'"),
        ("bert", {}, "no speech model"),
    ],
)
def test_models_that_cannot_be_are_refused(architecture: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        SpeechRecognition().check_model(architecture, config)


def test_recordings_that_cannot_be_heard_are_refused_when_served(network: tuple[SpeechRecognition, Any]) -> None:
    task, model = network
    for wrong, reason in (
        ("/etc/passwd", "bytes, or samples"),
        (np.zeros((2, 3), np.float32), "one channel"),
        (np.zeros(9_000, np.float32), r"at most 0\.60 s"),
        (np.array([np.inf], np.float32), "not finite"),
        (b"text", "no sound file"),
    ):
        with pytest.raises(TaskError, match=reason):
            task.predict(model, [wrong])


# -- models of the hub -------------------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
}


def test_a_model_of_transformers_is_trained_and_kept(tmp_path: Path) -> None:
    task = fitted(["ab", "b"])
    task.check_model("wav2vec2", TINY)
    torch.manual_seed(0)
    model = task.build("wav2vec2", TINY)
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(task.symbols), 0)
    batch = task.collate(task.encode([example("ab"), example("b")]))
    model.train()
    torch.manual_seed(1)
    first = task.loss(model, batch)[0]
    first.backward()
    torch.manual_seed(1)
    assert float(task.loss(model, batch)[0].detach()) == float(first.detach())
    model.eval()
    with torch.no_grad():
        scores, frames = task._heard(model, batch["waveform"], batch["samples"])
    assert scores.shape[1] == frames.max()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    served = SpeechRecognition.load(tmp_path)
    assert served.predict(served.load_model(tmp_path), [tones.spoken("b")]) == task.predict(model, [tones.spoken("b")])


def hub_model(folder: Path) -> Path:
    """Write a tiny wav2vec2 as the hub has them: capital letters, marks, `|` between words."""
    from transformers import AutoConfig, AutoModelForCTC

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}
    config = AutoConfig.for_model("wav2vec2", **TINY, vocab_size=7, pad_token_id=0)
    AutoModelForCTC.from_config(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    return folder


def test_a_model_in_the_hubs_cache_is_found_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.use(tmp_path / "cache", monkeypatch)
    hub.keep(tmp_path / "cache", "org/ear", hub_model(tmp_path / "ear"))
    task = SpeechRecognition()
    assert task.inherit("org/ear")
    assert (task.symbols[5:], task.rate) == (["A", "B"], 8000)
    assert task.load_model(Path("org/ear")).config.vocab_size == 7
    assert any("batched with" in sentence for sentence in task.said)
    assert not SpeechRecognition().inherit("org/nobody")


def test_a_model_of_the_hub_keeps_its_vocabulary(tmp_path: Path) -> None:
    hub_model(tmp_path)
    task = SpeechRecognition()
    assert task.inherit(tmp_path)
    assert task.symbols == ["", "", "", "\ufffd", " ", "A", "B"]
    assert (task.rate, task.blank, task.longest_s) == (8000, 0, 20.0)
    assert "upper case" in task.inherited()[0]
    rows = task.encode([example("a b"), example("c")])
    assert rows["label"][0, :3].tolist() == [5, 4, 6]
    assert rows["label"][1, 0] == 3
    assert task._spelled([0, 5, 5, 4, 6, 0]) == "A B"
    with pytest.raises(TaskError, match="'c', which the model has no symbol for"):
        transcripts.numbers("c", ["", "a"])
    task.check_parent(tmp_path, {})
    assert task.load_model(tmp_path).config.vocab_size == 7


def test_an_unknown_character_is_a_mistake_whatever_is_answered(tmp_path: Path) -> None:
    hub_model(tmp_path)
    task = SpeechRecognition()
    task.inherit(tmp_path)
    model = task.load_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0, 0, 0]))  # it answers with the unknown alone
        sums = task.measure(model, task.collate(task.encode([example("c", said="a")])))
    assert task._spelled([3, 3]) == "\ufffd"
    assert (int(sums["character_edits"]), int(sums["characters"])) == (1, 1)


def test_recordings_are_normalised_as_the_model_was_trained(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    hub_model(tmp_path)
    sound = tones.spoken("ab")
    for normalise in (True, False):
        settings = {"sampling_rate": 8000, "do_normalize": normalise}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        task = SpeechRecognition()
        task.inherit(tmp_path)
        task.save(tmp_path)
        task = SpeechRecognition.load(tmp_path)
        (tmp_path / "speech.json").unlink()
        model = task.load_model(tmp_path)
        theirs = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=normalise)
        values = theirs(sound, sampling_rate=8000, return_tensors="pt").input_values
        with torch.no_grad():
            found = task._heard(model, torch.from_numpy(sound)[None], torch.tensor([len(sound)]))[0]
            torch.testing.assert_close(found, model(values).logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_small_letters_are_asked_for_or_refused(tmp_path: Path) -> None:
    hub_model(tmp_path)
    with pytest.raises(TaskError, match=r"task\.lowercase asks for small letters, and the model .* writes 'AB'"):
        SpeechRecognition({"lowercase": True}).inherit(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}))
    task = SpeechRecognition({"lowercase": True})
    task.inherit(tmp_path)
    assert task.encode([example("AB", said="ab")])["unknown"].tolist() == [0]


def test_a_model_whose_adapter_makes_frames_too_long_is_refused() -> None:
    adapter = {**TINY, "add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 16}
    assert fitted(["ab"]).build("wav2vec2", {**adapter, "adapter_stride": 1}) is not None
    with pytest.raises(TaskError, match="one frame of 500 samples"):
        fitted(["ab"]).build("wav2vec2", {**adapter, "adapter_stride": 5})


def test_a_model_without_a_head_gets_one(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    AutoModel.from_config(AutoConfig.for_model("hubert", **TINY)).save_pretrained(tmp_path)
    task = SpeechRecognition()
    assert not task.inherit(tmp_path)
    task = fitted(["ab"])
    model = task.load_model(tmp_path)
    assert model.config.vocab_size == len(task.symbols)
    assert any("lm_head" in sentence and "random until trained" in sentence for sentence in task.said)


# -- the whole preparation ---------------------------------------------------------------------------------------------


def spec_for(train: Any, held_out: Any = None, bad_rows: str = "stop", **task: Any) -> JobSpec:
    data = {"train": train, "bad_rows": bad_rows}
    return JobSpec.model_validate(
        {
            "name": "x",
            "phase": "pretrain",
            "task": {"name": "speech-recognition", "transcript_from": "{text}_{voice}_{take}", **task},
            "model": {"architecture": "crnn"},
            "data": {**data, "eval": held_out} if held_out else {**data, "eval_fraction": 0.25},
            "training": {"steps": 1},
        }
    )


def prepared(spec: JobSpec, base: Path) -> prepare.Prepared:
    return prepare.prepare(spec, base, base / "storage", parent=None, on_progress=lambda *event: None)


def test_a_folder_is_prepared_and_a_broken_file_is_named(tmp_path: Path) -> None:
    tones.write(tmp_path / "said", ["a", "b", "ab", "ba"], {"low": 1.0, "high": 1.2}, takes=2)
    done = prepared(spec_for("said"), tmp_path)
    assert (done.train_rows, done.eval_rows) == (12, 4)
    notes = "\n".join(done.notes)
    assert "2 characters: 'ab'" in notes
    assert "8000 samples per second, as the first one has" in notes
    (tmp_path / "said/b_low_9.wav").write_bytes(b"RIFF, broken")
    with pytest.raises(UserError, match=r"b_low_9\.wav: no sound file that can be read"):
        prepared(spec_for("said"), tmp_path)
    skipped = prepared(spec_for("said", bad_rows="skip"), tmp_path)
    assert skipped.train_rows + skipped.eval_rows == 16


def test_a_voice_is_kept_aside_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    tones.write(tmp_path, ["a", "b", "ab"], {"low": 1.0}, takes=2)
    tones.write(tmp_path, ["a", "c", "abab"], {"high": 1.2})
    done = prepared(spec_for("*_low_*.wav", "*_high_*.wav"), tmp_path)
    assert (done.train_rows, done.eval_rows) == (6, 2)
    notes = "\n".join(done.notes)
    assert "held out: 1 of 3 recordings are longer than" in notes
    assert "held out: 1 of 3 transcripts have characters that the model does not know" in notes
