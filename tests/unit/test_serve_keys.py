"""Keys: what they look like, how they are kept, and what each has used, in both databases."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from serve.keys import place, secret
from serve.keys.ledger import Ledger, Used, orphans, read
from serve.keys.limits import Limits
from serve.keys.store import Store
from tests.support import postgres

DAY = date(2026, 3, 31)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if lacking := postgres.missing():
        pytest.skip(lacking)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'keys.db'}"
    server: str = request.getfixturevalue("postgres_url")
    import psycopg

    name = f"t{time.monotonic_ns()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


class TestSecrets:
    def test_the_id_finds_and_the_digest_proves(self) -> None:
        made = secret.make()
        assert secret.id_of(made.text) == made.id
        assert secret.matches(made.text, made.digest)

    @pytest.mark.parametrize(
        "change",
        [
            str.upper,
            str.lower,
            lambda t: t + "\n",
            lambda t: " " + t,
            lambda t: t[:-1],
            lambda t: t + "A",
            lambda t: "",
        ],
    )
    def test_what_is_nearly_a_key_is_none(self, change) -> None:
        made = secret.make()
        other = change(made.text)
        assert not secret.matches(other, made.digest)
        if other.lower() != other or len(other) != len(made.text):
            assert secret.id_of(other) is None

    def test_an_unknown_id_matches_nothing(self) -> None:
        assert not secret.matches(secret.make().text, None)
        assert not secret.matches("", None)

    def test_its_text_is_in_no_representation(self) -> None:
        made = secret.make()
        assert made.text not in repr(made)


class TestPlace:
    @pytest.mark.parametrize(
        "url", ["postgresql://me:secret@db/keys", "postgresql://db/keys?password=secret", "mysql://db/keys", "keys.db"]
    )
    def test_a_password_or_another_database_is_refused(self, url: str) -> None:
        with pytest.raises(UserError) as refused:
            place.check_url(url)
        assert "secret" not in str(refused.value)

    def test_a_database_that_is_away_is_a_sentence(self, tmp_path: Path) -> None:
        if lacking := postgres.missing():
            pytest.skip(lacking)
        with pytest.raises(UserError, match="cannot be opened"):
            Store(f"postgresql://nobody@/none?host={tmp_path}")

    def test_a_file_that_is_no_database_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "keys.db").write_text("no database" * 100)
        with pytest.raises(UserError, match="cannot be opened"):
            Store(f"sqlite:///{tmp_path / 'keys.db'}")


class TestLimits:
    def test_what_is_left_out_has_no_limit(self) -> None:
        assert Limits().allows("any")

    def test_models_are_named(self) -> None:
        assert Limits(models=("a",)).allows("a")
        assert not Limits(models=("a",)).allows("b")

    @pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"tokens_per_day": True}, {"priority": "first"}, {"rpm": 1}])
    def test_nonsense_is_refused(self, wrong: dict) -> None:
        with pytest.raises(ValidationError):
            Limits(**wrong)


class TestStore:
    def test_a_key_is_found_by_its_secret(self, store: Store) -> None:
        made = store.create("alice", Limits(concurrency=3))
        found = store.find(made.id)
        assert found is not None
        assert (found.name, found.limits.concurrency, found.revoked) == ("alice", 3, None)
        assert secret.matches(made.text, found.secrets[0].digest)
        assert store.find("0" * 12) is None

    def test_the_text_is_nowhere_in_it(self, tmp_path: Path) -> None:
        store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
        made = store.create("alice", Limits())
        store.close()
        kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert made.id.encode() in kept
        assert made.text.encode() not in kept
        assert made.text.split("-")[2].encode() not in kept
        assert (tmp_path / "keys.db").stat().st_mode & 0o777 == 0o600

    def test_a_name_is_used_once(self, store: Store) -> None:
        store.create("alice", Limits())
        with pytest.raises(UserError, match="already"):
            store.create("alice", Limits())
        store.revoke("alice")
        with pytest.raises(UserError, match="was one"):
            store.create("alice", Limits())

    def test_rotation_leaves_the_old_one_valid_for_a_while(self, store: Store) -> None:
        old = store.create("alice", Limits())
        new = store.rotate("alice", grace_s=60)
        now = time.time()
        first, second = store.all()[0].secrets
        assert (first.id, second.id) == (old.id, new.id)
        assert first.is_valid(now)
        assert not first.is_valid(now + 61)
        assert second.is_valid(now + 10**9)
        store.rotate("alice", grace_s=3600)
        assert not store.all()[0].secrets[0].is_valid(now + 61), "a second rotation does not prolong the first secret"

    def test_a_revoked_key_is_told_from_an_unknown_one(self, store: Store) -> None:
        made = store.create("alice", Limits())
        store.revoke("alice")
        found = store.find(made.id)
        assert found is not None
        assert found.revoked is not None
        for change in (
            lambda: store.revoke("alice"),
            lambda: store.limit("alice", Limits()),
            lambda: store.rotate("alice", 1),
        ):
            with pytest.raises(UserError, match="is revoked"):
                change()
        store.create("alicia", Limits())
        with pytest.raises(UserError, match="did you mean 'alicia'"):
            store.revoke("alicja")

    def test_limits_change(self, store: Store) -> None:
        made = store.create("alice", Limits(models=("a", "b")))
        store.limit("alice", Limits(tokens_per_day=5, priority="low"))
        found = store.find(made.id)
        assert found is not None
        assert found.limits == Limits(tokens_per_day=5, priority="low")

    def test_an_older_version_does_not_touch_a_newer_store(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.db"
        Store(f"sqlite:///{path}").close()
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE tandem_keys_schema SET version = 99")
        with pytest.raises(UserError, match="format 99"):
            Store(f"sqlite:///{path}")


def test_reading_waits_for_no_writer(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
    made = store.create("alice", Limits())
    writer = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    found = store.find(made.id)
    assert found is not None
    assert [key.name for key in store.all()] == [found.name] == ["alice"]
    assert store.usage() == []
    assert store.tokens_since(["alice"], DAY) == {}
    writer.close()
    store.close()


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_no_grace(tmp_path: Path, grace_s: float) -> None:
    store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
    store.create("alice", Limits())
    with pytest.raises(UserError, match="a grace of"):
        store.rotate("alice", grace_s)
    assert len(store.all()[0].secrets) == 1
    store.close()


class TestUsage:
    USED = Used("alice", "chat", DAY, 1, 10, 5)

    def test_totals_written_twice_count_once(self, store: Store) -> None:
        store.write_usage("one", [self.USED])
        store.write_usage("one", [self.USED])
        store.write_usage("two", [self.USED])
        assert store.usage() == [replace(self.USED, requests=2, prompt_tokens=20, generated_tokens=10)]

    def test_a_ledger_is_closed_once(self, store: Store) -> None:
        store.write_usage("one", [self.USED])
        last = replace(self.USED, generated_tokens=7)
        for _ in range(2):
            store.close_ledger("one", [last])
        store.close_ledger("two", [last])
        assert store.usage() == [replace(last, requests=2, prompt_tokens=20, generated_tokens=14)]

    def test_earlier_totals_after_later_ones_change_nothing(self, store: Store) -> None:
        more = replace(self.USED, requests=2, generated_tokens=50)
        store.write_usage("one", [more])
        store.write_usage("one", [self.USED])
        assert store.usage() == [more]

    def test_a_closed_ledger_is_written_no_more(self, store: Store) -> None:
        store.write_usage("one", [self.USED])
        store.close_ledger("one", [self.USED])
        store.write_usage("one", [self.USED])
        assert store.usage() == [self.USED]

    def test_a_ledger_that_is_written_and_closed_at_once_counts_once(self, url: str, store: Store) -> None:
        others = [Store(url) for _ in range(2)]
        with ThreadPoolExecutor(3) as threads:
            for name in map(str, range(20)):
                writing = [threads.submit(each.write_usage, name, [self.USED]) for each in others]
                closing = threads.submit(store.close_ledger, name, [self.USED])
                for done in (*writing, closing):
                    done.result(30)
        assert store.usage() == [replace(self.USED, requests=20, prompt_tokens=200, generated_tokens=100)]
        for each in others:
            each.close()

    def test_by_key_day_and_month(self, store: Store) -> None:
        other = replace(self.USED, key="bob", day=date(2026, 4, 1))
        store.write_usage("one", [self.USED, other])
        assert store.usage(key="bob") == [other]
        assert store.usage(until=DAY) == [self.USED]
        assert store.usage(since=date(2026, 4, 1), until=date(2026, 4, 1)) == [other]
        assert store.tokens_since(["alice", "bob", "carol"], date(2026, 4, 1)) == {"bob": 15}

    def test_many_writers_at_once(self, url: str) -> None:
        Store(url).close()
        writers = [multiprocessing.get_context("spawn").Process(target=_write, args=(url, str(at))) for at in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        store = Store(url)
        assert store.usage() == [Used("alice", "chat", DAY, 80, 800, 400)]
        store.close()


def _write(url: str, ledger: str) -> None:
    store = Store(url)
    for count in range(1, 21):
        store.write_usage(ledger, [Used("alice", "chat", DAY, count, 10 * count, 5 * count)])
    store.close_ledger(ledger, [Used("alice", "chat", DAY, 20, 200, 100)])


class TestLedger:
    def test_counts_are_in_the_file_at_once(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        entry = ledger.entry("alice", "chat", DAY)
        entry.add(requests=1, prompt_tokens=10)
        entry.add(generated_tokens=2)
        assert read(ledger.path) == [Used("alice", "chat", DAY, 1, 10, 2)]
        assert ledger.flushable() == [Used("alice", "chat", DAY, 1, 10, 2)]
        assert ledger.flushable() == []
        ledger.close()

    def test_it_grows(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        first = ledger.entry("k0", "chat", DAY)
        for at in range(1000):
            ledger.entry(f"k{at}", "chat", DAY).add(generated_tokens=at)
        first.add(generated_tokens=7)
        assert [used.generated_tokens for used in read(ledger.path)] == [7, *range(1, 1000)]
        ledger.close()

    def test_the_longest_names_fit(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.entry("k" * 100, "m" * 100, DAY).add(requests=1)
        assert read(ledger.path)[0].model == "m" * 100
        ledger.close()

    def test_one_whose_process_lives_is_no_orphan(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.entry("alice", "chat", DAY).add(requests=1)
        assert list(orphans(tmp_path)) == []
        ledger.close()
        assert [orphan.id for orphan in orphans(tmp_path)] == [ledger.id]

    def test_a_killed_process_loses_nothing(self, tmp_path: Path) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            entry = Ledger(tmp_path).entry("alice", "chat", DAY)
            while True:
                entry.add(generated_tokens=1)
                os.write(writer, b".")  # "sent": counted before
        os.close(writer)
        sent = len(os.read(reader, 1000))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while piece := os.read(reader, 65_536):
            sent += len(piece)
        [orphan] = orphans(tmp_path)
        assert sent > 0
        assert orphan.used[0].generated_tokens - sent in (0, 1)
