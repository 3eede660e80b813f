"""Open Inference Protocol: tensors in, tensors out, in JSON and in binary form."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest

from serve.api.body import ApiError
from serve.api.inference_api import InferRequest, answer, parse


def parsed(body: dict[str, Any], *tensors: bytes) -> InferRequest:
    """Parse a body, with binary tensors behind it if there are any."""
    head = json.dumps(body).encode()
    return parse(head + b"".join(tensors), str(len(head)) if tensors else None)


def request(**fields: Any) -> InferRequest:
    part = {"name": "x", "shape": [2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4], **fields}
    return parsed({"inputs": [{key: value for key, value in part.items() if value != "left out"}]})


def binary(datatype: str, shape: list[int], raw: bytes, **parameters: Any) -> InferRequest:
    given = {"binary_data_size": len(raw), **parameters}
    return parsed({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "parameters": given}]}, raw)


def refusal(**fields: Any) -> str:
    with pytest.raises(ApiError) as caught:
        request(**fields)
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_flat_and_nested_data(data: list[Any]) -> None:
    array = request(data=data).inputs["x"]
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("shape", "data"),
    [([2, 2, 1], [[1, 2], [3, 4]]), ([1, 2, 2], [[1, 2], [3, 4]]), ([2, 2, 1], [[[1], [2]], [[3], [4]]]),
     ([2, 1, 2], [[1, 2], [3, 4]])],
)  # fmt: skip
def test_dimensions_of_one_may_be_left_out_of_the_nesting(shape: list[int], data: list[Any]) -> None:
    assert request(shape=shape, data=data).inputs["x"].tolist() == np.reshape([1, 2, 3, 4], shape).tolist()


def test_rows_may_be_flat() -> None:
    array = request(shape=[2, 2, 2], data=[[1, 2, 3, 4], [5, 6, 7, 8]]).inputs["x"]
    assert array.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


@pytest.mark.parametrize("datatype", ["INT64", "UINT64", "FP32", "FP16", "FP64"])
def test_datatypes(datatype: str) -> None:
    array = request(datatype=datatype).inputs["x"]
    assert array.tolist() == [[1, 2], [3, 4]]
    assert array.dtype.name == datatype.lower().replace("fp", "float")


@pytest.mark.parametrize(("datatype", "value"), [("UINT64", 2**64 - 1), ("INT64", -(2**63)), ("INT64", 2**53 + 1)])
def test_64_bits_are_exact(datatype: str, value: int) -> None:
    assert request(datatype=datatype, shape=[2], data=[value, 0]).inputs["x"].tolist() == [value, 0]


def test_images_as_files() -> None:
    data = base64.b64encode(b"png").decode()
    found = request(datatype="BYTES", shape=[1], data=[data], parameters={"content_type": "base64"})
    assert found.inputs["x"] == [b"png"]


def test_texts_flat_and_nested() -> None:
    assert request(datatype="BYTES", shape=[2], data=["a", "b"]).inputs["x"] == ["a", "b"]
    for data in (["a", "b"], [["a"], ["b"]]):
        assert request(datatype="BYTES", shape=[2, 1], data=data).inputs["x"] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": [1, 2, 3]}, "asks for 4 values, there are 3"),
        ({"data": [1, 2, 3, 256]}, "value 3 is 256; UINT8 holds 0 to 255"),
        ({"data": [1, 2, 3, -1]}, "value 3 is -1"),
        ({"data": [1, 2, 3, 3.7]}, "value 3 is 3.7, which is no UINT8"),
        ({"data": [1, 2, 3, 4.0]}, "value 3 is 4.0"),
        ({"data": [1, 2, 3, "4"]}, 'value 3 is "4"'),
        ({"data": [1, 2, 3, True]}, "value 3 is true"),
        ({"data": [1, 2, 3, None]}, "value 3 is null"),
        ({"data": [1, 2, 3, {}]}, "value 3 is {}"),
        ({"data": [1, 2, 3, 1e300], "datatype": "FP32"}, "value 3 is beyond FP32"),
        ({"data": [1, 2, 3, 70000], "datatype": "FP16"}, "value 3 is beyond FP16"),
        ({"data": [1, 2, 3, 10**400], "datatype": "FP64"}, "beyond FP64"),
        ({"data": [1, 2, 3, 2**64], "datatype": "UINT64"}, "value 3 is 18446744073709551616"),
        ({"data": [1, 2, 3, 2**63], "datatype": "INT64"}, "value 3"),
        ({"data": [True, False, 1, 0], "datatype": "BOOL"}, "value 2 is 1, which is no BOOL"),
        ({"data": [True] * 4, "datatype": "FP32"}, "value 0 is true"),
        ({"data": [[1, 2], [3]]}, "unevenly"),
        ({"data": [1, [2, 3, 4]]}, "unevenly"),
        ({"data": [[1, 2], [3, 4], [5, 6]], "shape": [2, 3]}, "nested as [3, 2], the shape says [2, 3]"),
        ({"data": []}, "there are 0"),
        ({"data": "1234"}, "inputs[0].data: must be a list"),
        ({"data": None}, "either `data` or"),
        ({"data": "left out"}, "either `data` or"),
        ({"shape": []}, "inputs[0].shape"),
        ({"shape": [0, 2], "data": []}, "inputs[0].shape[0]: must be at least 1"),
        ({"shape": [2, 0], "data": []}, "inputs[0].shape[1]: must be at least 1"),
        ({"shape": [1] * 100, "data": [1]}, "inputs[0].shape: must be a list of at most 32 items"),
        ({"shape": [2**31], "data": [1]}, "inputs[0].shape[0]: is too large"),
        ({"shape": [-1, 2]}, "inputs[0].shape[0]"),
        ({"shape": [2.0, 2]}, "inputs[0].shape[0]"),
        ({"shape": [True, 4]}, "inputs[0].shape[0]"),
        ({"shape": [10**9, 4]}, "asks for 4000000000 values"),
        ({"datatype": "COMPLEX"}, "inputs[0].datatype"),
        ({"datatype": "uint8"}, "inputs[0].datatype"),
        ({"name": ""}, "inputs[0].name"),
        ({"datatype": "BYTES", "shape": [2], "data": ["a"]}, "asks for 2"),
        ({"datatype": "BYTES", "shape": [2], "data": ["a", 1]}, "value 1 is 1, which is no BYTES"),
        ({"datatype": "BYTES", "shape": [1], "data": ["%"], "parameters": {"content_type": "base64"}}, "no base64"),
        ({"datatype": "BYTES", "shape": [1], "data": ["é"], "parameters": {"content_type": "base64"}}, "no base64"),
        ({"datatype": "BYTES", "shape": [1], "data": ["a"], "parameters": {"content_type": "jpeg"}}, '"jpeg"'),
        ({"parameters": {"content_type": "base64"}}, "known: np"),
        ({"parameters": {"shared_memory_region": "r"}}, "inputs[0].parameters.shared_memory_region"),
        ({"parameters": {"binary_data_size": 4}}, "either `data` or"),
        ({"parameters": []}, "inputs[0].parameters"),
        ({"surprise": 1}, "inputs[0].surprise"),
    ],
)
def test_bad_tensors_are_refused_with_their_place(fields: dict[str, Any], said: str) -> None:
    assert said in refusal(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": 7}, "id:"),
        ({"inputs": []}, "inputs:"),
        ({"inputs": [{}, {}]}, "inputs[0].name"),
        ({"inputs": None}, "inputs:"),
        ({"outputs": [{"name": "a"}, {"name": "a"}]}, "'a' is asked for twice"),
        ({"outputs": [{"name": "a", "parameters": {"classification": 3}}]}, "outputs[0].parameters.classification"),
        ({"outputs": [{"name": "a", "parameters": {"binary_data": "yes"}}]}, "must be true or false"),
        ({"outputs": "score"}, "outputs:"),
        ({"parameters": {"sequence_id": 3}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_id": False}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_start": True}}, "parameters.sequence_start"),
        ({"parameters": {"binary_data_output": 1}}, "must be true or false"),
        ({"parameters": {"content_type": "pd"}}, '"pd"'),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_bad_requests_are_refused_with_their_place(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed({"inputs": [_part()], **fields})
    assert caught.value.status == 400
    assert said in caught.value.message


def test_an_input_given_twice_is_refused() -> None:
    with pytest.raises(ApiError, match="'x' is given twice"):
        parsed({"inputs": [_part(), _part()]})


def test_null_is_what_is_left_out() -> None:
    unset = {"id": None, "parameters": None, "outputs": None, "model_name": None}
    found = parsed({**unset, "inputs": [{**_part(), "parameters": None}]})
    assert (found.id, found.outputs, found.binary) == (None, None, False)
    content_type = {"content_type": None, "headers": None}
    assert parsed({"parameters": content_type, "outputs": [], "inputs": [_part()]}).outputs is None


def test_what_is_switched_off_is_accepted() -> None:
    off = {"sequence_id": 0, "sequence_start": False, "triton_enable_empty_final_response": False}
    one = {"name": "a", "parameters": {"classification": 0}}
    assert parsed({"inputs": [_part()], "parameters": off, "outputs": [one]}).outputs == {"a": False}


def test_the_body_names_the_model_of_the_path_or_none() -> None:
    body = json.dumps({"model_name": "m", "model_version": "2", "inputs": [_part()]}).encode()
    assert parse(body, model="m", version="2").inputs
    for model, version in (("n", "2"), ("m", "3")):
        with pytest.raises(ApiError, match="the path"):
            parse(body, model=model, version=version)


def test_binary_numbers() -> None:
    raw = np.arange(6, dtype="<i4").tobytes()
    found = binary("INT32", [2, 3], raw).inputs["x"]
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert binary("BOOL", [2], b"\0\1").inputs["x"].tolist() == [False, True]
    assert binary("FP16", [1], np.float16(1.5).tobytes()).inputs["x"].tolist() == [1.5]


def test_binary_texts_and_files() -> None:
    raw = b"\x02\0\0\0\xff\xfe" + b"\0\0\0\0"
    assert binary("BYTES", [2], raw).inputs["x"] == [b"\xff\xfe", b""]
    assert binary("BYTES", [2, 1], raw).inputs["x"] == [[b"\xff\xfe"], [b""]]
    assert binary("BYTES", [1], b"\x04\0\0\0cG5n", content_type="base64").inputs["x"] == [b"png"]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "said"),
    [
        ("INT32", [2], b"\0" * 7, "takes 8 bytes, not 7"),
        ("FP32", [1], np.float32(np.nan).tobytes(), "value 0 is NaN or infinite"),
        ("FP16", [2], np.array([0, np.inf], np.float16).tobytes(), "value 1 is NaN or infinite"),
        ("BOOL", [2], b"\0\2", "value 1 is neither 0 nor 1"),
        ("BYTES", [1], b"\x09\0\0\0a", "element 0 of the BYTES is cut short"),
        ("BYTES", [1], b"\0\0\0", "cut short"),
        ("BYTES", [2], b"\0\0\0\0", "there are 1"),
        ("BYTES", [1], b"\0\0\0\0" * 2, "there are 2"),
    ],
)
def test_bad_binary_tensors(datatype: str, shape: list[int], raw: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said):
        binary(datatype, shape, raw)


def test_binary_sizes_must_add_up_to_the_body() -> None:
    part = {"name": "x", "shape": [2], "datatype": "UINT8", "parameters": {"binary_data_size": 2}}
    assert parsed({"inputs": [part]}, b"ab").inputs["x"].tolist() == [97, 98]
    with pytest.raises(ApiError, match="3 bytes stand behind the JSON"):
        parsed({"inputs": [part]}, b"abc")
    with pytest.raises(ApiError, match="1 bytes are left"):
        parsed({"inputs": [part]}, b"a")
    with pytest.raises(ApiError, match="is the header Inference-Header-Content-Length set"):
        parsed({"inputs": [part]})
    for size in (-2, "2", True, 2.0):
        with pytest.raises(ApiError, match="number of bytes"):
            parsed({"inputs": [{**part, "parameters": {"binary_data_size": size}}]}, b"ab")


@pytest.mark.parametrize("length", ["", "0", "-1", "9999", "x", "1e1", "²", "1" * 5000])
def test_a_bad_header_length_is_refused(length: str) -> None:
    with pytest.raises(ApiError, match="Inference-Header-Content-Length"):
        parse(json.dumps({"inputs": [_part()]}).encode(), length)


PREDICTIONS = [
    {"label": "cat", "score": 0.75, "scores": {"cat": 0.75, "dog": 0.25}},
    {"label": "dog", "score": 0.5, "scores": {"cat": 0.5, "dog": 0.5}},
]


def outputs(predictions: list[dict[str, Any]], **asked: Any) -> dict[str, dict[str, Any]]:
    """Answer in JSON; return the output tensors by name."""
    told = answer("m", "3", parsed({"inputs": [_part()], **asked}), predictions)
    assert told.headers == {"content-type": "application/json"}
    return {tensor["name"]: tensor for tensor in json.loads(told.content)["outputs"]}


def test_predictions_become_tensors() -> None:
    told = json.loads(answer("m", "3", parsed({"id": "7", "inputs": [_part()]}), PREDICTIONS).content)
    assert (told["model_name"], told["model_version"], told["id"]) == ("m", "3", "7")
    by_name = {output["name"]: output for output in told["outputs"]}
    assert by_name["label"] == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["cat", "dog"]}
    assert by_name["score"]["data"] == [0.75, 0.5]
    assert by_name["scores"]["shape"] == [2, 2]
    assert by_name["scores"]["data"] == [0.75, 0.25, 0.5, 0.5]
    assert by_name["scores"]["parameters"] == {"labels": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("values", "datatype", "shape", "data"),
    [
        ([1, 2], "INT64", [2], [1, 2]),
        ([True, False], "BOOL", [2], [True, False]),
        ([[1.5, 2.5], [3.5, 4.5]], "FP32", [2, 2], [1.5, 2.5, 3.5, 4.5]),
        ([np.ones((2, 1), np.float64)], "FP64", [1, 2, 1], [1.0, 1.0]),
        ([np.uint8(3)], "UINT8", [1], [3]),
        ([["a", "b"], ["c", "d"]], "BYTES", [2, 2], ["a", "b", "c", "d"]),
        ([{"a": [np.float32(1.5)]}, None], "BYTES", [2], ['{"a": [1.5]}', "null"]),
        ([[1], [1, 2]], "BYTES", [2], ["[1]", "[1, 2]"]),
        ([{"a": 1.0}, {"b": 1.0}], "BYTES", [2], ['{"a": 1.0}', '{"b": 1.0}']),
        ([b"\xff"], "BYTES", [1], ["/w=="]),
    ],
)
def test_fields_of_every_kind(values: list[Any], datatype: str, shape: list[int], data: list[Any]) -> None:
    told = outputs([{"x": value} for value in values])["x"]
    assert (told["datatype"], told["shape"], told["data"]) == (datatype, shape, data)
    said = {"/w==": "base64", '{"a": [1.5]}': "json", "[1]": "json", '{"a": 1.0}': "json"}.get(data[0])
    assert told.get("parameters", {}).get("content_type") == said


def test_only_the_outputs_asked_for() -> None:
    assert list(outputs(PREDICTIONS, outputs=[{"name": "scores"}, {"name": "label"}])) == ["scores", "label"]
    with pytest.raises(ApiError, match="no output 'size'; known: label, score, scores"):
        outputs(PREDICTIONS, outputs=[{"name": "size"}])


def test_binary_outputs() -> None:
    told = answer("m", "3", parsed({"inputs": [_part()], "parameters": {"binary_data_output": True}}), PREDICTIONS)
    length = int(told.headers["inference-header-content-length"])
    head, tail = json.loads(told.content[:length]), told.content[length:]
    assert [part["parameters"]["binary_data_size"] for part in head["outputs"]] == [14, 8, 16]
    assert all("data" not in part for part in head["outputs"])
    assert tail[:14] == b"\x03\0\0\0cat\x03\0\0\0dog"
    assert struct.unpack("<6f", tail[14:]) == (0.75, 0.5, 0.75, 0.25, 0.5, 0.5)


def test_each_output_chooses_its_own_form() -> None:
    asked = [{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]
    told = answer("m", "3", parsed({"inputs": [_part()], "outputs": asked}), PREDICTIONS)
    length = int(told.headers["inference-header-content-length"])
    score, label = json.loads(told.content[:length])["outputs"]
    assert score["parameters"] == {"binary_data_size": 8}
    assert label["data"] == ["cat", "dog"]
    assert len(told.content) == length + 8


def test_the_published_example() -> None:
    """The REST specification's request with two inputs and one output, its second input complete."""
    body = {
        "id": "42",
        "inputs": [
            {"name": "input0", "shape": [2, 2], "datatype": "UINT32", "data": [1, 2, 3, 4]},
            {"name": "input1", "shape": [3], "datatype": "BOOL", "data": [True, False, True]},
        ],
        "outputs": [{"name": "output0"}],
    }
    found = parsed(body)
    assert found.inputs["input0"].tolist() == [[1, 2], [3, 4]]
    assert found.inputs["input1"].tolist() == [True, False, True]
    predictions = [{"output0": row, "other": 1} for row in ([1.0, 1.1], [2.0, 2.1], [3.0, 3.1])]
    told = json.loads(answer("mymodel", "1", found, predictions).content)
    assert told["id"] == "42"
    data = [1.0, 1.1, 2.0, 2.1, 3.0, 3.1]
    assert told["outputs"] == [{"name": "output0", "shape": [3, 2], "datatype": "FP32", "data": data}]


def test_the_published_example_in_binary_form() -> None:
    """The binary extension's: 19 bytes behind the JSON, and 24 in the answer."""
    body = {
        "model_name": "mymodel",
        "inputs": [
            {"name": "input0", "shape": [2, 2], "datatype": "UINT32", "parameters": {"binary_data_size": 16}},
            {"name": "input1", "shape": [3], "datatype": "BOOL", "parameters": {"binary_data_size": 3}},
        ],
        "outputs": [{"name": "output0", "parameters": {"binary_data": True}}],
    }
    found = parsed(body, np.array([1, 2, 3, 4], "<u4").tobytes(), b"\1\0\1")
    assert found.inputs["input0"].tolist() == [[1, 2], [3, 4]]
    assert found.inputs["input1"].tolist() == [True, False, True]
    told = answer("mymodel", "1", found, [{"output0": [1.0, 1.5]}, {"output0": [2.0, 2.5]}, {"output0": [3.0, 3.5]}])
    length = int(told.headers["inference-header-content-length"])
    assert told.headers["content-type"] == "application/octet-stream"
    (part,) = json.loads(told.content[:length])["outputs"]
    assert part == {"name": "output0", "shape": [3, 2], "datatype": "FP32", "parameters": {"binary_data_size": 24}}
    assert struct.unpack("<6f", told.content[length:]) == (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)


def _part() -> dict[str, Any]:
    return {"name": "x", "shape": [1], "datatype": "INT8", "data": [0]}
