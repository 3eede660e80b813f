"""Tables and policies through the Open Inference Protocol: a tensor for each column, some of which may be left out."""

from __future__ import annotations

from typing import Any

import httpx

from jobs.tasks import get
from tests.support import predictive
from tests.support.measured import train

ROWS = [
    {
        "income": None if at % 9 == 0 else 100.0 * (at % 10),
        "work": ["steady", "none"][at % 2],
        "since": f"20{at % 20:02}-06-01",
        "paid": ["yes", "no"][at % 2],
    }
    for at in range(60)
]
STEPS = [{"observation": [at / 10 - 3, 1.0], "action": int(at > 30)} for at in range(60)]
SMALL = {"hidden_size": 8, "layers": 1, "dropout": 0.0, "frequencies": 0}


def fitted(name: str, examples: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """Return a task with a model that was trained for a moment."""
    task = get(name)(options)
    task.fit(task.observe(examples))
    return task, train(task.build("mlp", SMALL), task, examples, steps=60)


def tensor(name: str, datatype: str, *data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    """Return an input tensor in JSON."""
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": list(data)}


async def asked(client: httpx.AsyncClient, model: str, *tensors: dict[str, Any]) -> Any:
    """Return the outputs by name, or the error."""
    reply = (await client.post(f"/v2/models/{model}/infer", json={"inputs": tensors})).json()
    return {part["name"]: part["data"] for part in reply["outputs"]} if "outputs" in reply else reply["error"]


def test_rows_of_a_table_and_states_of_a_policy_are_answered() -> None:
    models = {
        "loans": fitted("tabular", ROWS, target_column="paid"),
        "income": fitted("tabular", [row for row in ROWS if row["income"]], target_column="income", kind="regression"),
        "policy": fitted("policy", STEPS),
    }

    async def scenario(client: httpx.AsyncClient, _: predictive.Predicting) -> None:
        work, since = tensor("work", "BYTES", "steady", "none"), tensor("since", "BYTES", "2010-06-01", "2001-06-01")
        told = (await client.get("/v2/models/loans")).json()["inputs"]
        assert [part["name"] for part in told if part["parameters"].get("optional")] == ["income"]
        assert (await asked(client, "loans", work, since))["label"] == ["yes", "no"]
        assert (await asked(client, "loans", tensor("income", "FP64", 5, 7), work, since))["label"] == ["yes", "no"]
        assert "the inputs must be income (optional), work, since; given: work" in await asked(client, "loans", work)
        wrong = await asked(client, "loans", work, tensor("since", "BYTES", "2010-06-01", "soon"))
        assert wrong == "row 1: column 'since' holds 'soon', and it is one of dates as 2024-12-31"
        amounts = await asked(client, "income", tensor("paid", "BYTES", "yes", "no"), work, since)
        assert all(0 < value < 1000 for value in amounts["value"])
        states = tensor("observation", "FP32", -2.5, 1, 2.5, 1, shape=[2, 2])
        assert (await asked(client, "policy", states))["action"] == [0, 1]
        assert "has the shape [1, 3], the model takes [-1, 2]" in await asked(
            client, "policy", tensor("observation", "FP32", 1, 2, 3, shape=[1, 3])
        )

    predictive.run(models, scenario)
