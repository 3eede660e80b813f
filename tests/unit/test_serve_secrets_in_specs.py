"""A secret in a serve spec is refused, since others could read it there, and the refusal does not show it either."""

from __future__ import annotations

import pytest

from cluster import specfile
from cluster.errors import UserError
from serve.spec import ServeSpec

CANARY = "zq81canary"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            f"models: {{m: {{model: d, runtime_env: {{env_vars: {{HF_TOKEN: {CANARY}}}}}}}}}",
            "`models.m.runtime_env.env_vars.HF_TOKEN`: would be a secret",
        ),
        (
            f"models: {{m: {{model: d, runtime_env: {{env_vars: {{MLFLOW_PASSWORD: {CANARY}}}}}}}}}",
            "`models.m.runtime_env.env_vars.MLFLOW_PASSWORD`: is reserved",
        ),
        (
            f"models: {{m: {{model: d}}}}\nkeys: {{store: 'postgresql://alice:{CANARY}@db/keys'}}",
            "`keys.store`: the URL has a password",
        ),
        (
            f"models: {{m: {{model: d}}}}\nkeys: {{store: 'postgresql://alice@db/keys?password={CANARY}'}}",
            "`keys.store`: the URL has a password",
        ),
    ],
)
def test_it_is_refused_with_its_place_and_not_shown(text: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        specfile.loads(text, ServeSpec)
    assert wanted in str(caught.value)
    assert CANARY not in str(caught.value)


def test_other_variables_pass() -> None:
    given = "{env_vars: {OMP_NUM_THREADS: '2', TOKENIZERS_PARALLELISM: 'false'}}"
    spec = specfile.loads(f"models: {{m: {{model: d, runtime_env: {given}}}}}", ServeSpec)
    assert len(spec.models["m"].runtime_env["env_vars"]) == 2
