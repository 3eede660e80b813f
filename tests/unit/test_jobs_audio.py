"""Recordings: what is read, what is refused, spectrograms, and what training does to them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from jobs.tasks import TaskError, audio, log_mel, perturbation
from tests.support import tones

TONE = tones.spoken("ab")


def test_wav_and_flac_hold_the_same() -> None:
    of_wav, of_flac = audio.sound(tones.wav(TONE), 8000), audio.sound(tones.flac(TONE), 8000)
    np.testing.assert_allclose(of_wav.samples, TONE, atol=1e-4)
    np.testing.assert_allclose(of_flac.samples, TONE, atol=1e-4)
    assert not (of_wav.resampled)
    assert not (of_wav.averaged)
    assert audio.about(tones.flac(TONE)) == audio.About(8000, 1, len(TONE))


def test_channels_are_averaged_and_rates_changed() -> None:
    both = np.stack([tones.spoken("a", rate=44_100), np.zeros(len(tones.spoken("a", rate=44_100)))], 1)
    heard = audio.sound(tones.wav(both, 44_100), 8000)
    assert heard.resampled
    assert heard.averaged
    assert len(heard.samples) == pytest.approx(len(tones.spoken("a")), abs=2)
    spectrum = np.abs(np.fft.rfft(heard.samples[480:1440]))  # the tone's own 0.12 s
    assert spectrum.argmax() * 8000 / 960 == pytest.approx(400, abs=9)
    assert np.abs(heard.samples).max() == pytest.approx(0.2, abs=0.02)  # half of 0.4: the other channel is silent


@pytest.mark.parametrize("rate", [11_025, 22_050, 47_999, 191_999])
def test_any_rate_becomes_the_one_asked_for(rate: int) -> None:
    sound, wanted = (0.5 * np.sin(2 * np.pi * 500 * np.arange(each) / each) for each in (rate, 16_000))  # a second
    heard = audio.sound((sound.astype(np.float32), rate), 16_000).samples
    assert abs(len(heard) - 16_000) <= 1
    np.testing.assert_allclose(heard[1_000:15_000], wanted[1_000:15_000], atol=0.05)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"RIFFnonsense", "no sound file"),
        (tones.wav(TONE)[:-100], "cut off"),
        (tones.flac(TONE)[:-200], "cut off|broken"),
        (tones.wav(np.zeros(0)), "holds no sound"),
        (tones.wav(TONE, rate=500), "500 samples per second"),
        (tones.wav(np.zeros((9, 20))), "20 channels; at most 16"),
        ((np.array([0.0, np.nan], np.float32), 8000), "not finite"),
    ],
)
def test_what_is_no_whole_recording_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        audio.sound(content, 8000)


def ogg(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tones.spoken("abcabcabcabc"), 8000, format="OGG", subtype=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_an_ogg_file_whose_pages_are_not_all_there_is_refused(kind: str) -> None:
    content = ogg(kind)
    assert len(audio.sound(content, 8000).samples) == len(tones.spoken("abcabcabcabc"))
    starts = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    with pytest.raises(TaskError, match="does not end with a whole page"):
        audio.sound(content[: starts[-1] + 100], 8000)
    with pytest.raises(TaskError, match="page 3 does not follow its page 1"):
        audio.sound(content[: starts[2]] + content[starts[3] :], 8000)
    damaged = bytearray(content)
    damaged[starts[2] + 900] ^= 1
    with pytest.raises(TaskError, match="checksum of its page 2"):
        audio.sound(bytes(damaged), 8000)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"array": [0.1, 0.2], "path": "a.wav"}, "sampling_rate is None"),
        ({"array": [0.1, 0.2], "sampling_rate": 8000.5}, r"sampling_rate is 8000\.5"),
        ({"array": [[[0.1, 0.2]]], "sampling_rate": 8000}, r"shape \(1, 1, 2\)"),
        ({"array": ["a", "b"], "sampling_rate": 8000}, "they are numbers"),
    ],
)
def test_samples_that_say_too_little_are_refused(value: object, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        audio.content_of(value)


def test_other_kinds_of_files_are_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, TONE, 8000, format="AIFF")
    with pytest.raises(TaskError, match="AIFF file; recordings are read as WAV"):
        audio.about(file.getvalue())


def test_a_long_recording_is_refused_before_it_is_decoded() -> None:
    hour = tones.flac(np.zeros(8000 * 600, np.float32))
    assert len(hour) < 200_000
    with pytest.raises(TaskError, match=r"600\.00 s long, and at most 2\.00 s"):
        audio.sound(hour, 8000, 2.0)


def test_columns_hold_recordings_in_several_forms(tmp_path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(tones.wav(TONE))
    for value in (path, str(path), path.read_bytes(), {"bytes": None, "path": str(path)}, {"bytes": path.read_bytes()}):
        assert audio.content_of(value) == path.read_bytes()
    samples, rate = audio.content_of({"array": TONE.tolist(), "sampling_rate": 8000})
    assert (len(samples), rate) == (len(TONE), 8000)
    for wrong in (None, 3, "", b"", {"path": None}):
        with pytest.raises(TaskError, match="no recording"):
            audio.content_of(wrong)
    with pytest.raises(TaskError, match=r"missing\.wav"):
        audio.content_of(str(tmp_path / "missing.wav"))


def test_a_spectrogram_is_that_of_the_fourier_transform() -> None:
    sound = torch.from_numpy(TONE)[None]
    found = log_mel.log_mel(sound, torch.tensor([len(TONE)]), 8000, 40)[0]
    assert found.shape == (log_mel.frames(torch.tensor(len(TONE)), 8000), 40)
    first = found[12].argmax(), found[12 + 18].argmax()  # the middles of both letters, 0.18 s apart
    wanted = [2595 * np.log10(1 + hertz / 700) for hertz in (20, 400, 900, 4000)]
    for filter_, mel in zip(first, wanted[1:3], strict=True):
        assert int(filter_) == pytest.approx((mel - wanted[0]) / (wanted[3] - wanted[0]) * 41 - 1, abs=1)
    assert found.mean().abs() < 1e-4
    assert found.std() == pytest.approx(1, abs=0.05)


def test_a_spectrogram_depends_neither_on_level_nor_on_what_it_is_batched_with() -> None:
    longer = torch.zeros(2, 3 * len(TONE))
    longer[0, : len(TONE)] = torch.from_numpy(TONE)
    longer[1] = torch.randn(3 * len(TONE))
    samples = torch.tensor([len(TONE), 3 * len(TONE)])
    both = log_mel.log_mel(longer, samples, 8000, 40)[0]
    alone = log_mel.log_mel(0.5 * longer[:1, : len(TONE)], samples[:1], 8000, 40)[0]
    end = len(alone)
    torch.testing.assert_close(both[:end], alone, atol=2e-2, rtol=1e-2)
    assert not both[end:].any()


def test_silence_has_a_finite_spectrogram() -> None:
    found = log_mel.log_mel(torch.zeros(1, 800), torch.tensor([800]), 8000, 40)
    assert torch.isfinite(found).all()


def test_speed_changes_length_and_pitch_and_seeds_decide() -> None:
    time = torch.arange(8000) / 8000
    sound = torch.sin(2 * torch.pi * 400 * time).expand(4, -1)
    samples = torch.tensor([8000, 8000, 8000, 4000])
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(perturbation.at_other_speed(sound * (torch.arange(8000) < samples[:, None]), samples, 0.2))
    (played, lengths), again = made
    assert torch.equal(played, again[0])
    assert torch.equal(lengths, again[1])
    assert len(set(lengths.tolist())) == 4
    for row, length, was in zip(played, lengths.tolist(), samples.tolist(), strict=True):
        assert 0.82 * was < length < 1.26 * was
        assert not row[length:].any()
        pitch = row[:length].numpy()
        hertz = np.abs(np.fft.rfft(pitch)).argmax() * 8000 / length
        assert hertz == pytest.approx(400 * was / length, rel=0.01)


def test_noise_is_of_the_level_asked_for_and_ends_with_the_recording() -> None:
    torch.manual_seed(0)
    sound = torch.zeros(64, 8000)
    sound[:, :4000] = 0.5
    noisy = perturbation.in_noise(sound, torch.full((64,), 4000), 0.2)
    levels = (noisy - sound)[:, :4000].std(1)
    assert levels.min() > 0
    assert levels.max() < 0.105
    assert levels.max() > 0.07
    assert not noisy[:, 4000:].any()


def test_masks_are_bands_and_spans() -> None:
    torch.manual_seed(0)
    whole = torch.ones(200, 50, 40)
    masked = perturbation.masked(whole, torch.full((200,), 50), 1, 8, 0, 0.0)
    widths = 40 - masked[:, 0].sum(1)
    assert set(widths.int().tolist()) == set(range(9))
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    spans = perturbation.masked(whole, torch.full((200,), 30), 0, 0, 1, 0.2)
    lengths = 50 - spans[:, :, 0].sum(1)
    assert set(lengths.int().tolist()) == set(range(7))
    assert spans[:, 30:].all()  # behind the recording's end nothing is masked
