"""Which replicas give the same answers: only at those may a text that has begun go on."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from serve.deploy.plan import ServedModel

SERVED = ServedModel("m", "/d", "3", "run", "causal-lm", True, "torch", {"spans": 1}, "fp32", 1024, 16, 1, 0)
OTHER: dict[str, Any] = {
    "directory": "/other",
    "version": "4",
    "run_id": "other",
    "task": "seq2seq",
    "generates": False,
    "engine": "vllm",
    "options": {"spans": 2},
    "precision": "int8",
    "max_context": 512,
    "code": "digest",
}
BESIDE: dict[str, Any] = {"name": "n", "max_batch": 8, "threads": 2, "created": 5, "details": {"card": "x"}}


@pytest.mark.parametrize("name", OTHER)
def test_what_an_answer_depends_on_makes_another_build(name: str) -> None:
    assert replace(SERVED, **{name: OTHER[name]}).build() != SERVED.build()


@pytest.mark.parametrize("name", BESIDE)
def test_what_it_does_not_depend_on_makes_none(name: str) -> None:
    other = replace(SERVED, **{name: BESIDE[name]})
    assert other.build() == SERVED.build()
    assert other.digest() != SERVED.digest()


def test_every_setting_is_one_or_the_other() -> None:
    assert {each.name for each in fields(ServedModel)} == {*OTHER, *BESIDE}
