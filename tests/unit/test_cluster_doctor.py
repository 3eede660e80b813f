"""What the doctor makes of facts: rules, rounds, clocks and sentences; and its probes of this machine, without Ray."""

import io
import socket
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.doctor import collective, disks, gpus, judge, judge_links, quick, shared, table, versions, wire
from cluster.doctor.facts import AllReduce, Answer, Clock, Disk, Facts, Finding, Gpu, Link, NodeFacts, Storage
from cluster.doctor.tournament import rounds, sampled
from cluster.interfaces import Choice

SAME = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", versions.DRIVER: "", versions.CODE: "abc"}
FAST, SLOW = 1e9, 2e6


def node(number: int, **changed: Any) -> NodeFacts:
    address = f"10.0.0.{number}"
    known: dict[str, Any] = {
        "node_id": f"n{number}",
        "address": address,
        "host": f"host{number}",
        "versions": SAME,
        "clock": Clock(0.001, 0.0005),
        "disks": (Disk("/tmp", 50 << 30, 100 << 30, 500e6, 900e6, "O_DIRECT"),),
        "resolves_to": (address,),
        "interface": Choice("eth0", "=eth0", f"eth0 has Ray's address {address}"),
        "gloo_by": "eth0",
        "ports": (32768, 60999),
        "gpus_by": "none found",
        "mlflow": Answer("http://10.0.0.1:5000", 200),
    }
    return NodeFacts(**{**known, **changed})


def links(count: int, slow: set[tuple[int, int]] = frozenset()) -> tuple[Link, ...]:  # type: ignore[assignment]
    pairs = [(a, b) for a in range(1, count + 1) for b in range(1, count + 1) if a != b]
    return tuple(Link(f"n{a}", f"n{b}", 0.0002, SLOW if (a, b) in slow else FAST) for a, b in pairs)


def facts(*nodes: NodeFacts, **known: Any) -> Facts:
    count = len(nodes)
    shared_by_all = Storage("/mnt/runs", False, tuple(one.node_id for one in nodes))
    return Facts(nodes, **{"links": links(count), "storage": shared_by_all, **known})


def three(**changed: Any) -> Facts:
    """Three nodes, of which the third is changed."""
    return facts(node(1), node(2), node(3, **changed))


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


# -- the judge -------------------------------------------------------------------------------------------------------


def test_a_sound_cluster_has_nothing_to_mend() -> None:
    assert judge.verdicts(three()) == []
    assert judge.exit_code([]) == 0


@pytest.mark.parametrize(
    ("name", "version", "severity"),
    [
        ("torch", "2.12.0", "error"),
        ("torch", "2.13.0+cu130", "warning"),
        ("torch", "", "error"),
        ("ray", "2.59.0", "error"),
        ("python", "3.12.1", "error"),
        ("python", "3.11.9", "warning"),
        (versions.CODE, "abd", "error"),
        ("mlflow", "3.16", "warning"),
    ],
)
def test_versions_that_differ_are_named_with_their_node(name: str, version: str, severity: str) -> None:
    found = only(judge.verdicts(three(versions={**SAME, name: version})))
    assert (found.severity, found.node, found.kind) == (severity, "host3 (10.0.0.3)", "versions")
    assert name in found.what
    assert judge.exit_code([found]) == (severity == "error")


def test_a_node_without_gpus_needs_no_driver_and_drivers_that_differ_are_a_warning() -> None:
    with_driver = [node(1), *(node(n, versions={**SAME, versions.DRIVER: "580.1"}) for n in (2, 3))]
    assert judge.verdicts(facts(*with_driver)) == []
    other = node(3, versions={**SAME, versions.DRIVER: "570.2"})
    assert only(judge.verdicts(facts(*with_driver[:2], node(4), other, links=()))).severity == "warning"


@pytest.mark.parametrize(
    ("clock", "severity"),
    [
        (Clock(-60.0, 0.001), "error"),
        (Clock(11.0, 2.0), "warning"),  # it may be less than ten
        (Clock(3.0, 0.1), "warning"),
        (Clock(0.5, 0.001), None),
        (Clock(20.0, 20.0), None),
        (None, None),
    ],
)
def test_a_clock_counts_by_what_is_sure_of_it(clock: Clock | None, severity: str | None) -> None:
    # No namespace shifts the clock that time.time reads, so a wrong one is only judged here.
    found = judge.verdicts(three(clock=clock))
    assert [one.severity for one in found] == ([severity] if severity else [])
    assert all("host3" in one.node and ("behind" in one.what) == (clock.offset_s < 0) for one in found if clock)


def test_debians_habit_is_a_warning_where_an_interface_is_taken_and_an_error_where_none_is() -> None:
    warned = only(judge.verdicts(three(resolves_to=("127.0.1.1",))))
    assert warned.severity == "warning"
    assert "127.0.1.1" in warned.what
    assert "eth0" in warned.why
    unclear = Choice(None, None, "no interface has Ray's address 10.0.0.3")
    refused = only(judge.verdicts(three(resolves_to=("127.0.1.1",), gloo_by="127.0.1.1", interface=unclear)))
    assert refused.severity == "error"
    assert "no interface has" in refused.what
    assert "GLOO_SOCKET_IFNAME" in refused.way_out


def test_names_of_a_single_node_or_of_loopback_nodes_are_nobodys_matter() -> None:
    assert judge.verdicts(facts(node(1, resolves_to=("127.0.1.1",)))) == []
    loopback = [node(n, address=f"127.0.0.{n}", resolves_to=("127.0.1.1",), gloo_by="127.0.1.1") for n in (2, 3)]
    assert judge.verdicts(facts(*loopback, links=())) == []


def test_a_port_that_nobody_reaches_is_named_at_the_node_that_opened_it() -> None:
    deaf = {"n3": "Connection timed out"}
    found = only(judge.verdicts(facts(node(1, unreached=deaf), node(2, unreached=deaf), node(3))))
    assert (found.severity, found.node) == ("error", "host3 (10.0.0.3)")
    assert "any other node: Connection timed out" in found.what
    one_way = only(judge.verdicts(facts(node(1, unreached=deaf), node(2), node(3))))
    assert "from host1 (10.0.0.1)" in one_way.what


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Answer("http://head:5000", 403, "Invalid Host header - possible DNS rebinding attack detected"),
            "--allowed-hosts",
        ),
        (Answer("http://head:5000", 403, "Permission denied"), "MLFLOW_TRACKING_USERNAME"),
        (Answer("http://head:5000", 401, ""), "MLFLOW_TRACKING_USERNAME"),
        (Answer("http://head:5000", 0, "timed out"), "--host 0.0.0.0"),
        (Answer("", 0, ""), "export MLFLOW_TRACKING_URI"),
    ],
)
def test_why_mlflow_does_not_answer_decides_the_way_out(answer: Answer, words: str) -> None:
    found = only(judge.verdicts(three(mlflow=answer)))
    assert (found.severity, found.node) == ("error", "host3 (10.0.0.3)")
    assert words in found.way_out


def test_a_store_of_mlflows_that_is_no_server_is_not_judged() -> None:
    assert judge.verdicts(three(mlflow=Answer("sqlite:///x.db", 0, "not asked: it is no http address"))) == []


def test_what_is_the_same_on_every_node_is_said_once() -> None:
    silent = Answer("http://10.0.0.9:5000", 0, "timed out")
    found = only(judge.verdicts(facts(*(node(n, mlflow=silent) for n in (1, 2, 3)))))
    assert found.node == "every node"


@pytest.mark.parametrize(
    ("disk", "severity"),
    [
        (Disk("/tmp", 100 << 20, 100 << 30), "error"),
        (Disk("/tmp", 1 << 30, 100 << 30), "warning"),
        (Disk("/tmp", 50 << 30, 100 << 30, 5e6, 900e6, "O_DIRECT"), "warning"),
        (Disk("/tmp", 0, 0, error="Permission denied"), "error"),
        (Disk("/tmp", 50 << 30, 100 << 30), None),
    ],
)
def test_disks_that_are_full_slow_or_refuse_are_named(disk: Disk, severity: str | None) -> None:
    found = judge.verdicts(three(disks=(disk,)))
    assert [one.severity for one in found] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("gpu", "severity"),
    [
        (Gpu("H100", has_repair_failed=True, is_repair_pending=True), "error"),
        (Gpu("H100", is_repair_pending=True), "warning"),
        (Gpu("H100", uncorrected_errors=2), "warning"),
        (Gpu("H100", throttled_by=("hardware thermal slowdown",), temperature_c=95), "warning"),
        (Gpu("H100", throttled_by=("power cap",)), None),
        (Gpu("H100", uncorrected_errors=0, retired_pages=3), None),
    ],
)
def test_gpus_whose_memory_or_clocks_suffer_are_named(gpu: Gpu, severity: str | None) -> None:
    found = judge.verdicts(three(gpus=(gpu,), ray_gpus=1.0, gpus_by="NVML"))
    assert [one.severity for one in found] == ([severity] if severity else [])
    assert all("GPU 0 (H100)" in one.what for one in found)


def test_gpus_that_ray_offers_and_nothing_finds_are_named() -> None:
    assert "offers 2 GPUs" in only(judge.verdicts(three(ray_gpus=2.0))).what


def test_a_node_that_does_not_answer_is_an_error_and_nothing_else_is_said_of_it() -> None:
    found = only(judge.verdicts(three(error="no answer within 90 s", mlflow=Answer("", 0, ""))))
    assert (found.severity, found.kind) == ("error", "silent")


# -- storage ---------------------------------------------------------------------------------------------------------

ALL = ("n1", "n2", "n3")
GONE = "No such file or directory"


def stored(not_read: dict[str, dict[str, str]], **changed: Any) -> list[Finding]:
    return judge.verdicts(
        facts(*map(node, (1, 2, 3)), storage=Storage("/runs", False, ALL, not_read=not_read, **changed))
    )


def test_a_folder_that_is_each_nodes_own_is_said_once() -> None:
    nothing = {reader: {writer: GONE for writer in ALL if writer != reader} for reader in ALL}
    found = only(stored(nothing))
    assert (found.severity, found.node) == ("error", "")
    assert "/runs is not shared" in found.what


def test_one_node_without_the_share_is_named_alone() -> None:
    found = only(stored({"n1": {"n3": GONE}, "n2": {"n3": GONE}, "n3": {"n1": GONE, "n2": GONE}}))
    assert found.node == "host3 (10.0.0.3)"
    assert "another /runs" in found.what


def test_one_file_that_is_not_seen_names_its_reader_and_its_writer() -> None:
    found = only(stored({"n2": {"n1": "other bytes than were written"}}))
    assert found.node == "host2 (10.0.0.2)"
    assert "host1" in found.what


def test_a_node_that_cannot_write_but_reads_is_not_called_apart() -> None:
    found = only(stored({}, not_written={"n3": "Read-only file system"}))
    assert found.node == "host3 (10.0.0.3)"
    assert "cannot write" in found.what


def test_a_default_that_nobody_named_says_how_to_name_one() -> None:
    storage = Storage("/runs", True, ALL, not_read={reader: dict.fromkeys(set(ALL) - {reader}, GONE) for reader in ALL})
    assert "--storage PLACE" in only(judge.verdicts(facts(*map(node, (1, 2, 3)), storage=storage))).what


def test_a_file_in_a_folder_is_written_read_and_removed_with_the_folders_made_for_it(tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    made = shared.put(str(place), "one", b"content")
    assert shared.get(str(place), "one") == b"content"
    shared.remove(str(place), "one")
    shared.remove_folders(made)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    made = shared.put(str(tmp_path), "one", b"content")
    shared.remove(str(tmp_path), "one")
    shared.remove_folders(made)
    assert tmp_path.is_dir()


def test_a_uri_is_written_read_and_removed(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/a%20b"
    made = shared.put(uri, "one", b"content")
    assert (tmp_path / "a b").is_dir()
    assert shared.get(uri, "one") == b"content"
    shared.remove(uri, "one")
    shared.remove_folders(made)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_an_error_at_once_where_its_folder_is_not_there_either(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shared.get(str(tmp_path / "nowhere"), "one", within_s=3600)
    with pytest.raises(FileNotFoundError):
        shared.get(str(tmp_path), "one", within_s=0)


def test_unseen_tells_errors_other_bytes_and_what_was_not_asked() -> None:
    written = {"a": b"1", "b": b"2", "c": b"3", "d": b"4"}
    wrong = shared.unseen(written, {"a": b"1", "b": "gone", "c": b"x"})
    assert wrong == {"b": "gone", "c": "other bytes than were written", "d": "not asked"}


# -- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 10))
def test_each_pair_meets_once_and_nobody_is_in_two_pairs_of_a_round(count: int) -> None:
    held = rounds(range(count))
    assert len(held) == count - 1 + count % 2
    assert Counter(frozenset(pair) for pairs in held for pair in pairs) == Counter(
        frozenset(pair) for pair in combinations(range(count), 2)
    )
    for pairs in held:
        members = [member for pair in pairs for member in pair]
        assert len(members) == len(set(members))


def test_of_many_nodes_each_meets_31_and_the_rest_is_counted() -> None:
    held, left_out = sampled(range(40))
    assert len(held) == 31
    met = Counter(member for pairs in held for pair in pairs for member in pair)
    assert set(met.values()) == {31}
    assert left_out == 40 * 39 // 2 - 31 * 20
    assert sampled(range(32))[1] == 0
    assert rounds([1]) == []


def test_one_slow_node_of_three_is_named_though_most_links_are_slow() -> None:
    slow = {(1, 3), (3, 1), (2, 3), (3, 2)}
    found = only(judge.verdicts(facts(node(1), node(2), node(3), links=links(3, slow))))
    assert (found.severity, found.node, found.kind) == ("error", "host3 (10.0.0.3)", "network")
    assert "2.0 MB/s" in found.what
    assert "1000 MB/s" in found.what


def test_a_node_that_only_receives_slowly_is_named_by_its_links() -> None:
    found = judge.verdicts(facts(node(1), node(2), node(3), links=links(3, {(1, 3), (2, 3)})))
    assert [one.node for one in found] == ["host1 (10.0.0.1) → host3 (10.0.0.3), host2 (10.0.0.2) → host3 (10.0.0.3)"]


def test_between_two_nodes_the_floor_decides() -> None:
    slow = facts(node(1), node(2), links=links(2, {(1, 2), (2, 1)}))
    assert only(judge.verdicts(slow)).severity == "error"
    assert judge.verdicts(facts(node(1), node(2))) == []


def test_half_of_what_is_usual_is_a_warning() -> None:
    some = tuple(replace(one, bytes_per_s=0.4 * FAST) if "n3" in (one.source, one.target) else one for one in links(4))
    assert only(judge.verdicts(facts(*map(node, (1, 2, 3, 4)), links=some))).severity == "warning"


def test_links_that_look_slow_are_measured_again_before_anything_is_said() -> None:
    slow = links(3, {(1, 3), (3, 1), (2, 3), (3, 2)})
    assert {(one.source, one.target) for one in judge_links.suspects(slow)} == {
        ("n1", "n3"),
        ("n3", "n1"),
        ("n2", "n3"),
        ("n3", "n2"),
    }
    assert judge_links.suspects(links(3)) == []
    assert judge_links.suspects([Link("n1", "n2", 0.001)]) == []


def test_links_within_one_machine_are_not_judged() -> None:
    local = [node(n, address=f"127.0.0.{n}") for n in (1, 2, 3)]
    assert judge.verdicts(facts(*local, links=links(3, {(1, 2)}))) == []


def test_a_far_node_is_named_by_its_round_trips() -> None:
    far = tuple(replace(one, round_trip_s=0.08) if "n3" in (one.source, one.target) else one for one in links(4))
    found = only(judge.verdicts(facts(*map(node, (1, 2, 3, 4)), links=far)))
    assert (found.severity, found.node) == ("warning", "host3 (10.0.0.3)")


def test_a_sum_that_fails_is_an_error() -> None:
    failed = AllReduce("gloo", 1, 0.0, 0.0, "connectFullMesh failed")
    assert "connectFullMesh" in only(judge.verdicts(facts(node(1), node(2), allreduce=failed))).what


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert collective.bus_bytes_per_s(1000, 1.0, 4) == 1500


def test_the_clock_is_that_of_the_shortest_round_trip() -> None:
    # (asked at, the time there, how long it took): there it is 5 s later.
    clock = wire.best_clock([(100.0, 105.3, 1.0), (200.0, 205.01, 0.02), (300.0, 305.2, 0.5)])
    assert clock.offset_s == pytest.approx(5.0)
    assert clock.error_s == pytest.approx(0.01)


def test_a_listener_tells_the_time_and_counts_bytes_to_who_knows_the_secret() -> None:
    secret = b"s" * wire.SECRET_BYTES
    listener = wire.Listener(secret)
    try:
        trip, clock = wire.asked("127.0.0.1", listener.port, secret)
        assert trip > 0
        assert abs(clock.offset_s) <= clock.error_s + 0.01
        assert wire.sent("127.0.0.1", listener.port, secret, seconds=0.02) > 0
        with pytest.raises(OSError, match=r"reset|closed"):
            wire.asked("127.0.0.1", listener.port, b"x" * wire.SECRET_BYTES)
    finally:
        listener.close()
    deadline = time.monotonic() + 10
    while True:  # the thread that accepts needs a moment to let go
        try:
            socket.create_connection(("127.0.0.1", listener.port), 1).close()
        except OSError:
            break
        assert time.monotonic() < deadline, "it still listens"


# -- this machine ----------------------------------------------------------------------------------------------------


def test_a_disk_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    (found,) = disks.looked_at([str(tmp_path / "not" / "there"), str(tmp_path)], timed=True)
    assert found.free_bytes > 0
    assert found.write_bytes_per_s or found.error
    assert found.how or found.error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_not_written_to_where_its_speed_is_not_asked(tmp_path: Path) -> None:
    (found,) = disks.looked_at([str(tmp_path)], timed=False)
    assert (found.write_bytes_per_s, found.error) == (None, "")


def test_throttle_reasons_are_named_and_idleness_is_none() -> None:
    assert gpus.throttles(0x1) == ()  # idle
    assert set(gpus.throttles(0x48)) == {"hardware slowdown", "hardware thermal slowdown"}


def test_the_digest_of_code_is_that_of_its_files_and_not_of_where_they_lie(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "pkg").mkdir(parents=True)
        (tmp_path / place / "pkg" / "x.py").write_text("1")
    one, other = ([tmp_path / place / "pkg"] for place in ("a", "b"))
    assert versions.digest(one) == versions.digest(other)
    (tmp_path / "b" / "pkg" / "x.py").write_text("2")
    assert versions.digest(one) != versions.digest(other)


# -- what is said ----------------------------------------------------------------------------------------------------


def shown(facts: Facts) -> str:
    console = Console(file=io.StringIO(), width=300)
    for part in table.rendered(facts, judge.verdicts(facts)):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_a_row_for_each_node_and_ends_with_a_count() -> None:
    allreduce = AllReduce("gloo", 8 << 20, 0.05, 200e6)
    text = shown(replace(three(mlflow=Answer("http://h:5000", 0, "timed out")), allreduce=allreduce))
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(" host")}
    assert set(rows) == {"host1", "host2", "host3"}
    assert "answers" in rows["host1"]
    assert "no answer" in rows["host3"]
    assert "1000 MB/s" in rows["host2"]
    assert "the same on all nodes: python 3.11.7, ray 2.60.0" in text
    assert "200 MB/s a node" in text
    assert text.rstrip().endswith("3 nodes: 1 error")


def test_a_sound_cluster_is_said_to_be_one() -> None:
    assert shown(three()).rstrip().endswith("3 nodes: nothing to mend")


def test_columns_that_nobody_filled_are_left_out_and_what_was_left_out_is_said() -> None:
    plain = Facts((node(1, mlflow=None, clock=None),), quick=True, pairs_left_out=3)
    text = shown(plain)
    assert "MLflow" not in text.splitlines()[0]
    assert "3 pairs of nodes left out" in text
    assert "left out by --quick" in text


def test_a_finding_has_its_node_its_reason_and_a_way_out() -> None:
    found = Finding("error", "host3", "it is", "that matters", "do this")
    assert table.sentence(found) == "host3: it is; that matters. Way out: do this"


# -- before a job ----------------------------------------------------------------------------------------------------


def test_a_job_is_refused_by_versions_names_and_ports_and_told_of_the_rest() -> None:
    def finding(severity: str, kind: str) -> Finding:
        return Finding(severity, "", kind, "", "", kind)

    refusing = [finding("error", kind) for kind in quick.REFUSED]
    telling = [finding("error", "clock"), finding("error", "silent"), finding("warning", "versions")]
    refused, said = quick.divided([*refusing, *telling])
    assert len(refused) == 3
    assert len(said) == 3


def test_one_node_is_not_looked_at() -> None:
    assert quick.QuickLook(["n1"]).settle() == []
