"""What a node's processes may have: the least of the machine's memory and of what control groups leave."""

from __future__ import annotations

from pathlib import Path

from cluster import memory
from cluster.memory import Memory


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_groups_of_version_2_and_those_around_them(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max="1000", memory__current="700", memory__stat="anon 600\ninactive_file 100")
    group(tmp_path / "a" / "b", memory__max="max", memory__current="10")
    assert [*memory.limits(tmp_path, "0::/a/b\n")] == [Memory(1000, 400)]
    group(tmp_path / "a" / "b", memory__max="300", memory__current="350")
    assert [*memory.limits(tmp_path, "0::/a/b\n")] == [Memory(300, 0), Memory(1000, 400)]


def test_groups_of_version_1(tmp_path: Path) -> None:
    group(
        tmp_path / "memory" / "x", memory__limit_in_bytes="500", memory__usage_in_bytes="450",
        memory__stat="cache 90\ntotal_inactive_file 50",
    )  # fmt: skip
    group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="9000")
    membership = "9:cpu,cpuacct:/x\n4:memory:/x\n0::/\n"
    assert [*memory.limits(tmp_path, membership)] == [Memory(500, 100)]


def test_a_container_that_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    group(tmp_path, memory__max="800", memory__current="100")
    assert [*memory.limits(tmp_path, "0::/system.slice/docker-1.scope\n")] == [Memory(800, 700)]
    assert [*memory.limits(tmp_path / "none", "0::/\n")] == []
    assert [*memory.limits(tmp_path, "")] == []


def test_this_machine_has_some() -> None:
    found = memory.of_node()
    assert 0 < found.available <= found.total
    assert memory.of_device(on_gpu=False) is not None
    assert memory.least([Memory(5, 1), Memory(3, 2)]) == Memory(3, 1)
