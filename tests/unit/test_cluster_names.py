"""One rule for names, wherever a user gives one; and errors that reach the user through any process boundary."""

import pickle
from typing import Any

import pytest

from cluster import names, specfile
from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.tasks import TaskError
from serve.engines.protocol import RequestError
from serve.spec import ServeSpec
from tracking.errors import Refused

JOB = """
name: {name}
phase: evaluate
model: {{from: "models:/a@b"}}
data: {{eval: x}}
register: {{model: {model}, alias: {alias}}}
"""


def job(**given: str) -> JobSpec:
    fields = {"name": "n", "model": "m", "alias": "champion", **given}
    return specfile.loads(JOB.format(**fields), JobSpec)


@pytest.mark.parametrize("field", ["name", "model", "alias"])
@pytest.mark.parametrize("bad", ["'a/b'", "'.a'", "'a.'", "'a b'", "a" * 101, "'ä'", "'a\\n'"])
def test_a_bad_name_is_refused_where_it_is_written(field: str, bad: str):
    with pytest.raises(UserError, match="is not a valid name"):
        job(**{field: bad})


@pytest.mark.parametrize("alias", ["latest", "Latest", "'3'", "v3"])
def test_an_alias_that_reads_like_a_version_is_refused_before_anything_runs(alias: str):
    with pytest.raises(UserError, match=r"register\.alias.*reads like a version"):
        job(alias=alias)


def test_serving_holds_to_the_same_rule():
    for spec in ("name: a.\nmodels: {a: {model: m}}", "models: {'a/b': {model: m}}"):
        with pytest.raises(UserError, match="is not a valid name"):
            specfile.loads(spec, ServeSpec)
    assert specfile.loads("models: {a-b_c.9: {model: m}}", ServeSpec).models


def test_a_key_may_be_longer_than_a_name():
    assert names.check_key("run key", "a" * 120) == "a" * 120
    with pytest.raises(UserError):
        names.check_name("name", "a" * 120)


@pytest.mark.parametrize(
    "error", [UserError("a"), TaskError("a"), Refused("a", "CODE"), RequestError("top_p", "must be small")]
)
def test_errors_for_users_survive_a_process_boundary(error: Any):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert isinstance(again, UserError)
