"""Model directories small enough to make in a test: random weights, real files, served like any other."""

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


def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def language_model(directory: Path, seed: int = 0, context: int = 512, hidden: int = 64, layers: int = 2) -> Path:
    """Export a random Llama with its tokenizer to `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    manifest = ModelManifest(
        name="tiny",
        task="causal-lm",
        architecture="llama",
        run_id="run-of-tiny",
        dataset=DatasetRef(name="sentences", digest="abc"),
        evaluation={"loss": 5.5},
        created_at="2026-01-02T03:04:05+00:00",
    )
    write(directory, manifest)
    return directory


def image_classifier(directory: Path) -> Path:
    """Export an untrained classifier of 8x8 grey images with labels "0" to "2" to `directory`."""
    import numpy as np

    from jobs import tasks

    task = tasks.get("image-classification")({})
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    task.fit([{"image": image, "label": str(number % 3)} for number, image in enumerate(images)])
    task.build("cnn", {"width": 8, "hidden_size": 8}).save_pretrained(directory)  # type: ignore[operator]
    task.save(directory)
    write(directory, ModelManifest(name="shapes", task="image-classification", architecture="cnn"))
    return directory
