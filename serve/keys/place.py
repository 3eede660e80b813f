"""Where keys and usage are kept: a SQLite file in Tandem's home, or a PostgreSQL database that several nodes reach."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from cluster.errors import UserError
from cluster.home import home

DRIVER = "postgresql+psycopg"
_SECRET_PARAMETERS = ("password", "sslpassword")


def default_url() -> str:
    """Return the URL of this machine's own store."""
    return f"sqlite:///{home() / 'serve' / 'keys.db'}"


def check_url(url: str) -> str:
    """Return the URL as SQLAlchemy takes it.

    Raises:
        UserError: another kind of database, or a password in it: specs are read by many, and are shown by Ray.
    """
    parts = urlsplit(url)
    if parts.scheme == "sqlite" and parts.path.startswith("//"):
        return url
    if parts.scheme not in ("postgresql", "postgres", DRIVER):
        raise UserError(
            f"keys: {parts.scheme or url!r}: give postgresql://USER@HOST/DATABASE, or sqlite:////ABSOLUTE/PATH"
        )
    if parts.password is not None or any(name in parse_qs(parts.query) for name in _SECRET_PARAMETERS):
        raise UserError(
            "keys: the URL has a password in it, which Ray's dashboard and `ps` would show: take it out and put it "
            "into ~/.pgpass or PGPASSFILE (or PGPASSWORD) where the commands and the gateways run"
        )
    return url.replace(f"{parts.scheme}://", f"{DRIVER}://", 1)
