"""Tokenizers, models and model directories small enough to make in a test: random weights, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tracking.manifest import DatasetRef, ModelManifest, write

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog",
    "for i in range(10): print(i)",
]


PAD, EOS = 0, 2
"""Token ids that every `tokenizer()` has."""
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}


def tokenizer(vocabulary: int = 320) -> Any:
    """Train a byte-level BPE tokenizer with a ChatML template; it has exactly `vocabulary` tokens, 259 at least."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def metaspace_tokenizer() -> Any:
    """Return a tokenizer as SentencePiece makes them: spaces as `▁`, bytes for unknown characters, BOS in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁", "▁the", "▁quick", "▁b", "row", "n", "x", "y", "a", "b", "▁x", "é", "the"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁qu", "ick", "▁bro", "wn"]
    letters = [chr(at) for at in range(33, 127) if chr(at) not in names]
    vocab = {name: at for at, name in enumerate([*names, *letters])}
    merges = [("▁b", "row"), ("▁", "x")]
    vocab["▁brow"] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token for each byte, and one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def decoder(kind: str, seed: int = 0, spread: float = 0.02, **changes: Any) -> Any:
    """Build a random causal decoder in fp32: SIZES and GROUPED, but for `changes`, which are its config's own settings.

    `kind` is the model type of its config ("llama", "gemma3_text"). Weights are drawn with standard deviation `spread`:
    the larger, the further apart are the logits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | ({} if kind == "gpt2" else GROUPED) | {"max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **(sizes | {"initializer_range": spread} | changes))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def language_model(
    directory: Path, seed: int = 0, context: int = 512, hidden: int = 64, layers: int = 2, fast: Any = None
) -> Path:
    """Export a random Llama with its tokenizer (`fast`, or `tokenizer()`) to `directory`."""
    fast = fast or tokenizer()
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes |= {"head_dim": hidden // 4, "max_position_embeddings": context, "vocab_size": len(fast)}
    special = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    special |= {"bos_token_id": fast.bos_token_id}
    model = decoder("llama", seed, **sizes, **special)
    return export(directory, fast, model, run_id="run-of-tiny", evaluation={"loss": 5.5})


def export(directory: Path, tokenizer: Any, model: Any, **about: Any) -> Path:
    """Write a model directory as jobs/ leaves it; `about` goes into its manifest."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    dataset = DatasetRef(name="sentences", digest="abc")
    architecture = model.config.model_type
    manifest = ModelManifest(
        **{"name": "tiny", "task": "causal-lm", "architecture": architecture, "dataset": dataset},
        **{"created_at": "2026-01-02T03:04:05+00:00", **about},
    )
    write(directory, manifest)
    return directory


def image_classifier(directory: Path) -> Path:
    """Export an untrained classifier of 8x8 grey images with labels "0" to "2" to `directory`."""
    import numpy as np

    from jobs import tasks

    task = tasks.get("image-classification")({})
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    task.fit(task.observe([{"image": image, "label": str(number % 3)} for number, image in enumerate(images)]))
    task.build("cnn", {"width": 8, "hidden_size": 8}).save_pretrained(directory)  # type: ignore[operator]
    task.save(directory)
    write(directory, ModelManifest(name="shapes", task="image-classification", architecture="cnn"))
    return directory
