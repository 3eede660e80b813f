"""Worker processes by fork: one process a node imports what workers need, once, and forks each of them; this asks it.

    python -S -m cluster.fork_client MODULE:FUNCTION default_worker.py ARGUMENTS…

A raylet runs this in place of Python (`py_executable` of a runtime environment). It asks the node's fork server for a
process that is this one to the letter: arguments, environment, folder, standard streams. The first to come starts the
server (cluster/fork_server.py), which calls FUNCTION and waits. Importing torch, transformers and DeepSpeed takes seven
seconds of CPU; without the server every worker of every group pays them, at every start and after every failure.

Ray itself is imported after the fork: its core reads at import whose job it works for. Where anything about the server
fails, this process becomes a plain Python and imports everything by itself: slower, nothing else.
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

from cluster.ray_process_internals import RAYLET_ARGUMENT, RAYLET_PID, SHIPPED_FOLDER

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


def py_executable(hook: str) -> str:
    """Return the command for a runtime environment.

    `hook`, module:function, is what the server calls at its start. It must not import ray, nor compute: threads do not
    survive a fork. A node whose Python lies elsewhere takes the one on its PATH.
    """
    return f'"$(command -v {shlex.quote(sys.executable)} || command -v python3)" -S -m cluster.fork_client {hook}'


def main(hook: str, arguments: list[str]) -> None:
    """Have a process forked that is this one, and wait for its end; or become a plain Python."""
    try:
        connection = _connected(hook, _session(arguments))
        _send(connection, arguments)
        answer = connection.recv(4)
        if len(answer) < 4:
            raise ConnectionError("it ended")
    except OSError as error:
        print(f"no fork server ({error}): this process imports by itself", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *arguments])
    (pid,) = struct.unpack("i", answer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: os.kill(pid, signum))
    while connection.recv(1):  # the forked process holds the other end until it ends
        pass


def _session(arguments: list[str]) -> str:
    """Return the folder of the Ray session that a worker's arguments name; it goes when the session does."""
    for argument in arguments:
        if argument.startswith(RAYLET_ARGUMENT):
            return os.path.dirname(os.path.dirname(argument.removeprefix(RAYLET_ARGUMENT)))
    raise FileNotFoundError(f"no {RAYLET_ARGUMENT} among the arguments")


def _connected(hook: str, session: str) -> socket.socket:
    """Connect to the server; start it if there is none."""
    key = _key(hook)
    address = os.path.join(session, "sockets", f"fork-{key}")  # no longer than Ray's own: paths of sockets are limited
    deadline = time.monotonic() + START_TIMEOUT_S
    with open(f"{address}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _connect(address)
        except OSError:
            server = _start(hook, address, os.path.join(session, "logs", f"forkserver-{key}.log"))
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


def _key(hook: str) -> str:
    """Name the server by what its imports depend on."""
    shipped = [
        part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if SHIPPED_FOLDER in part
    ]  # jobs that ship the same share one
    what = [sys.executable, hook, shipped, [os.environ.get(name) for name in SHARED]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:7]


def _start(hook: str, address: str, log_path: str) -> int:
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
    os.chdir(os.path.dirname(address))  # -m looks in the folder first: a client's `datasets.py` is not for the others
    os.execv(sys.executable, [sys.executable, "-m", "cluster.fork_server", address, hook])


def _send(connection: socket.socket, arguments: list[str]) -> None:
    wanted = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("I", len(wanted))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(wanted)


def is_alive(pid: int) -> bool:
    """Say whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return pid > 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
