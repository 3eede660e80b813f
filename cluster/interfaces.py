"""Which network interface gloo and NCCL take to reach the other nodes, and setting it where the choice is clear.

gloo listens on the address that the host's name resolves to: 127.0.1.1 on Debian and Ubuntu, where no other node
reaches it. NCCL takes the first interface that is neither loopback nor Docker's. Ray's own address of a node is one by
which the others do reach it, so the interface with that address is the one to take.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
VIRTUAL = ("docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "cilium", "lxc", "tunl", "kube", "nodelocal")
"""How the names of interfaces begin that are a machine's own, and lead to no other."""


@dataclass(frozen=True)
class Interface:
    """One network interface of a node."""

    name: str
    addresses: tuple[str, ...]
    is_up: bool
    speed_mbits: int = 0
    """0: the system does not tell."""


@dataclass(frozen=True)
class Choice:
    """What to set on a node."""

    gloo: str | None
    """The interface; None: leave it to gloo."""
    nccl: str | None
    """In NCCL's notation, in which = stands before an exact name; None: leave it to NCCL."""
    why: str
    """A clause: what the choice rests on, or why it is not clear."""


def choose(address: str, interfaces: Sequence[Interface]) -> Choice:
    """Choose by the address that Ray has for the node. Pure.

    NCCL is left alone where another interface may be the better one for it: InfiniBand, or a faster one.
    """
    if is_loopback(address):
        return Choice(None, None, f"Ray's address {address} is a loopback one: all nodes are on this machine")
    with_it = [one for one in interfaces if address in one.addresses]
    if not with_it:
        return Choice(None, None, f"no interface has Ray's address {address}")
    if len(with_it) > 1:
        names = " and ".join(one.name for one in with_it)
        return Choice(None, None, f"{names} both have Ray's address {address}")
    found = with_it[0]
    if not found.is_up:
        return Choice(None, None, f"{found.name}, which has Ray's address {address}, is down")
    others = _rivals(found, interfaces)
    nccl = None if others else f"={found.name}"
    left = f"; NCCL chooses by itself, since {' and '.join(others)} may be faster" if others else ""
    return Choice(found.name, nccl, f"{found.name} has Ray's address {address}{left}")


def set_for(choice: Choice, environment: MutableMapping[str, str]) -> dict[str, str]:
    """Set what is chosen and not set yet; return what was set. What the user has set stays."""
    wanted = {GLOO: choice.gloo, NCCL: choice.nccl}
    changed = {name: value for name, value in wanted.items() if value is not None and not environment.get(name)}
    environment.update(changed)
    return changed


def here() -> list[Interface]:
    """List this machine's interfaces; none where the system does not tell: then nothing is set."""
    import psutil

    try:
        states, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    except OSError:
        return []
    return [
        Interface(
            name,
            tuple(entry.address.partition("%")[0] for entry in entries if _is_address(entry.address)),
            name in states and states[name].isup,
            states[name].speed if name in states else 0,
        )
        for name, entries in addresses.items()
    ]


def take() -> dict[str, str]:
    """Set, in a worker process of Ray's, what is clear; return what was set."""
    import ray.util

    return set_for(choose(ray.util.get_node_ip_address(), here()), os.environ)


def gloo_listens_on(name_resolves_to: str | None, choice: Choice, environment: Mapping[str, str]) -> str:
    """Say by what gloo would find its address on a node: an interface, or the address of the host's name. Pure."""
    if environment.get(GLOO):
        return environment[GLOO]
    return choice.gloo or name_resolves_to or "nothing"


def _rivals(chosen: Interface, interfaces: Sequence[Interface]) -> list[str]:
    """Name the interfaces that lead elsewhere and that NCCL may prefer with reason."""
    others = [one for one in interfaces if one.is_up and one.addresses and one != chosen and not _is_of_machine(one)]
    return [one.name for one in others if one.name.startswith("ib") or one.speed_mbits > chosen.speed_mbits > 0]


def _is_of_machine(interface: Interface) -> bool:
    return interface.name.startswith(VIRTUAL) or all(is_loopback(address) for address in interface.addresses)


def is_loopback(address: str) -> bool:
    """Say whether an address leads no further than its machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
        return True
    except ValueError:  # a MAC address
        return False
