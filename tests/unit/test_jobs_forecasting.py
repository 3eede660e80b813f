"""Forecasting: steps out of stamps, windows, seasonal naive and MASE by hand, models that load back."""

import io
import json
import math
from datetime import date, datetime, timedelta

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.data import corpora_series, prepare
from jobs.data.examples import BadRows, Example
from jobs.data.grouping import grouped
from jobs.spec import JobSpec
from jobs.tasks import TaskError, forecast_scores, get, time_steps
from jobs.tasks.forecast_rows import Shape, naive, naive_error, padded, reach, starts, to_learn
from jobs.tasks.series import Series, SeriesFindings
from jobs.tasks.time_steps import Step
from jobs.worker.evaluate import flat

CONFIGS = {
    "transformer": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "patch_length": 4},
    "gru": {"hidden_size": 8},
}
PATTERN = [1.0, 3.0, 2.0, 5.0]


def rows(series, count=24, first=date(2024, 1, 1)):
    return [
        {
            "shop": series,
            "day": (first + timedelta(days=at)).isoformat(),
            "sold": PATTERN[at % 4] * (1 + len(series)),
        }
        for at in range(count)
    ]


ROWS = [row for name in ("a", "bb", "ccc") for row in rows(name)]
OPTIONS = {"series_column": "shop", "time_column": "day", "target_column": "sold", "horizon": 3, "season": 4}


def examples(task, of=ROWS):
    found = [Example(row, f"log.csv:{line}") for line, row in enumerate(of, 1)]
    made = list(grouped(found, task.grouping(), task.check, BadRows()))
    for example in made:
        task.content(example)
    return made


def learned(of=ROWS, **options):
    task = get("forecasting")({**OPTIONS, **options})
    parts = [task.cut(example, 0.0) for example in examples(task, of)]
    train = [part[0] for part in parts]
    task.fit(task.observe(train[:1]).merged(task.observe(train[1:])))
    return task, train, [part[1] for part in parts]


def encoded(task, chunk):
    return {key: column for key, column in task.encode(chunk).items() if key not in task.counted}


class Fixed(torch.nn.Module):
    """Answers the quantiles that it is told, whatever it sees."""

    def __init__(self, quantiles):
        super().__init__()
        self.quantiles = torch.nn.Parameter(torch.tensor(quantiles))

    def forward(self, values, observed):
        return self.quantiles.expand(len(values), *self.quantiles.shape)


@pytest.mark.parametrize(
    ("text", "step", "season", "words"),
    [
        ("hour", Step("second", 3600), 24, "hour"),
        ("15 minutes", Step("second", 900), 96, "15 minutes"),
        ("7 days", Step("second", 604_800), 52, "week"),
        ("day", Step("second", 86_400), 7, "day"),
        ("month", Step("month", 1), 12, "month"),
        ("quarter", Step("month", 3), 4, "quarter"),
        ("year", Step("month", 12), 1, "year"),
        ("10", Step("number", 10), 1, "10"),
        ("5 hours", Step("second", 18_000), 1, "5 hours"),
    ],
)
def test_a_step_is_read_said_and_has_a_season(text, step, season, words):
    assert time_steps.parsed(text) == step
    assert (step.season(), str(step)) == (season, words)


@pytest.mark.parametrize("text", ["", "fortnight", "0", "1.5 months", "-1", "day day"])
def test_what_is_no_step_is_refused(text):
    with pytest.raises(TaskError, match=r"task forecasting: frequency: "):
        get("forecasting")({"frequency": text or " "})


@pytest.mark.parametrize(
    ("stamps", "step"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31"], "month"),
        (["2024-01-15", "2024-04-15", "2024-10-15"], "quarter"),
        ([datetime(2024, 1, 1, hour) for hour in (0, 6, 18)], "6 hours"),
        (["2024-03-01T00:00:00Z", "2024-03-01T00:30:00Z", "2024-03-01T01:00:00Z"], "30 minutes"),
        (["2024-01-01", "2024-01-02", "2024-01-05"], "day"),
        ([3, 5, 9], "2"),
        ([0, 10, 11, 20, 30], "10"),
        (["1.5", "2.0", "2.5"], "0.5"),
    ],
)
def test_the_step_is_the_usual_one_between_stamps(stamps, step):
    assert str(time_steps.inferred(stamps)) == step
    assert time_steps.inferred(stamps[:2]) is None


def test_places_follow_the_calendar():
    assert time_steps.places(["2024-01-31", "2024-02-29", "2024-05-31"], Step("month", 1)) == [0, 1, 4]
    assert time_steps.places([10, 20, 50], Step("number", 10)) == [0, 1, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"day": "2024-01-02T01:00:00"}, r"log.csv:1 and 23 more: .*lies 1.04167 steps of day behind the last"),
        ({"day": "2024-01-01"}, r"the time '2024-01-01' comes twice"),
        ({"sold": "many"}, r"log.csv:2: .*'sold' holds 'many', which is no number"),
        ({"sold": None}, r"log.csv:2: .*no value; task.gaps: missing"),
        ({"sold": "inf"}, r"which is no number"),
        ({"day": "soon"}, r"neither a number nor a date"),
    ],
)
def test_what_is_irregular_or_no_number_is_refused_where_it_stands(tmp_path, change, said):
    data = [*rows("a")[:1], {**rows("a")[1], **change}, *rows("a")[2:]]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    with pytest.raises(Exception, match=said.replace("log.csv", r"log.*jsonl")):
        prepare.prepare(spec_of(path), tmp_path, tmp_path / "s", parent=None, on_progress=lambda *_: None)


def spec_of(path, **options):
    return JobSpec.model_validate(
        {
            "name": "shops",
            "phase": "pretrain",
            "task": {"name": "forecasting", **OPTIONS, **options},
            "model": {"architecture": "transformer"},
            "data": {"train": str(path)},
            "training": {"steps": 1},
        }
    )


def test_a_stamp_between_two_steps_is_refused_where_the_step_is_given():
    task = get("forecasting")({**OPTIONS, "frequency": "day"})
    with pytest.raises(TaskError, match=r"lies 1\.04167 steps of day behind the last"):
        examples(task, [*rows("a")[:1], {**rows("a")[1], "day": "2024-01-02T01:00:00"}])


def test_gaps_are_refused_or_kept_as_steps_without_a_value():
    broken = [row for at, row in enumerate(rows("a")) if at not in (5, 6)]
    with pytest.raises(TaskError, match=r"2 step\(s\) of day are missing between '2024-01-05' and '2024-01-08'"):
        examples(get("forecasting")(OPTIONS), broken)
    task, train, _ = learned([*broken, *rows("b")], gaps="missing", stride=1, context_length=4)
    assert task.fit(task.observe(train))[-1] == "2 steps are missing: not learned"
    found = encoded(task, train[:1])
    assert found["targets"].sum() < 3 * len(found["targets"])
    holes = found["observed"] == 0
    assert holes.any()
    assert (found["context"][holes] == 0).all()


def test_the_end_is_held_out_and_said_what_was_chosen():
    task, train, ends = learned()
    assert [len(part["sold"]) for part in train] == [21] * 3
    said = task.fit(task.observe(train))
    assert said == [
        "3 series, 63 steps of day, by their stamps; a season has 4",
        "12 steps are read, 3 are forecast; windows begin every 1, one of four with a shorter past",
    ]
    row = task.encode(ends[:1])
    assert row["context"][0].tolist() == [PATTERN[at % 4] * 2 for at in range(9, 21)]
    assert row["future"][0].tolist() == [PATTERN[at % 4] * 2 for at in range(21, 24)]
    assert (row["naive"] == row["future"]).all(), "the pattern repeats"
    assert row["scale"].tolist() == [0.0]
    assert row["flat"].tolist() == [True]
    assert row["drawn"].tolist() == [1]
    assert task.cut(examples(task, rows("a", 4))[0], 0.0) is None, "one step would be left"


def test_windows_begin_every_stride_from_the_end_and_short_series_have_short_contexts():
    shape = Shape(context=8, horizon=3, season=1, stride=2, drawn=())
    assert starts(20, shape) == [17, 15, 13, 11, 9]
    assert starts(10, shape) == [7, 5, 3]
    assert starts(3, shape) == []
    found = to_learn([Series("a", np.arange(10.0), [], None)], shape)
    assert found["context"][2].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]
    assert found["observed"][2].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert found["future"][2].tolist() == [3, 4, 5]
    assert [reach(number, 8) for number in range(9)] == [8, 8, 8, 1, 8, 8, 8, 2, 8]
    none = to_learn([Series("a", np.arange(3.0), [], None)], shape)
    assert (none["context"].shape, none["short"].tolist()) == ((0, 8), [True])


def test_seasonal_naive_repeats_the_last_season_that_is_known():
    nan = math.nan
    assert naive(np.array([1.0, 2, 3, 4, nan, 6]), 3, 4).tolist() == [4, 2, 6, 4]
    assert naive(np.array([5.0, 7.0]), 4, 3).tolist() == [7, 7, 5], "no such step yet: the last value"
    assert naive_error(np.array([1.0, 2, 3, 5, nan, 4]), 3) == pytest.approx((4 + 1) / 2)
    assert naive_error(np.array([1.0, 2]), 3) == 0


def test_metrics_by_hand():
    quantiles = torch.tensor([[[0.0, 2.0, 4.0], [0.0, 2.0, 4.0]], [[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]])
    future, known = torch.tensor([[1.0, 5.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    levels = [0.1, 0.5, 0.9]
    found = forecast_scores.sums(quantiles, future, known, levels, torch.tensor([2.0, 0.0]))
    assert (found["mase"].item(), found["mase_rows"].item()) == ((1 + 3) / 2 / 2, 1)
    assert found["smape"].item() == pytest.approx((200 * 1 / 3 + 200 * 3 / 7) / 2)
    assert found["within"].item() == 2
    assert found["nominal"].item() == pytest.approx(3 * 0.8)
    loss = forecast_scores.pinball(quantiles, future, known, torch.tensor(levels))
    by_hand = sum(
        2 * max(level * (y - q), (level - 1) * (y - q)) / 3
        for y, row in ((1.0, [0.0, 2.0, 4.0]), (5.0, [0.0, 2.0, 4.0]))
        for level, q in zip(levels, row, strict=True)
    )
    assert loss.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("scaling", ["mean-absolute", "standard"])
def test_a_forecast_scales_with_its_history(scaling):
    task, _, _ = learned(scaling=scaling)
    torch.manual_seed(0)
    model = task.build("transformer", CONFIGS["transformer"]).eval()
    history = np.array(PATTERN * 3)
    one, thousand = task.predict(model, [history, 1000 * history])
    np.testing.assert_allclose(np.array(thousand["median"]), 1000 * np.array(one["median"]), rtol=1e-4)
    same = task.predict(model, [np.full(12, 7.3)])[0]
    assert np.isfinite(same["quantiles"]).all()


def test_figures_beside_those_of_seasonal_naive():
    task, _, _ = learned(quantiles=[0.1, 0.5, 0.9])
    noisy = [{**row, "sold": row["sold"] + at % 3} for at, row in enumerate(ROWS)]
    ends = [task.cut(example, 0.0)[1] for example in examples(task, noisy)]
    batch = task.collate(encoded(task, ends))
    found = task.summarise(flat(task.measure(Fixed([[0.0, 1e6, 2e6]] * 3), batch)))
    assert set(task.metrics) < set(found)
    assert found["coverage"] == 1
    assert found["coverage_error"] == pytest.approx(0.2)
    assert found["mase"] > 1000 > found["naive_mase"] > 0
    assert found["smape"] == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_network_learns_a_pattern_and_shares_of_rows_add_up(architecture):
    task, train, ends = learned()
    torch.manual_seed(0)
    model = task.build(architecture, {**CONFIGS[architecture], "dropout": 0.0})
    batch, held = task.collate(encoded(task, train)), encoded(task, ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        total, terms = task.loss(model, batch)
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert terms == 3 * len(batch["context"])
    model.eval()
    with torch.no_grad():
        sums = [flat(task.measure(model, task.collate({k: v[at::2] for k, v in held.items()}))) for at in (0, 1)]
        whole = flat(task.measure(model, task.collate(held)))
    added = {key: sums[0][key] + sums[1][key] for key in whole}
    assert task.summarise(added) == pytest.approx(task.summarise(whole), rel=1e-4)
    assert task.summarise(whole)["smape"] < 25
    image = Image.open(io.BytesIO(task.figures(added)["forecasts.png"]))
    assert image.size[0] > image.size[1] / 2
    assert task.figures({key: 0.0 for key in added}) == {}, "nothing was drawn"


def test_answers_are_in_order_and_as_long_as_asked_for():
    task, _, _ = learned(quantiles=[0.1, 0.5, 0.9])
    model = Fixed([[3.0, 1.0, 2.0]] * 3)
    first, second = task.predict(
        model, [{"history": np.float32([1, -1, math.nan]), "horizon": np.int32(2)}, {"history": [2.0]}]
    )
    assert first == {"quantiles": [[1.0, 2.0, 3.0]] * 2, "median": [2.0, 2.0]}
    assert second["median"] == [4.0] * 3
    for instance, said in (
        ({"history": [1.0], "horizon": 4}, "horizon is 4; the model forecasts from 1 to 3 steps"),
        ({"history": [math.inf]}, "infinite number"),
        ({"history": [math.nan]}, "no number at all"),
    ):
        with pytest.raises(TaskError, match=said):
            task.predict(model, [instance])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_saved_model_loads_back_and_answers_the_same(tmp_path, architecture):
    task, _, _ = learned(scaling="standard")
    torch.manual_seed(0)
    model = task.build(architecture, CONFIGS[architecture]).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("forecasting").load(tmp_path)
    asked = [{"history": PATTERN * 2}]
    assert again.predict(again.load_model(tmp_path), asked) == task.predict(model, asked)
    child = get("forecasting")({"season": 2})
    assert child.inherit(tmp_path)
    assert (child.context_length, str(child.step), child.season) == (12, "day", 2)
    assert (child.horizon, child.scaling) == (3, "standard")
    for options, said in (
        ({"horizon": 12}, r"task\.horizon is 12, but the model it starts from has 3"),
        ({"scaling": "mean-absolute"}, r"task\.scaling is mean-absolute, but .* standard"),
        ({"horizon": 3, "scaling": "standard", "frequency": "hour"}, r"task\.frequency is hour, but .* day"),
        ({"horizon": 3, "scaling": "standard", "quantiles": [0.5]}, r"task\.quantiles is"),
    ):
        with pytest.raises(TaskError, match=said):
            get("forecasting")(options).inherit(tmp_path)
    with pytest.raises(TaskError, match=r"holds no forecaster of Tandem: forecasting\.json"):
        get("forecasting").load(tmp_path / "nowhere")


@pytest.mark.parametrize("levels", [[0.1, 0.9], [0.9, 0.5, 0.1], [0.2, 0.5, 0.9], [0.0, 0.5, 1.0]])
def test_quantiles_come_in_pairs_around_the_median(levels):
    with pytest.raises(TaskError, match=r"quantiles: .* are not 0\.5 and pairs around it"):
        get("forecasting")({"quantiles": levels})


def test_findings_do_not_depend_on_where_chunks_are_cut():
    task, train, _ = learned()
    assert SeriesFindings().merged(task.observe(train)) == task.observe(train)
    assert task.observe(train[:1]).merged(task.observe(train[1:])) == task.observe(train)


def test_a_config_that_makes_no_model_is_refused():
    task = get("forecasting")({})
    for config, said in (({"horizon": 4}, "follows from the data"), ({"patch_length": 0}, "patch_length 0 is below 1")):
        with pytest.raises(TaskError, match=said):
            task.check_model("transformer", config)
    task.check_model("gru", {"num_hidden_layers": 2})


def test_prepared_data_holds_out_the_end_of_each_series(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({**row, "weather": "fine"}) + "\n" for row in [*ROWS, *rows("x", 4)]))
    made = prepare.prepare(spec_of(path), tmp_path, tmp_path / "s", parent=None, on_progress=lambda *_: None)
    said = " | ".join(made.notes)
    assert made.eval_rows == 3
    assert "the last task.horizon steps of each series; 1 of 4 are too short, and are learned whole" in said
    assert "columns that have no effect: 'weather' (in 4)" in said


def test_a_median_alone_has_no_band_whose_coverage_could_be_measured():
    for quantiles, there in (([0.5], False), ([0.1, 0.5, 0.9], True)):
        task, _, ends = learned(quantiles=quantiles)
        batch = task.collate(encoded(task, ends))
        found = task.summarise(flat(task.measure(Fixed([quantiles] * 3), batch)))
        assert ("coverage" in found, "coverage_error" in found) == (there, there)
        assert found["smape"] > 0


def test_a_series_of_longer_steps_than_the_models_is_not_forecast():
    task, _, _ = learned(gaps="missing")
    (usual, weekly) = examples(
        task, [*[row for row in rows("a", 9) if row["day"][-1] != "5"], *[row for row in rows("bb", 36)[::7]]]
    )
    assert len(task.instance(usual)["history"]) == 9, "a day that is missing makes no other step"
    with pytest.raises(TaskError, match="rows of the series are week apart, and the model's steps are day"):
        task.instance(weekly)


def test_a_job_that_goes_on_holds_out_as_many_steps_as_its_parent_forecasts(tmp_path):
    path, parent = tmp_path / "log.jsonl", tmp_path / "parent"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parent.mkdir()
    learned(scaling="standard")[0].save(parent)
    options = {"name": "forecasting", **{key: OPTIONS[key] for key in OPTIONS if key.endswith("_column")}}
    spec = JobSpec.model_validate(
        {
            "name": "more",
            "phase": "finetune",
            "task": options,
            "model": {"from": str(parent)},
            "data": {"train": str(path)},
            "training": {"steps": 1},
        }
    )
    made = prepare.prepare(spec, tmp_path, tmp_path / "s", parent=parent, on_progress=lambda *_: None)
    ends = prepare.rows_of(made, made.eval_files)
    assert [ends.targets(np.array([row])) for row in range(len(ends))] == [3, 3, 3], (
        "the parent's horizon, not the default"
    )
    assert ends.take(np.array([0]))["future"][0].tolist() == [6.0, 4.0, 10.0]
    assert (made.task(spec).horizon, made.task(spec).scaling) == (3, "standard")


def counted(task, chunk):
    said = task.counted.keys() - {"flat"}
    return {key: column.tolist() for key, column in task.encode(chunk).items() if key in said and column.any()}


def test_an_end_that_was_learned_is_no_news_to_a_model(tmp_path):
    task, train, ends = learned()
    assert counted(task, ends) == {}
    task.save(tmp_path)
    later = get("forecasting").load(tmp_path, {**OPTIONS})
    early = [{key: value if key == "shop" else value[:-1] for key, value in example.items()} for example in train]
    held = [task.cut(example, 0.0)[1] for example in early]
    assert counted(later, held) == {"told": [True] * 3}, "its last steps are among those that were learned"
    assert counted(later, ends) == {}
    other = [{**example, "shop": f"other {example['shop']}"} for example in held]
    assert counted(later, other) == {}


def test_what_32_bits_cannot_hold_is_refused_or_counted():
    task, _, _ = learned()
    with pytest.raises(TaskError, match=r"column 'sold' holds 1e\+39; numbers to 1e\+37 are read"):
        task.check({"shop": "a", "day": "2024-01-01", "sold": 1e39})
    with pytest.raises(TaskError, match=r"a history holds an infinite number, or one beyond 1e\+37"):
        task.predict(None, [{"history": [1.0, 1e39]}])
    high = [{**row, "sold": 1.7e9 + row["sold"]} for row in rows("a")]
    flat = [{**row, "sold": 0.1} for row in rows("bb")]
    assert counted(task, examples(task, [*high, *flat])) == {"coarse": [True, False]}


def test_a_series_with_few_values_is_counted():
    weekly = [row for row in rows("a", 140) if date.fromisoformat(row["day"]).weekday() == 0]
    task, _, _ = learned([*rows("bb"), *rows("ccc"), *rows("dddd")], gaps="missing")
    assert counted(task, examples(task, [*weekly, *rows("bb")])) == {"sparse": [True, False]}


def test_rows_that_wait_for_a_forecast_are_no_history():
    task = get("forecasting")({**OPTIONS, "gaps": "missing"})
    (gap,) = examples(task, [{**row, "sold": None if at == 5 else row["sold"]} for at, row in enumerate(rows("a"))])
    assert np.isnan(task.instance(gap)["history"]).sum() == 1
    for count in (2, 24):
        waiting = [{**row, "sold": None if at >= 24 - count else row["sold"]} for at, row in enumerate(rows("a"))]
        with pytest.raises(TaskError, match=rf"the last {count} step\(s\) of the series have no value"):
            task.instance(*examples(task, waiting))


def test_one_series_needs_no_column_of_names():
    task = get("forecasting")({**OPTIONS, "series_column": None})
    (example,) = examples(task, rows("a"))
    assert task.instance(example)["history"].tolist() == [PATTERN[at % 4] * 2 for at in range(24)]


def test_the_corpus_is_what_its_page_says():
    values = corpora_series.values()
    assert values.shape == (50, 500)
    assert (values > 0).all()
    first = next(iter(corpora_series.seasonal_series().read()))
    assert dict(first) == {"series": "shop-00", "time": "2023-01-02", "target": values[0, 0]}
    week = np.array([np.corrcoef(series[:-7], series[7:])[0, 1] for series in values])
    assert week.mean() > 0.8
    assert padded(values[0], 3)[0].tolist() == values[0, -3:].astype(np.float32).tolist()


def test_fine_tuning_takes_series_of_the_model_s_own_step_alone(tmp_path):
    task, _, _ = learned()
    model = task.build("gru", CONFIGS["gru"])
    model.save_pretrained(tmp_path / "parent")
    task.save(tmp_path / "parent")
    spec = spec_of(tmp_path / "log.jsonl").model_dump(exclude_unset=True) | {
        "phase": "finetune",
        "model": {"from": str(tmp_path / "parent")},
    }

    def made(of):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
        how = {"parent": tmp_path / "parent", "on_progress": lambda *_: None}
        return prepare.prepare(JobSpec.model_validate(spec), tmp_path, tmp_path / "s", **how)

    assert "steps of day: 12 are read, 3 forecast, as the model has it" in made(rows("dddd")).notes
    monthly = [{**row, "day": f"{2000 + at // 12}-{at % 12 + 1:02d}-01"} for at, row in enumerate(rows("m"))]
    with pytest.raises(Exception, match=r"30 step\(s\) of day are missing between .*; a step here is a month"):
        made(monthly)
