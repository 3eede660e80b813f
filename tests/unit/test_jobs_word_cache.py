"""A text by its words has the tokens that it has as a whole, whatever stands next to its spaces."""

import random

import pytest
from tokenizers import pre_tokenizers

from jobs.tasks import document_tokens, tokenization, word_cache
from tests.support import tiny_models

SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "\r",
    "\x0b",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2003",
    "\u200b",
    "\u3000",
    "\u180e",
]
LETTERS = ["a", "B", "12", "'s", "don't", "!", "?", "...", "é", "ß", "中", "’", "²", "\u0301", "\x00", "\x7f"]
PARTS = [*SPACES, *LETTERS, "<|endoftext|>", "<|im_start|>"]


@pytest.fixture(scope="module")
def trained():
    return tokenization.train("bpe", 600, ["don't a B 12's, été 中文 a a! ... B12 " * 50])


@pytest.mark.parametrize("seed", range(8))
def test_words_make_the_tokens_of_their_text(trained, seed):
    draw, backend = random.Random(seed), trained.backend_tokenizer
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(16))) for _ in range(500)]
    cache = word_cache.of(trained)
    assert cache is not None
    whole = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in cache.encode(texts)] == whole
    assert [ids.tolist() for ids in cache.encode(texts[::-1])] == whole[::-1]


def test_a_full_cache_begins_again(trained, monkeypatch):
    cache = word_cache.WordCache(trained.backend_tokenizer, ())
    texts = [f"number {n} of them" for n in range(2000)]
    monkeypatch.setattr(word_cache, "KEPT", 100)
    whole = [encoding.ids for encoding in trained.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    found = [ids.tolist() for at in range(0, 2000, 50) for ids in cache.encode(texts[at : at + 50])]
    assert found == whole


def test_tokens_that_are_added_later_are_seen():
    tokenizer = tokenization.train("bpe", 300, ["red green blue"])
    before = document_tokens.encode(tokenizer, ["red green"])[0]
    tokenizer.add_tokens(["green"])
    (after,) = document_tokens.encode(tokenizer, ["red green"])[0]
    assert after.tolist() != before[0].tolist()
    assert after.tolist() == tokenizer("red green", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_whose_words_hang_together_has_no_cache():
    assert word_cache.of(tokenization.train("char", 0, ["abc"])) is None
    assert word_cache.of(tokenization.train("unigram", 300, ["some words of a text"] * 20)) is None
    other = tokenization.train("bpe", 300, ["red green blue"])
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert word_cache.of(other) is None
    assert word_cache.of(tiny_models.tokenizer()) is not None
