"""The names by which the tracking server may be reached (tracking/server.py)."""

import pytest

from cluster.errors import UserError
from tracking.client import unknown_name
from tracking.server import allowed_hosts, own_names


def test_names_are_accepted_with_and_without_a_port() -> None:
    assert allowed_hosts(["Head"], ["mlflow.example.com"]) == [
        "head",
        "head:*",
        "mlflow.example.com",
        "mlflow.example.com:*",
    ]


def test_each_once_and_no_wildcard_interface() -> None:
    assert allowed_hosts(["0.0.0.0", "head", "::"], ["head", "", " "]) == ["head", "head:*"]


def test_ipv6_and_a_port_of_the_users() -> None:
    assert allowed_hosts(["2001:db8::1"], ["head:5000"]) == ["[2001:db8::1]", "[[]2001:db8::1]:*", "head:5000"]


def test_a_part_of_a_name_may_be_open() -> None:
    assert "*.example.com" in allowed_hosts([], ["*.example.com"])


@pytest.mark.parametrize("name", ["*", " * ", "*:*", "**", "*.*"])
def test_any_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="DNS rebinding"):
        allowed_hosts(["head"], ["mlflow", name])


def test_the_machines_own_names_are_found() -> None:
    import socket

    found = own_names()
    assert socket.gethostname() in found
    assert "127.0.0.1" in found


def test_a_refused_client_learns_the_way_out() -> None:
    text = unknown_name("http://head.example.com:5000")
    assert "TANDEM_MLFLOW_HOSTS=head.example.com" in text
