"""Busy ports are stepped over, or named."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.ports import Ports, is_free

ROOT = Path(__file__).parents[2]


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def ports(notes: list[str]) -> Iterator[Ports]:
    with closing(Ports(notes.append)) as opened:
        yield opened


def test_default_steps_over_a_busy_port_and_says_so(ports: Ports, notes: list[str], busy_port: int) -> None:
    port = ports.choose("MLflow", busy_port)
    assert busy_port < port
    assert is_free(port)
    assert len(notes) == 1
    assert f"port {busy_port} is in use" in notes[0]
    assert f"MLflow takes {port}" in notes[0]


def test_explicit_busy_port_is_an_error_that_names_the_process(ports: Ports, busy_port: int) -> None:
    with pytest.raises(UserError, match=rf"port {busy_port} for MLflow is in use by .* \(pid {os.getpid()}\)"):
        ports.choose("MLflow", 5000, busy_port)


def test_two_daemons_never_get_the_same_port(ports: Ports) -> None:
    first = ports.choose("one", 23456)
    second = ports.choose("two", first)
    assert first != second
    with pytest.raises(UserError, match="in use"):
        ports.choose("three", 1, second)


def test_two_starts_at_once_never_get_the_same_port(ports: Ports) -> None:
    """Neither listens yet, so the port looks free to both."""
    ours = ports.choose("ours", 24567)
    code = f"from cluster.ports import Ports; print(Ports(lambda note: None).choose('theirs', {ours}))"
    theirs = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(theirs.stdout) != ours
