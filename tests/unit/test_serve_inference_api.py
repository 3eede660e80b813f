"""Open Inference Protocol: tensors in, tensors out."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from serve.api.body import ApiError
from serve.api.inference_api import InferRequest, response


def request(**fields: Any) -> InferRequest:
    part = {"name": "x", "shape": [2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4], **fields}
    return InferRequest({"inputs": [part]})


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_flat_and_nested_data(data: list[Any]) -> None:
    array = request(data=data).inputs["x"]
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("datatype", ["INT64", "FP32", "FP16", "FP64"])
def test_datatypes(datatype: str) -> None:
    assert request(datatype=datatype).inputs["x"].tolist() == [[1, 2], [3, 4]]


def test_images_as_files() -> None:
    data = base64.b64encode(b"png").decode()
    parsed = request(datatype="BYTES", shape=[1], data=[data], parameters={"content_type": "base64"})
    assert parsed.inputs["x"] == [b"png"]


def test_texts() -> None:
    assert request(datatype="BYTES", shape=[2], data=["a", "b"]).inputs["x"] == ["a", "b"]


@pytest.mark.parametrize(
    "fields",
    [
        {"data": [1, 2, 3]},
        {"data": [1, 2, 3, 256]},
        {"data": [1, 2, 3, -1]},
        {"data": [1, 2, 3, 4.5]},
        {"data": [1, 2, 3, "4"]},
        {"data": [[1, 2], [3]]},
        {"data": []},
        {"data": "1234"},
        {"shape": []},
        {"shape": [0, 2], "data": []},
        {"shape": [-1, 2]},
        {"datatype": "COMPLEX"},
        {"datatype": "BYTES", "shape": [2], "data": ["a"]},
        {"datatype": "BYTES", "shape": [1], "data": ["%"], "parameters": {"content_type": "base64"}},
        {"surprise": 1},
    ],
)
def test_bad_tensors(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        request(**fields)
    assert caught.value.status == 400


def test_inputs_must_agree_on_the_batch() -> None:
    parts = [{"name": n, "shape": [s], "datatype": "INT8", "data": [0] * s} for n, s in (("a", 1), ("b", 2))]
    with pytest.raises(ApiError, match="batch size"):
        InferRequest({"inputs": parts})


PREDICTIONS = [
    {"label": "cat", "score": 0.75, "scores": {"cat": 0.75, "dog": 0.25}},
    {"label": "dog", "score": 0.5, "scores": {"cat": 0.5, "dog": 0.5}},
]


def test_predictions_become_tensors() -> None:
    answer = response("m", "3", InferRequest({"id": "7", "inputs": [_part()]}), PREDICTIONS)
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "3", "7")
    by_name = {output["name"]: output for output in answer["outputs"]}
    assert by_name["label"] == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["cat", "dog"]}
    assert by_name["score"]["data"] == [0.75, 0.5]
    assert by_name["scores"]["shape"] == [2, 2]
    assert by_name["scores"]["data"] == [0.75, 0.25, 0.5, 0.5]
    assert by_name["scores"]["parameters"] == {"labels": ["cat", "dog"]}


def test_only_the_outputs_asked_for() -> None:
    asked = InferRequest({"inputs": [_part()], "outputs": [{"name": "score"}]})
    assert [output["name"] for output in response("m", "3", asked, PREDICTIONS)["outputs"]] == ["score"]
    wrong = InferRequest({"inputs": [_part()], "outputs": [{"name": "size"}]})
    with pytest.raises(ApiError, match="no output 'size'"):
        response("m", "3", wrong, PREDICTIONS)


def _part() -> dict[str, Any]:
    return {"name": "x", "shape": [1], "datatype": "INT8", "data": [0]}
