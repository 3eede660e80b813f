"""A run in an object store has one owner: processes contend for it on a real S3 server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import stores
from jobs import lease, lease_objects, store_lease
from jobs.checkpoint.store import Store
from jobs.lease import RunIsOwned
from tests.support import faulty_proxy, moto_server
from tests.support.moto_server import MotoServer
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
BEAT_S, STALE_S = 0.3, 3.0
OWNER = """
import os, sys, time
from cluster import stores
from jobs import lease, store_lease
from jobs.checkpoint.store import Store
uri, job, host, seconds, beat_s, stale_s = sys.argv[1:]
if host:
    lease.this_host = lambda: host
store = Store(uri)
print("ready", flush=True)
sys.stdin.readline()
try:
    held = store_lease.take(store, "run-1", job, beat_s=float(beat_s), stale_s=float(stale_s))
except lease.RunIsOwned as error:
    print(error, flush=True)
    sys.exit()
with held.kept(lambda: print("lost it", flush=True)):
    print("took", held.number, flush=True)
    time.sleep(float(seconds))
    print("still held", held.held(), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with pytest.MonkeyPatch.context() as monkeypatch, moto_server.running(monkeypatch) as running:
        yield running


@pytest.fixture
def uri(server: MotoServer, request: pytest.FixtureRequest) -> str:
    """A place of this test's own."""
    return server.uri(f"bucket/{re.sub('[^a-z_]', '-', request.node.name)}")


class Process:
    """A contender in a process of its own; on a host of another name, where one is given."""

    def __init__(self, uri: str, job: str, host: str = "", seconds: float = 60) -> None:
        command = [sys.executable, "-c", OWNER, uri, job, host, *map(str, (seconds, BEAT_S, STALE_S))]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def line(self) -> str:
        """Return the next line that it says."""
        assert self.process.stdout is not None
        self.lines.append(self.process.stdout.readline().strip())
        return self.lines[-1]

    def begin(self) -> None:
        """Let it contend."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)


@pytest.fixture
def start(uri: str) -> Iterator:
    """Start contenders, which end with the test."""
    started: list[Process] = []

    def begin(*arguments, **named) -> Process:
        started.append(Process(uri, *arguments, **named))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("hosts", [("", "", "", ""), ("a", "b", "c", "d")], ids=["one host", "hosts of their own"])
def test_of_several_at_once_one_gets_the_run_and_the_others_are_told_which(start, hosts, uri):
    contenders = [start(f"job-{number}", host, seconds=8) for number, host in enumerate(hosts)]
    for each in contenders:
        assert each.line() == "ready"
    for each in contenders:
        each.begin()
    said = [next(line for line in iter(each.line, "") if "took" in line or "works on" in line) for each in contenders]
    winners = [number for number, line in enumerate(said) if line.startswith("took")]
    assert len(winners) == 1, said
    (winner,) = winners
    number = store_lease.newest(Store(uri), "run-1")
    assert said[winner] == f"took {number}"
    for other, line in enumerate(said):
        if other != winner:
            assert line.startswith(f"job job-{winner} works on the run run-1 since ")
            assert f"tandem jobs stop job-{winner}" in line
            assert f"process {contenders[winner].process.pid} on" in line
    assert contenders[winner].line() == "still held True"
    contenders[winner].process.wait(30)


def test_one_that_is_stopped_for_long_loses_its_run_to_another_and_finds_out(start, uri):
    first, second = start("job-1", "machine-a"), start("job-2", "machine-b", seconds=30)
    assert (first.line(), second.line()) == ("ready", "ready")
    first.begin()
    assert first.line() == "took 1"
    first.signal(signal.SIGSTOP)
    second.begin()
    assert second.line() == "tandem: waiting up to 3 s for a sign of life of job job-1, which had the run run-1"
    assert second.line() == "took 2"
    first.signal(signal.SIGCONT)
    assert first.line() == "lost it"
    assert store_lease.newest(Store(uri), "run-1") == 2


def test_one_that_is_stopped_for_long_on_this_machine_keeps_its_run_and_a_killed_one_does_not(start, uri):
    first = start("job-1")
    assert first.line() == "ready"
    first.begin()
    assert first.line() == "took 1"
    first.signal(signal.SIGSTOP)
    store = Store(uri)
    wait_for(lambda: store_lease.standing(_owner(store)) == "stopped")
    with pytest.raises(RunIsOwned, match=f"which is stopped: kill -CONT {first.process.pid} lets it go on"):
        store_lease.take(store, "run-1", beat_s=BEAT_S, stale_s=STALE_S)
    first.signal(signal.SIGKILL)
    first.process.wait(30)
    held = store_lease.take(store, "run-1", beat_s=BEAT_S, stale_s=STALE_S)
    assert held.number == 2
    held.release()


def _owner(store: Store) -> lease.Owner:
    (claim,) = [name for name in store.files("runs/run-1/lease") if name.startswith("claim")]
    return lease_objects.owner_of(store.read(f"runs/run-1/lease/{claim}"))


def test_signs_of_life_keep_a_run_however_long_others_watch(start, uri):
    first, second = start("job-1", "machine-a", seconds=60), start("job-2", "machine-b")
    assert (first.line(), second.line()) == ("ready", "ready")
    first.begin()
    assert first.line() == "took 1"
    second.begin()
    assert "waiting" in second.line()
    assert second.line().startswith("job job-1 works on the run run-1 since ")


def test_numbers_grow_and_old_objects_go(uri):
    store = Store(uri)
    for number in (1, 2, 3, 4):
        held = store_lease.take(store, "run-1", beat_s=BEAT_S, stale_s=STALE_S)
        assert held.number == number
        assert held.held()
        with pytest.raises(RunIsOwned, match=f"process {os.getpid()} works on the run run-1"):
            store_lease.take(store, "run-1", beat_s=BEAT_S, stale_s=STALE_S)
        held.release()
        assert len(store.files("runs/run-1/lease")) == 2
    assert store_lease.newest(store, "another") == 0


def test_an_owner_whose_run_was_taken_is_told_and_one_that_has_let_go_beats_no_more(uri):
    store, lost = Store(uri), threading.Event()
    held = store_lease.take(store, "run-1", beat_s=0.05, stale_s=STALE_S)
    with held.kept(lost.set):
        store.write("runs/run-1/lease/held-00000002-ab", [b"."])
        assert lost.wait(30)
        assert not held.held()
    claim = next(name for name in store.files("runs/run-1/lease") if name.startswith("claim-00000001"))
    said = store.read(f"runs/run-1/lease/{claim}")
    assert b'"released": true' in said
    time.sleep(0.2)
    assert store.read(f"runs/run-1/lease/{claim}") == said


def test_a_store_that_was_away_for_longer_than_any_silence_takes_the_run_from_nobody(server, uri, monkeypatch, capsys):
    monkeypatch.setattr(stores, "LONGEST_PAUSE_S", 0.3)
    monkeypatch.setattr(lease, "this_host", lambda: "machine-a")
    with faulty_proxy.before(server.port) as proxy:
        behind = Store(
            uri.replace(f":{server.port}?", f":{proxy.port}?").replace(f":{server.port}&", f":{proxy.port}&")
        )
        lost = threading.Event()
        held = store_lease.take(behind, "run-1", "job-1", beat_s=BEAT_S, stale_s=STALE_S)
        with held.kept(lost.set):
            monkeypatch.setattr(lease, "this_host", lambda: "machine-b")
            ended: list[str] = []
            contender = threading.Thread(target=lambda: ended.append(_refusal(behind)))
            with proxy.gone():
                contender.start()
                time.sleep(STALE_S + 1)
            contender.join(60)
            assert ended[0].startswith("job job-1 works on the run run-1 since "), ended
            assert held.held()
            assert not lost.is_set()
    assert store_lease.newest(Store(uri), "run-1") == 1


def _refusal(store: Store) -> str:
    try:
        return f"took {store_lease.take(store, 'run-1', 'job-2', beat_s=BEAT_S, stale_s=STALE_S).number}"
    except RunIsOwned as error:
        return str(error)


def test_pyarrow_still_asks_no_store_to_write_only_what_is_not_there(server):
    """Else a run could be taken as in a folder, by creating the next number."""
    client, name = server.client(), "bucket/conditional"
    for content, metadata in ((b"first", None), (b"second", {"If-None-Match": "*"})):
        with client.open_output_stream(name, metadata=metadata) as stream:
            stream.write(content)
    with client.open_input_stream(name) as stream:
        assert stream.read() == b"second"
