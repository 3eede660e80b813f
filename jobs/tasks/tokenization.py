"""Tokenizers: trained on the data (byte-level BPE, single characters, whole words), or loaded.

A BPE or a list of words is trained on a sample of stated size (jobs/tasks/text_sample.py). Characters are all kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from jobs.tasks import TaskError, TaskOptions, TaskSetupError, unigram
from jobs.tasks.chat_template import CHATML
from jobs.tasks.text_sample import TextFindings, drawn

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
         "merges.txt", "vocab.txt", "tokenizer.model")  # fmt: skip
"""What decides how a text becomes tokens, in the layouts that transformers reads."""


class TokenizerOptions(TaskOptions):
    """The tokenizer: trained on the data, or loaded. Left out, a model given by `from` keeps its own."""

    train: Literal["bpe", "char"] | None = None
    """bpe: byte-level pairs, any text comes back as it was. char: one token a character."""
    vocab_size: int = Field(4096, ge=32, le=10_000_000)
    """Tokens of a bpe, with the special ones."""
    sample_mb: int = Field(32, gt=0, le=1_000_000)
    """A bpe is trained on so many megabytes of the training text, drawn by `sample_seed`; less text is used whole."""
    sample_seed: int = Field(0, ge=0, lt=2**63)
    """Decides which text is drawn."""
    source: str | None = Field(None, alias="from")
    """A directory or a hub id."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerOptions:
        if self.train and self.source:
            raise ValueError("give either `train` or `from`, not both")
        if (self.source or self.train == "char") and self.of_training:
            raise ValueError(
                f"{self.of_training[0]} has no effect on a tokenizer of characters or a loaded one: leave it out"
            )
        return self

    @property
    def of_training(self) -> list[str]:
        """The names of what is set and decides how a tokenizer is trained."""
        names, fields = ("vocab_size", "sample_mb", "sample_seed"), type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def is_given(self) -> bool:
        """True where the spec says which tokenizer to take; else a parent's is kept."""
        return bool(self.train or self.source)


def observe(options: TokenizerOptions, texts: Iterable[str], expected_bytes: int = 0) -> TextFindings | None:
    """Return what `obtain` needs of some texts; None for a tokenizer that is loaded.

    Args:
        expected_bytes: about how much text there is in all. Where it is far more than the sample, texts whose hashes
            are so high that they will hardly be in it are left out at once. 0: none is.
    """
    if options.source:
        return None
    texts = list(texts)
    seen_bytes, limit = sum(len(text.encode()) for text in texts), options.sample_mb * 1_000_000
    if options.train == "char":
        return TextFindings(limit, (), 0, frozenset().union(*map(set, texts)), seen_bytes)
    return drawn(texts, limit, options.sample_seed, expected_bytes)


def obtain(options: TokenizerOptions, findings: TextFindings | None) -> tuple[Any, list[str]]:
    """Load or train the tokenizer that the options ask for; return it and what is to be said about it."""
    if options.source:
        tokenizer = load(options.source)
        return tokenizer, said_of_template(tokenizer, options.source)
    assert findings is not None, "a tokenizer is trained on what was observed"
    if options.train == "char":
        return train("char", options.vocab_size, findings.characters), []
    sample = findings.sample
    taken, seen = sum(len(text.encode()) for text in sample) / 1e6, findings.seen_bytes / 1e6
    share = f"{taken:.1f} of {seen:.1f} MB of text, drawn by tokenizer.sample_seed {options.sample_seed}"
    tokenizer = train(options.train or "bpe", options.vocab_size, sample)
    return tokenizer, [f"tokenizer trained on {share if taken < seen else f'all {seen:.1f} MB of text'}"]


def train(kind: str, vocab_size: int, texts: Iterable[str]) -> Any:
    """Train a fast tokenizer on `texts`: `bpe` (byte-level, any text round-trips), `char`, `word` or `unigram`.

    Words are in lower case.

    The special tokens of a chat are reserved from the start, so fine-tuning never resizes the embedding.
    """
    kinds = {"bpe": _train_bpe, "char": _train_char, "word": _train_word, "unigram": _train_unigram}
    if kind not in kinds:
        raise TaskError(f"tokenizer.train is {kind!r}; it can be {', '.join(map(repr, kinds))}")
    return _wrap(kinds[kind](texts, vocab_size))


def located(source: str, base: Path) -> Path | str:
    """Return the folder that `tokenizer.from` names, a relative one beside the spec in `base`; else what was given.

    Raises:
        TaskError: it can only be a path, and there is no such folder.
    """
    place = base / Path(source).expanduser()
    if place.is_dir():
        return place
    if source.startswith(("/", ".", "~")):
        raise TaskError(f"task.tokenizer.from: no folder at {place}")
    return source


def anchored(options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return a task's options with `tokenizer.from` as `located` finds it.

    Raises:
        TaskError: as `located`.
    """
    given = options.get("tokenizer")
    if not isinstance(given, Mapping) or not given.get("from"):
        return dict(options)
    return {**options, "tokenizer": {**given, "from": str(located(given["from"], base))}}


def load(source: str | Path) -> Any:
    """Load a tokenizer from a directory or a hub id; give it a padding token and a chat template if it lacks them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot load a tokenizer from {str(source)!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.init_kwargs.get("auto_map"):
        raise TaskError(f"the tokenizer of {str(source)!r} has `auto_map`: it needs code of its own, which is not run")
    if not tokenizer.is_fast:
        raise TaskError(f"the tokenizer in {str(source)!r} has no fast (tokenizer.json) form, which encoding needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML
    return tokenizer


def said_of_template(tokenizer: Any, source: Path | str) -> list[str]:
    """Say where `load` gave a tokenizer the chat template that its own files lack, or took one of two."""
    if (other := _template_in_config(Path(source))) is not None and other != tokenizer.chat_template:
        return [
            f"the tokenizer of {source} brings two chat templates: that of chat_template.jinja is used, not the one in "
            "tokenizer_config.json, which differs"
        ]
    if tokenizer.chat_template != CHATML or tokenizer.init_kwargs.get("chat_template") is not None:
        return []
    return [f"the tokenizer of {source} brings no chat template: it is given ChatML, and the model keeps it"]


def _template_in_config(folder: Path) -> str | None:
    """Return the template in a folder's tokenizer_config.json, where chat_template.jinja goes before it."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("chat_template") if isinstance(config, dict) else None
    return found if isinstance(found, str) and (folder / "chat_template.jinja").is_file() else None


def check_origin(options: TaskOptions, starts_from: str | None) -> None:
    """Refuse to train a tokenizer for weights that were learned with another, or to say how where it is kept.

    Args:
        options: a task's, with its `tokenizer`.
        starts_from: `model.from`; None where the weights are fresh.

    Raises:
        TaskError: they ask for it.
    """
    tokenizer = getattr(options, "tokenizer", None)
    if starts_from is not None and tokenizer is not None and tokenizer.train:
        raise TaskError(
            f"tokenizer.train makes new tokens, which the embeddings of {starts_from!r} do not know; leave it out to "
            "keep the model's own, or name a tokenizer in tokenizer.from"
        )
    if starts_from is not None and tokenizer is not None and tokenizer.of_training:
        name = tokenizer.of_training[0]
        raise TaskError(f"tokenizer.{name} has no effect: the tokenizer of {starts_from!r} is kept; leave it out")


def end_of_text(tokenizer: Any) -> int:
    """Return the token that ends a text.

    Raises:
        TaskSetupError: the tokenizer has none, so that a model would never learn to end.
    """
    if tokenizer.eos_token_id is None:
        raise TaskSetupError(
            "the tokenizer has no end token: say which it is as eos_token in its tokenizer_config.json, or name "
            "another tokenizer in task.tokenizer.from"
        )
    return int(tokenizer.eos_token_id)


def of_model(directory: Path | str) -> Any | None:
    """Return the tokenizer of a model's folder, or hub id; None where it has none that can be loaded."""
    try:
        return load(directory)
    except TaskError:
        return None


def difference(tokenizer: Any, parent: Path | str) -> list[str]:
    """Say where a tokenizer's tokens are not those that the parent's embeddings were learned for.

    Nothing is said of a parent without a tokenizer.
    """
    of_parent = of_model(parent)
    if of_parent is None:
        return []
    before, now = of_parent.get_vocab(), tokenizer.get_vocab()
    moved = sum(before.get(token) != at for token, at in now.items())
    if not moved:
        return []
    return [
        f"task.tokenizer is not that of {parent}: {moved} of its {len(now)} tokens have another number there or none, "
        "and the embeddings of these start from what was learned for other tokens"
    ]


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TaskError(f"tokenizer.vocab_size is {vocab_size}; a byte-level BPE needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_char(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({character for text in texts for character in set(text)})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, "<|unk|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS])
    return tokenizer


def _train_word(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [*SPECIAL_TOKENS, "<|unk|>"]
    # A word seen once teaches nothing but itself: as an unknown one it teaches what those are like.
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Any:
    return unigram.train(texts, vocab_size, SPECIAL_TOKENS)


def _wrap(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped
