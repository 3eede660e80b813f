"""Rows that lack what is to be predicted from, or hold NaN in its place, are errors of their own in phase predict."""

import math
from functools import partial

import numpy as np
import pytest

from jobs.data.examples import BadRow, Example, bounded
from jobs.predict.predictors import TaskPredictor, answers
from jobs.tasks import get

IMAGE = np.zeros((8, 8, 1), np.uint8)
TABLE = [{"size": float(at), "kind": "ab"[at % 2], "target": "yes" if at % 3 else "no"} for at in range(24)]
IMAGES = [{"image": IMAGE + 20 * at, "label": "ab"[at % 2]} for at in range(6)]
SOUND = {"array": np.sin(np.arange(4000) / 9).astype(np.float32), "sampling_rate": 8000}
STEPS = [{"observation": [float(at % 5), float(at)], "action": at % 2} for at in range(40)]
NO_IMAGES = [{"image": None}, {"image": math.nan}, {"image": np.full((8, 8, 1), math.nan)}, {"image": ""}, {}]

LEARNED = {
    "tabular": (TABLE, "mlp"),
    "image-classification": (IMAGES, "cnn"),
    "image-embedding": (IMAGES, "embedding-cnn"),
    "speech-recognition": ([{"audio": SOUND, "text": "one"}], "crnn"),
    "gan": ([{"image": each["image"]} for each in IMAGES], "gan-cnn"),
    "policy": (STEPS, "mlp"),
}
GOOD = {
    "tabular": {"size": 1.0, "kind": "a"},
    "image-classification": {"image": IMAGE},
    "image-embedding": {"image": IMAGE},
    "speech-recognition": {"audio": SOUND},
    "gan": {"seed": "3"},
    "policy": {"observation": [1.0, 2.0]},
}
LACKING = {
    "tabular": [
        *({"size": value, "kind": "a"} for value in (None, math.nan, "")),
        *({"size": 1.0, "kind": value} for value in (None, math.nan, " ")),
        {"kind": "a"},
    ],
    "image-classification": NO_IMAGES,
    "image-embedding": NO_IMAGES,
    "speech-recognition": [
        {"audio": None},
        {"audio": math.nan},
        {"audio": {**SOUND, "array": np.full(4000, math.nan)}},
        {"audio": {"bytes": None, "path": None}},
        {},
    ],
    "gan": [{"seed": None}, {"seed": math.nan}, {"seed": ""}, {}],
    "policy": [{"observation": None}, {"observation": [1.0, math.nan]}, {"observation": [1.0, None]}, {}],
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_row_that_lacks_something_fails_alone_and_is_named(name):
    data, architecture = LEARNED[name]
    task = get(name)()
    task.fit(task.observe(data))
    model = task.build(architecture, {}).eval()
    rows = [GOOD[name], *LACKING[name], GOOD[name]]
    made = answers(task, TaskPredictor(task, model), 0, [Example(row, f"in:{at}") for at, row in enumerate(rows)])
    assert [row.where for row in made if isinstance(row, BadRow)] == [f"in:{at}" for at in range(1, len(rows) - 1)]
    assert {len(made[at]) for at in (0, -1)} == {len(task.outputs()) - 2 * (name == "image-embedding")}


@pytest.mark.parametrize(
    ("name", "options", "lacking"),
    [
        ("seq2seq", {}, [{"source": value} for value in (None, math.nan, " ")]),
        ("causal-lm", {}, [*({"text": value} for value in (None, math.nan, " ")), {"prompt": math.nan}, {}]),
        ("text-classification", {}, [{"text": value} for value in (None, math.nan, " ")]),
        ("object-detection", {}, [{"image": None}, {"image": math.nan}, {}]),
    ],
)
def test_what_has_no_instance_is_found_before_a_model_is_asked(name, options, lacking):
    task = get(name)(options)
    assert all(isinstance(bounded(partial(task.instance, Example(row)), "in:1"), BadRow) for row in lacking)
