"""Requests that parsers read in different ways, or that ask for nothing: refused or passed, in plain words."""

import json

import pytest

from serve.api import inference_api, strict_json
from serve.api.body import ApiError
from serve.api.content import check_length
from serve.api.texts import texts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" is given twice in one object'),
        ("[NaN]", "NaN is not a JSON value"),
        ("[-Infinity]", "-Infinity is not a JSON value"),
        ("[1e999]", "1e999 is out of range"),
        ('["\\ud800"]', "half a surrogate pair"),
        ("[" * 101 + "]" * 101, "at most 100 lists and objects"),
        ("[" * 200_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "more than 4300 digits"),
    ],
)
def test_json_of_more_than_one_reading_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        strict_json.read(text)


def test_a_hundred_lists_and_many_brackets_in_texts_are_read():
    deep = "[" * 100 + "]" * 100
    assert json.dumps(strict_json.read(deep)) == deep
    assert strict_json.read(json.dumps(["[" * 500])) == ["[" * 500]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", 3], r"prompt\[1\]: must be a string, as the first is \(given: 3\)"),
        ([1, "a"], r"prompt\[1\]: must be a token id"),
        ([1, True], r"prompt\[1\]: must be a token id"),
        ([[1], []], r"prompt\[1\]: must not be empty"),
        ([[1, -1]], r"prompt\[0\]\[1\]: must be a token id"),
        ([], "prompt: must be a string, a list of strings"),
        ({"a": 1}, "prompt: must be a string, a list of strings"),
    ],
)
def test_the_item_at_fault_is_named(given, said):
    with pytest.raises(ApiError, match=said):
        texts(given, "prompt")


def test_texts_and_token_ids_in_each_form():
    assert texts("a", "prompt") == ["a"]
    assert texts(["a", ""], "prompt") == ["a", ""]
    assert texts([1, 2], "prompt") == [(1, 2)]
    assert texts([[1], [2, 3]], "prompt") == [(1,), (2, 3)]


def test_a_listing_of_models_asks_for_the_ready_ones_or_all():
    assert not inference_api.parse_index(b"")
    assert inference_api.parse_index(b'{"ready": true}')
    for wrong in (b'{"ready": 1}', b'{"redy": true}'):
        with pytest.raises(ApiError):
            inference_api.parse_index(wrong)


@pytest.mark.parametrize("said", ["1001", "9" * 40])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(said):
    with pytest.raises(ApiError) as refused:
        check_length(said, 1000)
    assert refused.value.status == 413
    check_length("1000", 1000)
    check_length(None, 1000)
