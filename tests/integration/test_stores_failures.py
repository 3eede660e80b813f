"""A real S3 server that is slow, busy, cut off, silent or gone: the right result in the end, or an error that tells.

Nothing is left half written, and nothing waits for ever.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster import stores
from cluster.errors import UserError
from cluster.stores import is_clients, is_for_good, paused_s, repeated
from jobs.checkpoint.store import Store
from jobs.data import remote_listing
from jobs.driver import storage
from tests.support import faulty_proxy, moto_server
from tests.support.faulty_proxy import Proxy
from tests.support.moto_server import MotoServer

LARGE = bytes(range(256)) * (3 << 13)  # 6 MiB: more than a part
LIMIT_S = 120.0
"""No call takes longer: PATIENCE_S, what one call takes to be given up, and room."""


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with pytest.MonkeyPatch.context() as monkeypatch, moto_server.running(monkeypatch) as running:
        yield running


@pytest.fixture
def proxy(server: MotoServer) -> Iterator[Proxy]:
    with faulty_proxy.before(server.port) as running:
        yield running


@pytest.fixture
def whole(server: MotoServer) -> Store:
    """The store, without failures."""
    store = Store(server.uri("bucket/models"))
    store.write("there/large", [LARGE])
    store.write("there/small", [b"small"])
    return store


@pytest.fixture
def store(server: MotoServer, proxy: Proxy, whole: Store) -> Store:
    return Store(server.uri("bucket/models", proxy.port))


def broken_off(store: Store) -> None:
    with store.stream("broken/streamed") as sink:
        sink.write(LARGE)
        raise KeyError("stop")


def streamed(store: Store, name: str) -> int:
    with store.stream(name) as sink:
        for start in range(0, len(LARGE), 1 << 20):
            sink.write(LARGE[start : start + (1 << 20)])
    return len(LARGE)


DIGEST = hashlib.sha256(LARGE).hexdigest()
CALLS: dict[str, tuple[Callable[[Store], object], object]] = {
    "write": (lambda store: repeated(lambda: store.write("new/large", [LARGE])).sha256, DIGEST),
    "stream": (lambda store: repeated(lambda: streamed(store, "new/large")), len(LARGE)),
    "read": (lambda store: store.read("there/large"), LARGE),
    "digest": (lambda store: store.digest("there/large").sha256, DIGEST),
    "list": (lambda store: store.files("there"), ["large", "small"]),
    "exists": (lambda store: store.exists("there/small"), True),
    "open": (lambda store: store.open("there/small").read_at(3, 1), b"mal"),
}


def failing(proxy: Proxy, how: str) -> None:
    """Let the next requests fail."""
    if how == "busy":
        proxy.busy = 4
    elif how == "busy now and then":
        proxy.busy_share = 0.3
    elif how == "answers cut":
        proxy.cut_answers = 4
    elif how == "requests cut":
        proxy.cut_sent = 4
    elif how == "answers lost":
        proxy.lost_answers = 4
    elif how == "slow":
        proxy.latency_s, proxy.bytes_per_s = 0.2, 8e6
    elif how == "gone":
        proxy.gone_for(6.0)


WAYS = ["busy", "busy now and then", "answers cut", "requests cut", "answers lost", "slow", "gone"]


@pytest.mark.parametrize("how", WAYS)
def test_what_fails_for_a_while_comes_right(store, whole, proxy, how, monkeypatch):
    monkeypatch.setattr(stores, "PAUSE_S", 0.2)
    calls = ["read", "write", "list"] if how == "gone" else list(CALLS)
    for name in calls:
        call, expected = CALLS[name]
        failing(proxy, how)
        began = time.monotonic()
        assert call(store) == expected, name
        assert time.monotonic() - began < LIMIT_S
        proxy.busy = proxy.cut_answers = proxy.cut_sent = proxy.lost_answers = 0
    assert whole.read("new/large") == LARGE
    whole.remove("new")


@pytest.mark.parametrize("call", CALLS)
def test_what_goes_on_failing_is_given_up_and_named_and_leaves_nothing_behind(store, whole, proxy, call, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE_S", 2.0)
    whole.remove("new")
    with proxy.gone(), pytest.raises(OSError, match="bucket") as raised:
        CALLS[call][0](store)
    assert is_clients(raised.value)
    assert not whole.exists("new/large")
    told = storage.told(raised.value, None)  # type: ignore[arg-type]
    assert isinstance(told, UserError)
    assert "a store failed: When" in str(told)
    assert "submit the same spec again to go on" in str(told)


def test_an_outage_is_said_once_and_so_is_its_end(store, proxy, capsys):
    proxy.busy = 7
    assert store.files("there") == ["large", "small"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith("the store failed, trying again for up to 90 s: When listing objects under key")
    assert said[1].startswith("the store answers again after ")


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_key_is_told_at_once(store, proxy, call, capsys):
    proxy.key = "another"
    before = len(proxy.log)
    with pytest.raises(OSError, match=r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID") as raised:
        CALLS[call][0](store)
    assert is_for_good(raised.value)
    assert "trying again" not in capsys.readouterr().out
    assert len(proxy.log) - before <= 2, "a write also tries to remove what it may have left"


def test_a_bucket_that_is_not_there_and_a_key_that_is_wrong_are_named_before_a_job_starts(server, proxy):
    with pytest.raises(storage.NotWritable, match=r"directory: s3://none/x.* cannot be written: .*NO_SUCH_BUCK"):
        storage.try_uri("checkpoint.directory", server.uri("none/x"))
    proxy.key = "another"
    with pytest.raises(storage.NotWritable, match=r"export: s3://bucket/x.* cannot be written: .*INVALID_ACCESS"):
        storage.try_uri("model.export", server.uri("bucket/x", proxy.port))
    with pytest.raises(UserError, match=r"data: cannot list s3://bucket/models: .*(ACCESS_DENIED|INVALID_ACCESS)"):
        remote_listing.listed(server.uri("bucket/models", proxy.port))


def test_a_writer_that_breaks_off_leaves_no_file_that_reads_as_whole(whole):
    def half() -> Iterator[bytes]:
        yield LARGE
        raise KeyError("the state could not be read")

    with pytest.raises(KeyError):
        whole.write("broken/large", half())
    with pytest.raises(KeyError):
        broken_off(whole)
    assert whole.files("broken") == []
    assert whole.read("there/large") == LARGE


def test_a_server_that_takes_requests_and_never_answers_is_given_up(store, proxy, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE_S", 1.0)
    monkeypatch.setattr(stores, "REQUEST_TIMEOUT_S", 1.0)
    impatient = Store(store.root)
    proxy.silent.set()
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(impatient.read("there/small"))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert "Timeout was reached" in str(outcome[0])


def test_pauses_grow_to_a_limit_and_differ():
    assert 0.5 <= paused_s(1, 1.0) <= 1.0
    assert 2.0 <= paused_s(3, 1.0) <= 4.0
    assert paused_s(50, 1.0) <= stores.LONGEST_PAUSE_S
    assert len({paused_s(3, 1.0) for _ in range(20)}) > 1


def test_a_disk_is_asked_three_times_and_what_is_not_there_once(monkeypatch):
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    for error, times in ((OSError(28, "No space left on device"), 3), (FileNotFoundError(2, "x"), 1), (KeyError(), 1)):
        asked = []

        def call(error: Exception = error, asked: list[int] = asked) -> None:
            asked.append(1)
            raise error

        with pytest.raises(type(error)):
            repeated(call)
        assert len(asked) == times
