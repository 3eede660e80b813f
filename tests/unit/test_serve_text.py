"""What may be shown of a text while it grows: whole characters, and nothing of a stop string."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serve.engines.text import ByteDetokenizer, Decoder, Detokenizer, StopStrings, TextStream
from tests.support import tiny_models


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    return tiny_models.byte_tokenizer()


@pytest.mark.parametrize("kind", [Detokenizer, ByteDetokenizer])
def test_whole_characters_come_out_as_soon_as_they_are_whole(kind: Any, bytes_tokenizer: Any) -> None:
    stream = kind(Decoder(bytes_tokenizer))
    tokens = bytes_tokenizer.encode("aé中🙂z", add_special_tokens=False)
    assert [stream.push(t) for t in tokens] == ["a", "", "é", "", "", "中", "", "", "", "🙂", "z"]
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", [Detokenizer, ByteDetokenizer])
@pytest.mark.parametrize("seed", range(40))
def test_pieces_join_to_the_whole_for_any_bytes(seed: int, kind: Any, bytes_tokenizer: Any) -> None:
    """Half characters, invalid bytes, long runs of them, special tokens."""
    rng = random.Random(seed)
    special = bytes_tokenizer.eos_token_id
    runs = [
        lambda: rng.randrange(256),
        lambda: rng.randrange(128, 256),
        lambda: special,
        lambda: rng.randrange(32, 127),
    ]
    tokens = [token() for _ in range(12) for token in [rng.choice(runs)] * rng.choice([1, 2, 3, 40])]
    stream = kind(Decoder(bytes_tokenizer))
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == bytes_tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_decoder_that_drops_the_first_space_keeps_the_others() -> None:
    vocab = {"<unk>": 0, "▁the": 1, "▁cache": 2, "s": 3, "▁": 4}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokens = [1, 2, tokenizer.eos_token_id, 3, 4, 1, 2]
    stream = Detokenizer(Decoder(tokenizer))
    pieces = [stream.push(token) for token in tokens]
    assert (
        "".join(pieces) + stream.flush()
        == tokenizer.decode(tokens, skip_special_tokens=True)
        == "the caches  the cache"
    )


def cut(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        size = rng.randint(1, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("seed", range(60))
def test_stop_strings_cut_at_the_first_to_end_however_the_text_arrives(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 7))) for _ in range(rng.randint(1, 3))]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    stream, shown = StopStrings(stops), ""
    for piece in cut(text, rng):
        shown += stream.push(piece)
        assert text.startswith(shown)
        if stream.stopped:
            break
    else:
        shown += stream.flush()
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert [stream.push(p) for p in ["Hi", "!\n", "x", "\n\nUs", "a", "\n"]] == ["Hi", "!", "\nx", "", "\n\nUsa", ""]
    assert stream.flush() == "\n"


def test_half_a_character_at_the_end_is_shown_as_its_decoding(bytes_tokenizer: Any) -> None:
    stream = TextStream(Decoder(bytes_tokenizer), ())
    tokens = bytes_tokenizer.encode("中", add_special_tokens=False)[:2]
    assert [stream.push(token) for token in tokens] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_a_token_s_bytes(bytes_tokenizer: Any) -> None:
    decode = Decoder(bytes_tokenizer)
    tokens = bytes_tokenizer.encode("aé 中\n", add_special_tokens=False)
    assert b"".join(decode.token_bytes(token) for token in tokens) == "aé 中\n".encode()
    assert decode.token_bytes(bytes_tokenizer.eos_token_id) == b"<eos>"
    assert decode.token_bytes(99_999) == b""


def test_a_sentencepiece_token_s_bytes() -> None:
    raw = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁the": 1, "<0xE4>": 2}, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    decode = Decoder(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>"))
    assert [decode.token_bytes(token) for token in (1, 2)] == [b" the", b"\xe4"]


def test_special_tokens_may_show_by_their_names(bytes_tokenizer: Any) -> None:
    decode = Decoder(bytes_tokenizer)
    special, letter = bytes_tokenizer.eos_token_id, bytes_tokenizer.encode("a", add_special_tokens=False)[0]
    assert decode.showing([letter]) is decode
    for kind in (Detokenizer, ByteDetokenizer):
        hidden, shown = kind(decode), kind(decode.showing([special]))
        assert "".join(map(hidden.push, [letter, special, letter])) == "aa"
        assert "".join(map(shown.push, [letter, special, letter])) == "a<eos>a"


def test_stop_strings_wait_for_the_least_length(bytes_tokenizer: Any) -> None:
    stream = TextStream(Decoder(bytes_tokenizer), ["aa"], min_tokens=3)
    letter = bytes_tokenizer.encode("a", add_special_tokens=False)[0]
    assert [stream.push(letter) for _ in range(5)] == ["a", "a", "a", "", ""]
    assert stream.stopped
