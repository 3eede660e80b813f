"""The process of a node that has imported what workers and drivers need, and forks them, for cluster/fork_client.py.

    python -m cluster.fork_server SOCKET MODULE:FUNCTION        started by the first client

A forked process has the imports, and no more: environment, folder, arguments and streams are its client's.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

from cluster import garbage
from cluster.cuda_internals import CannotFork
from cluster.fork_client import REFUSED, check_peer, is_alive
from cluster.ray_process_internals import RAYLET_PID

IDLE_S = 900.0
"""A server without living children that nobody has asked for so long ends."""
POLL_S = 2.0


class Server:
    """Forks what it is asked for, and looks after those whose clients are their shadows."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._shadows: dict[int, socket.socket] = {}
        """Connections to the clients of watched processes, by pid."""
        self._wake, self._signalled = os.pipe2(os.O_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._signalled)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)  # the pipe wakes the loop

    def run(self, raylet: int) -> None:
        """Serve until the raylet is gone or nobody asks any more, and no process is watched."""
        asked_at = time.monotonic()
        while self._shadows or is_alive(raylet):
            if self._has_children():
                asked_at = time.monotonic()
            if time.monotonic() - asked_at > IDLE_S:
                break
            for key, _ in self._selector.select(POLL_S):
                if key.fileobj is self._listener:
                    asked_at = time.monotonic()
                    self._take()
                elif key.fileobj == self._wake:
                    os.read(self._wake, 4096)
                else:
                    self._killed(key.data)

    def _take(self) -> None:
        """Fork what the next connection asks for."""
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            if not self._fork(connection):
                connection.close()

    def _fork(self, connection: socket.socket) -> bool:
        """Fork what a connection asks for; say whether the new process is watched."""
        connection.settimeout(5)
        streams: list[int] = []
        try:
            check_peer(connection)
            wanted = _receive(connection, streams)
            pid = os.fork()
            if pid == 0:
                self._leave()
                _become(connection, wanted, streams)
            if "module" in wanted:
                self._shadows[pid] = connection
                self._selector.register(connection, selectors.EVENT_READ, pid)
                return True
        except (OSError, ValueError) as error:
            print(f"a request failed: {error}", flush=True)
        finally:
            for stream in streams:
                os.close(stream)
        return False

    def _leave(self) -> None:
        """Let go, in a forked process, of what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        self._listener.close()
        os.close(self._wake)
        os.close(self._signalled)
        for other in self._shadows.values():
            other.close()

    def _has_children(self) -> bool:
        """Take leave of the children that have ended, so that no zombie stays; say whether others live."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                self._ended(pid, os.waitstatus_to_exitcode(status))
        except ChildProcessError:
            return False

    def _ended(self, pid: int, code: int) -> None:
        """Tell a client how its process has ended, as a shell would put it."""
        if (connection := self._shadows.pop(pid, None)) is None:
            return
        self._selector.unregister(connection)
        with contextlib.suppress(OSError), connection:
            connection.sendall(struct.pack("i", code if code >= 0 else 128 - code))

    def _killed(self, pid: int) -> None:
        """Kill what a client was the shadow of, with all of its group: the client is gone."""
        self._selector.unregister(self._shadows.pop(pid))
        for kill in (os.killpg, os.kill):  # it has no group of its own yet, for a moment
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)


def serve(address: str, hook: str) -> None:
    """Import, then fork whatever is asked for at a socket, until the raylet is gone or nobody asks any more.

    What is imported is out of the garbage collector's sight, there and in what is forked: a collection would write to
    each of its objects, and so copy 100 MB of them into each process.
    """
    gc.disable()  # a collection finds next to nothing while modules are imported, and looks through all of them
    module, _, function = hook.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    except CannotFork:
        Path(f"{address}{REFUSED}").touch()  # the next client need not try
        raise
    garbage.settle()
    gc.enable()
    raylet = int(os.environ.get(RAYLET_PID) or 0)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(64)
        listener.settimeout(POLL_S)
        Server(listener).run(raylet)


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
        os.setsid()  # raylets signal a worker's whole process group when it ends
        connection.settimeout(None)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        arguments = _dress(wanted)
        connection.send(struct.pack("i", os.getpid()))
        if (module := wanted.get("module")) is not None:
            _be_called(str(module))
            sys.path[0] = os.getcwd()  # as with python -m
            runpy.run_module(str(module), run_name="__main__")
        else:
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


def _be_called(name: str) -> None:
    """Show a name, of which Linux keeps 15 characters, to `top` and `ps -o comm`: the command line is the server's."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="utf-8") as file:
        file.write(name)


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
