"""Batch inference with real models in the test's own process: what a row becomes, and that batches change nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import specfile
from cluster.errors import UserError
from jobs.data import sources
from jobs.data.examples import BadRow, Example
from jobs.predict import parts, terms
from jobs.predict.columns import KeptColumns
from jobs.predict.parts import Form
from jobs.predict.predictors import TaskPredictor, answers, loaded_task, predicted_columns
from jobs.predict.rows import Shard, Tolerance, shards, survey
from jobs.predict.worker import CUT, Work, Worker
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.tasks import Task, TaskError, get
from serve.engines.offline import seed_of
from tests.support import opinions as opinions_model
from tests.support import tiny_models
from tests.unit import test_jobs_seq2seq as seq2seq

BASE = "{name: x, phase: predict, model: {from: m}, data: {predict: in.jsonl}}"


@pytest.fixture(scope="module")
def opinions(tmp_path_factory):
    return opinions_model.classifier(tmp_path_factory.mktemp("opinions"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.language_model(tmp_path_factory.mktemp("model"), context=64)


def spec_of(*overrides):
    return specfile.loads(BASE, JobSpec, overrides)


def predicted(folder, spec, directory, content, format="jsonl", most_rows=3):
    """Predict for the rows of a file, without Ray; return the rows of the output, and the entries."""
    (folder / "in.jsonl").write_text(content)
    source = sources.open_source(str(folder / "in.jsonl"), folder)
    task = loaded_task(get(spec.task.name)(spec.task.options), directory)
    most = spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0
    found = survey(source, task, KeptColumns(format), Tolerance(most), most_rows)
    run = RunFolder(folder)
    form = Form(format, "p_", False, None, None)
    work = Work(spec, directory, "fp32", run, form, terms.generation_of(spec, task))
    worker = Worker(work)
    worker.load()
    entries = [worker.do(shard) for shard in shards(source, task, found, most_rows)]
    worker.close()
    contents = [(folder / parts.FOLDER / entry.file).read_text() for entry in entries]
    return [json.loads(line) for content in contents for line in content.splitlines()], entries


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- what a row becomes ----------------------------------------------------------------------------------------------


def test_texts_are_classified_as_behind_an_endpoint_whatever_the_batch(tmp_path, opinions):
    rows = [{"id": n, "text": text} for n, text in enumerate(["a good film", "bad", "a bad film that is long", "good"])]
    task = get("text-classification").load(opinions)
    wanted = task.predict(task.load_model(opinions), [row["text"] for row in rows])
    for size in (1, 3):
        found, entries = predicted(
            tmp_path, spec_of("task=text-classification", f"predict.batch_size={size}"), opinions, lines(*rows)
        )
        assert [row["id"] for row in found] == [0, 1, 2, 3]
        assert [row["p_label"] for row in found] == [answer["label"] for answer in wanted]
        assert [row["p_score"] for row in found] == pytest.approx([answer["score"] for answer in wanted], rel=1e-5)
        assert [entry.counts for entry in entries] == [{"truncated": 1}, {}]
        assert all(row["p_error"] is None for row in found)


def test_a_row_that_cannot_be_used_is_in_its_place_with_the_reason(tmp_path, opinions):
    content = lines({"text": "good"}, {"text": ""}, {"text": "bad"}) + "not json\n" + lines({"other": 1})
    spec = spec_of("task=text-classification", "data.bad_rows=skip")
    found, entries = predicted(tmp_path, spec, opinions, content)
    assert sorted(found[0]) == ["p_error", "p_label", "p_score", "p_scores", "p_truncated", "text"]
    assert [bool(row["p_error"]) for row in found] == [False, True, False, True, True]
    assert found[1]["text"] == "", "its own columns are there all the same"
    assert found[4]["other"] == 1
    assert [number for entry in entries for number, _, _ in entry.failed] == [1, 3, 4]


def test_a_row_on_which_predict_fails_fails_alone_and_ends_the_job_where_the_spec_says_so(tmp_path):
    class Fails:
        name = "fails"
        generates = False

        def predict(self, model, instances):
            if "b" in instances:
                raise RuntimeError("no b, please")
            return [{"said": instance} for instance in instances]

        def instance(self, example):
            return example["text"]

    rows = [Example({"text": text}, f"in:{n}") for n, text in enumerate("acbda")]
    found = answers(Fails(), TaskPredictor(Fails(), None), 0, [*rows, BadRow("in:9", "broken")])
    assert [each if isinstance(each, BadRow) else each["said"] for each in found] == [
        "a", "c", BadRow("in:2", "RuntimeError: no b, please"), "d", "a", BadRow("in:9", "broken"),
    ]  # fmt: skip
    worker = Worker(Work(spec_of(), tmp_path, "fp32", RunFolder(tmp_path), Form("jsonl", "", False, None, None), {}))
    worker._task, worker._predictor = Fails(), TaskPredictor(Fails(), None)
    with pytest.raises(UserError, match=r"in:2: RuntimeError: no b, please; with data.bad_rows: skip it would be"):
        worker.do(Shard(0, 0, rows, ""))
    assert not (tmp_path / parts.FOLDER).exists()


def test_images_are_read_as_in_training(tmp_path):
    directory = tiny_models.image_classifier(tmp_path)
    task = loaded_task(get("image-classification")({}), directory)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    model = task.load_model(directory)
    held = {"image": {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}}
    forms = [{"image": pixels}, {"image": str(tmp_path / "x.png")}, held]
    found = task.predict(model, [task.instance(form) for form in forms])
    assert found[0] == found[1] == found[2]
    assert predicted_columns(task) == ["label", "score", "scores"]
    with pytest.raises(TaskError, match="no column 'image'"):
        task.instance({"picture": pixels})


# -- generation ------------------------------------------------------------------------------------------------------

ROWS = [
    {"text": "the quick brown"},
    {"text": "for i in"},
    {"text": "def add("},
    {"text": "x " * 200},
    {"text": "the lazy dog"},
]


def test_what_is_generated_for_a_row_depends_on_its_number_and_not_on_the_sharding(tmp_path, model):
    spec = spec_of("data.bad_rows=skip", "predict.generation={max_tokens: 8, temperature: 1.0, seed: 7}")
    told = [predicted(tmp_path, spec, model, lines(*ROWS), most_rows=rows)[0] for rows in (2, 5)]
    assert told[0] == told[1]
    found = told[0]
    assert [bool(row["p_error"]) for row in found] == [False, False, False, True, False]
    assert "context is 64 tokens" in found[3]["p_error"]
    assert all(1 <= row["p_completion_tokens"] <= 8 for row in found if not row["p_error"])
    other = predicted(
        tmp_path,
        spec_of("data.bad_rows=skip", "predict.generation={max_tokens: 8, temperature: 1.0, seed: 8}"),
        model,
        lines(*ROWS),
    )
    assert [row.get("p_text") for row in other[0]] != [row.get("p_text") for row in found]


def test_greedy_text_is_that_of_transformers_and_what_is_cut_is_counted(tmp_path, model):
    spec = spec_of("predict.generation={max_tokens: 6, temperature: 0}")
    (row,), (entry,) = predicted(tmp_path, spec, model, lines(ROWS[0]))
    task = get("causal-lm").load(model)
    ids = task.tokenizer(ROWS[0]["text"], return_tensors="pt")
    whole = task.load_model(model).generate(**ids, max_new_tokens=6, do_sample=False)[0]
    expected = task.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert row["p_text"] == expected
    assert row["p_prompt_tokens"] == ids["input_ids"].shape[1]
    assert entry.counts == ({CUT: 1} if row["p_finish_reason"] == "length" else {})


def test_a_translator_answers_through_its_own_engine(tmp_path):
    directory = tmp_path / "translator"
    directory.mkdir()
    task = seq2seq.learned()
    torch.manual_seed(5)
    task.build("t5", seq2seq.CONFIGS["t5"]).save_pretrained(directory)
    task.save(directory)
    spec = spec_of("task=seq2seq", "predict.generation={max_tokens: 5}", "predict.batch_size=3")
    rows = [{"source": text} for text in ("one two", "three", "four five one", "two")]
    found, _ = predicted(tmp_path, spec, directory, lines(*rows), most_rows=3)
    alone, _ = predicted(tmp_path, spec, directory, lines(*rows), most_rows=1)
    assert found == alone
    assert [row["source"] for row in found] == [row["source"] for row in rows]
    assert all(row["p_error"] is None and 0 < row["p_completion_tokens"] <= 5 for row in found)


def test_settings_of_the_model_that_are_not_honoured_are_said(tmp_path, model):
    changed = tmp_path / "model"
    shutil.copytree(model, changed)
    config = json.loads((changed / "generation_config.json").read_text())
    (changed / "generation_config.json").write_text(json.dumps({**config, "do_sample": False, "num_beams": 4}))
    form = Form("jsonl", "p_", False, None, None)
    worker = Worker(Work(spec_of(), changed, "fp32", RunFolder(tmp_path), form, {"max_tokens": 4, "seed": 0}))
    said: list[str] = []
    worker.load(say=said.extend)
    rows = (Example(ROWS[0], "in:1"),)
    texts = []
    for number in (0, 1):
        entry = worker.do(Shard(number, number, rows, ""))
        texts.append(json.loads((tmp_path / parts.FOLDER / entry.file).read_text())["p_text"])
    worker.close()
    assert texts[0] == texts[1], "do_sample: false is greedy, whatever the row's seed"
    assert any("num_beams: 4" in each for each in said)


def test_a_seed_of_a_row_is_63_bits_and_its_own():
    seeds = {seed_of(seed, row) for seed in range(10) for row in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


QUESTION = {"role": "user", "content": "What?"}


@pytest.mark.parametrize(
    ("example", "asked"),
    [
        ({"text": "go on"}, "go on"),
        ({"prompt": "What?"}, (QUESTION,)),
        ({"prompt": "What?", "completion": "That."}, (QUESTION,)),
        ({"instruction": "What?", "input": "", "output": "That."}, (QUESTION,)),
        ({"instruction": "Add.", "input": "1 2"}, ({"role": "user", "content": "Add.\n\n1 2"},)),
        ({"messages": [QUESTION]}, (QUESTION,)),
        ({"messages": [QUESTION, {"role": "assistant", "content": "That."}]}, (QUESTION,)),
        ({"conversations": [{"from": "human", "value": "What?"}]}, (QUESTION,)),
        ({"prompt": "What?", "system": "Be short."}, ({"role": "system", "content": "Be short."}, QUESTION)),
    ],
)  # fmt: skip
def test_what_a_model_is_asked_by_an_example(example, asked):
    assert get("causal-lm")({}).instance(example) == asked


def test_a_named_column_is_the_text_and_a_question_in_the_middle_keeps_its_answer():
    assert get("causal-lm")({"text_column": "prompt"}).instance({"prompt": "What?", "completion": "x"}) == "What?"
    turns = [QUESTION, {"role": "assistant", "content": "That."}, {"role": "user", "content": "Why?"}]
    assert get("causal-lm")({}).instance({"messages": turns}) == tuple(turns)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"other": 1}, "no text in column 'text'"),
        ({"text": " "}, "is empty: there is nothing to go on from"),
        ({"messages": [{"role": "assistant", "content": "That."}]}, "asks nothing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": [QUESTION], "tools": [{"name": "f"}]}, "tools or calls of functions is not honoured"),
    ],
)
def test_what_asks_nothing_or_cannot_be_honoured_is_refused(example, said):
    with pytest.raises(TaskError, match=said):
        get("causal-lm")({}).instance(example)


# -- what is refused before a worker starts --------------------------------------------------------------------------


def test_settings_of_generation_are_for_tasks_that_generate(opinions):
    task = loaded_task(get("text-classification")({}), opinions)
    with pytest.raises(
        UserError, match=r"predict.generation is for tasks that generate, and 'text-classification' does"
    ):
        terms.generation_of(spec_of("predict.generation={max_tokens: 3}"), task)
    assert terms.generation_of(spec_of(), task) == {}
    assert terms.generation_of(spec_of(), get("causal-lm")({})) == {"max_tokens": 256, "stop": [], "seed": 0}


def test_a_task_that_does_not_say_what_it_predicts_from_is_refused():
    class Silent(Task):
        name = "silent"

    with pytest.raises(UserError, match="give its class a method `instance`"):
        terms.generation_of(spec_of(), Silent())


def test_a_model_that_learned_something_else_is_refused(opinions):
    with pytest.raises(TaskError, match=r"leave out task.pair_column"):
        loaded_task(get("text-classification")({"pair_column": "other"}), opinions)
    with pytest.raises(UserError, match=r"leave task.tokenizer out"):
        loaded_task(get("text-classification")({"tokenizer": {"train": "word"}}), opinions)


@pytest.mark.parametrize(
    ("output", "said"),
    [("file:///o.parquet", "names no store"), ("runtime_resources/o.jsonl", "is a copy that goes with the job")],
)
def test_an_output_that_would_not_be_there_is_refused(tmp_path, output, said):
    with pytest.raises(UserError, match=said):
        terms.output_of(spec_of(f"predict.output={output}"), tmp_path, tmp_path)


def test_the_output_is_where_the_spec_says_or_in_the_run(tmp_path):
    assert (
        terms.output_of(spec_of("predict.output=o.jsonl"), tmp_path / "specs", tmp_path) == tmp_path / "specs/o.jsonl"
    )
    assert (
        terms.output_of(spec_of("predict.format=jsonl"), tmp_path, tmp_path / "run")
        == tmp_path / "run/predictions.jsonl"
    )


def test_a_run_goes_on_only_with_what_it_began_with():
    now = {"input": "a", "weights": "b", "learned": "c", "code": "d"}
    terms.check_same({}, now)
    terms.check_same(now, now)
    with pytest.raises(UserError, match=r"since it began, the input .* and the weights behind model.from changed"):
        terms.check_same({**now, "input": "x", "weights": "y"}, now)


def test_the_types_of_parquet_files_are_kept_where_they_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    one = pyarrow.table(
        {"text": ["a"], "n": pyarrow.array([1], pyarrow.int8()), "m": pyarrow.array([1], pyarrow.int8())}
    )
    other = pyarrow.table(
        {"text": ["b"], "n": pyarrow.array([2], pyarrow.int8()), "m": pyarrow.array([2], pyarrow.int32())}
    )
    for name, table in (("a", one), ("b", other)):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    source = sources.open_source(str(tmp_path), tmp_path)
    found = terms.known_types(source)
    assert {name: str(kind) for name, kind in found.items()} == {"text": "string", "n": "int8"}
    task = get("text-classification")({"tokenizer": {"train": "word"}})
    columns = survey(source, task, KeptColumns("parquet", known=found), Tolerance(0), 10).columns
    assert str(columns.schema().field("n").type) == "int8"
    assert str(columns.schema().field("m").type) == "int64"


def test_what_a_spec_says_of_predict_and_what_contradicts_itself():
    assert spec_of("predict.output=a.ndjson").predict.written_as == "jsonl"
    assert spec_of().predict.written_as == "parquet"
    whole = spec_of().digest()
    assert spec_of("predict.batch_size=3").digest() == whole
    assert len({whole, spec_of("data.predict=b").digest(), spec_of("predict.prefix=b").digest()}) == 3
    for override, said in (
        ("predict.output=a.csv", "ends in neither .parquet nor .jsonl"),
        ("predict={output: a.jsonl, format: parquet}", "is jsonl by its name and parquet by `format`"),
        ("predict.columns=[a, a]", "has 'a' twice"),
        ("data.eval=x", "takes all rows of `data.predict` and nothing else"),
        ("data.predict=null", "needs `data.predict`"),
        ("training={steps: 3}", "takes nothing from `training`"),
        ("register={model: m}", "makes no model"),
        ("model={architecture: llama}", "needs `model.from`"),
        ("phase=evaluate", "is for phase predict"),
    ):
        with pytest.raises(UserError, match=said):
            spec_of(override)


def test_the_digests_of_other_phases_are_what_they_were():
    spec = specfile.loads("{name: x, phase: evaluate, model: {from: m}, data: {eval: a}}", JobSpec, [])
    assert spec.digest() == "13eddc9e68e46eaa76e34be5d7e1b0d083dbccfedbf92f4bfec4923d18870c97", "runs are known by it"
