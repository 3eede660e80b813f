"""Packed pieces do not see each other, whatever the architecture: found on the model, and undone in its batches."""

import numpy as np
import pytest
import torch

from jobs.data import rows as data_rows
from jobs.tasks import IGNORED, get, packed_attention, packing

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KEEPS_APART = {"llama": SHAPE, "gpt_neox": SHAPE}
CONFUSES = {
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2},
}  # fmt: skip
CONVERSATIONS = [{"prompt": f"fox {i}", "completion": "dog " * (i + 1)} for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    task = get("causal-lm")({"tokenizer": {"train": "bpe", "vocab_size": 300}})
    task.fit(task.observe([{"text": "the quick brown fox jumps over the lazy dog; " * 30}]))
    return task.tokenizer


@pytest.fixture
def lm(tokenizer):
    task = get("causal-lm")({"sequence_length": 128})
    task.tokenizer = tokenizer
    return task


def encode(lm, examples):
    return {name: column for name, column in lm.encode(examples).items() if name not in lm.counted}


@pytest.mark.parametrize(("architecture", "config"), [*KEEPS_APART.items(), *CONFUSES.items()])
def test_packed_conversations_have_the_loss_that_they_have_alone(lm, architecture, config):
    torch.manual_seed(0)
    model = lm.build(architecture, config)
    before = torch.random.get_rng_state()
    packed = encode(lm, CONVERSATIONS)
    assert len(packed["targets"]) < len(CONVERSATIONS), "the test needs a row with more than one conversation"
    said = lm.prepare_model(model, packed.keys())
    assert bool(said) == (architecture in CONFUSES), said
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before), "whoever is asked draws no other numbers afterwards"
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # random weights say little: a leak would be lost in the rounding
        together = lm.loss(model, lm.collate(packed))
        apart = []
        for conversation in CONVERSATIONS:
            batch = lm.collate(encode(lm, [conversation]))
            length = int((batch["labels"][0] != IGNORED).nonzero().max()) + 1
            alone = {name: batch[name][:, :length] for name in ("input_ids", "labels")}
            apart.append(lm.loss(model, alone))
    assert together[1] == sum(count for _, count in apart)
    assert together[0].item() == pytest.approx(sum(loss.item() for loss, _ in apart), rel=1e-5)


def losses_of_each(lm, model):
    """Return the loss of each conversation, lowest first, whichever row it is in."""
    rows = encode(lm, CONVERSATIONS)
    assert lm.prepare_model(model, rows.keys()) == []
    batch = lm.collate(rows)
    with torch.no_grad():
        logits = model(**packed_attention.inputs(model, batch), use_cache=False).logits
    of_tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    beginnings = torch.zeros_like(batch["labels"])
    beginnings[:, 0] = 1
    beginnings = (batch["position_ids"] == 0).long() if "position_ids" in batch else beginnings
    piece = beginnings.flatten().cumsum(0) - 1
    sums = torch.zeros(int(piece.max()) + 1).index_add(0, piece, of_tokens)
    return sums[sums > 0].sort().values


def test_each_packed_conversation_has_the_loss_that_it_has_in_a_padded_row(lm, tokenizer):
    padded = get("causal-lm")({"sequence_length": 128, "pack": False})
    padded.tokenizer = tokenizer
    torch.manual_seed(0)
    model = lm.build("llama", SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    alone = losses_of_each(padded, model)
    assert len(alone) == len(CONVERSATIONS) == len(set(alone.tolist()))
    torch.testing.assert_close(losses_of_each(lm, model), alone, rtol=1e-5, atol=0)


def test_text_alone_asks_nothing_of_the_model(lm):
    assert lm.prepare_model(torch.nn.Linear(1, 1), encode(lm, [{"text": "fox"}]).keys()) == []


def test_a_model_without_positions_is_given_none(lm):
    class Plain(torch.nn.Module):
        def forward(self, input_ids, use_cache=False):
            raise AssertionError("it is not run")

    (said,) = lm.prepare_model(Plain(), {"position_ids"})
    assert said.startswith("Plain lets what is packed into one row see")
    assert "position_ids" not in lm.collate(encode(lm, CONVERSATIONS))


def test_unpacked_rows_hold_one_conversation_each(tokenizer):
    task = get("causal-lm")({"sequence_length": 64, "pack": False})
    task.tokenizer = tokenizer
    rows = encode(task, CONVERSATIONS)
    assert len(rows["targets"]) == len(CONVERSATIONS)
    assert task.collate(rows).keys() == {"input_ids", "labels"}


def test_files_of_texts_and_of_conversations_are_read_as_one(lm, tmp_path):
    texts, chats = encode(lm, [{"text": "the fox " * 50}]), encode(lm, CONVERSATIONS)
    for name, columns in (("0", texts), ("1", chats)):
        data_rows.write(tmp_path / name, columns)
    rows = data_rows.Rows([tmp_path / "0", tmp_path / "1"])
    batch = lm.collate(rows.take(np.arange(len(rows))))
    assert rows.columns == {"input_ids", "labels", "position_ids", "targets"}
    count = len(texts["targets"])
    assert torch.equal(batch["labels"][:count], lm.collate(texts)["labels"])
    assert torch.equal(batch["labels"][count:], lm.collate(chats)["labels"])
    assert (batch["labels"] != IGNORED).sum() == rows.targets(np.arange(len(rows)))


def test_separated_pieces_keep_their_tokens(tokenizer):
    pieces = [([5, 6, 7], [IGNORED, 6, 7]), ([8, 9], [IGNORED, 9])]
    separated = packing.separate(packing.pack(pieces, 8, 3), 3)
    assert separated["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert separated["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_a_model_with_adapted_embeddings_is_looked_at_too(lm):
    from jobs.spec import LoraSpec
    from jobs.worker.lora import add_lora

    torch.manual_seed(0)
    model = add_lora(lm.build("llama", KEEPS_APART["llama"]), LoraSpec(target_modules=["q_proj", "embed_tokens"]))
    assert lm.prepare_model(model, encode(lm, CONVERSATIONS).keys()) == []
