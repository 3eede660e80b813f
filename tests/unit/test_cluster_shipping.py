"""What of a spec's folder travels: small text files, the same bytes for the same files, nothing that hides Tandem."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from cluster import shipping
from cluster.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_code_and_configuration_travel_and_data_stays(tmp_path: Path) -> None:
    write(tmp_path, "job.yaml", "my_task.py", "pkg/inner/deep.py", "pkg/inner/too/deep.py", "rows.jsonl", ".env.py")
    (tmp_path / "large.json").write_text(" " * shipping.LARGEST_BYTES)
    with shipping.copied(tmp_path, without=tmp_path / "job.yaml") as folder:
        assert names(folder) == ["my_task.py", "pkg/inner/deep.py"]
    assert not folder.exists()


def test_a_spec_travels_whatever_it_is_called(tmp_path: Path) -> None:
    write(tmp_path, "job.spec", "my_task.py")
    with shipping.copied(tmp_path, also=tmp_path / "job.spec") as folder:
        assert names(folder) == ["job.spec", "my_task.py"]


def test_what_is_called_like_our_packages_stays(tmp_path: Path) -> None:
    write(tmp_path, "jobs/__init__.py", "serve.py", "jobs.yaml", "mine/jobs/__init__.py")
    with shipping.copied(tmp_path) as folder:
        assert names(folder) == ["jobs.yaml", "mine/jobs/__init__.py"]


def test_an_archive_depends_on_the_files_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "my_task.py", "pkg/data.json")
        (tmp_path / folder / "pkg" / "__pycache__").mkdir()
    first, second = shipping.pack(tmp_path / "a"), shipping.pack(tmp_path / "b")
    assert first == second
    (tmp_path / "b" / "my_task.py").write_text("x = 2\n")
    assert shipping.digest(shipping.pack(tmp_path / "b")) != shipping.digest(first)
    (tmp_path / "out").mkdir()
    shipping.unpack(first, tmp_path / "out")
    assert names(tmp_path / "out") == ["my_task.py", "pkg/data.json"]


def test_an_archive_writes_nowhere_else(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../outside.py", "")
    (tmp_path / "in").mkdir()
    shipping.unpack(packed.getvalue(), tmp_path / "in")
    assert not (tmp_path / "outside.py").exists()


def test_more_than_code_is_refused(tmp_path: Path) -> None:
    import random

    noise = random.Random(0)
    for number in range(24):
        (tmp_path / f"{number}.json").write_bytes(noise.randbytes(shipping.LARGEST_BYTES - 1))
    with pytest.raises(UserError, match="are 24 MiB packed, and at most 16 can go"):
        shipping.pack(tmp_path)
