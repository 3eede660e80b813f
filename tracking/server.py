"""Run an MLflow tracking server in this very process: `python -m tracking.server --root DIR --port 5000`.

It serves the app that `mlflow server` serves, but in one process instead of two (`mlflow server` prepares the
database and then starts uvicorn as a child), so that it starts in 3 s instead of 6, takes half the memory, and the
process id that the caller knows is the server's: killing it leaves nothing behind.

It answers to the names and addresses of its machine, and to those of `--allowed-hosts` and TANDEM_MLFLOW_HOSTS: a page
in somebody's browser that has its own name point here (DNS rebinding) is refused.

Metadata lives in SQLite under the root unless `--backend-store-uri` names another SQLAlchemy URL. Artifacts go
through the server, so every node of a cluster reaches them.
"""

import argparse
import contextlib
import os
import socket
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import UserError
from tracking import mlflow_internals

HOSTS_VARIABLE = "TANDEM_MLFLOW_HOSTS"
"""Further names by which the server is reached, with commas between them."""

SAFE_DEFAULTS = {
    # MLflow's own defaults for both are true: unpickling uploads, and running jobs inside the server.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `--root` settles where everything lies that is not given its own URI."""
    parser = argparse.ArgumentParser(prog="python -m tracking.server", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of mlflow.db and artifacts/")
    parser.add_argument("--host", default="127.0.0.1", help="interface to bind; loopback unless you mean otherwise")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend-store-uri", default=None, help="SQLAlchemy URL; default: SQLite under the root")
    parser.add_argument("--artifacts-destination", default=None, help="artifact URI; default: under the root")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        help=f"names by which it is reached, with commas between, besides this machine's own, localhost and private "
        f"addresses; {HOSTS_VARIABLE} may name more",
    )
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> None:
    """Create the folders and put the settings that MLflow's app reads into the environment.

    Raises UserError when a name that is to be allowed stands for any name.
    """
    added = f"{args.allowed_hosts},{os.environ.get(HOSTS_VARIABLE, '')}".split(",")
    hosts = allowed_hosts([args.host, *own_names()], added)
    root = args.root.resolve()
    (root / "artifacts").mkdir(parents=True, exist_ok=True)
    os.environ.update(SAFE_DEFAULTS)
    if args.backend_store_uri is None:
        _use_write_ahead_log(root / "mlflow.db")
    store = args.backend_store_uri or f"sqlite:///{root / 'mlflow.db'}"
    mlflow_internals.set_server_environment(store, args.artifacts_destination or str(root / "artifacts"), hosts)


def own_names() -> list[str]:
    """Return what this machine is called and the addresses of its interfaces."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    found = [a.address for all_of in psutil.net_if_addrs().values() for a in all_of if a.family in families]
    addresses = [address for address in found if "%" not in address]  # those are of one link only
    return [socket.gethostname(), socket.getfqdn(), *addresses]


def allowed_hosts(own: Iterable[str], added: Iterable[str]) -> list[str]:
    """Return the Host headers that MLflow is to accept besides its defaults, each with any port. Pure.

    Args:
        own: names and addresses of the machine, and the interface that the server is bound to.
        added: what the user adds; a name may hold `*`, as in `*.example.com`.

    Raises:
        UserError: an added name stands for any name.
    """
    names = [name.strip().lower() for name in added]
    if wide := [name for name in names if name and not name.strip("*.:")]:
        raise UserError(
            f"the tracking server is to answer to the name {wide[0]!r}, which is any: then a page in somebody's "
            "browser could use it (DNS rebinding). Name the hosts, for instance mlflow.example.com or *.example.com"
        )
    hosts = dict.fromkeys(name for name in (*map(str.lower, own), *names) if name and name not in ("0.0.0.0", "::"))
    found = []
    for host in hosts:
        if ":" in host and not host.startswith("[") and host.count(":") > 1:  # an IPv6 address
            found += [f"[{host}]", f"[[]{host}]:*"]  # in a pattern, a bracket is written so
        else:
            found += [host] if ":" in host else [host, f"{host}:*"]
    return found


def _use_write_ahead_log(database: Path) -> None:
    """Let readers and the writer work side by side: in SQLite's default mode a long query blocks every metric.

    The mode is a property of the file and stays with it.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def serve(args: argparse.Namespace) -> None:
    """Create or migrate the database, then answer until SIGTERM or SIGINT."""
    import uvicorn

    # One worker: SQLite has one writer anyway, and each worker is another 250 MB. No access log: the metric sender
    # posts every second. A browser's kept-alive connections must not delay the shutdown.
    uvicorn.run(
        mlflow_internals.server_app(), host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=3
    )


def main(argv: list[str] | None = None) -> None:
    """Run the server in the foreground."""
    args = parse_args(argv)
    try:
        prepare(args)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    serve(args)


if __name__ == "__main__":
    main()
