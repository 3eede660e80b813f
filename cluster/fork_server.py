"""The process of a node that has imported what workers need, and forks them: the other end of cluster/fork_client.py.

    python -m cluster.fork_server SOCKET MODULE:FUNCTION        started by the first client

A forked process has the imports, and no more: environment, folder, arguments and streams are its client's.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import socket
import struct
import sys
import time
import traceback

from cluster.fork_client import check_peer, is_alive
from cluster.ray_process_internals import RAYLET_PID

IDLE_S = 900.0
"""A server without living children that nobody has asked for so long ends."""
POLL_S = 2.0


def serve(address: str, hook: str) -> None:
    """Import, then fork whatever is asked for at a socket, until the raylet is gone or nobody asks any more."""
    module, _, function = hook.partition(":")
    getattr(importlib.import_module(module), function)()
    raylet = int(os.environ.get(RAYLET_PID) or 0)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    signal.signal(signal.SIGCHLD, lambda signum, frame: _has_children())  # nobody may see a zombie for long
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(64)
        listener.settimeout(POLL_S)
        asked_at = time.monotonic()
        while is_alive(raylet):
            if _has_children():
                asked_at = time.monotonic()
            if time.monotonic() - asked_at > IDLE_S:
                break
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            asked_at = time.monotonic()
            with connection:
                _fork(listener, connection)


def _fork(listener: socket.socket, connection: socket.socket) -> None:
    """Fork what one connection asks for."""
    connection.settimeout(5)
    streams: list[int] = []
    try:
        check_peer(connection)
        wanted = _receive(connection, streams)
        if os.fork() == 0:
            listener.close()
            _become(connection, wanted, streams)
    except (OSError, ValueError) as error:
        print(f"a request failed: {error}", flush=True)
    finally:
        for stream in streams:
            os.close(stream)


def _has_children() -> bool:
    """Take leave of the children that have ended; say whether others live."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    except ChildProcessError:
        return False


def _receive(connection: socket.socket, streams: list[int]) -> dict[str, object]:
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data)
            streams.extend(numbers)
    if len(head) < 4 or len(streams) != 3:
        raise ValueError("it is none")
    (size,) = struct.unpack("I", head)
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ValueError("it ends early")
        content += part
    return dict(json.loads(content))


def _become(connection: socket.socket, wanted: dict[str, object], streams: list[int]) -> None:
    """Be the process that was asked for: its streams, environment, folder and arguments; then run its script."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()  # raylets signal a worker's whole process group when it ends
        connection.settimeout(None)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        arguments = _dress(wanted)
        connection.send(struct.pack("i", os.getpid()))
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _dress(wanted: dict[str, object]) -> list[str]:
    """Take over environment, folder, arguments and import path; return the arguments."""
    environment, arguments = wanted["environment"], wanted["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    inherited = {*os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd(), ""}
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(wanted["folder"]))
    paths = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [os.path.dirname(arguments[0]), *paths, *(part for part in sys.path if part not in inherited)]
    sys.argv[:] = arguments
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    return arguments


if __name__ == "__main__":
    serve(*sys.argv[1:3])
