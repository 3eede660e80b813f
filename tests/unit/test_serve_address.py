"""The endpoint's port: exactly the one named, or the first free one."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from cluster.errors import UserError
from serve.deploy import address
from serve.spec import HttpSpec


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that is in use for the whole test."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_named_port_that_is_taken_is_refused(taken_port: int) -> None:
    with pytest.raises(UserError, match=f"http.port {taken_port}"):
        address.free_port(HttpSpec(port=taken_port))


def test_a_named_port_that_is_free_is_taken() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert address.free_port(HttpSpec(port=port)) == port


def test_without_a_name_the_next_free_port_is_taken(taken_port: int) -> None:
    assert taken_port < address.free_port(HttpSpec(), first=taken_port) < taken_port + address.PORTS_TRIED


@pytest.mark.parametrize("port", [None, 8123])
@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 70])
def test_a_host_that_is_not_this_machines_is_a_sentence(host: str, port: int | None) -> None:
    with pytest.raises(UserError, match=f"http.host {host}: the head node cannot listen on it"):
        address.free_port(HttpSpec(host=host, port=port))


def test_a_port_without_the_right_to_it_is_a_sentence() -> None:
    told = address._why("127.0.0.1", 80, PermissionError(errno.EACCES, "Permission denied"))
    assert told == "http.port 80 on 127.0.0.1: this user may not listen there; name a port from 1024 on"


def test_a_running_serve_cannot_move() -> None:
    running = HttpSpec(host="127.0.0.1", port=8000)
    assert address.running_address(running, HttpSpec()) == ("127.0.0.1", 8000)
    for wanted in (HttpSpec(port=8001), HttpSpec(host="0.0.0.0")):
        with pytest.raises(UserError, match=r"already listens on 127\.0\.0\.1:8000"):
            address.running_address(running, wanted)
