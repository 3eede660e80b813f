"""What a model makes NaN or infinity of is no answer: the input is refused, and those beside it are answered."""

import math

import numpy as np
import pytest
import torch

from jobs.predict.predictors import TaskPredictor
from jobs.tasks import TaskError, get

TABLE = [{"size": float(at), "kind": "a" if at % 2 else "b", "target": "yes" if at % 3 else "no"} for at in range(24)]
SERIES = {"time": list(range(40)), "target": [float(at % 4 + 1) for at in range(40)]}
USERS = [
    {"user": f"u{user}", "item": [f"i{(user + at) % 6}" for at in range(5)], "time": list(range(5))}
    for user in range(6)
]
IMAGES = [{"image": np.full((8, 8, 1), 20 * at, np.uint8), "label": "ab"[at % 2]} for at in range(6)]
SOUND = {"audio": {"array": np.sin(np.arange(4000) / 9).astype(np.float32), "sampling_rate": 8000}, "text": "one"}

WORKLOADS = {
    "tabular": ({}, TABLE, "mlp", {"size": 1.0, "kind": "a"}),
    "tabular-numbers": ({"kind": "regression"}, [{**row, "target": row["size"] + 1} for row in TABLE], "mlp", None),
    "forecasting": ({"horizon": 2}, [SERIES], "gru", {"history": [1.0, 2.0, 3.0]}),
    "recommendation": ({}, USERS, "sasrec", {"history": ["i1", "i2"]}),
    "image-classification": ({}, IMAGES, "cnn", IMAGES[0]["image"]),
    "image-embedding": ({}, IMAGES, "embedding-cnn", {"image": IMAGES[0]["image"]}),
    "speech-recognition": ({}, [SOUND], "crnn", SOUND["audio"]["array"]),
    "gan": ({}, [{"image": each["image"]} for each in IMAGES], "gan-cnn", 3),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_model_of_nan_answers_nothing(name):
    options, data, architecture, instance = WORKLOADS[name]
    task = get(name.removesuffix("-numbers"))(options)
    task.fit(task.observe(data))
    instance = {"size": 1.0, "kind": "a"} if instance is None else instance
    model = task.build(architecture, {}).eval()
    assert len(task.predict(model, [instance])) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(TaskError, match="NaN or infinite numbers of this input"):
        task.predict(model, [instance])


def test_numbers_that_overflow_while_they_are_scaled_are_refused_and_others_beside_them_answered():
    task = get("forecasting")({"horizon": 2, "scaling": "standard"})
    task.fit(task.observe([SERIES]))
    model = task.build("gru", {}).eval()
    large, usual = {"history": [1e30, 2e30, 1e30]}, {"history": [1.0, 2.0, 1.0]}
    first, second = TaskPredictor(task, model).answer([(0, large), (1, usual)])
    assert isinstance(first, TaskError)
    assert np.isfinite(second["median"]).all()


def test_a_history_whose_latest_steps_are_all_missing_is_no_history():
    task = get("forecasting")({"horizon": 2, "context_length": 4})
    task.fit(task.observe([SERIES]))
    model = task.build("gru", {}).eval()
    with pytest.raises(TaskError, match="the last 4 steps of a history, which are read, hold no number"):
        task.predict(model, [{"history": [5.0, 6.0, *[math.nan] * 4]}])
    assert task.predict(model, [{"history": [5.0, 6.0, *[math.nan] * 3]}])
