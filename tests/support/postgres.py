"""A PostgreSQL server of a test's own, on a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "tandem"


def missing() -> str | None:
    """Return what this machine lacks for it, None when it can run."""
    try:
        import psycopg  # noqa: F401
    except ModuleNotFoundError:
        return "psycopg is not installed"
    return None if _binary("postgres") and _binary("initdb") else "PostgreSQL is not on this machine"


@contextmanager
def server(password: str | None = None) -> Iterator[str]:
    """Run a server on a socket in a temporary folder and yield its URL, which has no password in it.

    Args:
        password: what it asks for; None: it asks for none.
    """
    short = tempfile.TemporaryDirectory(prefix="pg")  # a socket's path may not be long
    with short as folder, _running(Path(folder), password) as url:
        yield url


@contextmanager
def _running(folder: Path, password: str | None) -> Iterator[str]:
    owner, data, told = _unprivileged(), folder / "data", folder / "password"
    told.write_text(password or "")
    if owner:
        os.chown(folder, *owner)
        os.chown(told, *owner)
    asks = ["-A", "scram-sha-256", f"--pwfile={told}"] if password else ["-A", "trust"]
    _run([_binary("initdb"), "-D", data, "-U", USER, *asks, "-N", "-E", "UTF8", "--locale=C"], owner)
    told.unlink()
    command = [_binary("postgres"), "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, **_as(owner))
    try:
        _wait(folder, process, password)
        yield f"postgresql://{USER}@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(20)


def _wait(folder: Path, process: subprocess.Popen[bytes], password: str | None) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(host=str(folder), user=USER, dbname="postgres", password=password).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text(encoding="utf-8")) from None
            time.sleep(0.05)


def _binary(name: str) -> str | None:
    found = [*sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), *filter(None, [shutil.which(name)])]
    return str(found[0]) if found else None


def _unprivileged() -> tuple[int, int] | None:
    """Return who runs it where the tests run as root, which PostgreSQL refuses to be."""
    if os.geteuid():
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _as(owner: tuple[int, int] | None) -> dict[str, object]:
    return {"user": owner[0], "group": owner[1], "extra_groups": []} if owner else {}


def _run(command: list[object], owner: tuple[int, int] | None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **_as(owner))  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(done.stderr)
