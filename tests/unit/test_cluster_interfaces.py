"""Which interface gloo and NCCL are told to take."""

import pytest

from cluster.interfaces import GLOO, NCCL, Interface, choose, gloo_listens_on, here, set_for

LO = Interface("lo", ("127.0.0.1", "::1"), True)
ETH = Interface("eth0", ("10.0.0.5", "fe80::1"), True, 10_000)
DOCKER = Interface("docker0", ("172.17.0.1",), True, 100_000)


def test_the_interface_with_rays_address_is_taken() -> None:
    choice = choose("10.0.0.5", [LO, ETH, DOCKER])
    assert (choice.gloo, choice.nccl) == ("eth0", "=eth0")


@pytest.mark.parametrize(
    "other", [Interface("ib0", ("10.9.0.5",), True), Interface("eth1", ("10.9.0.5",), True, 100_000)]
)
def test_nccl_is_left_alone_beside_what_may_be_faster(other: Interface) -> None:
    choice = choose("10.0.0.5", [LO, ETH, other])
    assert (choice.gloo, choice.nccl) == ("eth0", None)
    assert other.name in choice.why


@pytest.mark.parametrize(
    "other",
    [
        Interface("eth1", ("10.9.0.5",), False, 100_000),
        Interface("eth1", (), True, 100_000),
        Interface("eth1", ("10.9.0.5",), True, 1_000),
        Interface("eth1", ("10.9.0.5",), True, 0),
    ],
)
def test_what_is_down_slower_or_of_unknown_speed_is_no_rival(other: Interface) -> None:
    assert choose("10.0.0.5", [LO, ETH, other]).nccl == "=eth0"


@pytest.mark.parametrize(
    ("address", "interfaces", "because"),
    [
        ("127.0.0.3", [LO, ETH], "loopback"),
        ("10.0.0.6", [LO, ETH], "no interface has"),
        ("10.0.0.5", [LO, ETH, Interface("br0", ("10.0.0.5",), True)], "eth0 and br0 both"),
        ("10.0.0.5", [LO, Interface("eth0", ("10.0.0.5",), False)], "is down"),
    ],
)
def test_where_it_is_not_clear_nothing_is_chosen(address: str, interfaces: list[Interface], because: str) -> None:
    choice = choose(address, interfaces)
    assert (choice.gloo, choice.nccl) == (None, None)
    assert because in choice.why


def test_what_the_user_has_set_stays() -> None:
    environment = {GLOO: "bond0", NCCL: ""}
    assert set_for(choose("10.0.0.5", [ETH]), environment) == {NCCL: "=eth0"}
    assert environment == {GLOO: "bond0", NCCL: "=eth0"}


def test_gloo_goes_by_the_users_choice_then_by_ours_then_by_the_name() -> None:
    clear, unclear = choose("10.0.0.5", [ETH]), choose("10.0.0.6", [ETH])
    assert gloo_listens_on("127.0.1.1", clear, {GLOO: "bond0"}) == "bond0"
    assert gloo_listens_on("127.0.1.1", clear, {}) == "eth0"
    assert gloo_listens_on("127.0.1.1", unclear, {}) == "127.0.1.1"


def test_this_machine_has_a_loopback_interface_with_its_address() -> None:
    assert any("127.0.0.1" in one.addresses and one.is_up for one in here())
