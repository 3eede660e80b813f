"""Preferences: what is read of an example, the rows, the losses against their definitions, and the reference."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cluster.errors import UserError
from jobs.data import prepare, splitting, stream
from jobs.data.examples import BadRows, Example, Source
from jobs.data.said import said_of_overlap, said_of_split
from jobs.spec import DataSpec, JobSpec, LoraSpec
from jobs.tasks import IGNORED, TaskError, cross_entropy, is_ours, preference_loss
from jobs.tasks.causal_lm import CausalLM
from jobs.tasks.preference_loss import Answers
from jobs.tasks.preferences import preference_of, unused
from jobs.worker import lora, reference
from jobs.worker.evaluate import flat
from jobs.worker.export import save
from tests.support import tiny_models

Q, A, B = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
)
SYSTEM = {"role": "system", "content": "s"}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def dpo(**options: Any) -> CausalLM:
    task = CausalLM({"objective": "dpo", "sequence_length": 48, **options})
    task.tokenizer = tiny_models.tokenizer()
    return task


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "chosen": "brown fox " * (number % 3 + 1), "rejected": f"lazy dog {number}"}


def tiny(task: CausalLM, seed: int = 0, architecture: str = "llama") -> Any:
    torch.manual_seed(seed)
    config = TINY if architecture == "llama" else {"hidden_size": 16}
    return task.build(architecture, {**config, "initializer_range": 0.5}).eval()


def rows_of(task: CausalLM, count: int = 5) -> dict[str, np.ndarray]:
    rows = task.encode([pair(number) for number in range(count)])
    return {name: column for name, column in rows.items() if name not in task.counted}


@torch.no_grad()
def measured(task: CausalLM, model: Any, rows: dict[str, np.ndarray]) -> dict[str, float]:
    return flat(task.measure(model, task.collate(rows)))


@pytest.mark.parametrize(
    ("example", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [Q]),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, [Q]),
        ({"prompt": [SYSTEM, Q], "chosen": A, "rejected": B}, [SYSTEM, Q]),
        ({"chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]}, [SYSTEM, Q]),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 8.0}, [Q]),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, [Q]),
        ({"prompt": "q", "system": "s", "chosen": "good", "rejected": "bad"}, [SYSTEM, Q]),
        ({"question": "q", "system": "", "chosen": "good", "rejected": "bad"}, [Q]),
        ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, [Q]),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            [Q],
        ),
    ],
)
def test_every_shape_becomes_two_conversations(example: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    found = preference_of(example)
    assert found.chosen.messages == [*prompt, A]
    assert found.rejected.messages == [*prompt, B]
    assert unused(example) == [key for key in example if key == "score_chosen"]


def test_answers_that_begin_alike_part_at_the_answer() -> None:
    call = {"role": "assistant", "content": "wait"}
    found = preference_of({"chosen": [Q, call, A], "rejected": [Q, call, B]})
    assert found.chosen.messages == [Q, call, A]
    assert all("learned" not in message for message in found.chosen.messages)


def test_answers_within_the_prompt_are_context() -> None:
    found = preference_of({"prompt": [Q, A, Q], "chosen": "good", "rejected": "bad"})
    assert [message.get("learned", True) for message in found.chosen.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"prompt": "q", "chosen": "good"}, "this example has no 'rejected'; its columns are"),
        ({"prompt": "q", "chosen": "good", "rejected": None}, r"no 'rejected' \(null\)"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "are the same answer"),
        ({"prompt": "q", "chosen": " \n", "rejected": "bad"}, "'chosen' is empty"),
        ({"chosen": "good", "rejected": "bad"}, "no common message, and there is no `prompt`"),
        ({"chosen": [Q, A], "rejected": [{**Q, "content": "other"}, B]}, "no common message"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "begins with other messages than an answer"),
        ({"prompt": "q", "question": "q", "chosen": "good", "rejected": "bad"}, "both 'prompt' and 'question'"),
        ({"prompt": "q", "chosen": [A, Q], "rejected": [B]}, "'chosen' does not end in an answer"),
        ({"prompt": "q", "chosen": [A, Q, A], "rejected": [B]}, "'chosen' has a message of role 'user'"),
        ({"prompt": "q", "chosen": [{**A, "weight": 0}], "rejected": [B]}, "weight or train of 0"),
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "weight": 0.5}, "'weight' beside a preference"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r", "rejected": "\n\nHuman: q"},
            "'chosen' does not end in an answer",
        ),
        ({"prompt": "q", "chosen": 7, "rejected": "bad"}, "'chosen' holds int instead of a list"),
    ],
)
def test_what_is_no_preference_is_refused(example: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        dpo().check(example)


def test_likelihood_refuses_preferences_and_says_who_learns_them() -> None:
    with pytest.raises(TaskError, match=r"which task\.objective dpo, ipo or orpo learns"):
        CausalLM().check({"prompt": "q", "chosen": "good", "rejected": "bad"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.2}, r"beta is for task\.objective dpo, ipo or orpo"),
        ({"chosen_weight": 1.0}, "chosen_weight is for task.objective"),
        ({"objective": "dpo", "text_column": "x"}, "text_column has no effect with objective dpo"),
        ({"objective": "dpo", "documents": "separate"}, "documents has no effect"),
        ({"objective": "orpo", "chosen_weight": 1.0}, "orpo learns the chosen answer anyway"),
        ({"objective": "dpo", "beta": 0}, "beta"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        CausalLM(options)


def spec(objective: str, metric: str = "loss", **model: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "x",
            "phase": "finetune" if "from" in model else "pretrain",
            "task": {"name": "causal-lm", "objective": objective, "sequence_length": 48},
            "model": model or {"architecture": "llama"},
            "data": {"train": "pairs.jsonl", "eval_fraction": 0.25},
            "training": {"steps": 1},
            "checkpoint": {"metric": metric},
        }
    )


def test_a_pair_and_the_other_way_round_are_one_example_with_two_answers(tmp_path: Path) -> None:
    one = {"prompt": "q", "chosen": "good\nanswer", "rejected": "bad"}
    same, reverse = {**one, "chosen": "good answer "}, {**one, "chosen": "bad", "rejected": "good answer"}
    task = dpo()
    contents = [splitting.content_of(task.content(each)) for each in (one, same, reverse, pair(1))]
    assert contents[0] == contents[1] == contents[2] != contents[3]
    answers = [splitting.content_of(task.answer(each)) for each in (one, same, reverse)]
    assert answers[0] == answers[1] != answers[2]
    rows = [one, reverse, *({**one, "prompt": f"q {number}"} for number in range(18))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = prepare.prepare(
        JobSpec.model_validate(
            {
                "name": "x",
                "phase": "pretrain",
                "task": {"name": "causal-lm", "objective": "orpo", "tokenizer": {"train": "bpe", "vocab_size": 300}},
                "model": {"architecture": "lstm"},
                "data": {"train": "pairs.jsonl", "eval_fraction": 0.1},
                "training": {"steps": 1},
            }
        ),
        tmp_path,
        tmp_path / "storage",
        parent=None,
        on_progress=lambda *event: None,
    )
    assert "1 of 20 examples are copies of an earlier one with another target" in done.notes


def sides(rows: list[dict[str, Any]], **data: Any) -> tuple[list[set[str]], list[str]]:
    """Return the prompts that are trained on and those that are held out, and what is said of it."""
    reading = stream.Stream(Source("x", "", lambda: (Example(row) for row in rows)), dpo())
    survey, settings = reading.survey(BadRows()), DataSpec.model_validate(data)
    division = stream.division_of(survey, settings)
    found = list(stream.divided(reading, survey, division))
    prompts = [{row["prompt"].strip() for split, row in found if split == side} for side in ("train", "eval")]
    return prompts, said_of_split(survey, settings, 0 if division.held is None else int(division.held.sum()))


def test_pairs_of_one_prompt_are_on_one_side_of_the_split() -> None:
    rows = [{**pair(at), "prompt": f"question {at % 6}" + " " * (at % 2), "chosen": f"fox {at}"} for at in range(30)]
    (train, held), said = sides([*rows, rows[0]], eval_fraction=0.2)
    assert train
    assert held
    assert not train & held
    assert "1 of 31 examples are copies of an earlier one, and are kept on its side of the split" in said
    assert "24 of 31 examples have the prompt of an earlier one, and are kept on its side of the split" in said


def test_pairs_of_a_single_prompt_are_not_held_out_unless_that_is_asked() -> None:
    rows = [{**pair(at), "prompt": "why?"} for at in range(30)]
    (train, held), said = sides(rows)
    assert (train, held) == ({"why?"}, set())
    assert said == ["nothing is held out: all examples belong together, as those of one prompt do"]
    with pytest.raises(UserError, match=r"eval_fraction 0\.2 leaves nothing of 30 example"):
        sides(rows, eval_fraction=0.2)


def test_held_out_prompts_that_are_in_the_training_data_are_counted() -> None:
    def survey(rows: list[dict[str, Any]]) -> stream.Survey:
        return stream.Stream(Source("x", "", lambda: (Example(row) for row in rows)), dpo()).survey(BadRows())

    held = [pair(0), {**pair(1), "chosen": "another answer"}, pair(9)]
    both = survey([pair(0), pair(1)]), survey(held)
    assert said_of_overlap(*both, stream.shared(*both)) == [
        "1 of 3 held-out examples are also in the training data",
        "1 of 3 held-out examples have a prompt of the training data",
    ]


def test_what_was_said_before_the_answers_is_the_prompt() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answers = {"chosen": [{"role": "assistant", "content": "d"}], "rejected": [{"role": "assistant", "content": "e"}]}
    assert [message["content"] for message in dpo().together({"prompt": turns, **answers})] == ["a", "b", "c"]
    assert [message["content"] for message in dpo().together({"prompt": turns[1:2], **answers})] == ["b"]


def test_a_comparison_needs_a_model_to_start_from() -> None:
    with pytest.raises(ValidationError, match=r"task\.objective dpo compares with the model that the job starts from"):
        spec("dpo")
    assert spec("orpo").task.options["objective"] == "orpo"


def test_checkpoints_are_chosen_by_what_the_objective_measures() -> None:
    assert spec("dpo", "margin", **{"from": "parent"}).checkpoint.metric == "margin"
    for objective, metric in (("dpo", "perplexity"), ("likelihood", "margin"), ("orpo", "chosen_change")):
        with pytest.raises(ValidationError, match="the task has no such metric"):
            spec(objective, metric, **{"from": "parent"})


def test_rows_hold_both_answers_behind_the_prompt() -> None:
    task = dpo()
    rows = task.encode([{"prompt": "q", "chosen": "good", "rejected": "bad news"}])
    assert {name: rows[name].shape for name in ("input_ids", "labels", "targets")} == {
        "input_ids": (1, 2, 49),
        "labels": (1, 2, 49),
        "targets": (1,),
    }
    told = [task.tokenizer.decode(labels[labels != IGNORED]) for labels in rows["labels"][0]]
    assert told == ["good<|im_end|>", "bad news<|im_end|>"]
    batch = task.collate(rows)
    assert batch["labels"].shape == (1, 2, int((batch["labels"][0, 1] != IGNORED).nonzero().max()) + 1)
    assert task.unit == "pairs"
    assert is_ours(task)


def test_pairs_that_say_nothing_within_the_row_are_counted() -> None:
    task = dpo()
    examples = [
        {"prompt": "x" * 80, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "z" * 60 + "a", "rejected": "z" * 60 + "b"},
        {"prompt": "q", "chosen": "good", "rejected": "bad " * 40},
        {"prompt": "q", "chosen": "good <|im_end|>", "rejected": "bad"},
    ]
    rows = task.encode(examples)
    counts = {name: int(rows[name][0]) for name in task.counted if name in rows and rows[name][0]}
    assert counts == {"pairs_left_out": 1, "pairs_alike": 1, "pairs_cut": 1, "pairs_special": 1}
    assert len(rows["targets"]) == 2


def test_answers_that_repeat_the_question_are_counted() -> None:
    whole = {"prompt": "the fox ", "chosen": "the fox is quick", "rejected": "the fox is lazy"}
    one_only = {**whole, "rejected": "it is lazy"}
    apart = {"prompt": "the fox", "chosen": "is quick", "rejected": "is lazy"}
    turns = {"chosen": [Q, A, Q, {**A, "content": "q good"}], "rejected": [Q, A, Q, {**A, "content": "q bad"}]}
    rows = dpo().encode([whole, one_only, apart, turns])
    assert int(rows["pairs_repeating"].sum()) == 2


def test_a_prompt_that_shows_nothing_is_refused() -> None:
    with pytest.raises(TaskError, match="the prompt is empty"):
        preference_of({"prompt": " \u200b", "chosen": "a", "rejected": "b"})


def test_answers_whose_tokens_agree_are_left_out() -> None:
    task = dpo()
    task.tokenizer.chat_template = task.tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")
    rows = task.encode([{"prompt": "q", "chosen": "good", "rejected": "good "}])
    assert [int(rows[name][0]) for name in ("pairs_alike", "pairs_stripped")] == [1, 1]
    assert len(rows["targets"]) == 0


def test_losses_are_those_of_their_papers() -> None:
    answers = Answers(torch.tensor([[-2.0, -6.0]]), torch.tensor([[2, 3]]), torch.tensor([[-3.0, -5.0]]))
    loss, margin = preference_loss.compared("dpo", 0.5, answers)
    assert float(margin) == pytest.approx(0.5 * ((-2 + 3) - (-6 + 5)))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1.0)))
    loss, margin = preference_loss.compared("ipo", 0.5, answers)
    assert float(margin) == pytest.approx(1 / 2 + 1 / 3)
    assert float(loss) == pytest.approx((5 / 6 - 1) ** 2)
    loss, margin = preference_loss.compared("orpo", 0.5, answers)
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (-1.0, -2.0)]
    assert float(margin) == pytest.approx(math.log(odds[0] / odds[1]))
    assert float(loss) == pytest.approx(1.0 + 0.5 * math.log(1 + odds[1] / odds[0]))


@pytest.mark.parametrize("architecture", ["llama", "lstm"])
def test_the_loss_is_the_definition_on_unpadded_texts_one_by_one(architecture: str) -> None:
    task = dpo(beta=0.3)
    policy, parent = tiny(task, 0, architecture), tiny(task, 1, architecture)
    rows = rows_of(task)
    whole = {**rows, **task.reference(parent, rows)}
    loss, count = task.loss(policy, task.collate(whole))

    def likelihood(model: Any, ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        end = int(np.flatnonzero(labels != IGNORED)[-1]) + 1
        logits = model(input_ids=torch.from_numpy(ids[None, :end].astype(np.int64))).logits[0].log_softmax(-1)
        places = [at for at in range(1, end) if labels[at] != IGNORED]
        return sum(logits[at - 1, int(labels[at])] for at in places)

    expected = torch.zeros(())
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        sides = list(zip(ids, labels, strict=True))
        change = [likelihood(policy, *side) - likelihood(parent, *side) for side in sides]
        expected = expected - torch.nn.functional.logsigmoid(0.3 * (change[0] - change[1]))
    torch.testing.assert_close(loss, expected)
    assert int(count) == 5
    apart = [task.loss(policy, task.collate({n: c[at : at + 1] for n, c in whole.items()}))[0] for at in range(5)]
    torch.testing.assert_close(loss, torch.stack(apart).sum())


def test_log_probabilities_are_those_of_the_labels_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_BYTES", 4 * 33 * 4)  # four tokens at a time
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 11, 33, generator=generator) * 3).requires_grad_()
    labels = torch.randint(33, (4, 11), generator=generator)
    labels[0, :9], labels[1, 5:], labels[2] = IGNORED, IGNORED, IGNORED
    found, lengths = preference_loss.log_probabilities(logits, labels)
    chosen = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = chosen.where(labels != IGNORED, 0).sum(1)
    assert lengths.tolist() == [2, 5, 0, 11]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    weights = torch.tensor([2.0, -3.0, 5.0, 0.25])
    mine, right = (torch.autograd.grad((sums * weights).sum(), logits)[0] for sums in (found, expected))
    torch.testing.assert_close(mine, right, rtol=0, atol=3e-6)


def test_a_model_that_has_learned_nothing_is_level_with_its_reference() -> None:
    task = dpo()
    model, rows = tiny(task), rows_of(task)
    rows |= task.reference(model, rows)
    metrics = task.summarise(measured(task, model, rows))
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["margin"] == metrics["chosen_change"] == metrics["rejected_change"] == 0
    assert metrics.keys() == task.metrics_of(task.options).keys()


def test_margins_are_counted_by_size_and_drawn() -> None:
    margins = torch.tensor([-30.0, -0.2, 0.0, 0.2, 0.7, 99.0])
    answers = Answers(torch.zeros(6, 2), torch.ones(6, 2, dtype=torch.int64))
    sums = flat(preference_loss.sums(torch.zeros(6), margins, answers))
    counted = {at: sums[f"histogram.{at}"] for at in range(len(preference_loss.EDGES) + 1) if sums[f"histogram.{at}"]}
    assert counted == {0: 1, 20: 2, 21: 1, 22: 1, 41: 1}
    assert sums["preferred"] == 3
    (name, picture), *others = dpo().figures(sums).items()
    assert (name, picture[:4], others) == ("margins.png", b"\x89PNG", [])


def test_the_chosen_weight_keeps_the_chosen_answer_likely() -> None:
    plain, weighted = dpo(), dpo(chosen_weight=2.0)
    model, rows = tiny(plain), rows_of(plain)
    rows |= plain.reference(model, rows)
    batch = plain.collate(rows)
    sums = measured(plain, model, rows)
    per_token = [
        measured(plain, model, {n: c[at : at + 1] for n, c in rows.items()})["chosen_nll"]
        / int((rows["labels"][at, 0] != IGNORED).sum())
        for at in range(5)
    ]
    assert float(weighted.loss(model, batch)[0].detach()) == pytest.approx(sums["loss"] + 2 * sum(per_token), rel=1e-5)


def test_learning_raises_the_margin_and_a_collapse_is_said() -> None:
    task = dpo(beta=1.0)
    model, rows = tiny(task), rows_of(task)
    rows |= task.reference(model, rows)
    batch = task.collate(rows)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        task.loss(model, batch)[0].backward()
        optimiser.step()
    metrics = task.summarise(measured(task, model, rows))
    assert metrics["preference_accuracy"] == 1
    assert metrics["margin"] > 1
    assert task.verdict({**metrics, "chosen_change": -0.4}) == []
    (said,) = task.verdict({**metrics, "chosen_change": -1.0})
    assert "0.37 times the probability that the reference gives it (-1.00 nats)" in said


def test_adapters_begin_level_with_the_reference_and_learn() -> None:
    task = dpo(beta=1.0)
    model, rows = tiny(task), rows_of(task)
    rows |= task.reference(model, rows)
    adapted = lora.add_lora(model, LoraSpec(rank=4))
    assert task.prepare_model(adapted, set(rows))[0].startswith("each answer is a row of its own")
    batch = task.collate(rows)
    loss, _ = task.loss(adapted, batch)
    assert float(loss.detach()) == pytest.approx(5 * math.log(2))
    loss.backward()
    optimiser = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), 1e-3)
    optimiser.step()
    assert float(task.loss(adapted, batch)[0].detach()) < 5 * math.log(2)


def test_a_mixtures_balancing_loss_is_refused() -> None:
    task = dpo()
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = task.build("mixtral", {**config, "num_key_value_heads": 2, "output_router_logits": True})
    with pytest.raises(TaskError, match="a balancing loss, which objective dpo does not add"):
        task.prepare_model(model.train(), {"labels"})


def test_reference_columns_are_kept_beside_the_rows(tmp_path: Path) -> None:
    task = dpo()
    parent = tiny(task)
    save(parent, tmp_path / "parent")
    task.save(tmp_path / "parent")
    lines = [f'{{"prompt": "question {n}", "chosen": "brown fox {n}", "rejected": "dog"}}\n' for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    job = spec("dpo", **{"from": str(tmp_path / "parent")})
    prepared = prepare.prepare(
        job, tmp_path, tmp_path / "storage", parent=tmp_path / "parent", on_progress=lambda *event: None
    )
    files = [*prepared.train_files, *prepared.eval_files]
    target = Path(prepared.directory) / "reference-x"
    target.mkdir()
    made = reference.write_share(job, str(tmp_path / "parent"), prepared, "fp32", str(target), files)
    assert made == prepared.train_rows + prepared.eval_rows == 40
    found = prepare.rows_of(prepare.Prepared(**{**vars(prepared), "reference": "reference-x"}), prepared.eval_files)
    assert found.columns == {"input_ids", "labels", "targets", "reference"}
    taken = found.take(np.array([3, 1]))
    assert taken["reference"].dtype == np.float32
    again = task.reference(parent, prepare.rows_of(prepared, prepared.eval_files).take(np.array([3, 1])))
    np.testing.assert_allclose(taken["reference"], again["reference"], rtol=1e-5)
