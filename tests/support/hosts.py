"""Hosts on one machine: each has namespaces of its own for network, mounts, processes, IPC and its name.

    with hosts.up(3, shared=True) as three:
        three[0].run("ip", "addr")                              # waits; fails with what it said if it fails
        process = three[1].start("sleep", "600")                # a Popen; `end(process)` ends it
        three.slow(three[2], "20mbit")                          # both ways; `fast` takes that back
        three.cut(three[2]); three.mend(three[2])               # its link goes down, and up again
        three[1].path("/tmp/x").read_text()                     # a host's file, as this process sees it

A host has its own /tmp, /root (which is HOME), /dev/shm and /etc/hosts, sees the project and this interpreter's Python
read-only, and the rest of the machine as it is. With `shared` all of them see one folder at /shared, else each its own.
The bridge between them lies in a network namespace too: nothing of it is seen on the machine, so that two processes may
have hosts of the same names and addresses, and all of it ends with the process that made it, however that ends.
This process is in none of the hosts: what asks them has to run in one.

`need()` skips a test where hosts cannot be made. Ray and MLflow on hosts: tests/support/hosts_cluster.py.
"""

from __future__ import annotations

import functools
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
NETWORK = "10.77.0"
"""The first three numbers of the hosts' addresses: host 1 is 10.77.0.1."""
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "pivot_root", "hostname", "bash")
START_TIMEOUT_S = 30.0
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")

BOOT = """
set -eu
root=$1 name=$2 shared=$3 hosts=$4; shift 4
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=16m root "$root"
for entry in /*; do
    case $entry in /tmp|/root|/proc|/sys|/shared|/lost+found) continue ;; esac
    if [ -L "$entry" ]; then cp -P "$entry" "$root$entry"
    elif [ -d "$entry" ]; then mkdir "$root$entry"; mount --rbind "$entry" "$root$entry"
    fi
done
mkdir "$root/tmp" "$root/root" "$root/proc" "$root/sys" "$root/shared" "$root/.old"
mount -t tmpfs -o mode=1777,size=8g tmp "$root/tmp"
mount -t tmpfs -o mode=700,size=4g home "$root/root"
mount -t tmpfs -o mode=1777,size=4g shm "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs sys "$root/sys"
if [ -d /sys/fs/cgroup ]; then mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"; fi
if [ -n "$shared" ]; then mount --bind "$shared" "$root/shared"
else mount -t tmpfs -o mode=1777,size=4g shared "$root/shared"; fi
for path in "$@"; do
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
printf '%s' "$hosts" > "$root/tmp/.hosts"
mount --bind "$root/tmp/.hosts" "$root/etc/hosts"
cd "$root"
pivot_root . .old
umount -l /.old
rmdir /.old
hostname "$name"
echo up
exec 3<&0
while read -r -u 3 line; do :; done  # until the process that made it is gone; bash takes leave of orphans
"""


class CannotMakeHosts(RuntimeError):
    """A host did not come up."""


@dataclass
class Host:
    """One host."""

    name: str
    address: str
    pid: int
    """Of its first process, as this process sees it."""
    number: int
    """From 1."""

    def start(
        self, *command: str, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command there, in /root; its streams are pipes, or its output goes to the file `log`.

        Its environment is HOME, PATH and LANG, PYTHONPATH (the project), no byte code written, and `env`.
        """
        variables = {
            "HOME": "/root",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(PROJECT),
            "PYTHONDONTWRITEBYTECODE": "1",
            **(env or {}),
        }
        enter = ["nsenter", "--target", str(self.pid), *NAMESPACES, "env", "-i", "-C", "/root"]
        line = [*enter, *(f"{name}={value}" for name, value in variables.items()), *command]
        if log is None:
            pipe = subprocess.PIPE
            return subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
            )
        with log.open("a") as output:
            return subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, start_new_session=True
            )

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout_s: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end; with `check`, fail with what it said where it exits by another code than 0.

        Raises:
            subprocess.TimeoutExpired: it ran for too long, and was ended.
        """
        process = self.start(*command, env=env)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            end(process)
            raise
        assert not check or process.returncode == 0, (
            f"{self.name}: {' '.join(command)}: {process.returncode}\n{out}{err}"
        )
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def python(self, code: str, *arguments: str, **options: object) -> str:
        """Run Python code there; return what it printed."""
        return self.run(sys.executable, "-c", code, *arguments, **options).stdout  # type: ignore[arg-type]

    def path(self, inside: str | Path) -> Path:
        """Return where a file of the host is, for this process to read and write."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write_hosts_file(self, text: str) -> None:
        """Replace what /etc/hosts has on this host."""
        self.path("/etc/hosts").write_text(text)


class Hosts(Sequence[Host]):
    """Hosts on a bridge: a sequence of them, by position from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """A folder of this machine that goes with them, for logs."""
        self._hosts: list[Host] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._switch = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def cut(self, host: Host) -> None:
        """Take a host's link down: nothing reaches it, nothing leaves it, and nobody is told."""
        self._net("link", "set", f"v{host.number}", "down")

    def mend(self, host: Host) -> None:
        """Put a host's link up again."""
        self._net("link", "set", f"v{host.number}", "up")

    def lose(self, host: Host) -> None:
        """Have a host lose its power: its link is down, and all that ran there is gone; its disk stays.

        `mend` puts its link up; what runs on a host that has been started has to be started.
        """
        self.cut(host)
        host.run("bash", "-c", "kill -9 -1", check=False)  # all but the host's first process

    def slow(self, host: Host, rate: str, latency: str = "400ms") -> None:
        """Let a host send and receive no faster than `rate`, such as 20mbit.

        Args:
            latency: how long a packet may wait for its turn; what would wait longer is dropped.
        """
        shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", latency]
        _in_net(self._switch, "tc", "qdisc", "replace", "dev", f"v{host.number}", *shape)
        _in_net(host.pid, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def fast(self, host: Host) -> None:
        """Take back what `slow` did."""
        _in_net(self._switch, "tc", "qdisc", "del", "dev", f"v{host.number}", "root")
        _in_net(host.pid, "tc", "qdisc", "del", "dev", "eth0", "root")

    def up(self, count: int, shared: bool) -> None:
        """Make the bridge and the hosts; `down` has to follow, also if this fails."""
        self._switch = self._spawn(["unshare", "--net"], ["bash", "-c", "echo up; read -r line"])
        self._net("link", "add", "name", "bridge0", "type", "bridge")
        self._net("link", "set", "bridge0", "up")
        everyone = "".join(f"{NETWORK}.{n} host{n}\n" for n in range(1, count + 1))
        place = self.folder / "shared"
        place.mkdir()
        place.chmod(0o1777)
        for number in range(1, count + 1):
            root = self.folder / f"root{number}"
            root.mkdir()
            flags = ["unshare", *NAMESPACES, "--fork", "--kill-child"]
            what = [str(root), f"host{number}", str(place) if shared else "", f"127.0.0.1 localhost\n{everyone}"]
            pid = self._spawn(flags, ["bash", "-c", BOOT, "boot", *what, *seen()])
            self._connect(number, pid)
            self._hosts.append(Host(f"host{number}", f"{NETWORK}.{number}", pid, number))

    def down(self) -> None:
        """End every host with all that runs in it."""
        for process in self._processes:
            below = _children(process)
            for child in below:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if not below:
                process.kill()
            process.wait()  # `unshare` ends once its child has
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connect(self, number: int, pid: int) -> None:
        link = f"v{number}"
        self._net("link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._net("link", "set", link, "master", "bridge0", "up")
        _in_net(pid, "ip", "link", "set", "lo", "up")
        _in_net(pid, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        _in_net(pid, "ip", "link", "set", "eth0", "up")

    def _net(self, *words: str) -> None:
        _in_net(self._switch, "ip", *words)

    def _spawn(self, flags: Sequence[str], command: Sequence[str]) -> int:
        """Start the first process of namespaces; return its pid once it says that it is up."""
        log = self.folder / "boot.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [*flags, *command],
                stdin=subprocess.PIPE,  # it ends where this end is closed
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._processes.append(process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        if not ready or process.stdout.readline() != b"up\n":
            raise CannotMakeHosts(f"{' '.join(flags)}: {log.read_text(errors='replace')}")
        children = _children(process) if "--fork" in flags else []
        return children[0].pid if children else process.pid


@contextmanager
def up(count: int, shared: bool = True) -> Iterator[Hosts]:
    """Make hosts named host1, host2, …; end them afterwards, with all that runs in them."""
    made = Hosts(Path(tempfile.mkdtemp(prefix="th-", dir="/tmp")))
    try:
        made.up(count, shared)
        yield made
    finally:
        made.down()


def end(process: subprocess.Popen[str], timeout_s: float = 10) -> None:
    """End what `Host.start` started, with its children: politely, then not."""
    below = [child for one in _children(process) for child in (one, *_below(one))]
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _, left = psutil.wait_procs(below, timeout_s)
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait()


def need() -> None:
    """Skip the test, loudly, where hosts cannot be made: the run's last line says so."""
    if reason := lacking():
        pytest.skip(f"hosts by namespaces: {reason}")


@functools.cache
def lacking() -> str:
    """Return why hosts cannot be made on this machine; empty: they can."""
    if sys.platform != "linux":
        return "not Linux"
    if os.geteuid():
        return "needs root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(missing)}"
    try:
        with up(1) as one:
            one.slow(one[0], "20mbit")
            one[0].run(sys.executable, "-c", "import cluster")
    except (CannotMakeHosts, subprocess.CalledProcessError, AssertionError) as error:
        return f"the kernel or this container refuses: {str(error).strip()[-200:]}"
    return ""


def seen() -> list[str]:
    """List the folders that hosts see read-only: the project's and this Python's."""
    wanted = {PROJECT.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    wanted |= {Path(entry).resolve() for entry in sys.path if entry.endswith("-packages")}
    return sorted(str(one) for one in wanted if not any(other in one.parents for other in wanted))


def _children(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children()
    return []


def _below(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _in_net(pid: int, *command: str) -> None:
    done = subprocess.run(["nsenter", "--target", str(pid), "--net", *command], capture_output=True, text=True)
    if done.returncode:
        raise CannotMakeHosts(f"{' '.join(command)}: {done.stderr.strip()}")


def wait_for_text(log: Path, text: str, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Wait until a log has a text; fail with its end where the process ends before, or it never comes."""
    deadline = time.monotonic() + timeout_s
    while text not in (found := log.read_text(errors="replace") if log.exists() else ""):
        assert process.poll() is None, f"ended with {process.returncode}: {found[-2000:]}"
        assert time.monotonic() < deadline, f"no {text!r} in {log}: {found[-2000:]}"
        time.sleep(0.1)
