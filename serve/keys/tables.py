"""The tables of keys and usage, the same in SQLite and in PostgreSQL, and how an engine for them is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cluster.errors import UserError

SCHEMA = 1
BUSY_S = 10
"""How long a writer waits for another one."""
CREATION_LOCK = 0x7A4D_0001
"""PostgreSQL's advisory lock: its CREATE TABLE IF NOT EXISTS fails when two run at once."""

LEDGER_LOCK = 0x7A4D
"""First part of the advisory lock of one ledger; the second is made of its name."""

ONLY_READS = "tandem_only_reads"
"""Execution option of connections that write nothing."""

metadata = sa.MetaData()

keys = sa.Table(
    "tandem_keys",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("limits", sa.Text, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
)
secrets = sa.Table(
    "tandem_key_secrets",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("key", sa.String(100), sa.ForeignKey(keys.c.name), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float),
)
usage = sa.Table(
    "tandem_usage",
    metadata,
    # The ledger that still counts, or '' for those that are closed.
    sa.Column("ledger", sa.String(32), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("model", sa.String(100), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("generated_tokens", sa.BigInteger, nullable=False),
    sa.Index("tandem_usage_by_key", "key", "day"),
)
closed = sa.Table(
    "tandem_closed_ledgers",
    metadata,
    sa.Column("ledger", sa.String(32), primary_key=True),
)
schema = sa.Table("tandem_keys_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))


def connect(url: str) -> sa.Engine:
    """Return an engine for a URL that `place.check_url` passed, with the tables made.

    Raises:
        UserError: the database cannot be reached, or was written by a newer version.
    """
    engine = _sqlite(url) if url.startswith("sqlite") else _postgresql(url)
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION_LOCK)))
            metadata.create_all(connection)
            written = connection.scalar(sa.select(schema.c.version))
            if written is None:
                connection.execute(schema.insert().values(version=SCHEMA))
    except sa.exc.SQLAlchemyError as error:
        raise UserError(f"the store of keys, {shown(url)}, cannot be opened: {cause(error)}") from error
    if written not in (None, SCHEMA):
        raise UserError(f"the store of keys has format {written}, this version of Tandem knows {SCHEMA}: use the newer")
    return engine


def upsert(engine: sa.Engine, table: sa.Table) -> Any:
    """Return an INSERT of the engine's dialect, which has `on_conflict_do_update`."""
    return (postgresql if engine.dialect.name == "postgresql" else sqlite).insert(table)


def lock(connection: sa.Connection, ledger: str) -> None:
    """Let no other transaction write or close this ledger until this one ends. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LEDGER_LOCK, sa.func.hashtext(ledger))))


def greater(engine: sa.Engine, one: sa.ColumnElement[int], other: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """Return the greater of two values in the engine's dialect."""
    return (sa.func.greatest if engine.dialect.name == "postgresql" else sa.func.max)(one, other)


def shown(url: str) -> str:
    """Return the URL as messages may have it."""
    return sa.make_url(url).render_as_string(hide_password=True)


def cause(error: Exception) -> str:
    """Return the first line of what the database's driver said."""
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _sqlite(url: str) -> sa.Engine:
    path = Path(sa.make_url(url).database or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A transaction that reads first and then writes would fail, not wait, where another one writes meanwhile. One
        # that only reads waits for none, and none waits for it.
        only_reads = connection.get_execution_options().get(ONLY_READS, False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: str) -> sa.Engine:
    try:
        return sa.create_engine(
            url, pool_size=2, max_overflow=4, pool_pre_ping=True, connect_args={"connect_timeout": BUSY_S}
        )
    except ModuleNotFoundError:
        raise UserError("keys in PostgreSQL need its driver: pip install 'tandem-ray[postgres]'") from None
