"""URIs of stores: which they are, what may be kept of them, and what of them is refused."""

from __future__ import annotations

import pytest

from cluster import store_uri
from cluster.errors import UserError

OTHER = "s3://bucket/a/model?endpoint_override=10.0.0.5:9000&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket/model", True),
        ("GS://bucket/model", True),
        ("hdfs://host:9000/model", True),
        ("models:/lm@champion", False),
        ("dir:///data/model", False),
        ("file:///data/model", False),
        ("/data/model", False),
        ("./model", False),
        ("owner/name", False),
    ],
)
def test_stores_are_told_from_paths_versions_and_hub_ids(place: str, expected: bool) -> None:
    assert store_uri.is_store(place) is expected


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        (OTHER, OTHER),
        ("S3://bucket/a/model/", "s3://bucket/a/model"),
        ("gs://bucket/m", "gs://bucket/m"),
        ("gs://anonymous@bucket/m", "gs://anonymous@bucket/m"),
        ("abfs://container@account.dfs.core.windows.net/m", "abfs://container@account.dfs.core.windows.net/m"),
        ("s3://bucket/a%20b/m", "s3://bucket/a%20b/m"),
    ],
)
def test_where_a_store_is_stays(uri: str, kept: str) -> None:
    assert store_uri.checked(uri) == kept


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hushhush@bucket/m",
        "s3://hushhush@bucket/m",
        "gs://anonymous:hushhush@bucket/m",
        "abfs://container:hushhush@account.dfs.core.windows.net/m",
        "abfs://c@a.dfs.core.windows.net/m?client_secret=hushhush",
        "s3://bucket/m?X-Amz-Signature=hushhush",
    ],
)
def test_what_may_be_secret_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match="environment") as refused:
        store_uri.checked(uri, "model.from")
    assert "hushhush" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["s3://bucket", "s3://bucket/", "s3://b/../m", "s3://b/%2e%2e/m", "s3://b//m", "s3://b/m#x"]
)
def test_what_names_no_folder_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="names no folder"):
        store_uri.checked(uri)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        (OTHER, (OTHER.replace("/a/model", "/a"), "model")),
        ("s3://bucket/my%20model", ("s3://bucket", "my model")),
    ],
)
def test_a_folder_is_parted_from_the_one_around_it(uri: str, parts: tuple[str, str]) -> None:
    assert store_uri.split(uri) == parts
