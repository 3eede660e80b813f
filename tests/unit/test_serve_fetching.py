"""What `up` tells of nodes that fetch a model from a store."""

from __future__ import annotations

from serve.deploy.waiting import fetches
from serve.wire import Fetching


def test_each_model_is_told_with_its_nodes() -> None:
    told = [
        Fetching("lm", "s3://bucket/lm", "10.0.0.2"),
        Fetching("lm", "s3://bucket/lm", "10.0.0.1"),
        Fetching("lm", "s3://bucket/lm", "10.0.0.1"),
        Fetching("images", "gs://other/images", "10.0.0.1"),
    ]
    assert fetches("tandem", told) == {
        "tandem.lm": "10.0.0.1, 10.0.0.2 fetch s3://bucket/lm",
        "tandem.images": "10.0.0.1 fetches gs://other/images",
    }
    assert fetches("tandem", []) == {}
