"""The endpoint's port: exactly the one named, or the first free one."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from ray.serve.config import HTTPOptions
from ray.serve.schema import ProxyStatus

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


def test_a_running_serve_cannot_move() -> None:
    running = HTTPOptions(host="127.0.0.1", port=8000, location="HeadOnly")
    assert address.running_address(running, HttpSpec()) == ("127.0.0.1", 8000)
    for wanted in (HttpSpec(port=8001), HttpSpec(host="0.0.0.0")):
        with pytest.raises(UserError, match=r"already listens on 127\.0\.0\.1:8000"):
            address.running_address(running, wanted)
    address.running_address(running, HttpSpec(proxies="head"))
    with pytest.raises(UserError, match=r"http\.proxies: every-node asks for EveryNode: that cannot change"):
        address.running_address(running, HttpSpec(proxies="every-node"))


def test_the_port_before_is_taken_again_if_it_is_free(taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert address.free_port(HttpSpec(), before=str(port)) == port
    assert address.free_port(HttpSpec(), first=port, before=str(taken_port)) == port


@pytest.mark.parametrize(
    ("host", "said"),
    [("192.0.2.1", "no address of the node"), ("no-such-host.invalid", "can be resolved")],
)
def test_a_host_that_cannot_be_listened_on_is_named_with_the_reason(host: str, said: str) -> None:
    for http in (HttpSpec(host=host), HttpSpec(host=host, port=8123)):
        with pytest.raises(UserError, match=f"{host} .*{said}"):
            address.free_port(http)


def test_a_proxy_that_does_not_listen_is_found() -> None:
    healthy, starting, unhealthy, draining = (
        ProxyStatus(name) for name in ("HEALTHY", "STARTING", "UNHEALTHY", "DRAINING")
    )
    found = address.silent_proxies({"b": unhealthy, "a": healthy, "c": starting, "d": draining})
    assert found == ["b", "c"]
