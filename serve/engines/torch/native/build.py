"""Compile the kernels once for this machine, into a folder that later processes share.

    python -m serve.engines.torch.native.build      compile now, and say where the library is

The folder is kernels below TANDEM_CACHE, or tandem/kernels in the user's cache (XDG_CACHE_HOME); not in TANDEM_HOME:
a new home need not compile again. A library is named by a digest of the sources, the compiler and the CPU's features,
so that a folder shared by unlike machines holds one for each.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.precision import cpu_flags, this_cpu

SOURCES = Path(__file__).parent / "kernels"
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
# the kernels are vectors already; looking for more takes half of the compiling
FLAGS = ("-std=c++20", "-O3", "-fno-tree-vectorize", "-march=native", "-fPIC", "-fno-math-errno", "-w")
COMPILE_TIMEOUT_S = 300
NO_COMPILER = "there is no C++ compiler (g++ or clang++) to build the kernels with"
logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the compiler's."""


def refusal() -> str | None:
    """Return why the kernels cannot run on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"the CPU is {platform.machine()}, not x86_64"
    missing = [name for name in NEEDED if name not in cpu_flags()]
    if missing:
        return f"the CPU lacks {', '.join(missing)}"
    if not this_cpu().bf16:
        return this_cpu().reason
    if _compiler() is None and not _target(_digest()).exists():
        return NO_COMPILER
    return None


def library() -> Path:
    """Return the compiled library, compiling it first if this machine has none yet. Raises BuildError."""
    target = _target(_digest())
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(target.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # engines that start together compile once
            if not target.exists():
                _compile(target)
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {target.parent}: {error}") from error
    return target


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _target(digest: str) -> Path:
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    return Path(os.environ.get("TANDEM_CACHE") or users) / "kernels" / f"tandem-{digest}.so"


def _digest() -> str:
    """Name everything that the machine code depends on. The compiler counts by its path, size and time."""
    state = hashlib.blake2b(digest_size=10)
    for source in sorted(SOURCES.iterdir()):
        state.update(source.name.encode() + source.read_bytes())
    compiler = _compiler()
    if compiler:
        about = Path(shutil.which(compiler) or compiler).stat()
        state.update(f"{compiler} {about.st_size} {about.st_mtime_ns}".encode())
    state.update(" ".join((*FLAGS, *sorted(cpu_flags()))).encode())
    return state.hexdigest()


def _compile(target: Path) -> None:
    """Compile the sources side by side and link them; the library appears whole or not at all."""
    compiler = _compiler()
    if compiler is None:
        raise BuildError(NO_COMPILER)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(
                pool.map(lambda o: _run(compiler, *FLAGS, "-c", str(SOURCES / f"{o.stem}.cpp"), "-o", str(o)), objects)
            )
        built = Path(folder) / target.name
        _run(compiler, "-shared", "-o", str(built), *map(str, objects), "-lpthread")
        built.rename(target)
    logger.info("compiled the native kernels in %.1f s", time.perf_counter() - began)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    print(refusal() or library())
