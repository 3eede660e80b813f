"""Where tokens lie in a text: `text[start:]` begins with what a token gave, for every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from serve.engines.protocol import TokenLogprobs
from serve.engines.spans import Places, Scores, of_prompt, starts_of
from serve.engines.text import Decoder, StopStrings, detokenizer
from tests.support import tiny_models

PROMPTS = [
    "x é🎉 y",
    "",
    " x",
    "  two  spaces ",
    "日本語",
    "a\n\nb\t",
    "caf\u00e9 e\u0301 👩‍👩‍👧",
    "<s> literal",
    "▁ itself",
]


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tokenizer() if request.param == "byte_level" else tiny_models.metaspace_tokenizer()


def check(text: str, raws: Sequence[bytes], starts: Sequence[int]) -> None:
    assert sorted(starts) == list(starts)
    for raw, start in zip(raws, starts, strict=True):
        assert 0 <= start <= len(text)
        try:
            assert text[start:].startswith(raw.decode())
        except UnicodeDecodeError:
            assert raw[:1] in text[start].encode() or text[start] == "\ufffd"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_of_a_prompt(tokenizer: Any, prompt: str) -> None:
    ids = tokenizer(prompt)["input_ids"]
    text, placed = of_prompt(Decoder(tokenizer), tokenizer, prompt, ids)
    assert text == prompt
    assert len(placed) == len(ids)
    check(prompt, [place.raw for place in placed], [place.start for place in placed])
    assert b"".join(place.raw for place in placed).decode() == prompt.encode().decode()


@pytest.mark.parametrize("seed", range(40))
def test_any_tokens(tokenizer: Any, seed: int) -> None:
    """Half characters, invalid bytes, special tokens."""
    rng = random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 40))]
    text, placed = of_prompt(Decoder(tokenizer), tokenizer, None, ids)
    assert len(placed) == len(ids)
    stream = detokenizer(Decoder(tokenizer))
    assert text == "".join(map(stream.push, ids)) + stream.flush()
    check(text, [place.raw for place in placed], [place.start for place in placed])


def test_bytes_of_one_character_begin_where_it_begins() -> None:
    assert starts_of([b"x", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x8e\x89 y", b"z"], "xé🎉 yz") == [0, 1, 1, 2, 2, 5]
    assert starts_of([b"\xdf", b"\xdf", b"a", b"\xe4", b"", b"b"], "\ufffd\ufffda\ufffdb") == [0, 1, 2, 3, 3, 4]


def test_a_word_that_goes_on_from_the_prompt_keeps_its_space() -> None:
    tokenizer = tiny_models.metaspace_tokenizer()
    ids = tokenizer("the quick brown", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    for at in range(1, len(ids)):
        before = tokenizer.decode(ids[:at])
        places = Places(Decoder(tokenizer), ids[:at])
        placed = [place for token in ids[at:] for place in places.push(token)]
        assert before + b"".join(place.raw for place in placed).decode() == whole


@pytest.mark.parametrize("seed", range(60))
def test_scored_tokens_cover_what_is_returned(tokenizer: Any, seed: int) -> None:
    """Cut by a stop string or not, in whatever pieces it comes: their text is the text that was returned."""
    rng = random.Random(seed)
    said = "".join(rng.choice(["a", "b", " ", "é", "日本", "🎉", "ab", "the "]) for _ in range(30))
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    decode = Decoder(tokenizer)
    stops = StopStrings([said[at : at + 3] for at in [rng.randrange(len(said) - 3)] if rng.random() < 0.7])
    stream, scores, shown, told = detokenizer(decode), Scores(decode), "", []
    for token in ids:
        piece = stops.push(stream.push(token))
        span = [(len(shown), len(shown) + len(piece))] if piece else []
        shown += piece
        told += scores.push([TokenLogprobs(token, -1.0, ())], span, len(shown))
        if stops.stopped:
            break
    if not stops.stopped:
        piece = stops.push(stream.flush()) + stops.flush()
        told += scores.push([], [(len(shown), len(shown) + len(piece))] if piece else [], len(shown) + len(piece))
        shown += piece
    told += scores.finish()
    assert b"".join(token.raw for token in told).decode() == shown
    check(shown, [token.raw for token in told], [token.offset for token in told])


def test_an_end_is_told_where_it_belongs_to_the_text() -> None:
    tokenizer = tiny_models.tokenizer()
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    for returned, wanted in (([(0, 1)], [b"a", b""]), ([], [])):
        scores = Scores(Decoder(tokenizer))
        entries = [TokenLogprobs(a, -1.0, ()), TokenLogprobs(tokenizer.eos_token_id, -2.0, ())]
        told = scores.push(entries, returned, 1) + scores.finish()
        assert [token.raw for token in told] == wanted


def test_a_special_token_inside_a_character_that_never_became_whole_gives_nothing() -> None:
    tokenizer = tiny_models.tokenizer()
    half, other = (tokenizer.convert_tokens_to_ids(char) for char in ("Ê", "ô"))  # the bytes 0xca and 0xf4
    places = Places(Decoder(tokenizer))
    placed = [place for token in (half, tiny_models.EOS, other) for place in places.push(token)] + places.flush()
    assert [place.raw for place in placed] == [b"\xca", b"", b"\xf4"]
