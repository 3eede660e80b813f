"""Find and end exactly the processes that one `tandem cluster up` started, and whatever those started in turn.

Every daemon carries the cluster's id in its environment and leads a session of its own; children inherit both. Neither
is enough alone: Ray overwrites the environment of processes whose title it sets, and job drivers get new sessions.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.ray_process_internals import JOB_MARKER

MARKER = "TANDEM_CLUSTER_ID"
KILL_WITHIN_S = 10.0


def born(pid: int) -> str | None:
    """Return what tells a process from others that had its number before, or will; None where there is none.

    Ticks since the machine was started, where the kernel tells them: times of day change with the clock.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return str(process.create_time())
    except psutil.NoSuchProcess:
        return None


def is_running(pid: int, cluster_id: str) -> bool:
    """Say whether `pid` lives and is a daemon of the cluster, not a stranger that got a used number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == cluster_id
    except psutil.Error:
        return False


def boot_id() -> str:
    """Return what tells this run of the machine from those before it; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def members(
    cluster_id: str, sessions: Iterable[int], started_at: float, boot: str | None = None
) -> list[psutil.Process]:
    """List the live processes of a cluster: marked, in one of its `sessions`, or descended from such a process.

    The calling process is never among them. After a reboot since the cluster was started there are none.

    Args:
        started_at: when it was, in seconds since the epoch: looked at where `boot` is not known, since clocks are set.
        boot: `boot_id()` at that time.
    """
    rebooted = boot != boot_id() if boot else started_at < psutil.boot_time()
    if rebooted:
        return []
    running = {process.pid: process for process in psutil.process_iter() if process.pid != os.getpid()}
    owned = {session for session in sessions if session not in running or is_running(session, cluster_id)}
    found = {pid for pid, process in running.items() if _belongs(process, cluster_id, owned)}
    for pid in tuple(found):
        found.update(child.pid for child in _descendants(running[pid]))
    return [running[pid] for pid in found if pid in running and _is_alive(running[pid])]


def wait_for_job_drivers(find: Callable[[], Sequence[psutil.Process]], timeout_s: float) -> None:
    """Wait until no driver of a submitted job is left among what `find` lists, but not longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(_is_job_driver(process) for process in find()) and time.monotonic() < deadline:
        time.sleep(0.1)


def end(find: Callable[[], Sequence[psutil.Process]], grace_s: float) -> int:
    """End what `find` lists and return how many processes that was.

    All are asked first and get `grace_s`; what is left, or comes, is killed until `find` finds nothing.
    """
    asked = find()
    ended = _signal(asked, signal.SIGTERM)
    psutil.wait_procs(asked, timeout=grace_s)
    deadline = time.monotonic() + KILL_WITHIN_S
    while (left := find()) and time.monotonic() < deadline:
        ended |= _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
    return len(ended)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> set[int]:
    reached = set()
    for process in processes:
        try:
            process.send_signal(number)
            reached.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return reached


def _belongs(process: psutil.Process, cluster_id: str, sessions: set[int]) -> bool:
    """Trust the marker; trust a session number, which may be used again, only where the environment is overwritten."""
    try:
        environment = process.environ()
        if MARKER in environment:
            return environment[MARKER] == cluster_id
        return "PATH" not in environment and os.getsid(process.pid) in sessions
    except (psutil.Error, OSError):
        return False


def _is_job_driver(process: psutil.Process) -> bool:
    try:
        return JOB_MARKER in process.environ()
    except psutil.Error:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
