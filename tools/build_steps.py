"""Run a Dockerfile's steps without a container engine: tools/build_steps.py DOCKERFILE [--then COMMAND] (root, Linux)

The steps run in namespaces of their own, chrooted into an overlay over this machine's root: nothing of it is changed.
What differs from a build, and is said when it begins: the base image is not pulled (this machine's system takes its
place, with a fresh virtual environment of its Python), and pip's settings and proxies are this machine's.
"""

from __future__ import annotations

import argparse
import fnmatch
import grp
import json
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "/usr/local/python"
"""Where the base image's Python stands in for: a folder that its users may read."""
PASSED_ON = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE")
INSIDE = "TANDEM_BUILD_STEPS_INSIDE"


@dataclass(frozen=True)
class Step:
    """One instruction."""

    word: str
    text: str
    line: int


@dataclass
class State:
    """What instructions leave for those that follow."""

    root: Path
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "0:0"
    folder: str = "/"
    command: list[str] = field(default_factory=list)


def steps(text: str) -> Iterator[Step]:
    """Yield the instructions of a Dockerfile, lines that go on joined and comments left out. Pure."""
    whole, begun = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not whole):
            continue
        begun = begun if whole else number
        whole += line.strip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            whole += " "
            continue
        word, _, rest = whole.strip().partition(" ")
        yield Step(word.upper(), rest.strip(), begun)
        whole = ""


def assignments(text: str) -> dict[str, str]:
    """Return what an ENV sets. Pure."""
    return dict(word.partition("=")[::2] for word in shlex.split(text))


def ignored(patterns: list[str], path: Path) -> bool:
    """Say whether .dockerignore leaves a path out; as far as ours goes: names, `**/names`, `!names`. Pure."""
    out = False
    for pattern in patterns:
        keeps, plain = pattern.startswith("!"), pattern.lstrip("!")
        if plain.startswith("**/"):
            found = any(fnmatch.fnmatch(part, plain[3:]) for part in path.parts)
        else:
            found = fnmatch.fnmatch(path.parts[0], plain)
        out = (not keeps) if found else out
    return out


def run(state: State, command: list[str], extra: Mapping[str, str] | None = None) -> None:
    """Run a command in the image that is being made, as its user, and end with its exit code where that is not 0."""
    variables = {**state.arguments, **state.environment, **(extra or {})}
    words = ["env", "-i", f"--chdir={state.folder}", *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(["chroot", f"--userspec={state.user}", str(state.root), *words, *command])
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {shlex.join(command)[:200]}")


def copy(state: State, text: str, context: Path) -> None:
    """Do what COPY does, .dockerignore included."""
    *sources, target = shlex.split(text)
    lines = (context / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    place = state.root / os.path.join(state.folder, target).lstrip("/")
    for source in sources:
        files = [context / source] if (context / source).is_file() else sorted((context / source).rglob("*"))
        for path in files:
            below = path.relative_to(context)
            if path.is_file() and not ignored(patterns, below):
                into = place / path.relative_to(context / source) if path != context / source else place / path.name
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into)


def do(step: Step, state: State, context: Path) -> None:
    """Do one instruction."""
    if step.word == "RUN":
        run(state, [*state.shell, step.text])
    elif step.word == "COPY":
        copy(state, step.text, context)
    elif step.word == "ENV":
        state.environment.update(assignments(step.text))
    elif step.word == "ARG":
        name, _, value = step.text.partition("=")
        if (given := os.environ.get(name, value)) != "":
            state.arguments[name] = given
    elif step.word == "SHELL":
        state.shell = json.loads(step.text)
    elif step.word == "USER":
        state.user = step.text
    elif step.word == "WORKDIR":
        state.folder = step.text
        (state.root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif step.word == "CMD":
        state.command = json.loads(step.text)
    elif step.word != "FROM":
        sys.exit(f"line {step.line}: {step.word} is not known here")


def prepare(folder: Path) -> Path:
    """Mount the overlay and what processes need, and make the Python that stands in for the base image's."""
    root = folder / "root"
    for name in ("upper", "work", "root"):
        (folder / name).mkdir()
    options = f"lowerdir=/,upperdir={folder / 'upper'},workdir={folder / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    for name in ("dev", "sys"):
        subprocess.run(["mount", "--rbind", f"/{name}", str(root / name)], check=True)
    # A temporary folder of its own: what the overlay lies in is below this machine's.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(root / "tmp")], check=True)
    for table in ("passwd", "group", "shadow", "gshadow"):
        _without_people(
            root / "etc" / table, {entry.pw_name for entry in pwd.getpwall() if 1000 <= entry.pw_uid < 60000}
        )
    subprocess.run(["chroot", str(root), "/usr/bin/python3", "-m", "venv", "--copies", PYTHON], check=True)
    return root


def _without_people(table: Path, names: set[str]) -> None:
    """Take this machine's people and their groups out: a base image has none."""
    names = names | {entry.gr_name for entry in grp.getgrall() if 1000 <= entry.gr_gid < 60000}
    kept = [line for line in table.read_text().splitlines() if line.partition(":")[0] not in names]
    table.write_text("\n".join(kept) + "\n")


def inside(options: argparse.Namespace, folder: Path) -> None:
    """Run all steps, in the namespaces."""
    root = prepare(folder)
    path = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    here = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    state = State(root, {"PATH": path, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", **here})
    found = list(steps(options.dockerfile.read_text()))
    for number, step in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {step.word} {step.text[:100]}", flush=True)
        began = time.monotonic()
        do(step, state, ROOT)
        if step.word == "RUN":
            print(f"        {time.monotonic() - began:.0f} s", flush=True)
    for command in [*([shlex.join(state.command)] if state.command else []), *options.then]:
        print(f"then, as {state.user} in {state.folder}: {command}", flush=True)
        run(state, ["/bin/bash", "-c", command], {"HOME": "/home/tandem"})
    used = subprocess.run(["du", "-sm", str(folder / "upper")], capture_output=True, text=True).stdout.split()[0]
    print(f"all steps done: {used} MB beyond the base", flush=True)


def main() -> None:
    """Enter the namespaces, run, and leave nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--then", action="append", default=[], help="a command to try in the image, as its user")
    options = parser.parse_args()
    if folder := os.environ.pop(INSIDE, None):
        inside(options, Path(folder))
        return
    if os.geteuid() != 0:
        sys.exit("needs root: it mounts and changes its root folder")
    base = next(step.text for step in steps(options.dockerfile.read_text()) if step.word == "FROM")
    print(f"in place of {base}: this machine's system, and a fresh environment of its /usr/bin/python3 in {PYTHON}")
    print("pip's settings and proxies: this machine's", flush=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir="/var/tmp") as folder:
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv]
        sys.exit(subprocess.run(own, env={**os.environ, INSIDE: folder}).returncode)


if __name__ == "__main__":
    main()
