"""Tasks: what encoding keeps, what loss counts, and what loads back."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from jobs.tasks import IGNORED, TaskError, get, tokenization
from jobs.tasks.conversations import messages_of
from jobs.tasks.cross_entropy import cross_entropy_sum
from jobs.tasks.images import read_image, resize
from jobs.tasks.packing import best_fit
from jobs.tasks.tokenization import TokenizerOptions

TEXT = "the quick brown fox jumps over the lazy dog; " * 30
TINY = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    task = get("causal-lm")({"sequence_length": 32, "tokenizer": {"train": "bpe", "vocab_size": 300}})
    learn(task, [{"text": TEXT}])
    return task


def learn(task, examples):
    """Let a task learn from examples in one chunk."""
    return task.fit(task.observe(examples))


def longer(lm, length):
    """The same task for rows of another length."""
    task = get("causal-lm")({"sequence_length": length})
    task.tokenizer = lm.tokenizer
    return task


def test_every_token_is_predicted_exactly_once(lm):
    rows = lm.encode([{"text": TEXT}, {"text": "short"}])
    stream = lm.tokenizer(TEXT)["input_ids"] + [lm.tokenizer.eos_token_id]
    stream += lm.tokenizer("short")["input_ids"] + [lm.tokenizer.eos_token_id]
    labels = lm.collate(rows)["labels"]
    assert labels[labels != IGNORED].tolist() == stream[1:]
    assert rows["targets"].sum() == len(stream) - 1


def test_conversation_learns_the_answers_only(lm):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "lazy"},
    ]
    rows = longer(lm, 256).encode([{"messages": messages}])
    learned = [t for t in rows["labels"][0].tolist() if t != IGNORED]
    assert lm.tokenizer.decode(learned) == "jumps<|im_end|>lazy<|im_end|>"


@pytest.mark.parametrize("architecture", TINY)
def test_packed_conversations_do_not_see_each_other(lm, architecture):
    conversations = [{"prompt": f"fox {i}", "completion": "dog " * (i + 1)} for i in range(5)]
    lm = longer(lm, 128)
    packed, single = lm.encode(conversations), [lm.encode([c]) for c in conversations]
    assert len(packed["targets"]) < len(single), "the test needs a row with more than one conversation"
    torch.manual_seed(0)
    model = lm.build(architecture, TINY[architecture]).eval()
    with torch.no_grad():
        together = lm.loss(model, lm.collate(packed))
        apart = [lm.loss(model, lm.collate(rows)) for rows in single]
    assert together[1] == sum(count for _, count in apart)
    assert together[0].item() == pytest.approx(sum(loss.item() for loss, _ in apart), rel=1e-5)


@pytest.mark.parametrize(
    "example",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_every_shape_of_a_conversation_reads_the_same(example):
    assert messages_of(example) == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "no answer to learn from"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown role 'alien'"),
        ({"messages": [{"role": "user"}]}, "needs 'role' and 'content'"),
    ],
)
def test_broken_conversation_is_refused(example, said):
    with pytest.raises(TaskError, match=said):
        messages_of(example)


def test_best_fit_places_every_item_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    bins = best_fit(lengths, 128)
    assert sorted(item for members in bins for item in members) == list(range(500))
    assert all(sum(lengths[i] for i in members) <= 128 for members in bins)
    assert len(bins) <= 1.05 * math.ceil(sum(lengths) / 128)


def test_measures_add_up_to_loss_perplexity_and_bits_per_byte(lm):
    torch.manual_seed(0)
    model = lm.build("llama", TINY["llama"]).eval()
    rows = lm.encode([{"text": TEXT}])
    with torch.no_grad():
        sums = {key: float(value) for key, value in lm.measure(model, lm.collate(rows)).items()}
    summary = lm.summarise(sums)
    first = lm.tokenizer.decode(lm.tokenizer(TEXT)["input_ids"][:1])
    assert sums["bytes"] == len(TEXT.encode()) - len(first.encode()), "every byte but the first token's is predicted"
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["bits_per_byte"] == pytest.approx(sums["loss"] / math.log(2) / sums["bytes"])


def test_text_round_trips_through_both_tokenizers(lm):
    char = get("causal-lm")({"sequence_length": 8, "tokenizer": {"train": "char"}})
    sample = "naïve\tΩ 漢字\n"
    learn(char, [{"text": sample}])
    for task in (lm, char):
        assert task.tokenizer.decode(task.tokenizer(sample)["input_ids"]) == sample


@pytest.mark.parametrize("architecture", TINY)
def test_model_loads_back_as_it_was_saved(lm, architecture, tmp_path):
    model = lm.build(architecture, TINY[architecture])
    model.save_pretrained(tmp_path)
    lm.save(tmp_path)
    task = get("causal-lm").load(tmp_path)
    loaded = dict(task.load_model(tmp_path).named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in model.named_parameters())
    assert task.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("lama", {}, "did you mean 'llama'"),
        ("llama", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("llama", {"vocab_size": 10}, "vocab_size is 10, but the tokenizer has"),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, "multiple of the number of attention heads"),
    ],
)
def test_wrong_model_is_refused(lm, architecture, config, said):
    with pytest.raises(TaskError, match=said):
        lm.build(architecture, config)


def test_wrong_text_column_names_the_columns(lm):
    with pytest.raises(TaskError, match=r"no text in column 'text'; this example has \['body'\]"):
        lm.encode([{"body": "x"}])


def test_unknown_task_suggests():
    with pytest.raises(TaskError, match="did you mean 'causal-lm'"):
        get("casual-lm")
    with pytest.raises(TaskError, match="no module 'nowhere'"):
        get("nowhere.at_all:Task")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [{"image": generator.integers(0, 255, (8, 8), dtype=np.uint8), "label": i % 3} for i in range(30)]


@pytest.mark.parametrize("architecture", ["cnn", "vit"])
def test_image_classifier_saves_loads_and_predicts_the_same(images, architecture, tmp_path):
    task = get("image-classification")({})
    learn(task, images)
    config = {"cnn": {}, "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                 "intermediate_size": 32, "patch_size": 4}}[architecture]  # fmt: skip
    model = task.build(architecture, config).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("image-classification").load(tmp_path)
    picture = images[0]["image"]
    assert again.predict(again.load_model(tmp_path), [picture]) == task.predict(model, [picture])
    assert again.inputs()[0]["shape"] == [-1, 8, 8, 1]


def test_image_answers_are_probabilities_over_the_labels(images):
    task = get("image-classification")({})
    learn(task, images)
    answer = task.predict(task.build("cnn", {}).eval(), [np.zeros((16, 16, 3), np.uint8)])[0]
    assert set(answer["scores"]) == {"0", "1", "2"}
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["scores"][answer["label"]] == answer["score"] == max(answer["scores"].values())


def test_labels_outside_the_vocabulary_are_named(images):
    task = get("image-classification")({})
    learn(task, images)
    with pytest.raises(TaskError, match=r"\['cat'\] are not among the 3 labels"):
        task.encode([{"image": images[0]["image"], "label": "cat"}])


@pytest.mark.instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 50, 777), (3, 400, 2048), (1, 1, 5)])
def test_cross_entropy_in_chunks_is_the_exact_one(dtype, shape):
    """Against torch's in fp64: its fp32 gradient, exp(logit - log of the sum), is ten times as far off as ours."""
    torch.manual_seed(0)
    logits = (torch.randn(shape) * 5).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels[0, : shape[1] // 3] = IGNORED
    logits[-1, -1] = 0
    logits[-1, -1, labels[-1, -1]] = 9  # a probability near 1: its gradient must not cancel
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy_sum(ours, labels)
    expected = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    (loss / 7).backward()
    (expected / 7).backward()
    epsilon = torch.finfo(torch.float32).eps
    reach = float((logits.amax(-1) - logits.amin(-1)).max())  # of logit - largest
    # A row's loss is a difference of numbers up to `reach`. Sums add half an epsilon for each of a few chunks.
    rows = int((labels != IGNORED).sum())
    torch.testing.assert_close(loss.double(), expected, rtol=8 * epsilon, atol=rows * reach * epsilon)
    # logit - largest is rounded to half an epsilon of `reach`, which exp turns into a relative error; four more
    # roundings follow (exp, sum, quotient, product). Where 1 is taken off a probability near 1 they stay, over 7.
    relative = (reach / 2 + 4) * epsilon
    if dtype == torch.bfloat16:  # the gradient is stored in it twice: by the forward pass, and scaled
        relative += torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=relative, atol=4 * epsilon / 7)


def merged(task, parts):
    """The findings of several chunks, in order."""
    found = [task.observe(part) for part in parts]
    whole = found[0]
    for later in found[1:]:
        whole = whole.merged(pickle.loads(pickle.dumps(later)))
    return whole


def chunked(items, *sizes):
    ends = np.cumsum(sizes)
    return [items[a:b] for a, b in zip([0, *ends], [*ends, len(items)], strict=True) if a < b]


@pytest.mark.parametrize("sizes", [(1, 2, 3), (17,), (5, 20, 1)])
def test_what_an_image_task_learns_does_not_depend_on_the_chunks(sizes):
    generator = np.random.default_rng(0)
    shapes = [(8, 8), (8, 8, 3), (5, 9)]
    images = [{"image": generator.integers(0, 256, shapes[i % 3], np.uint8), "label": i % 4} for i in range(30)]
    whole, parts = (get("image-classification")() for _ in range(2))
    learn(whole, images)
    parts.fit(merged(parts, chunked(images, *sizes)))
    assert (whole.mean, whole.std, whole.labels, whole.size, whole.channels) == (
        parts.mean, parts.std, parts.labels, parts.size, parts.channels)  # fmt: skip
    pixels = np.concatenate([resize(read_image(e["image"]), e["image"].shape[:2], 1).ravel() for e in images]) / 255
    assert whole.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert whole.std == pytest.approx([pixels.std()], rel=1e-12)


def test_an_image_size_that_the_parent_does_not_have_is_refused(images, tmp_path):
    task = get("image-classification")()
    learn(task, images)
    task.save(tmp_path)
    assert get("image-classification")({"image_size": 8}).inherit(tmp_path)
    with pytest.raises(TaskError, match="image_size is 16, but the model it starts from"):
        get("image-classification")({"image_size": 16}).inherit(tmp_path)


WORDS = [f"w{i}x{i % 97} says {i * i}\n" for i in range(4000)]


def findings(limit, seed, texts):
    options = TokenizerOptions(train="bpe", sample_seed=seed)
    return dataclasses.replace(tokenization.observe(options, texts), limit=limit)


@pytest.mark.parametrize("limit", [500, 20_000, 10**9])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (1777,), tuple([40] * 99)])
def test_the_sample_of_a_tokenizer_does_not_depend_on_the_chunks(limit, sizes):
    whole = findings(limit, 0, WORDS)
    parts = findings(limit, 0, [])
    for chunk in chunked(WORDS, *sizes):
        parts = parts.merged(findings(limit, 0, chunk))
    assert parts.sample == whole.sample
    assert parts.size <= max(2 * limit, whole.seen_bytes if limit > 10**6 else 0)
    drawn = sum(map(len, whole.sample))
    assert min(limit, whole.seen_bytes) - 30 < drawn <= limit, "it has the size that was asked for"
    if limit < 10**9:
        assert findings(limit, 1, WORDS).sample != whole.sample
    else:
        assert sorted(whole.sample) == sorted(WORDS)


def test_a_long_text_is_sampled_in_pieces_that_make_it_up():
    text = "".join(f"line {i}\n" for i in range(400_000))
    found = tokenization.observe(TokenizerOptions(), [text])
    pieces = [piece for _, piece in found.texts]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.startswith("\n") for piece in pieces[1:])


def test_a_tokenizer_trained_on_chunks_is_that_of_the_whole():
    examples = [{"text": word} for word in WORDS]
    one, two = (get("causal-lm")({"tokenizer": {"train": "bpe", "vocab_size": 400}}) for _ in range(2))
    said = learn(one, examples)
    two.fit(merged(two, chunked(examples[::-1], 7, 1500)))
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert said == ["tokenizer trained on all 0.1 MB of text"]


def test_a_sample_smaller_than_the_text_is_said():
    task = get("causal-lm")({"tokenizer": {"train": "bpe", "vocab_size": 300, "sample_mb": 1, "sample_seed": 3}})
    said = learn(task, [{"text": f"{i} {word}"} for i in range(20) for word in WORDS])
    assert said == ["tokenizer trained on 1.0 of 1.9 MB of text, drawn by tokenizer.sample_seed 3"]
