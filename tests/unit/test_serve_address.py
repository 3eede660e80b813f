"""The endpoint's port: exactly the one named, or the first free one."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.ports import Claims
from serve.deploy import address
from serve.deploy.where import Address
from serve.front import listening
from serve.spec import HttpSpec

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = Claims()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that is in use for the whole test."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_named_port_that_is_taken_is_refused(taken_port: int) -> None:
    with pytest.raises(UserError, match=f"http.port {taken_port}"):
        address.free_port(HttpSpec(port=taken_port), CLAIMS)


def test_a_named_port_that_is_free_is_taken() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert address.free_port(HttpSpec(port=port), CLAIMS) == port


def test_without_a_name_the_next_free_port_is_taken(taken_port: int) -> None:
    assert taken_port < address.free_port(HttpSpec(), CLAIMS, first=taken_port) < taken_port + address.PORTS_TRIED


def test_a_port_on_which_another_start_is_about_to_listen_is_not_taken() -> None:
    """Neither listens yet, so the port looks free to both."""
    ours = address.free_port(HttpSpec(), CLAIMS, first=24767)
    code = f"""
from cluster.errors import UserError
from cluster.ports import Claims
from serve.deploy import address
from serve.spec import HttpSpec
print(address.free_port(HttpSpec(), Claims(), first={ours}))
try:
    address.free_port(HttpSpec(port={ours}), Claims())
except UserError as error:
    print(error)
"""
    theirs = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    port, said = theirs.splitlines()
    assert int(port) > ours
    assert said.startswith(f"http.port {ours} on 127.0.0.1 is about to be listened on by another start")


def test_running_gateways_keep_their_port_unless_the_spec_names_another(taken_port: int) -> None:
    running = Address("127.0.0.1", taken_port)
    assert address.choose(HttpSpec(), running, CLAIMS) == running
    assert address.choose(HttpSpec(port=taken_port), running, CLAIMS) == running, "theirs is not taken by somebody else"
    assert address.choose(HttpSpec(host="0.0.0.0"), running, CLAIMS) == Address("0.0.0.0", taken_port)
    with pytest.raises(UserError, match=f"http.port {taken_port} on 127.0.0.1 is taken"):
        address.choose(HttpSpec(port=taken_port), Address("127.0.0.1", taken_port - 1), CLAIMS)
    with pytest.raises(UserError, match="is taken"):
        address.choose(HttpSpec(port=taken_port), None, CLAIMS)


def test_a_port_that_others_share_is_taken() -> None:
    with listening.listen("127.0.0.1", 0) as shared:
        port = shared.getsockname()[1]
        listening.listen("127.0.0.1", port).close()
        with pytest.raises(UserError, match="is taken"):
            address.free_port(HttpSpec(port=port), CLAIMS)


def test_gateways_run_on_the_nodes_that_are_to_listen() -> None:
    assert address.placement(HttpSpec()) == {"resources": {"node:__internal_head__": 0.001}}
    assert address.placement(HttpSpec(proxies="every-node")) == {}


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (Address("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (Address("0.0.0.0", 8000), "http://10.0.0.1:8000"),
        (Address("::1", 8443, "/c.pem"), "https://[::1]:8443"),
        (Address("::", 8443, "/c.pem"), "https://10.0.0.1:8443"),
    ],
)
def test_the_endpoint_is_named_by_a_node_where_the_host_means_all_addresses(at: Address, expected: str) -> None:
    assert at.url("10.0.0.1") == expected


def test_the_port_before_is_taken_again_if_it_is_free(taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert address.free_port(HttpSpec(), CLAIMS, before=str(port)) == port
    assert address.free_port(HttpSpec(), CLAIMS, first=port, before=str(taken_port)) == port


@pytest.mark.parametrize(
    ("host", "said"),
    [("192.0.2.1", "no address of the node"), ("no-such-host.invalid", "can be resolved")],
)
def test_a_host_that_cannot_be_listened_on_is_named_with_the_reason(host: str, said: str) -> None:
    for http in (HttpSpec(host=host), HttpSpec(host=host, port=8123)):
        with pytest.raises(UserError, match=f"{host} .*{said}"):
            address.free_port(http, CLAIMS)
