"""Recommendation: histories in order, ends held out, ranks by hand, models that load back and answer the same."""

import json

import numpy as np
import pytest
import torch

from jobs.data import prepare
from jobs.data.examples import BadRows, Example
from jobs.data.grouping import grouped
from jobs.data.rows import Rows
from jobs.spec import JobSpec
from jobs.tasks import TaskError, get, ranking
from jobs.tasks.interaction_rows import drawn, windows
from jobs.tasks.interactions import InteractionFindings
from jobs.worker.evaluate import flat, joined, measure

CONFIG = {"hidden_size": 8, "intermediate_size": 8, "dropout": 0.0}


def cycle(user, start, length=6, of=12):
    """A user who meets items in a circle: a, b, c, …"""
    return [{"user": user, "item": f"i{(start + step) % of:02d}", "time": step} for step in range(length)]


ROWS = [row for user in range(12) for row in cycle(f"u{user}", user)]


def examples(task, rows=ROWS):
    found = [Example(row, f"log.csv:{line}") for line, row in enumerate(rows, 1)]
    return list(grouped(found, task.grouping(), task.check, BadRows()))


def learned(rows=ROWS, **options):
    task = get("recommendation")({"max_length": 4, "negatives": 3, **options})
    parts = [task.cut(example, 0.0) for example in examples(task, rows)]
    train = [part[0] for part in parts if part]
    task.fit(task.observe(train[:5]).merged(task.observe(train[5:])))
    return task, train, [part[1] for part in parts if part]


def encoded(task, chunk):
    return {key: column for key, column in task.encode(chunk).items() if key not in task.counted}


class Constant(torch.nn.Module):
    """Gives each item the score that it is told."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(scores))

    def forward(self, inputs, where, candidates):
        return self.scores[candidates - 1].expand(int(where.sum()), -1)


def test_the_last_interaction_that_counts_is_predicted_and_not_learned_from():
    rows = [
        {"user": "a", "item": "x", "time": 3, "stars": 5},
        {"user": "a", "item": "y", "time": 1, "stars": 4},
        {"user": "a", "item": "z", "time": 2, "stars": 1},
        {"user": "a", "item": "w", "time": 4, "stars": "2"},
        {"user": "b", "item": "x", "time": 9, "stars": 5},
    ]
    task = get("recommendation")({"rating_column": "stars", "min_rating": 4, "max_length": 4, "negatives": 2})
    both = examples(task, rows)
    assert task.cut(both[1], 0.0) is None, "a history of one has nothing before its end"
    first, second = task.cut(both[0], 0.0)
    assert sorted(first["item"]) == ["w", "y", "z"], "what does not count stays where it is counted"
    said = task.fit(task.observe([first, both[1]]))
    assert "2 interactions are rated below 4: left out" in said
    assert task.items == ["x", "y"]
    row = task.encode([second])
    assert row["wanted"].tolist() == [1]
    assert row["inputs"].tolist() == [[2, 0, 0, 0]]
    assert task.encode([first, both[1]])["short"].tolist() == [True, True]


def test_a_row_that_is_there_twice_counts_once_and_is_held_out_with_its_copy():
    rows = [{"user": user, "item": item, "time": at} for user in "ab" for at, item in enumerate("xyz")]
    task, train, ends = learned([*rows, rows[2], rows[5], rows[1]])
    assert [row["item"] for row in train] == [["x", "y", "y"], ["x", "y"]], "the held-out item is no item to learn"
    assert "1 rows repeat user, item and moment of another: counted once" in task.fit(task.observe(train))
    assert task.counts == [2, 2]
    assert task.encode(train)["inputs"].tolist() == [[1, 0, 0, 0]] * 2
    assert task.encode(ends)["wanted"].tolist() == [0, 0], "z occurs nowhere else"


def test_next_items_that_answers_would_leave_out_are_counted():
    task, _, ends = learned([*ROWS, {"user": "u0", "item": "i01", "time": 99}])
    assert task.encode(ends)["again"].tolist() == [True] + [False] * 11


def test_an_end_that_was_learned_is_no_news_to_a_model(tmp_path):
    tied, _, ends = learned([{**row, "time": row["time"] // 3} for row in ROWS])
    assert not tied.encode(ends)["told"].any(), "it was held out of the moment that others share"
    task, _, ends = learned()
    assert not task.encode(ends)["told"].any()
    task.save(tmp_path)
    later = get("recommendation").load(tmp_path, {"negatives": 3})
    early = examples(task, [row for row in ROWS if 0 < row["time"] < 5 or row["user"] == "u1"])
    told = later.encode([task.cut(example, 0.0)[1] for example in early])["told"]
    assert told.tolist() == [example["user"] != "u1" for example in early]


def test_items_that_look_alike_are_said():
    task, train, _ = learned()
    assert not any("alike" in said for said in task.fit(task.observe(train)))
    task, train, _ = learned([{**row, "item": str(int(row["item"][1:])) if at % 2 else row["item"][1:]}
                              for at, row in enumerate(ROWS)])  # fmt: skip
    assert any(said.startswith("items that look alike are told apart: '0") for said in task.fit(task.observe(train)))


def test_windows_follow_each_item_once():
    found = list(windows([1, 2, 3, 4, 5, 6, 7], 3))
    assert found == [([4, 5, 6], [5, 6, 7]), ([1, 2, 3], [2, 3, 4])]
    assert list(windows([1, 2], 3)) == [([1], [2])]
    assert list(windows([1], 3)) == []


def test_what_happened_in_one_moment_has_no_order_but_a_drawn_one_and_is_counted():
    rows = [{"user": "a", "item": f"{item:02d}", "time": item // 20} for item in range(40)]
    shuffled, kept = (get("recommendation")({"same_time": way}) for way in ("shuffle", "keep"))
    orders = [task.instance(examples(task, rows)[0])["history"] for task in (shuffled, kept)]
    assert orders[1] == [f"{item:02d}" for item in range(40)]
    assert orders[0] != orders[1]
    assert sorted(orders[0][:20]) == orders[1][:20], "only within its moment"
    other = shuffled.instance(examples(shuffled, rows[::-1])[0])["history"]
    assert other == orders[0], "whatever the order of the file"
    assert "40 interactions share" in shuffled.fit(shuffled.observe(examples(shuffled, rows)))[-1]


def test_findings_do_not_depend_on_where_chunks_are_cut():
    task, train, _ = learned()
    whole = task.observe(train)
    assert whole.merged(InteractionFindings()) == whole
    assert task.observe(train[:3]).merged(task.observe(train[3:])) == whole
    assert (whole.users, whole.longest, sum(whole.counts.values())) == (12, 5, 60)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user": "a", "time": 1}, "no column 'item'"),
        ({"user": "a", "item": 1.5, "time": 1}, "names no item"),
        ({"user": "a", "item": " ", "time": 1}, "names no item"),
        ({"user": "a", "item": "x", "time": "soon"}, "neither a number nor a date"),
        ({"user": None, "item": "x", "time": 1}, "names no group"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(row, said):
    task = get("recommendation")({})
    with pytest.raises(Exception, match=rf"log.csv:2: .*{said}"):
        examples(task, [ROWS[0], row])


def test_a_bad_rating_and_options_that_do_not_go_together_are_refused():
    task = get("recommendation")({"rating_column": "stars", "min_rating": 3})
    with pytest.raises(TaskError, match="'stars' holds 'good', which is no rating"):
        task.check({"user": "a", "item": "x", "time": 1, "stars": "good"})
    with pytest.raises(TaskError, match="rating_column and min_rating go together"):
        get("recommendation")({"rating_column": "stars"})
    with pytest.raises(TaskError, match="user_column and item_column are both 'item'"):
        get("recommendation")({"user_column": "item"})


def test_negatives_are_new_to_the_user_and_always_the_same():
    known = {1, 2, 3}
    first = drawn(100, 500, known, 0, "u1")
    assert len(set(first.tolist())) == 100
    assert not known & set(first.tolist())
    assert first.min() >= 1
    assert (drawn(100, 500, known, 0, "u1") == first).all()
    assert (drawn(100, 500, known, 0, "u2") != first).any()
    assert (drawn(100, 500, known, 1, "u1") != first).any()
    assert sorted(drawn(5, 6, {1, 2, 3}, 0, "u").tolist()) == [0, 0, 4, 5, 6], "0 where there are no more"


def test_ranks_and_gains_by_hand_and_ties_flatter_nobody():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [float("nan"), 0.0, 0.0]])
    among = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    found = ranking.ranks(scores, torch.tensor([0.6, 0.5, float("nan")]), among)
    assert found.tolist() == [1, 2, 3]
    hit, gain = ranking.hits(torch.tensor([0, 1, 9, 10, ranking.MISSED]), 10)
    assert hit.item() == 3
    assert gain.item() == pytest.approx(1 + 1 / np.log2(3) + 1 / np.log2(11))


def test_popularity_is_a_ranking_of_its_own():
    assert ranking.popularity([5, 9, 5, 1]).tolist() == [1, 0, 2, 3]


def test_inclusion_in_a_batch_is_the_chance_of_being_drawn_at_least_once():
    found = np.exp(ranking.log_inclusion([1, 3], 2))
    assert found.tolist() == pytest.approx([1 - 0.75**2, 1 - 0.25**2])


def test_a_model_that_knows_nothing_hits_nothing_and_popularity_is_measured_beside_it():
    task, _, ends = learned(rows=[row for user in range(40) for row in cycle(f"u{user}", user, of=40)], negatives=20)
    batch = task.collate(encoded(task, ends))
    found = task.summarise(flat(task.measure(Constant([0.0] * 40), batch)))
    assert set(task.metrics) < set(found)
    assert [found[f"hr_10{all_}"] for all_ in ("", "_all")] == [0, 0]
    assert found["loss"] == pytest.approx(np.log(40))
    as_popular = Constant((-ranking.popularity(task.counts)).astype(np.float32).tolist())
    found = task.summarise(flat(task.measure(as_popular, batch)))
    for name in ("hr_10", "ndcg_10", "hr_10_all", "ndcg_10_all"):
        assert found[name] == pytest.approx(found[f"popularity_{name}"])
    assert 0 < found["hr_10"] < 1


def test_items_that_the_user_has_met_are_not_ranked_among_all():
    task, _, ends = learned()
    batch = task.collate(encoded(task, ends[:1]))  # i00 … i04, then i05
    scores = [9.0] * 5 + [1.0] + [0.0] * 6
    assert task.summarise(flat(task.measure(Constant(scores), batch)))["ndcg_10_all"] == 1.0
    scores[11] = 2.0
    assert task.summarise(flat(task.measure(Constant(scores), batch)))["ndcg_10_all"] == pytest.approx(1 / np.log2(3))


def test_an_item_of_the_held_out_data_alone_counts_as_missed():
    task, _, ends = learned()
    new = task.cut(examples(task, [*cycle("v", 0), {"user": "v", "item": "new", "time": 99}])[0], 0.0)[1]
    rows = task.encode([new, ends[0]])
    assert rows["unseen"].tolist() == [True, False]
    assert rows["targets"].tolist() == [0, 1]
    best = Constant([9.0] * 5 + [1.0] + [0.0] * 6)
    sums = flat(task.measure(best, task.collate({k: v for k, v in rows.items() if k not in task.counted})))
    assert task.summarise(sums)["hr_10_all"] == 0.5


@pytest.mark.parametrize("architecture", ["sasrec", "two-tower"])
@pytest.mark.parametrize("softmax", ["full", "in-batch"])
def test_a_network_learns_a_circle_and_shares_of_rows_add_up(architecture, softmax):
    task, train, ends = learned(softmax=softmax)
    torch.manual_seed(0)
    model = task.build(architecture, CONFIG)
    rows, held = encoded(task, train), encoded(task, ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(40):
        total, terms = task.loss(model, task.collate(rows))
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert terms == rows["targets"].sum()
    with torch.no_grad():
        sums = [task.measure(model.eval(), task.collate({k: v[at::2] for k, v in held.items()})) for at in (0, 1)]
    found = task.summarise({key: sum(flat(part)[key] for part in sums) for key in flat(sums[0])})
    assert found["ndcg_10"] > 0.9
    answer = task.predict(model, [{"history": ["i02", "i03", "i04"]}])[0]
    assert answer["items"][0] == "i05"


def test_what_lies_behind_the_end_of_a_history_changes_nothing():
    task, _, _ = learned()
    torch.manual_seed(0)
    for architecture in task.networks:
        model = task.build(architecture, CONFIG).eval()
        alone = task.predict(model, [{"history": ["i02"]}])[0]
        beside = task.predict(model, [{"history": ["i02"]}, {"history": ["i05", "i06", "i07", "i08"]}])[0]
        assert alone["items"] == beside["items"]
        assert alone["scores"] == pytest.approx(beside["scores"], abs=1e-5)


def test_a_history_without_a_known_item_is_measured_by_popularity_as_it_is_answered():
    task, _, _ = learned([*ROWS, *(row for at in range(9) for row in cycle(f"v{at}", 7, length=2))])
    rows = [{"user": "new", "item": "never", "time": 0}, {"user": "new", "item": "i07", "time": 1}]
    end = task.cut(examples(task, rows)[0], 0.0)[1]
    batch = task.collate(encoded(task, [end]))
    worst = Constant([1.0] * 7 + [-1.0] + [1.0] * 4)
    assert task.predict(worst, [{"history": ["never"]}])[0]["items"][0] == "i07"
    assert task.summarise(flat(task.measure(worst, batch)))["ndcg_10_all"] == 1.0


def test_an_item_that_was_rated_too_low_has_been_seen_all_the_same():
    task = get("recommendation")({"rating_column": "stars", "min_rating": 4})
    rows = [{**row, "stars": 1 if row["item"] == "i03" else 5} for row in ROWS]
    task.fit(task.observe(examples(task, rows)))
    (user,) = examples(task, [{"user": "u", "item": f"i{at:02d}", "time": at, "stars": 5 - at} for at in range(3)])
    instance = task.instance(user)
    assert instance == {"history": ["i00", "i01"], "also_seen": ["i02"]}
    model = Constant([float(-number) for number in range(len(task.items))])
    assert task.predict(model, [instance])[0]["items"][0] == "i04"
    assert task.predict(model, [{**instance, "exclude_seen": False}])[0]["items"][0] == "i00"
    with pytest.raises(TaskError, match="also_seen is a list of items' names"):
        task.predict(model, [{"history": ["i01"], "also_seen": "i02"}])


def test_answers_leave_out_what_was_seen_count_what_is_unknown_and_fall_back_on_popularity():
    task, _, _ = learned()
    model = Constant([float(number) for number in range(12)])
    first, second, third = task.predict(
        model,
        [
            {"history": ["i11", "never", ""], "k": np.int32(2)},
            {"history": ["i11"], "k": 2, "exclude_seen": np.bool_(False)},
            {"history": ["never"], "k": 12},
        ],
    )
    assert (first["items"], first["scores"], first["unknown"]) == (["i10", "i09"], [10.0, 9.0], 1)
    assert second["items"] == ["i11", "i10"]
    assert third["ranked_by"] == "popularity"
    assert third["scores"] == sorted(third["scores"], reverse=True)
    assert sum(third["scores"]) == pytest.approx(1)
    for k in (0, 13):
        with pytest.raises(TaskError, match=f"k is {k}: there are 12 items"):
            task.predict(model, [{"history": ["i01"], "k": k}])
    with pytest.raises(TaskError, match="a history is a list of items' names"):
        task.predict(model, [{"history": "i01"}])


@pytest.mark.parametrize("architecture", ["sasrec", "two-tower"])
def test_a_saved_model_loads_back_and_answers_the_same(tmp_path, architecture):
    task, _, _ = learned()
    torch.manual_seed(0)
    model = task.build(architecture, CONFIG).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("recommendation").load(tmp_path)
    asked = [{"history": ["i03", "i04"], "k": 5}]
    assert again.predict(again.load_model(tmp_path), asked) == task.predict(model, asked)
    child = get("recommendation")({})
    assert child.inherit(tmp_path)
    assert (child.items, child.counts, child.max_length) == (task.items, task.counts, 4)
    with pytest.raises(TaskError, match=r"task\.max_length is 9, but the model it starts from reads 4"):
        get("recommendation")({"max_length": 9}).inherit(tmp_path)
    with pytest.raises(TaskError, match=r"holds no recommender of Tandem: items\.json"):
        get("recommendation").load(tmp_path / "nowhere")


def test_a_config_that_makes_no_model_is_refused_before_anything_is_learned():
    task = get("recommendation")({})
    for config, said in (
        ({"hidden_size": 7}, "no multiple of num_attention_heads"),
        ({"num_items": 5}, "follows from the data"),
        ({"layers": 5}, "sasrec has no 'layers'"),
    ):
        with pytest.raises(TaskError, match=said):
            task.check_model("sasrec", config)
    with pytest.raises(TaskError, match="no 'sasrek'; did you mean 'sasrec'"):
        task.check_model("sasrek", {})
    task.check_model("two-tower", {"hidden_size": 16})


def test_prepared_data_holds_out_one_interaction_a_user_and_shares_of_ranks_are_the_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"user": "one", "item": "i00", "time": 0}]))
    spec = JobSpec.model_validate(
        {
            "name": "circle",
            "phase": "pretrain",
            "task": {"name": "recommendation", "max_length": 4, "negatives": 3},
            "model": {"architecture": "sasrec"},
            "data": {"train": str(path)},
            "training": {"steps": 1},
        }
    )
    prepared = prepare.prepare(spec, tmp_path, tmp_path / "s", parent=None, on_progress=lambda *_: None)
    assert (prepared.train_rows, prepared.eval_rows) == (12, 12)
    said = " | ".join(prepared.notes)
    assert "held out: the last interaction of each user; 1 of 13 are too short, and are learned whole" in said
    assert "1 of 13 users have fewer than two interactions" in said
    task = prepared.task(spec)
    model = task.build("sasrec", CONFIG)
    rows: Rows = prepare.rows_of(prepared, prepared.eval_files)
    how = {"limit": None, "seed": 0, "micro_batch": 4, "device": torch.device("cpu")}
    shares = [measure(task, model, rows, **how, rank=rank, world_size=2) for rank in (0, 1)]
    whole = task.summarise(measure(task, model, rows, **how))
    assert task.summarise(joined(shares)) == pytest.approx(whole)


def test_fine_tuning_keeps_the_items_that_the_model_knows_and_counts_others(tmp_path):
    task, _, _ = learned()
    model = task.build("sasrec", CONFIG)
    model.save_pretrained(tmp_path / "parent")
    task.save(tmp_path / "parent")
    log = [*cycle("v", 0), {"user": "v", "item": "new", "time": 2.5}, *cycle("w", 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    spec = JobSpec.model_validate(
        {
            "name": "more",
            "phase": "finetune",
            "task": {"name": "recommendation", "negatives": 3},
            "model": {"from": str(tmp_path / "parent")},
            "data": {"train": str(tmp_path / "log.jsonl")},
            "training": {"steps": 1},
        }
    )
    made = prepare.prepare(spec, tmp_path, tmp_path / "s", parent=tmp_path / "parent", on_progress=lambda *_: None)
    said = " | ".join(made.notes)
    assert "12 items and their popularity are those of the model that the job starts from" in said
    assert "1 of 2 users have met items that the training data does not hold" in said
    assert made.task(spec).items == task.items
