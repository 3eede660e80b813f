"""What the kernel tells of a connection that gets no answers (cluster/link.py)."""

import socket

import pytest

from cluster import link

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = (
    "   1: 0300000A:9C40 {end} {state} 00000028:00000000 01:00000114 {again:08X}     0        0 2489559 2 0 0 100 0\n"
)
MAPPED = "0000000000000000FFFF0000"


@pytest.fixture
def end() -> str:
    return f"{link.as_hex('10.77.0.1')}:18EB"


def test_the_most_of_all_connections_counts(end: str) -> None:
    lines = [LINE.format(end=end, state="01", again=n) for n in (0, 6, 2)]
    assert link.sent_again(HEAD + "".join(lines), {end}) == 6


def test_other_ends_and_connections_that_are_not_open_do_not_count(end: str) -> None:
    other = LINE.format(end=f"{link.as_hex('10.77.0.9')}:18EB", state="01", again=9)
    closing = LINE.format(end=end, state="04", again=9)
    assert link.sent_again(HEAD + other + closing, {end}) == 0
    assert link.sent_again("", {end}) == 0


def test_an_address_that_is_mapped_into_ipv6_counts(end: str) -> None:
    assert link.sent_again(HEAD + LINE.format(end=MAPPED + end, state="01", again=5), {end}) == 5


def test_this_machine_tells_of_connections_and_of_none_that_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.create_connection(server.getsockname()):
            assert any(address_in(table.read_text(), address) for table in link.TABLES if table.exists())
            assert not link.looks_cut(address)
    assert not link.looks_cut("no.such.host.invalid:1")
    assert not link.looks_cut("nonsense")


def address_in(table: str, address: str) -> bool:
    host, _, port = address.partition(":")
    return f"{link.as_hex(host)}:{int(port):04X}" in table
