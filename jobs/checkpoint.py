"""Checkpoints that can be trusted: shards and state first, then a manifest of digests, then a rename into place.

    <run>/checkpoints/step-00000100/shards/…    DeepSpeed's shards, one set per rank
                                    state.json  step, world size, ZeRO stage
                                    MANIFEST.json

Neither DeepSpeed's `latest` nor Ray Train's snapshot decides what exists: without a manifest that verifies there is
no checkpoint, and a resume takes the newest one that verifies and says what it skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.engine import Engine

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class State:
    """What a resume needs besides the shards. The step is the whole position: batches follow from it."""

    step: int
    world_size: int
    zero_stage: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    directory: Path
    state: State


def folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def save(root: Path, engine: Engine, state: State, keep: int) -> Path:
    """Write a checkpoint and remove the oldest beyond `keep`. Collective; returns on every rank when it is in place."""
    import torch.distributed as dist

    final = folder(root, state.step)
    partial = root / f".step-{state.step:08d}.partial"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial)
    dist.barrier()
    if engine.rank == 0:
        (partial / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _remove_old(root, keep)
    dist.barrier()
    return final


def newest_valid(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one was skipped."""
    skipped: list[str] = []
    for directory in sorted(root.glob("step-*"), reverse=True):
        problem = verify(directory)
        if problem is None:
            state = State(**json.loads((directory / "state.json").read_text(encoding="utf-8")))
            return Checkpoint(directory, state), skipped
        skipped.append(f"{directory.name}: {problem}")
    return None, skipped


def write_manifest(directory: Path) -> None:
    """Write size and SHA-256 of every file below `directory`, and flush it to the disk."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {p.relative_to(directory).as_posix(): [p.stat().st_size, _sha256(p)] for p in files}
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": entries}, file)
        file.flush()
        os.fsync(file.fileno())


def verify(directory: Path) -> str | None:
    """Compare every file with the manifest; return what is wrong, or None."""
    try:
        entries = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "no manifest, so it was never completed"
    except (OSError, ValueError, KeyError):
        return "the manifest is unreadable"
    for name, (size, digest) in entries.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} is corrupt (its digest differs)"
    return None


def to_universal(checkpoint: Checkpoint) -> Path:
    """Convert ZeRO shards so that another number of workers can load them; return the folder for `load_universal`.

    Raises:
        RuntimeError: DeepSpeed's converter failed; its last lines are in the message.
    """
    target = checkpoint.directory.with_name(f".{checkpoint.directory.name}.universal") / "shards"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1"]
    command += [
        "--num_merge_workers=1",
        "--input_folder",
        str(checkpoint.directory / "shards"),
        "--output_folder",
        str(target),
    ]
    if checkpoint.state.zero_stage < 3:
        command.append("--inject_missing_state")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("the conversion to a universal checkpoint failed:\n" + (done.stderr or done.stdout)[-2000:])
    return target.parent


def _remove_old(root: Path, keep: int) -> None:
    for directory in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(directory, ignore_errors=True)
    for directory in root.glob(".step-*"):
        shutil.rmtree(directory, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
