"""Worker processes by fork: one process a node imports what workers need, once, and forks each of them; this asks it.

    python -S -m cluster.fork_client MODULE:FUNCTION default_worker.py ARGUMENTS…

A raylet runs this in place of Python (`py_executable` of a runtime environment). It asks the node's fork server for a
process that is this one to the letter: arguments, environment, folder, standard streams. The first to come starts the
server (cluster/fork_server.py), which calls FUNCTION and waits. Importing torch, transformers and DeepSpeed takes seven
seconds of CPU; without the server every worker of every group pays them, at every start and after every failure.

Ray itself is imported after the fork: its core reads at import whose job it works for. Where anything about the server
fails, this process becomes a plain Python and imports everything by itself: slower, nothing else.

A job's driver is forked too (`shadow`). It was started by Ray's job supervisor, which sends it signals, kills it and
waits for its exit code, so the process that Ray knows stays: it passes signals on, and when it is killed the server
kills the forked one.
"""

from __future__ import annotations

import array
import fcntl
import hashlib
import json
import os
import shlex
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from cluster.ray_process_internals import RAYLET_ARGUMENT, RAYLET_PID, RAYLET_SOCKET, SHIPPED_FOLDER

START_TIMEOUT_S = 60.0
SHARED = (
    "TANDEM_CLUSTER_ID",
    RAYLET_PID,
    "RAY_ADDRESS",
    "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES",
    "THP_MEM_ALLOC_ENABLE",
)
"""Variables that what is imported looks at, and the cluster's mark, which a forked process shows for good."""
REFUSED = ".refused"
"""What follows a server's address in the name of a file: what has made the imports cannot be forked here."""
IS_FORKED = "TANDEM_FORKED"
"""A variable of processes that `shadow` has had forked."""


def py_executable(hook: str) -> str:
    """Return the command for a runtime environment.

    `hook`, module:function, is what the server calls at its start. It must not import ray, nor compute: threads do not
    survive a fork. A node whose Python lies elsewhere takes the one on its PATH.
    """
    return f'"$(command -v {shlex.quote(sys.executable)} || command -v python3)" -S -m cluster.fork_client {hook}'


def main(hook: str, arguments: list[str]) -> None:
    """Have a process forked that is this one, and wait for its end; or become a plain Python."""
    try:
        connection = _connected(hook, _session(arguments), os.environ)
        _pass_signals(_asked(connection, {"arguments": arguments}))
    except OSError as error:
        print(f"no fork server ({error}): this process imports by itself", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *arguments])
    while connection.recv(1):  # the forked process holds the other end until it ends
        pass


def shadow(hook: str, module: str, environment: Mapping[str, str]) -> int | None:
    """Have this process's work, `python -m module` with its arguments, done by a forked one; return its exit code.

    None: there is no raylet above this process, no server comes up, or this one has been forked: do it here.

    Args:
        environment: the server's, should it have to be started; what its imports depend on tells servers apart.
    """
    if os.environ.pop(IS_FORKED, None) or (raylet := raylet_above()) is None:
        return None
    pid, session = raylet
    try:
        connection = _connected(hook, session, {**environment, RAYLET_PID: str(pid)})
        marked = {**os.environ, IS_FORKED: "1"}
        _pass_signals(_asked(connection, {"arguments": sys.argv, "module": module, "environment": marked}))
    except OSError as error:
        print(f"no fork server ({error}): this process imports by itself", file=sys.stderr)
        return None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it in all that it starts
    code = connection.recv(4)  # the server sends it
    if len(code) < 4:
        print("the fork server is gone: how this process ended is not known, so it counts as failed", file=sys.stderr)
        return 1
    found: int = struct.unpack("i", code)[0]
    return found


def raylet_above() -> tuple[int, str] | None:
    """Return the raylet among the processes above this one, and the folder of its session."""
    pid = os.getppid()
    with suppress(OSError, ValueError, IndexError):
        while pid > 1:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                arguments = file.read().split("\0")
            for argument in arguments:
                if argument.startswith(RAYLET_SOCKET):
                    return pid, os.path.dirname(os.path.dirname(argument.removeprefix(RAYLET_SOCKET)))
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
    return None


def _asked(connection: socket.socket, wanted: dict[str, object]) -> int:
    """Ask for a process with this one's streams, folder and, unless others are wanted, variables; return its pid."""
    _send(connection, {"environment": dict(os.environ), "folder": os.getcwd(), **wanted})
    answer = connection.recv(4)
    if len(answer) < 4:
        raise ConnectionError("it ended")
    pid: int = struct.unpack("i", answer)[0]
    return pid


def _pass_signals(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: _kill(pid, signum))


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _session(arguments: list[str]) -> str:
    """Return the folder of the Ray session that a worker's arguments name; it goes when the session does."""
    for argument in arguments:
        if argument.startswith(RAYLET_ARGUMENT):
            return os.path.dirname(os.path.dirname(argument.removeprefix(RAYLET_ARGUMENT)))
    raise FileNotFoundError(f"no {RAYLET_ARGUMENT} among the arguments")


def _connected(hook: str, session: str, environment: Mapping[str, str]) -> socket.socket:
    """Connect to the server of an environment; start it if there is none."""
    key = _key(hook, environment)
    address = os.path.join(session, "sockets", f"fork-{key}")  # no longer than Ray's own: paths of sockets are limited
    deadline = time.monotonic() + START_TIMEOUT_S
    with open(f"{address}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(f"{address}{REFUSED}"):
            raise FileNotFoundError(f"its imports cannot be forked here: see {key} in {session}/logs")
        try:
            return _connect(address)
        except OSError:
            log = os.path.join(session, "logs", f"forkserver-{key}.log")
            server = _start([address, hook], log, environment)
        while True:
            try:
                return _connect(address)
            except OSError:
                if time.monotonic() > deadline or not is_alive(server):
                    raise
                time.sleep(0.05)


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    check_peer(connection)
    return connection


def check_peer(connection: socket.socket) -> None:
    """Ray lets everybody on a machine write into a session's folder; only processes of one's own user are talked to."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.getuid():
        raise PermissionError(f"the other end belongs to user {uid}")


def _key(hook: str, environment: Mapping[str, str]) -> str:
    """Name the server by what its imports depend on."""
    shipped = [
        part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if SHIPPED_FOLDER in part
    ]  # jobs that ship the same share one
    what = [sys.executable, hook, shipped, [environment.get(name) for name in SHARED]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:7]


def _start(arguments: list[str], log_path: str, environment: Mapping[str, str]) -> int:
    """Start the server as nobody's child, in a session of its own; return its pid."""
    reader, writer = os.pipe()
    if os.fork():
        os.wait()
        os.close(writer)
        return int(os.read(reader, 16) or 0)
    os.setsid()
    server = os.fork()
    if server:
        os.write(writer, str(server).encode())
        os._exit(0)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 256)
    # -m looks in the folder first: a client's `datasets.py` is not for the others.
    os.chdir(os.path.dirname(arguments[0]))
    os.execve(sys.executable, [sys.executable, "-m", "cluster.fork_server", *arguments], dict(environment))


def _send(connection: socket.socket, wanted: dict[str, object]) -> None:
    content = json.dumps(wanted).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("I", len(content))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(content)


def is_alive(pid: int) -> bool:
    """Say whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return pid > 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
