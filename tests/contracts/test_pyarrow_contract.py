"""pyarrow still has what cluster/pyarrow_internals.py relies on."""

from __future__ import annotations

import pytest
from pyarrow import fs

from cluster import pyarrow_internals
from tests.support.contracts import Contract

PYARROW = Contract("cluster/pyarrow_internals.py", pyarrow_internals.ENTRIES)
URI = "s3://key:secret@bucket/x?endpoint_override=127.0.0.1:1&scheme=http&region=eu-west-3&allow_bucket_creation=true"


@PYARROW.check("pyarrow.fs.S3FileSystem.__reduce__")
def _reduce() -> None:
    files, _ = fs.FileSystem.from_uri(URI)
    copy = pyarrow_internals.with_timeouts(files, 7.0, 11.0)
    assert isinstance(copy, fs.S3FileSystem)
    before, after = files.__reduce__()[1][0], copy.__reduce__()[1][0]
    assert {key for key in after if after[key] != before[key]} == {"connect_timeout", "request_timeout"}
    assert (after["connect_timeout"], after["request_timeout"]) == (7.0, 11.0)
    assert (after["access_key"], after["region"], after["allow_bucket_creation"]) == ("key", "eu-west-3", True)


@pytest.mark.parametrize("name", PYARROW.entries)
def test_pyarrow(name: str) -> None:
    PYARROW.verify(name)
