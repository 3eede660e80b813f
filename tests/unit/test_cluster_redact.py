"""Which settings are secrets, and that what only looks like one stays readable."""

import pytest

from cluster.redact import MASK, is_secret, redacted


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "token",
        "auth_token",
        "api_key",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "ENCRYPTION_KEY",
        "env.DB_PASSWORD",
    ],
)
def test_secrets_are_recognised(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["pad_token", "tokenizer", "max_tokens", "tokens_per_second", "num_key_value_heads", "sort_key", "eos_token_id"],
)
def test_the_vocabulary_of_training_is_no_secret(name: str) -> None:
    assert not is_secret(name)


def test_masks_nested_values_and_credentials_in_urls() -> None:
    spec = {
        "env": {"HF_TOKEN": "hf_abc", "LEVEL": "info"},
        "keys": [{"api_key": "x"}],
        "store": "postgresql://joe:pa55@db:5432/mlflow",
        "other": "postgresql://joe@db/keys?host=/run&sslpassword=pa55&password=pa55",
        "wait_for_token": True,
    }
    assert redacted(spec) == {
        "env": {"HF_TOKEN": MASK, "LEVEL": "info"},
        "keys": [{"api_key": MASK}],
        "store": f"postgresql://{MASK}@db:5432/mlflow",
        "other": f"postgresql://{MASK}@db/keys?host=/run&sslpassword={MASK}&password={MASK}",
        "wait_for_token": True,
    }
