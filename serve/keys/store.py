"""The store of keys and usage: made, limited, rotated and revoked here; read by every gateway.

Usage is kept by ledger (serve/keys/ledger.py): a running gateway writes its totals again and again, which changes
nothing when it is done twice; a ledger that has ended is added to the closed ones in the transaction that marks it so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

import sqlalchemy as sa

from cluster.errors import UserError
from cluster.names import check_name, suggest
from serve.keys import place, secret, tables
from serve.keys.ledger import Used
from serve.keys.limits import Limits
from serve.keys.secret import NewSecret


@dataclass(frozen=True)
class Key:
    """One key: a name, limits, and the secrets that stand for it."""

    name: str
    limits: Limits
    created: float
    revoked: float | None
    secrets: tuple[KeySecret, ...] = ()


@dataclass(frozen=True)
class KeySecret:
    """What proves a key. Two are valid while a key is rotated."""

    id: str
    digest: str
    created: float
    expires: float | None

    def is_valid(self, now: float) -> bool:
        """Whether it may still be used."""
        return self.expires is None or now < self.expires


class Store:
    """Keys and usage in a database. Every method is one transaction; all of them block."""

    def __init__(self, url: str | None = None) -> None:
        """Raises UserError when the database cannot be opened."""
        self._engine = tables.connect(place.check_url(url or place.default_url()))
        self._reading = self._engine.execution_options(**{tables.ONLY_READS: True})

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    # -- keys ------------------------------------------------------------------------------------------------------

    def create(self, name: str, limits: Limits) -> NewSecret:
        """Make a key. Its text is in what this returns, and nowhere else.

        Raises:
            UserError: not a name, or there is (or was) such a key: usage is counted by name.
        """
        check_name("key", name)
        made, now = secret.make(), time.time()
        try:
            with self._engine.begin() as connection:
                values = {"name": name, "limits": _written(limits), "created": now}
                connection.execute(tables.keys.insert().values(values))
                connection.execute(_new_secret(name, made, now))
        except sa.exc.IntegrityError:
            raise UserError(f"there is a key {name!r} already, or was one: choose another name") from None
        return made

    def rotate(self, name: str, grace_s: float) -> NewSecret:
        """Make a new secret for a key; those before it are valid for `grace_s` more seconds.

        Raises:
            UserError: there is no such key, or it is revoked, or `grace_s` is no time.
        """
        if not 0 <= grace_s < math.inf:
            raise UserError(f"a grace of {grace_s} s is none: give seconds, 0 or more")
        made, now = secret.make(), time.time()
        with self._engine.begin() as connection:
            self._check_live(connection, name)
            of_key = tables.secrets.c.key == name
            later = of_key & (tables.secrets.c.expires.is_(None) | (tables.secrets.c.expires > now + grace_s))
            connection.execute(tables.secrets.update().where(later).values(expires=now + grace_s))
            connection.execute(_new_secret(name, made, now))
        return made

    def limit(self, name: str, limits: Limits) -> None:
        """Give a key other limits.

        Raises:
            UserError: there is no such key, or it is revoked.
        """
        with self._engine.begin() as connection:
            self._check_live(connection, name)
            connection.execute(tables.keys.update().where(tables.keys.c.name == name).values(limits=_written(limits)))

    def revoke(self, name: str) -> None:
        """End a key for good, with all its secrets. Its usage stays.

        Raises:
            UserError: there is no such key, or it is revoked already.
        """
        with self._engine.begin() as connection:
            self._check_live(connection, name)
            connection.execute(tables.keys.update().where(tables.keys.c.name == name).values(revoked=time.time()))

    def all(self) -> list[Key]:
        """Return all keys by name, revoked ones too."""
        with self._reading.begin() as connection:
            found = connection.execute(sa.select(tables.keys).order_by(tables.keys.c.name)).all()
            held: dict[str, list[KeySecret]] = {}
            for row in connection.execute(sa.select(tables.secrets).order_by(tables.secrets.c.created)):
                held.setdefault(row.key, []).append(KeySecret(row.id, row.digest, row.created, row.expires))
        return [_key(row, held.get(row.name, ())) for row in found]

    def find(self, secret_id: str) -> Key | None:
        """Return the key that a secret's id stands for, with that secret alone; None when there is none."""
        joined = sa.join(tables.secrets, tables.keys, tables.secrets.c.key == tables.keys.c.name)
        secret_columns = (tables.secrets.c.digest, tables.secrets.c.created.label("made"), tables.secrets.c.expires)
        wanted = sa.select(tables.keys, *secret_columns).select_from(joined).where(tables.secrets.c.id == secret_id)
        with self._reading.begin() as connection:
            row = connection.execute(wanted).first()
        return None if row is None else _key(row, (KeySecret(secret_id, row.digest, row.made, row.expires),))

    def _check_live(self, connection: sa.Connection, name: str) -> None:
        names = connection.execute(sa.select(tables.keys.c.name, tables.keys.c.revoked)).all()
        live = [row.name for row in names if row.revoked is None]
        if name not in live:
            was = "is revoked" if any(row.name == name for row in names) else f"does not exist: {suggest(name, live)}"
            raise UserError(f"key {name!r} {was}")

    # -- usage -----------------------------------------------------------------------------------------------------

    def write_usage(self, ledger: str, totals: Sequence[Used]) -> None:
        """Write the totals of a ledger that counts on, or of one that was closed meanwhile, whose last ones are there.

        Writing the same again, or earlier totals after later ones, changes nothing.
        """
        if totals:
            with self._engine.begin() as connection:
                tables.lock(connection, ledger)
                is_closed = sa.select(tables.closed.c.ledger).where(tables.closed.c.ledger == ledger)
                if connection.execute(is_closed).first() is None:
                    self._put(connection, ledger, totals, add=False)

    def close_ledger(self, ledger: str, totals: Sequence[Used]) -> None:
        """Add a ledger's last totals to what is closed; a second time changes nothing."""
        with self._engine.begin() as connection:
            tables.lock(connection, ledger)
            mark = tables.upsert(self._engine, tables.closed).values(ledger=ledger).on_conflict_do_nothing()
            if connection.execute(mark.returning(tables.closed.c.ledger)).first() is None:
                return
            connection.execute(tables.usage.delete().where(tables.usage.c.ledger == ledger))
            self._put(connection, "", totals, add=True)

    def usage(self, key: str | None = None, since: date | None = None, until: date | None = None) -> list[Used]:
        """Return what was used, by key, model and day (both days included)."""
        columns = tables.usage.c
        sums = [
            sa.func.sum(each).label(each.name)
            for each in (columns.requests, columns.prompt_tokens, columns.generated_tokens)
        ]
        by = (columns.key, columns.model, columns.day)
        wanted = sa.select(*by, *sums).group_by(*by).order_by(*by)
        for given, condition in (
            (key, columns.key == key),
            (since, columns.day >= str(since)),
            (until, columns.day <= str(until)),
        ):
            wanted = wanted if given is None else wanted.where(condition)
        with self._reading.begin() as connection:
            rows = connection.execute(wanted).all()
        return [
            Used(
                row.key,
                row.model,
                date.fromisoformat(row.day),
                int(row.requests),
                int(row.prompt_tokens),
                int(row.generated_tokens),
            )
            for row in rows
        ]

    def tokens_since(self, names: Iterable[str], since: date) -> dict[str, int]:
        """Return the tokens that each of the keys has used since a day, that day included."""
        columns = tables.usage.c
        tokens = sa.func.sum(columns.prompt_tokens + columns.generated_tokens)
        wanted = sa.select(columns.key, tokens.label("tokens")).group_by(columns.key)
        wanted = wanted.where(columns.key.in_(list(names)), columns.day >= since.isoformat())
        with self._reading.begin() as connection:
            return {row.key: int(row.tokens) for row in connection.execute(wanted)}

    def _put(self, connection: sa.Connection, ledger: str, totals: Sequence[Used], *, add: bool) -> None:
        if not totals:
            return
        insert = tables.upsert(self._engine, tables.usage)
        new = {name: insert.excluded[name] for name in ("requests", "prompt_tokens", "generated_tokens")}
        old = tables.usage.c
        values = {
            name: old[name] + value if add else tables.greater(self._engine, old[name], value)
            for name, value in new.items()
        }
        identity = [tables.usage.c[name] for name in ("ledger", "key", "model", "day")]
        connection.execute(
            insert.on_conflict_do_update(index_elements=identity, set_=values),
            [
                {**vars(used), "ledger": ledger, "day": used.day.isoformat()}
                for used in sorted(totals, key=lambda used: (used.key, used.model, used.day))  # rows lock in one order
            ],
        )


def _new_secret(name: str, made: NewSecret, now: float) -> sa.Insert:
    return tables.secrets.insert().values(id=made.id, key=name, digest=made.digest, created=now)


def _written(limits: Limits) -> str:
    return limits.model_dump_json(exclude_none=True)


def _key(row: sa.Row[tuple[object, ...]], held: Sequence[KeySecret]) -> Key:
    return Key(row.name, Limits.model_validate_json(row.limits), row.created, row.revoked, tuple(held))
