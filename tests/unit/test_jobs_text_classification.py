"""Text classification: metrics by hand, rows that keep their texts, models that load back and answer the same."""

import io
import math
import re
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

from cluster import specfile
from cluster.errors import UserError
from jobs.data import prepare
from jobs.spec import JobSpec
from jobs.tasks import TaskError, get, scores
from jobs.worker.evaluate import flat

TEXTS = [
    ("a good film", "good"),
    ("a bad film", "bad"),
    ("good fun", "good"),
    ("bad jokes", "bad"),
    ("so good", "good"),
]
EXAMPLES = [{"text": text, "label": label} for text, label in TEXTS * 4]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS = {
    "ngram": {"hidden_size": 8, "buckets": 64},
    "bert": TINY,
    "roberta": TINY,
    "modernbert": TINY,
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
}


def learned(examples=EXAMPLES, **options):
    task = get("text-classification")({"max_length": 8, "tokenizer": {"train": "word"}, **options})
    task.fit(task.observe(examples[:7]).merged(task.observe(examples[7:])))
    return task


@pytest.fixture(scope="module")
def task():
    return learned()


def test_sums_are_the_counts_of_three_guesses():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]))
    found = scores.sums(logits, torch.tensor([0, 0, 1]))
    assert found["confusion"].tolist() == [[1, 1], [0, 1]]
    guesses, confidence, right = found["bins"]
    assert guesses.nonzero().flatten().tolist() == [8, 11, 13], "0.6 is the upper edge of the ninth of 15 bins"
    assert confidence.sum().item() == pytest.approx(0.9 + 0.6 + 0.8)
    assert right.sum() == 2


def test_calibration_error_by_hand():
    bins = np.zeros((3, scores.BINS))
    bins[:, 14] = 4, 3.8, 3  # 4 guesses of confidence 0.95, 3 right: |0.75 - 0.95| weighs 4 of 5
    bins[:, 8] = 1, 0.6, 1  # one of 0.6 that is right: 0.4 weighs 1 of 5
    assert scores.calibration_error(bins) == pytest.approx((4 * 0.2 + 1 * 0.4) / 5)


def test_macro_f1_by_hand_and_as_scikit_learn_has_it():
    # label 0: 2 right, 1 taken for 1; label 1: 1 right, 1 taken for 0; label 2 never occurs
    counts = np.array([[2, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert scores.macro_f1(counts) == pytest.approx((2 * 2 / 6 + 2 * 1 / 4) / 2)
    assert scores.macro_f1(counts) == pytest.approx(f1_score([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], average="macro"))


def test_sums_of_batches_add_up_to_the_metrics_of_the_whole(task):
    torch.manual_seed(0)
    model = task.build("ngram", {"hidden_size": 8, "buckets": 64}).eval()
    rows = task.encode(EXAMPLES)
    rows.pop("cut")
    parts = [{key: column[at] for key, column in rows.items()} for at in (slice(0, 7), slice(7, None))]
    with torch.no_grad():
        logits = model(**{k: v for k, v in task.collate(rows).items() if k != "labels"}).logits
        sums = [flat(task.measure(model, task.collate(part))) for part in parts]
    summary = task.summarise({key: sums[0][key] + sums[1][key] for key in sums[0]})
    truth, guesses = rows["label"], logits.argmax(-1).numpy()
    assert set(summary) == set(task.metrics)
    assert summary["accuracy"] == (truth == guesses).mean()
    assert summary["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert summary["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(truth).long()).item(), rel=1e-5
    )


def test_the_picture_of_the_confusion_is_darkest_on_the_diagonal_of_a_good_classifier(task):
    flat_sums = {f"confusion.{i}": count for i, count in enumerate([9.0, 1.0, 0.0, 10.0])}
    image = np.asarray(Image.open(io.BytesIO(task.figures(flat_sums)["confusion.png"])).convert("L"))
    height, width = image.shape
    row = image[int(0.1 * height) : int(0.3 * height)]  # through the cells of the first label
    right, wrong = row[:, int(0.3 * width) : int(0.4 * width)], row[:, int(0.85 * width) : int(0.95 * width)]
    assert right.mean() < 120 < 200 < wrong.mean()
    assert learned([{"text": f"a b {i}", "label": i} for i in range(61)]).figures({}) == {}, "nobody could read it"


def test_rows_hold_the_texts_and_what_is_cut_is_counted(task):
    rows = task.encode([{"text": "a good film", "label": "good"}, {"text": "bad " * 20, "label": "bad"}])
    ids = task.tokenizer.convert_ids_to_tokens(rows["input_ids"][0])
    assert ids == ["<|endoftext|>", "a", "good", "film", "<|pad|>", "<|pad|>", "<|pad|>", "<|pad|>"]
    assert rows["length"].tolist() == [4, 8]
    assert rows["cut"].tolist() == [0, 1]
    assert [task.labels[i] for i in rows["label"]] == ["good", "bad"]
    batch = task.collate({key: column[:1] for key, column in rows.items()})
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 4), "as long as the longest"


def test_pairs_are_marked_apart_and_answered_as_pairs():
    pairs = [{"text": "good film", "other": "bad film", "label": i % 2} for i in range(6)]
    task = learned(pairs, pair_column="other")
    rows = task.encode(pairs)
    assert task.tokenizer.convert_ids_to_tokens(rows["input_ids"][0])[:6] == [
        "<|endoftext|>", "good", "film", "<|endoftext|>", "bad", "film"]  # fmt: skip
    task.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as those of bert say
    assert task.encode(pairs)["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert [part["name"] for part in task.inputs()] == ["text", "pair"]
    model = task.build("bert", TINY).eval()
    assert set(task.predict(model, [{"text": "good", "pair": b"bad"}])[0]["scores"]) == {"0", "1"}
    with pytest.raises(TaskError, match="classifies pairs of texts"):
        task.predict(model, ["good"])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_loads_back_without_options_and_answers_the_same(task, architecture, tmp_path):
    model = task.build(architecture, CONFIGS[architecture]).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("text-classification").load(tmp_path)
    answers = again.predict(again.load_model(tmp_path), ["a good film", "bad " * 50, b"fun"])
    assert answers == task.predict(model, ["a good film", "bad " * 50, b"fun"])
    assert sum(answers[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_a_text_that_is_cut_is_said_to_be():
    task = learned(max_length=8)
    model = task.build("ngram", {})
    short, long = task.predict(model, ["good film", "good film " * 9])
    assert (short["truncated"], long["truncated"]) == (False, True)
    assert task.inputs()[0]["parameters"] == {"max_tokens": 8}
    assert {part["name"] for part in task.outputs()} == set(short)


@pytest.mark.parametrize("architecture", ["ngram", "bert"])
def test_padding_changes_no_answer(task, architecture):
    model = task.build(architecture, CONFIGS[architecture]).eval()
    alone = task.predict(model, ["good"])[0]["scores"]
    beside = task.predict(model, ["good", "a bad film so bad"])[0]["scores"]
    assert beside == pytest.approx(alone, rel=1e-5)


def test_ngrams_that_were_never_seen_say_nothing(task):
    model = task.build("ngram", CONFIGS["ngram"]).eval()
    a, b = (task.predict(model, [text])[0]["score"] for text in ("good film", "film good"))
    assert a == pytest.approx(b), "without training, the order of words means nothing"
    torch.nn.init.normal_(model.grams.weight)
    a, b = (task.predict(model, [text])[0]["score"] for text in ("good film", "film good"))
    assert not math.isclose(a, b, rel_tol=1e-4), "then it does"


def test_a_childs_labels_are_its_parents_and_a_bare_encoder_learns_them(task, tmp_path):
    task.save(tmp_path)
    child = get("text-classification")({"max_length": 8})
    assert child.inherit(tmp_path)
    with pytest.raises(TaskError, match=r"\['ugly'\] are not among the 2 labels"):
        child.encode([{"text": "a film", "label": "ugly"}])
    (tmp_path / "text_classification.json").unlink()
    bare = get("text-classification")({"max_length": 8})
    assert not bare.inherit(tmp_path)
    bare.fit(bare.observe([{"text": "a film", "label": label} for label in ("10", "9", "x")]))
    assert bare.labels == ["9", "10", "x"]
    assert bare.tokenizer.get_vocab() == task.tokenizer.get_vocab()


def test_a_model_is_measured_as_it_was_trained(task, tmp_path):
    task.save(tmp_path)
    plain = get("text-classification")({})
    assert plain.inherit(tmp_path)
    assert plain.max_length == task.max_length == 8
    assert get("text-classification").load(tmp_path, {"max_length": 16}).max_length == 8, "as it was saved"
    longer = get("text-classification")({"max_length": 16})
    assert longer.inherit(tmp_path)
    assert longer.max_length == 16, "a child may read more"
    with pytest.raises(TaskError, match=r"classifies single texts: leave out task.pair_column"):
        get("text-classification")({"pair_column": "other"}).inherit(tmp_path)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"txt": "x", "label": 1}, r"no column 'text'; this example has \['label', 'txt'\]; did you mean 'txt'"),
        ({"text": " ", "label": 1}, "holds ' ', not a text"),
        ({"text": None, "label": 1}, "holds None, not a text"),
        ({"text": "x"}, "no column 'label'.*task.label_column"),
        ({"text": "\u200b\ufeff", "label": 1}, r"holds '\\u200b\\ufeff', not a text"),
        ({"text": "x", "label": None}, "holds None, which is no label"),
        ({"text": "x", "label": "\u200b"}, "which is no label"),
        ({"text": "x", "label": float(2**60)}, "which is no label"),
        ({"text": "x", "label": Decimal("NaN")}, "which is no label"),
    ],
)
def test_an_example_that_cannot_be_used_is_refused(example, said):
    with pytest.raises(TaskError, match=said):
        get("text-classification")().check(example)


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("brt", {}, "did you mean 'bert'"),
        ("ngram", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("bert", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("bert", {**TINY, "max_position_embeddings": 4}, "max_length is 8, but the model has 4 positions"),
        ("bert", {**TINY, "vocab_size": 3}, "vocab_size is 3, but the tokenizer has"),
    ],
)
def test_a_wrong_model_is_refused(task, architecture, config, said):
    with pytest.raises(TaskError, match=said):
        task.build(architecture, config)


def test_one_label_is_none():
    with pytest.raises(TaskError, match=r"have 1 label\(s\) \['good'\]"):
        learned([{"text": "a film", "label": "good"}] * 8)


def test_a_text_that_is_no_utf8_is_refused(task):
    with pytest.raises(TaskError, match="not UTF-8"):
        task.predict(task.build("ngram", CONFIGS["ngram"]), [b"\xff"])


def test_the_task_of_ones_own_in_the_page_learns_labels_from_stars(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"```\w+ (praise\.\w+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(content)
    rows = [f"a review of {stars} stars,{stars}\n" for stars in range(1, 6)] * 5
    (tmp_path / "reviews.csv").write_text("text,stars\n" + "".join(rows))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = specfile.load(tmp_path / "praise.yaml", JobSpec)
    with pytest.raises(UserError, match=r"praise_form` in task; did you mean `praise_from`"):
        specfile.load(tmp_path / "praise.yaml", JobSpec, ["task.praise_form=2"])
    made = prepare.prepare(spec, tmp_path, tmp_path / "s", parent=None, on_progress=lambda *_: None)
    task = made.task(spec)
    assert task.labels == ["blame", "praise"]
    labels = prepare.rows_of(made, made.train_files).take(np.arange(made.train_rows))["label"]
    assert made.train_rows == 20
    assert 0.4 < labels.mean() < 0.8, "three of five numbers of stars are praise"


def said(*labels):
    task = get("text-classification")({"max_length": 8, "tokenizer": {"train": "word"}})
    return task.fit(task.observe([{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]))[1:]


@pytest.mark.parametrize(
    ("labels", "sentences"),
    [
        (["good", "bad"], ["2 labels: bad, good"]),
        ([1.0, 0, 1], ["2 labels: 0, 1"]),
        (["1", 1, 0], ["2 labels: 0, 1", "labels come as numbers and as text: those that read alike are one label"]),
        (
            [True, 1, "no"],
            ["3 labels: 1, True, no", "labels come as numbers and as text and as true or false: those that read alike "
             "are one label"],
        ),
        (["a", "A", "b "], ["3 labels: A, a, 'b '", "labels that look alike are told apart: 'A' and 'a'"]),
        (["1.0", "1", "01"], ["3 labels: 01, 1, 1.0", "labels that look alike are told apart: '01' and '1' and '1.0'"]),
        (["é", "e\u0301"], ["2 labels: e\u0301, é", "labels that look alike are told apart: 'e\u0301' and 'é'"]),
        (["a\u200b", "a"], ["2 labels: a, 'a\\u200b'", "labels that look alike are told apart: 'a' and 'a\\u200b'"]),
        (["a  b", "a b"], ["2 labels: a  b, a b", "labels that look alike are told apart: 'a  b' and 'a b'"]),
        ([Decimal(2**60), Decimal(2**60 + 1)], [f"2 labels: {2**60}, {2**60 + 1}"]),
    ],
)  # fmt: skip
def test_labels_that_may_be_one_are_said(labels, sentences):
    assert said(*labels) == sentences


def test_half_a_character_is_no_label(task):
    with pytest.raises(TaskError, match="half of a surrogate pair"):
        task.check({"text": "a", "label": "\ud83d"})


def test_a_label_that_was_not_learned_says_why_that_may_be(task):
    with pytest.raises(TaskError, match=r"\['odd'\] are not among the 2 labels .*another data\.split_seed"):
        task.encode([{"text": "a", "label": "odd"}])


def test_the_label_is_no_question():
    with pytest.raises(TaskError, match="text_column and label_column are both 'a'"):
        get("text-classification")({"text_column": "a", "label_column": "a"})


def test_texts_of_which_nothing_is_known_are_counted():
    task = learned([{"text": f"good film {n}", "label": n % 2} for n in range(6)])
    texts = ["a film", "zzz", "zzz yyy", "good zzz", "🙂"]
    encoded = task.encode([{"text": text, "label": 0} for text in texts])
    assert encoded["unknown"].tolist() == [0, 1, 1, 0, 1]
