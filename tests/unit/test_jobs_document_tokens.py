"""Texts as token ids: they begin as the tokenizer begins a text, which is how a server begins a prompt."""

import pytest

from jobs.tasks import get
from jobs.tasks.document_tokens import beginning
from tests.support.tiny_models import byte_tokenizer, metaspace_tokenizer

TEXTS = [{"text": "brow x"}, {"text": "xx"}]


def rows(tokenizer, **options):
    task = get("causal-lm")({"sequence_length": 16, **options})
    task.tokenizer = tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return task.encode(TEXTS)


@pytest.mark.parametrize("options", [{}, {"documents": "separate"}, {"documents": "separate", "pack": False}])
def test_a_text_begins_as_a_prompt_does(options):
    tokenizer = metaspace_tokenizer()
    prompts = [tokenizer(example["text"])["input_ids"] for example in TEXTS]
    encoded = rows(tokenizer, **options)
    documents = " ".join(map(str, encoded["input_ids"].ravel().tolist()))
    assert all(" ".join(map(str, [*ids, tokenizer.eos_token_id])) in documents for ids in prompts)
    assert all(ids[0] == tokenizer.bos_token_id for ids in prompts)
    assert encoded["begun"].sum() == 2
    assert encoded["special_texts"].sum() == 0, "what is put there is not written into the texts"


def test_a_tokenizer_that_puts_nothing_before_a_text_begins_with_it():
    tokenizer = byte_tokenizer()
    encoded = rows(tokenizer)
    assert beginning(tokenizer) == []
    assert encoded["begun"].sum() == 0
    assert encoded["input_ids"][0][:6].tolist() == tokenizer("brow x")["input_ids"]
