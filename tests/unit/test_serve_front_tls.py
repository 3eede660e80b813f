"""TLS's files: used, or refused with what is wrong, and trusted by our own commands alone."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.errors import UserError
from serve.deploy import plan
from serve.front import tls
from serve.spec import ServeSpec
from tests.support import certificates


class Files(NamedTuple):
    certificate: str
    key: str


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(*certificates.make(tmp_path_factory.mktemp("tls"), "localhost"))


def test_a_pair_is_taken(good: Files) -> None:
    tls.check(*good)
    assert tls.context(*good).minimum_version == ssl.TLSVersion.TLSv1_2


def test_files_that_are_not_there_are_named(good: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"http\.tls\.certificate: there is no file {tmp_path}/c\.pem"):
        tls.check(str(tmp_path / "c.pem"), good.key)
    with pytest.raises(UserError, match=r"http\.tls\.key: there is no file"):
        tls.check(good.certificate, str(tmp_path))


def test_a_key_of_another_certificate_is_refused(good: Files, tmp_path: Path) -> None:
    other = Files(*certificates.make(tmp_path, "localhost"))
    with pytest.raises(UserError, match="the key is not that of the certificate"):
        tls.check(good.certificate, other.key)


def test_a_file_that_is_none_is_refused(good: Files, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no PEM")
    with pytest.raises(UserError, match=str(text)):
        tls.check(str(text), good.key)
    with pytest.raises(UserError, match=str(text)):
        tls.check(good.certificate, str(text))


@pytest.mark.parametrize(("days", "said"), [((-20, -10), "expired"), ((10, 20), "not yet valid")])
def test_a_certificate_out_of_its_time_is_refused(days: tuple[int, int], said: str, tmp_path: Path) -> None:
    begin, end = (datetime.timedelta(days=each) for each in days)
    with pytest.raises(UserError, match=said):
        tls.check(*certificates.make(tmp_path, "localhost", begin, end))


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the key is encrypted"):
        tls.check(*certificates.make(tmp_path, "localhost", password=b"secret"))


def test_paths_are_read_beside_the_spec() -> None:
    files = {"certificate": "tls/c.pem", "key": "/keys/k.pem"}
    spec = ServeSpec.model_validate({"models": {"m": {"model": "dir"}}, "http": {"tls": files}})
    made = plan.absolute(spec, Path("/specs")).http.tls
    assert made is not None
    assert (made.certificate, made.key) == ("/specs/tls/c.pem", "/keys/k.pem")
