"""Keep a node in its cluster: start Ray there, and again when its raylet has died though nobody asked for it.

    python -m cluster.supervisor start --address HEAD:6379 -- ray start --address=HEAD:6379 …
    python -m cluster.supervisor stop

A node behind a cut link is declared dead; when the link is mended, its raylet hears of that and ends, and Ray leaves
it at that. `start` replaces an older supervisor of the same folder, returns when Ray has started (or has not: exit code
1), and leaves a process behind that watches the raylet. It ends when the raylet was asked to stop (`ray stop`), and
when it gives up; what it does is decided in cluster/rejoining.py and written to `supervisor.log` in the folder.

On Linux it adopts whatever the node leaves without a parent: so it learns how the raylet ended, and ends what ran under
it before another one is started. Nothing of a node that was declared dead goes on writing beside its successor.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from cluster import daemons, link, processes
from cluster.errors import UserError
from cluster.home import home
from cluster.ray_process_internals import JOB_MARKER, NODE_PROGRAMS, RAYLET_PID, WORKER_TITLE
from cluster.rejoining import (
    GIVEN_UP,
    MOST_TRIES,
    RETURNS_LABEL,
    SETTLED_S,
    Seen,
    decide,
    ended_how,
    node_id,
    with_label,
)

LOG, STATE = "supervisor.log", "supervisor.json"
LOOK_S = 0.5
LEFT_S = 3.0
"""What a dead raylet leaves has so long to end by itself."""
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2)."""


@dataclass(frozen=True)
class State:
    """What a supervisor has written down last."""

    pid: int
    born: str
    """Of the supervisor: `processes.born`."""
    state: Literal["starting", "up", "down", "ended"] = "starting"
    raylet: int = 0
    returns: int = 0
    """How often the node has joined again."""
    reason: str = ""
    """Of the last death, or of the end."""
    at: float = 0.0
    """When that was, in seconds since the epoch."""

    @property
    def lives(self) -> bool:
        """Say whether the supervisor runs."""
        return processes.born(self.pid) == self.born


@dataclass(frozen=True)
class Node:
    """What a supervisor is to keep."""

    command: tuple[str, ...]
    """A `ray start`."""
    address: str
    """`host:port` of the head."""
    folder: Path
    """Of its state."""
    log: Path
    record: Path | None = None
    """The embedded cluster's state file: where it is gone or names another cluster than `cluster`, the node is too."""
    cluster: str = ""


def read(folder: Path) -> State | None:
    """Return what the supervisor of a folder has written down, if there was one."""
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def begin(node: Node, env: dict[str, str]) -> tuple[int, int]:
    """Start a supervisor as nobody's child; return its pid and its session's id. It has started nothing yet."""
    for folder in (node.folder, node.log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (node.folder / STATE).unlink(missing_ok=True)
    record = ["--record", str(node.record), "--cluster", node.cluster] if node.record else []
    options = ["--address", node.address, "--folder", str(node.folder), "--log", str(node.log), *record]
    command = [sys.executable, "-m", "cluster.supervisor", "watch", *options, "--", *node.command]
    return daemons.start_daemon(command, env, node.log, node.log.parent)  # where it starts: as `daemons.start_ray`


def wait(node: Node, pid: int, what: str) -> int:
    """Wait until Ray runs, and return the raylet's pid.

    Raises UserError with the end of the log when it does not within START_TIMEOUT_S, or when the supervisor has ended.
    """
    deadline = time.monotonic() + daemons.START_TIMEOUT_S
    while time.monotonic() < deadline:
        found = read(node.folder)
        if found and found.state == "up":
            return found.raylet
        if processes.born(pid) is None:
            break
        time.sleep(0.1)
    raise UserError(f"{what} did not start; {daemons.tail(node.log)}")


def stop(folder: Path) -> bool:
    """End the supervisor of a folder, and say whether there was one. Ray runs on."""
    found = read(folder)
    if found is None or not found.lives:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(found.pid)
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(5)
            return True
        process.kill()
    return True


class Supervisor:
    """One node's. `run` returns when it has nothing to keep any more."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._state = State(os.getpid(), processes.born(os.getpid()) or "")
        self._raylet_code: int | None = None
        self._tries = 0
        self._started_at = self._ended_at = self._answered_at = time.monotonic()
        self._link_was_cut = self._given_up = False
        self._said = ""

    def run(self) -> int:
        """Start the node, and again whenever that is due; return an exit code."""
        self._write()
        if not self._start():
            return 1
        while True:
            self._look()
            following = decide(self._seen())
            if following.action == "end":
                self._write(state="ended", reason=following.reason)
                self._say(f"the node is left alone: {following.reason}")
                return 0
            if following.action == "wait":
                self._say(following.reason)
            elif following.action == "start" and self._start():
                self._write(returns=self._state.returns + 1)
                self._say(f"the node has joined again, for the {self._state.returns}. time")
            time.sleep(LOOK_S)

    def _seen(self) -> Seen:
        now, runs = time.monotonic(), self._state.state == "up"
        answers = not runs and daemons.listens(self._node.address)
        if answers or runs:
            self._answered_at = now
        silent_s, idle_s = now - self._answered_at, now - self._ended_at
        return Seen(runs, self._raylet_code, answers, self._tries, idle_s, silent_s, self._is_wanted(), self._given_up)

    def _is_wanted(self) -> bool:
        if self._node.record is None:
            return True
        try:
            return bool(json.loads(self._node.record.read_text(encoding="utf-8"))["id"] == self._node.cluster)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError):  # a disk that does not answer says nothing of the cluster
            return True

    def _look(self) -> None:
        """Notice that the raylet has ended, and end what it has left."""
        self._reap()
        if self._state.state == "up":
            self._end_what_was_given_up()
        if self._state.state != "up" or processes.born(self._state.raylet) is not None:
            return
        self._reap()
        lived_s, self._ended_at = time.monotonic() - self._started_at, time.monotonic()
        self._tries = 0 if lived_s > SETTLED_S or self._given_up else self._tries + 1
        how = GIVEN_UP if self._given_up else ended_how(self._raylet_code)
        self._write(state="down", reason=how, at=time.time())
        self._say(f"{how}, after {lived_s:.0f} s")
        if ended := self._end_left(self._state.raylet):
            self._say(f"what it left had to be ended: processes {', '.join(map(str, ended))}")

    def _end_what_was_given_up(self) -> None:
        """End a raylet that was declared dead behind a cut link: by itself it would hear of it up to a minute later."""
        if not self._link_was_cut:
            self._link_was_cut = link.looks_cut(self._node.address)
            if self._link_was_cut:
                self._say("the head does not answer the raylet")
        elif daemons.listens(self._node.address):
            self._link_was_cut = False
            with contextlib.suppress(psutil.Error):  # it may end by itself at any moment
                raylet = psutil.Process(self._state.raylet)
                named = node_id(_line(raylet))
                self._given_up = bool(named) and link.given_up(self._node.address, named)
                self._say(GIVEN_UP if self._given_up else "the head answers again")
                if self._given_up:
                    raylet.kill()
                    raylet.wait(LEFT_S)

    def _start(self) -> bool:
        """Run `ray start`; say whether a raylet runs."""
        labelled = with_label(self._node.command, RETURNS_LABEL, self._state.returns + 1)
        command = labelled if self._state.state == "down" else [*self._node.command]
        self._say(f"$ {' '.join(command)}")
        try:
            code = subprocess.run(command, timeout=daemons.START_TIMEOUT_S, check=False).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            code = -1
            self._say(str(error))
        raylet = next((p.pid for p in self._own() if daemons.runs(_line(p), NODE_PROGRAMS)), 0)
        if code or not raylet:
            self._ended_at, self._tries = time.monotonic(), self._tries + 1
            self._end_left(raylet)  # half a node would be in the way of the next one
            self._say(f"`ray start` went wrong (exit code {code}), try {self._tries} of {MOST_TRIES}")
            return False
        self._started_at, self._raylet_code = time.monotonic(), None
        self._link_was_cut = self._given_up = False
        self._write(state="up", raylet=raylet, at=time.time())
        return True

    def _reap(self) -> None:
        """Take leave of adopted processes that have ended, and note how the raylet did."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self._state.raylet:
                    self._raylet_code = os.waitstatus_to_exitcode(status)

    def _own(self) -> list[psutil.Process]:
        """List what lives in the supervisor's session, itself not."""
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and _session(p) == os.getsid(0)]

    def _end_left(self, raylet: int) -> list[int]:
        """End what a dead raylet has left, once it had time to end by itself; return the process ids."""
        deadline = time.monotonic() + LEFT_S
        while (left := self._left(raylet)) and time.monotonic() < deadline:
            time.sleep(0.1)
            self._reap()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=LEFT_S)
        self._reap()
        return [process.pid for process in left]

    def _left(self, raylet: int) -> list[psutil.Process]:
        own = {process.pid: process for process in self._own()}
        below = {process.pid: process for process in psutil.Process().children(recursive=True)}
        found = {**own, **{pid: process for pid, process in below.items() if _is_rays(process, raylet)}}
        return [process for pid, process in found.items() if processes.born(pid) is not None]

    def _write(self, **changed: object) -> None:
        self._state = replace(self._state, **changed)  # type: ignore[arg-type]
        draft = self._node.folder / f".{STATE}"
        with contextlib.suppress(OSError):  # a full disk costs the note, not the node
            draft.write_text(json.dumps(asdict(self._state)), encoding="utf-8")
            draft.replace(self._node.folder / STATE)

    def _say(self, text: str) -> None:
        if text != self._said:
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)
        self._said = text


def adopt_orphans() -> None:
    """Become the parent of whatever processes below lose theirs; without effect where the kernel has no such thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _is_rays(process: psutil.Process, raylet: int) -> bool:
    """Say whether a process is a worker of a raylet or its fork server; the driver of a job and its guard are not."""
    try:
        title, environment = _line(process), process.environ()
    except psutil.Error:
        return False
    if title and title[0].startswith(WORKER_TITLE):
        return True
    return environment.get(RAYLET_PID) == str(raylet) and JOB_MARKER not in environment


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return 0


def parsed(argv: Sequence[str]) -> tuple[str, Node]:
    """Read a command line: what to do, and the node to keep; what follows `--` is its `ray start`."""
    at = argv.index("--") if "--" in argv else len(argv)  # argparse takes options there for its own
    prog = "python -m cluster.supervisor"
    parser = argparse.ArgumentParser(prog, usage="%(prog)s {start,stop} [options] -- ray start …", description=__doc__)
    parser.add_argument("what", choices=["start", "stop", "watch"])
    parser.add_argument("--address", default="", help="host:port of the head")
    parser.add_argument("--folder", type=Path, default=home() / "node", help="of its state and log")
    parser.add_argument("--log", type=Path, help="its log; default: supervisor.log in the folder")
    parser.add_argument("--record", type=Path, help="the state file of an embedded cluster")
    parser.add_argument("--cluster", default="", help="the id that it names")
    args, command = parser.parse_args(argv[:at]), argv[at + 1 :]
    if args.what != "stop" and not (args.address and command):
        parser.error("say where the head is (--address) and how Ray is started (-- ray start …)")
    folder, log = args.folder.absolute(), (args.log or args.folder / LOG).absolute()
    return args.what, Node(tuple(command), args.address, folder, log, args.record, args.cluster)


def main(argv: Sequence[str] | None = None) -> int:
    """Start or stop a node's supervisor, or be it (`watch`); return an exit code."""
    what, node = parsed(sys.argv[1:] if argv is None else argv)
    if what == "stop":
        print("its supervisor was ended" if stop(node.folder) else "no supervisor runs here")
        return 0
    if what == "watch":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        adopt_orphans()
        return Supervisor(node).run()
    stop(node.folder)
    pid, _ = begin(node, dict(os.environ))
    try:
        wait(node, pid, "Ray")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Ray runs, and is started again when it dies: {node.log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
