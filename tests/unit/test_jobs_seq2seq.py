"""Translation: pairs as rows, one tokenizer for both sides, the loss and the scores by hand, models that load back."""

import json
import math

import numpy as np
import pytest
import sacrebleu
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cluster.errors import UserError
from jobs.data import splitting
from jobs.tasks import IGNORED, TaskError, TaskSetupError, get, pair_tokens, translation_scores
from jobs.worker import export, quantize
from jobs.worker.evaluate import flat

TINY_BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0},
}
CONFIGS = {
    "t5": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "dropout_rate": 0.0},
    "bart": TINY_BART,
    "marian": TINY_BART,
    "pegasus": TINY_BART,
}
WORDS = {"one": "un", "two": "deux", "three": "trois", "four": "quatre", "five": "cinq"}
EXAMPLES = [
    {"source": f"{a} {b}", "target": f"{WORDS[b]} {WORDS[a]}"} for a in WORDS for b in WORDS
]  # backwards, so that a model has to look


def learned(examples=EXAMPLES, **options):
    options = {"tokenizer": {"train": "bpe", "vocab_size": 300}, "max_source_length": 16, **options}
    task = get("seq2seq")({"max_target_length": 16, **options})
    middle = len(examples) // 2
    task.fit(task.observe(examples[:middle]).merged(task.observe(examples[middle:])))
    return task


@pytest.fixture(scope="module")
def task():
    return learned()


def rows_of(task, examples=EXAMPLES):
    rows = task.encode(examples)
    counts = {name: int(rows.pop(name).sum()) for name in task.counted}
    return rows, counts


def trained(task, steps):
    torch.manual_seed(0)
    model = task.build("t5", {**CONFIGS["t5"], "d_model": 32, "d_ff": 64}).train()
    rows, _ = rows_of(task)
    batch, optimiser = task.collate(rows), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        loss, targets = task.loss(model, batch)
        (loss / targets).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_both_sides_come_back_from_one_trained_tokenizer_and_end(kind):
    tokenizer = learned(tokenizer={"train": kind, "vocab_size": 300 if kind == "bpe" else 60}).tokenizer
    for text in (text for each in EXAMPLES for text in each.values()):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template is None


def test_rows_are_cut_and_what_was_cut_does_not_learn_to_end():
    task = learned(max_source_length=4, max_target_length=4, tokenizer={"train": "bpe", "vocab_size": 260})
    rows, counts = rows_of(task, [{"source": "one two", "target": "un deux"}, {"source": "a", "target": "b"}])
    assert counts == {"cut_source": 1, "cut_target": 1, "special": 0, "unknown": 0, "lossy": 0}
    end = task.tokenizer.eos_token_id
    assert rows["source_length"].tolist() == [4, 2], "the source keeps what the tokenizer puts behind it"
    assert rows["source"][0, -1] == end
    assert rows["targets"].tolist() == [4, 2]
    assert end not in rows["target"][0]
    assert rows["target"][1, 1] == end


def test_what_the_tokenizer_loses_is_counted():
    task = learned(tokenizer={"train": "unigram", "vocab_size": 60})
    pairs = [
        {"source": "one ☃", "target": "un"},
        {"source": "one", "target": "un ☃"},
        {"source": "one<|endoftext|>", "target": "un"},
    ]
    _, counts = rows_of(task, pairs)
    assert counts == {"cut_source": 0, "cut_target": 0, "special": 1, "unknown": 1, "lossy": 1}


def test_a_batch_is_as_wide_as_its_longest_texts(task):
    rows, _ = rows_of(task, [{"source": "one", "target": "un"}, {"source": "one two", "target": "deux un"}])
    batch = task.collate(rows)
    assert batch["input_ids"].shape == (2, rows["source_length"].max())
    assert batch["labels"].shape == (2, rows["targets"].max())
    assert batch["attention_mask"].sum(1).tolist() == rows["source_length"].tolist()
    assert (batch["labels"] != IGNORED).sum(1).tolist() == rows["targets"].tolist()


def test_bad_pairs_are_named(task):
    for wrong, said in [
        ({"source": "one"}, "no column 'target'"),
        ({"source": "", "target": "un"}, "not a text"),
        ({"source": "one", "target": 5}, "not a text"),
    ]:
        with pytest.raises(TaskError, match=said):
            task.check(wrong)
    assert task.unused({"source": "a", "target": "b", "note": "c", "empty": ""}) == ["note"]
    with pytest.raises(UserError, match="are both 'a'"):
        get("seq2seq")({"source_column": "a", "target_column": "a"})


def test_a_source_is_held_out_with_all_its_translations(task):
    pairs = [{"source": f"source {n % 40}", "target": f"target {n}"} for n in range(120)]
    contents = np.array([splitting.content_of(task.content(pair)) for pair in pairs], dtype=np.uint64)
    out = splitting.held_out(contents, 0.2, seed=0)
    held = {pair["source"] for pair, is_out in zip(pairs, out, strict=True) if is_out}
    kept = {pair["source"] for pair, is_out in zip(pairs, out, strict=True) if not is_out}
    assert out.sum() == 24
    assert not held & kept


def test_the_loss_is_that_of_transformers_and_smoothing_is_only_learned_with(task):
    torch.manual_seed(0)
    model = task.build("t5", CONFIGS["t5"]).eval()
    batch = task.collate(rows_of(task)[0])
    loss, targets = task.loss(model, batch)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert loss.item() / targets.item() == pytest.approx(expected, rel=1e-5)
    smoothed = learned(label_smoothing=0.5)
    smoothed.prepare_model(model, set())
    assert smoothed.loss(model, batch)[0].item() == pytest.approx(loss.item(), rel=1e-5)
    logits = model(**batch).logits.log_softmax(-1).flatten(0, 1)[batch["labels"].flatten() != IGNORED]
    uniform = -logits.mean(-1).sum().item()
    assert smoothed.loss(model.train(), batch)[0].item() == pytest.approx((loss.item() + uniform) / 2, rel=1e-4)


def test_padding_changes_nothing(task):
    torch.manual_seed(0)
    for architecture in ("t5", "marian"):
        model = task.build(architecture, CONFIGS[architecture]).eval()
        rows, _ = rows_of(task, [*EXAMPLES[:1], {"source": "one two three four", "target": "quatre trois deux un"}])
        alone = {name: column[:1] for name, column in rows.items()}
        other = {name: column[1:] for name, column in rows.items()}
        together = task.loss(model, task.collate(rows))[0].item()
        apart = sum(task.loss(model, task.collate(each))[0].item() for each in (alone, other))
        assert together == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("groups", [2, 3, 40])
def test_parts_of_like_length_give_the_same_loss_and_gradient(task, groups):
    torch.manual_seed(0)
    model = task.build("t5", CONFIGS["t5"]).eval()
    longer = [{"source": " ".join(list(WORDS)[:n]), "target": " ".join(list(WORDS.values())[:n])} for n in range(1, 6)]
    batch = task.collate(rows_of(task, EXAMPLES + longer)[0])
    parted = learned(length_groups=groups)
    parted.prepare_model(model, set())
    gradients = []
    for each in (task, parted):
        loss, targets = each.loss(model, batch)
        model.zero_grad()
        loss.backward()
        gradients.append((loss.item(), targets.item(), model.shared.weight.grad.clone()))
    (whole, targets, first), (in_parts, also, second) = gradients
    assert in_parts == pytest.approx(whole, rel=1e-5)
    assert targets == also
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    parts = pair_tokens.of_like_length(batch, groups)
    assert len(parts) == groups
    assert sum(len(part["labels"]) * weight for part, weight in parts) == len(batch["labels"])
    assert sum(part["labels"].numel() * weight for part, weight in parts) < batch["labels"].numel()


def test_counts_of_parts_add_up_to_sacrebleus_scores_of_the_whole():
    guesses = ["le chat est sur le tapis .", "il pleut beaucoup ce soir", "bonjour"]
    truths = ["le chat est assis sur le tapis .", "il pleut beaucoup ce matin", "bonsoir à tous"]
    parts = [translation_scores.counts(guesses[:1], truths[:1]), translation_scores.counts(guesses[1:], truths[1:])]
    whole = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    found = translation_scores.of(flat({name: value.double() for name, value in whole.items()}))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(guesses, [truths]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(guesses, [truths]).score)
    assert 0 < found["bleu"] < 100
    nothing = flat({name: value.double() for name, value in translation_scores.counts([], []).items()})
    assert translation_scores.of(nothing) == {"bleu": 0.0, "chrf": 0.0}


def test_a_model_learns_to_translate_backwards_and_is_measured_as_it_generates(task):
    model = trained(task, 110)
    rows, _ = rows_of(task)
    sums = {name: value.double() for name, value in task.measure(model, task.collate(rows)).items()}
    found = task.summarise(flat(sums))
    assert found["accuracy"] > 0.9
    assert found["bleu"] == 0, "of two words there are no four in a row"
    assert found["chrf"] > 80
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_greedy_decoding_is_that_of_transformers(task):
    for architecture in CONFIGS:
        torch.manual_seed(1)
        model = task.build(architecture, CONFIGS[architecture]).eval()
        batch = task.collate(rows_of(task, [*EXAMPLES[:3], {"source": "one two three", "target": "un"}])[0])
        ours = task._translated(model, batch["input_ids"], batch["attention_mask"])
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**given, do_sample=False, num_beams=1, forced_eos_token_id=None)
        end, theirs = task.tokenizer.eos_token_id, []
        for row in ids.tolist():
            shown = row[1:]
            theirs.append(shown[: shown.index(end)] if end in shown else shown)
        assert ours == theirs, architecture


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_loads_back_and_into_transformers_alone(task, architecture, tmp_path):
    torch.manual_seed(2)
    model = task.build(architecture, CONFIGS[architecture]).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("seq2seq").load(tmp_path)
    loaded = again.load_model(tmp_path)
    batch = task.collate(rows_of(task)[0])
    assert again.loss(loaded, batch)[0].item() == task.loss(model, batch)[0].item()
    assert (again.max_source_length, again.max_target_length, again.prefix) == (16, 16, "")
    alone, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    given = tokenizer(["one two"], return_tensors="pt", return_token_type_ids=False)
    texts = tokenizer.batch_decode(alone.generate(**given, num_beams=1, max_new_tokens=5), skip_special_tokens=True)
    ours = again._translated(loaded, given["input_ids"], given["attention_mask"])
    assert tokenizer.decode(ours[0][:5], skip_special_tokens=True) == texts[0]


def test_a_fine_tuned_model_keeps_tokenizer_prefix_and_lengths(tmp_path):
    parent = learned(prefix="go: ", max_target_length=12)
    parent.build("t5", CONFIGS["t5"]).save_pretrained(tmp_path)
    parent.save(tmp_path)
    child = get("seq2seq")({"max_source_length": 8})
    assert child.inherit(tmp_path)
    assert (child.prefix, child.max_source_length, child.max_target_length) == ("go: ", 8, 12)
    assert child.tokenizer.get_vocab() == parent.tokenizer.get_vocab()
    assert child.encode(EXAMPLES[:1])["source"][0, 0] == parent.tokenizer("go: ")["input_ids"][0]
    other = get("seq2seq")({"prefix": ""})
    other.inherit(tmp_path)
    assert other.prefix == ""


@pytest.mark.parametrize("architecture", ["t5", "marian"])
def test_another_tokenizer_numbers_the_tokens_that_texts_begin_and_end_with(task, architecture, tmp_path):
    other = learned(tokenizer={"train": "unigram", "vocab_size": 60}).tokenizer
    other.save_pretrained(tmp_path / "tokenizer")
    task.build(architecture, {**CONFIGS[architecture], "vocab_size": 400}).save_pretrained(tmp_path / "parent")
    child = get("seq2seq")({"tokenizer": {"from": str(tmp_path / "tokenizer")}})
    assert not child.inherit(tmp_path / "parent")
    child.fit(None)
    model = child.load_model(tmp_path / "parent")
    assert model.generation_config.decoder_start_token_id == other.bos_token_id
    assert model.generation_config.eos_token_id == other.eos_token_id
    assert child._start == other.bos_token_id


def test_a_directory_of_transformers_alone_is_a_parent(task, tmp_path):
    torch.manual_seed(3)
    model = task.build("bart", CONFIGS["bart"])
    model.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    child = get("seq2seq")({})
    assert child.inherit(tmp_path)
    assert child.max_source_length == 128
    child.check_parent(tmp_path, {})
    longer = get("seq2seq")({"max_source_length": 1100})
    longer.inherit(tmp_path)
    with pytest.raises(TaskError, match="texts may have 1100 tokens, but the model has 1024 positions"):
        longer.load_model(tmp_path)


def test_what_cannot_be_is_refused(task, tmp_path):
    for architecture, said in [
        ("llama", "no encoder-decoder architecture"),
        ("voxtral", "has no encoder beside its decoder|made of several models|no config of its own"),
    ]:
        with pytest.raises(TaskError, match=said):
            task.check_model(architecture, {})
    with pytest.raises(TaskError, match="did you mean 'num_layers'"):
        task.check_model("t5", {"num_layer": 2})
    with pytest.raises(TaskError, match=r"tokenizer\.train makes new tokens"):
        get("seq2seq").check_options(get("seq2seq")({"tokenizer": {"train": "bpe"}}).options, "models:/a@b")
    with pytest.raises(TaskError, match="the model's vocab_size is 10"):
        task.build("t5", {**CONFIGS["t5"], "vocab_size": 10})
    (tmp_path / "seq2seq.json").write_text(json.dumps({"prefix": ""}))
    task.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TaskError, match=r"holds no seq2seq model of Tandem: seq2seq\.json"):
        get("seq2seq").load(tmp_path)
    with pytest.raises(TaskError, match="serve it with the engine"):
        task.predict(None, ["one"])


def test_a_tokenizer_of_several_languages_is_refused(task):
    class Multilingual:
        eos_token_id, src_lang = 1, "en_XX"

    with pytest.raises(TaskError, match="several languages"):
        pair_tokens.checked(Multilingual())


def test_what_is_said_of_training(task):
    model = task.build("t5", CONFIGS["t5"])
    smoothed = learned(label_smoothing=0.1, decode_share=0.25)
    said = smoothed.prepare_model(model.train(), set())
    assert [line.split(" (")[0] for line in said] == [
        "bleu and chrf are of the first 25% of each batch of held-out rows",
        "the training loss has label smoothing of 0.1 in it, that of held-out rows has none",
    ]
    assert len(smoothed.prepare_model(model.eval(), set())) == 1
    model.generation_config.repetition_penalty = 1.2
    assert smoothed.prepare_model(model.eval(), set())[1:] == [
        "bleu and chrf are of greedy answers; the model's generation config asks for repetition_penalty 1.2, with "
        "which a server answers unless a request says otherwise"
    ]


@pytest.mark.parametrize("architecture", ["t5", "marian"])
def test_int8_weights_are_written_and_load_back(task, architecture, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    torch.manual_seed(4)
    model = task.build(architecture, {**CONFIGS[architecture], "d_model": 64}).eval()
    whole, small = tmp_path / "whole", tmp_path / "small"
    model.save_pretrained(whole)
    task.save(whole)
    quantised = task.load_model(whole, None, {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())})
    export.save(quantised, small)
    loaded = task.load_model(small)
    assert quantize.layers_of(loaded).left == {"lm_head": 1}
    batch = task.collate(rows_of(task)[0])
    loss = task.loss(model, batch)[0].item()
    assert task.loss(loaded, batch)[0].item() == task.loss(quantised, batch)[0].item()
    assert task.loss(loaded, batch)[0].item() == pytest.approx(loss, rel=1e-2)


def test_a_bias_of_the_logits_that_int8_cannot_keep_is_refused(task, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = task.build("marian", {**CONFIGS["marian"], "d_model": 64})
    model.final_logits_bias[0, 0] = 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(TaskError, match="final_logits_bias that is not zero"):
        task.load_model(tmp_path, None, {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())})


def test_a_prefix_that_leaves_no_room_is_refused():
    with pytest.raises(TaskSetupError, match=r"task\.prefix .* takes all 16 tokens"):
        rows_of(learned(prefix="translate this text: "))
    assert rows_of(learned(prefix="translate this text: ", max_source_length=64))


def test_predictions_are_asked_for_as_the_model_was_trained(tmp_path):
    learned(prefix="go: ").save(tmp_path)
    other = get("seq2seq")({"prefix": "come: "})
    other.inherit(tmp_path)
    with pytest.raises(TaskSetupError, match=r"task\.prefix is another than the model was trained with"):
        other.instance({"source": "one"})
    for same in ({}, {"prefix": "go: "}):
        child = get("seq2seq")(same)
        child.inherit(tmp_path)
        assert child.instance({"source": "one"}) == "one"
