"""What a client sent, against a model's metadata: what passes, and what would be another question."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve.engines.inputs import InputError, blank, rows

IMAGE = {
    "name": "image",
    "datatype": "UINT8",
    "shape": [-1, 2, 3, 1],
    "parameters": {"content_types": ["np", "base64"]},
}
NUMBERS = {"name": "numbers", "datatype": "FP32", "shape": [-1, 2]}
TEXT = {"name": "text", "datatype": "BYTES", "shape": [-1]}
PAIR = {"name": "pair", "datatype": "BYTES", "shape": [-1]}
FREE = {"name": "free", "datatype": "INT64", "shape": [-1, -1, 2]}


def image(shape: list[int], dtype: Any = np.uint8, fill: float = 7) -> Any:
    return rows({"image": np.full(shape, fill, dtype)}, [IMAGE])


@pytest.mark.parametrize("shape", [[2, 2, 3, 1], [2, 2, 3], [2, 1, 2, 3]])
def test_dimensions_of_one_do_not_matter(shape: list[int]) -> None:
    found = image(shape)
    assert [row.shape for row in found] == [(2, 3, 1), (2, 3, 1)]


@pytest.mark.parametrize("shape", [[2, 3], [2, 3, 2, 1], [2, 2, 3, 3], [2, 6], [2, 2, 3, 1, 2], [2, 2, 4, 1], [6]])
def test_another_shape_is_refused(shape: list[int]) -> None:
    with pytest.raises(InputError, match=r"the model takes \[-1, 2, 3, 1\]"):
        image(shape)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64])
def test_whole_numbers_that_fit_pass(dtype: Any) -> None:
    (row,) = image([1, 2, 3], dtype)
    assert row.dtype == np.uint8
    assert (row == 7).all()


@pytest.mark.parametrize(
    ("dtype", "fill", "said"),
    [
        (np.int64, -5, r"image'\[0\]\[0\]\[0\] is -5; UINT8 holds 0 to 255"),
        (np.uint16, 256, "is 256; UINT8 holds"),
        (np.uint64, 2**64 - 1, "is 18446744073709551615"),
        (np.float32, 0.5, "is FP32, the model takes UINT8"),
        (np.float32, 16, "is FP32, the model takes UINT8"),
        (np.float64, 3, "is FP64, the model takes UINT8"),
        (np.float16, 3, "is FP16, the model takes UINT8"),
        (np.bool_, 1, "is BOOL, the model takes UINT8"),
    ],
)
def test_another_datatype_or_range_is_refused(dtype: Any, fill: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        image([1, 2, 3], dtype, fill)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16])
def test_numbers_are_not_made_floats(dtype: Any) -> None:
    with pytest.raises(InputError, match="the model takes FP32"):
        rows({"numbers": np.ones((1, 2), dtype)}, [NUMBERS])
    assert len(rows({"numbers": np.ones((3, 2), np.float32)}, [NUMBERS])) == 3


def test_files_stand_in_for_numbers_where_the_metadata_says_so() -> None:
    for sent in ([b"a", b"b"], [[b"a"], [b"b"]]):
        assert rows({"image": sent}, [IMAGE]) == [b"a", b"b"]
    with pytest.raises(InputError, match="'numbers' is BYTES, the model takes FP32"):
        rows({"numbers": [b"a"]}, [NUMBERS])


@pytest.mark.parametrize("sent", [["/etc/passwd"], [["/etc/passwd"]], [b"a", "/etc/passwd"]])
def test_text_is_no_file(sent: Any) -> None:
    with pytest.raises(InputError, match=r'"parameters": \{"content_type": "base64"\}'):
        rows({"image": sent}, [IMAGE])


@pytest.mark.parametrize("sent", [[[b"a", b"b"]], [[[b"a"]]], [[[b"a"], [b"b"]], [[b"c"], [b"d"]]]])
def test_files_are_one_a_row(sent: Any) -> None:
    with pytest.raises(InputError, match="one file for each"):
        rows({"image": sent}, [IMAGE])


def test_texts() -> None:
    assert rows({"text": ["a", "b"]}, [TEXT]) == rows({"text": [["a"], ["b"]]}, [TEXT]) == ["a", "b"]
    assert rows({"text": [b"a"]}, [TEXT]) == [b"a"]
    with pytest.raises(InputError, match=r"shape \[1, 2\]"):
        rows({"text": [["a", "b"]]}, [TEXT])
    with pytest.raises(InputError, match="is INT64, the model takes BYTES"):
        rows({"text": np.array([1])}, [TEXT])


def test_several_inputs() -> None:
    assert rows({"pair": ["c", "d"], "text": ["a", "b"]}, [TEXT, PAIR]) == [
        {"text": "a", "pair": "c"}, {"text": "b", "pair": "d"}]  # fmt: skip
    with pytest.raises(InputError, match=r"given: \{'text': 2, 'pair': 1\}"):
        rows({"text": ["a", "b"], "pair": ["c"]}, [TEXT, PAIR])


@pytest.mark.parametrize("sent", [{}, {"text": ["a"]}, {"text": ["a"], "pair": ["b"], "more": ["c"]}, {"texts": ["a"]}])
def test_missing_and_unknown_inputs_are_named(sent: Any) -> None:
    with pytest.raises(InputError, match="the inputs must be text, pair; given: "):
        rows(sent, [TEXT, PAIR])


def test_free_dimensions() -> None:
    assert rows({"free": np.zeros((1, 5, 2), np.int64)}, [FREE])[0].shape == (5, 2)
    assert rows({"free": np.zeros((1, 1, 2), np.int64)}, [FREE])[0].shape == (1, 2)
    with pytest.raises(InputError):
        rows({"free": np.zeros((1, 5, 3), np.int64)}, [FREE])


def test_a_blank_instance() -> None:
    assert blank([IMAGE]).shape == (2, 3, 1)
    assert blank([TEXT]) == "a"
    assert blank([TEXT, PAIR]) == {"text": "a", "pair": "a"}
    assert blank([FREE]).shape == (1, 2)


def test_what_is_optional_may_be_left_out_and_nothing_else() -> None:
    wanted = [TEXT, {**PAIR, "parameters": {"optional": True}}]
    assert rows({"text": ["a", "b"]}, wanted) == [{"text": "a"}, {"text": "b"}]
    assert rows({"text": ["a"], "pair": ["c"]}, wanted) == [{"text": "a", "pair": "c"}]
    with pytest.raises(InputError, match=r"must be text, pair \(optional\); given: pair"):
        rows({"pair": ["c"]}, wanted)
    assert blank(wanted) == {"text": "a"}
