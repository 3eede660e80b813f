"""The hosts that other tests rest on (tests/support/hosts.py): apart where they should be, and gone afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import hosts
from tests.support.hosts import Host, Hosts
from tests.support.waiting import wait_for

PORT = 7000
SINK = """
import socket
server = socket.create_server(("", 7000))
print("up", flush=True)
while True:
    with server.accept()[0] as connection:
        while connection.recv(1 << 16):
            pass
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 7000), 2) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    hosts.need()
    with hosts.up(3) as made:
        yield made


@pytest.fixture(scope="module")
def sink(three: Hosts) -> Host:
    """The second host, on which bytes are swallowed."""
    process = three[1].start(sys.executable, "-c", SINK)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return three[1]


def seconds(source: Host, target: Host, count: int = 1) -> float | None:
    """Return how long so many bytes take; None: they do not arrive."""
    done = source.run(sys.executable, "-c", SEND, target.address, str(count), check=False)
    return float(done.stdout) if done.returncode == 0 else None


def test_each_has_a_name_an_address_and_folders_of_its_own(three: Hosts) -> None:
    for host in three:
        assert host.run("hostname").stdout.strip() == host.name
        host.run("sh", "-c", "echo mine > /tmp/mine; echo mine > /root/mine; echo mine > /dev/shm/mine")
    three[0].run("rm", "/tmp/mine", "/root/mine", "/dev/shm/mine")
    assert three[1].path("/tmp/mine").read_text() == "mine\n"
    assert not Path("/tmp/mine").exists()
    assert three[1].run("sh", "-c", "echo $HOME; pwd").stdout.split() == ["/root", "/root"]


def test_they_share_a_folder_and_see_the_project_read_only(three: Hosts) -> None:
    three[0].path("/shared/note").write_text("all")
    assert three[2].run("cat", "/shared/note").stdout == "all"
    imported = three[2].python("import cluster; print(cluster.__file__)").strip()
    assert Path(imported).parents[1] == hosts.PROJECT
    assert three[2].run("touch", imported, check=False).returncode != 0


def test_without_a_shared_folder_each_has_its_own(three: Hosts) -> None:
    with hosts.up(2, shared=False) as two:
        two[0].path("/shared/note").write_text("mine")
        assert not two[1].path("/shared/note").exists()
        assert two[0].address == three[0].address, "which no other process's hosts are troubled by"


def test_a_cut_link_carries_nothing_until_it_is_mended(three: Hosts, sink: Host) -> None:
    assert seconds(three[0], sink) is not None
    three.cut(sink)
    assert seconds(three[0], sink) is None
    three.mend(sink)
    wait_for(lambda: seconds(three[0], sink) is not None, "the link does not come back")


def test_a_slow_link_carries_no_more_than_it_is_given(three: Hosts, sink: Host) -> None:
    three.slow(three[2], "20mbit")
    try:
        slow = seconds(three[2], sink, 4_000_000)
    finally:
        three.fast(three[2])
    assert slow is not None
    assert slow > 4_000_000 * 8 / 20e6 * 0.8, "tbf lets a burst pass"


def test_nothing_is_left_when_they_go() -> None:
    hosts.need()
    with hosts.up(1) as one:
        folder, pid = one.folder, one[0].pid
        asleep = one[0].start("sleep", "600")
        below = psutil.Process(asleep.pid)
        ended = one[0].start("sleep", "600")
        hosts.end(ended)
        assert ended.returncode is not None
    asleep.wait(30)
    assert not folder.exists()
    assert not psutil.pid_exists(pid)
    assert not below.is_running()


def test_what_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hosts.lacking.__wrapped__() == "needs root"
