"""Checkpoints while training goes on.

    begin      the training thread names the state to save; nothing is copied yet
    copy       a thread copies it to a buffer, while the next step computes its loss and gradients
    copied     the training thread waits here before it lets the optimizer change the state: the only stall
    write      the thread writes the buffer; every rank its own shard
    commit     rank 0's thread waits for all shards, compares their headers with the model's elements, writes the
               manifest, removes old checkpoints

Where there is no memory for a copy, or the state lies in files, the thread writes the state itself, and the training
thread waits for that.

State is constant between two optimizer steps, and a forward and backward pass is longer than a copy in memory: the idea
is that of lazy snapshots (Maurya et al. 2024, DataStates-LLM, arXiv:2406.10707). A save that fails is tried again from
the buffer, then given up and reported; training goes on.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from cluster.stores import repeated
from jobs.checkpoint import catalog, shards, torch_internals
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.shards import Fragment
from jobs.checkpoint.store import Store, Written

RETRY_PAUSE_S = 1.0
COMMIT_TIMEOUT_S = 1800.0
POLL_S = 0.05

Result = TypeVar("Result")


class Notes(Protocol):
    """How ranks tell rank 0 that they have saved, or could not; not through the storage, which may be full."""

    def write(self, name: str, content: bytes) -> None:
        """Leave a note."""

    def read(self, name: str) -> bytes | None:
        """Return a note, or None as long as there is none."""


class GroupNotes:
    """Through the key-value store by which the process group has met; in rank 0's memory."""

    def __init__(self) -> None:
        self._store = dist.PrefixStore("checkpoint", torch_internals.group_store())

    def write(self, name: str, content: bytes) -> None:
        """Leave a note."""
        self._store.set(name, content.decode())

    def read(self, name: str) -> bytes | None:
        """Return a note, or None as long as there is none; never waits."""
        if not self._store.check([name]):
            return None
        content = bytes(self._store.get(name))
        self._store.delete_key(name)
        return content


@dataclass(frozen=True)
class Outcome:
    """How a save ended on this rank."""

    step: int
    error: str | None
    total_s: float
    """From `begin` to the end."""
    stalled_s: float
    """How long the training thread waited."""
    size: int = 0
    """Bytes of all shards; on rank 0."""
    superseded: bool = False
    """A newer attempt works on the run; on rank 0."""


class Saver:
    """Saves one checkpoint at a time for one rank."""

    def __init__(
        self,
        store: Store,
        attempt: str,
        rank: int,
        world_size: int,
        keep: Keep,
        on_phase: Callable[[str, int], object] = lambda phase, step: None,
        notes: Notes | None = None,
        fence: Fence | None = None,
    ) -> None:
        """Save what one rank holds.

        Args:
            on_phase: called in the thread with `save` or `commit` and the step, before the phase.
            notes: how ranks tell each other; one rank alone needs none.
            fence: rank 0's: it commits and deletes only as long as no newer attempt has entered.
        """
        assert notes is not None or world_size == 1
        self._store = store
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._keep = keep
        self._notes = notes
        self._fence = fence
        self._on_phase = on_phase
        self._buffer: torch.Tensor | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.to_copy = False
        """A save was begun, and `wait_copied` has not returned since: the same on all ranks."""
        self.direct = False
        """It is written from the state itself."""
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._stalled_s = 0.0

    def begin(
        self,
        manifest: Manifest,
        fragments: Sequence[Fragment],
        extra: Mapping[str, bytes] | None = None,
        *,
        direct: bool = False,
    ) -> None:
        """Start to save; the state must not change before `wait_copied` returned.

        Args:
            manifest: of this checkpoint, without its files.
            fragments: this rank's part of the state; all ranks' parts cover it once.
            extra: further files (rank 0's), by the end of their names.
            direct: write the state without a copy: there is no memory for one, or it lies in files; the same on all
                ranks.
        """
        self.finish()  # backpressure: a disk slower than the interval between checkpoints slows training down, visibly
        self._stalled_s = 0.0
        self._copied.clear()
        self.to_copy, self.direct = True, direct
        if direct:
            self._buffer = None
        arguments = (manifest, fragments, dict(extra or {}), time.monotonic())
        self._thread = threading.Thread(target=self._save, args=arguments, name="tandem-checkpoint", daemon=True)
        self._thread.start()

    def wait_copied(self) -> None:
        """Return when the state may change."""
        if not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._stalled_s += time.perf_counter() - began
        self.to_copy = False

    def check_newest(self) -> None:
        """Return if no newer attempt works on the run, as far as this rank may tell.

        Raises:
            Superseded: one does.
        """
        if self._fence is not None:
            self._fence.check()

    def finish(self) -> None:
        """Return when nothing is being saved."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._stalled_s += time.perf_counter() - began
            self._thread = None

    @property
    def held(self) -> int:
        """The bytes of memory that are there for a copy."""
        return self._buffer.nbytes if self._buffer is not None else 0

    def release(self) -> None:
        """Let go of the memory that states are copied to: as much as they take. The next save takes it again."""
        self.finish()
        self._buffer = None

    def outcomes(self) -> list[Outcome]:
        """Return what has ended since the last call."""
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def _save(
        self, manifest: Manifest, fragments: Sequence[Fragment], extra: Mapping[str, bytes], began: float
    ) -> None:
        error, size, superseded = None, 0, False
        try:
            written = self._written(manifest.step, fragments, extra)
            if self._rank == 0:
                size = self._commit(manifest, written)
            else:
                self._note(manifest.step, {"files": {name: [f.size, f.sha256] for name, f in written.items()}})
        except Exception as failure:  # whatever storage throws: training goes on
            error = f"{type(failure).__name__}: {failure}"
            superseded = isinstance(failure, Superseded)
            self._give_up(manifest.step, error)
        total_s = time.monotonic() - began
        self._outcomes.put(Outcome(manifest.step, error, total_s, self._stalled_s, size, superseded))

    def _written(self, step: int, fragments: Sequence[Fragment], extra: Mapping[str, bytes]) -> dict[str, Written]:
        """Write this rank's files; the state may change as soon as it is copied, or written."""
        try:
            head = shards.header(fragments)
            if self.direct:
                return _repeated(lambda: self._write(step, chain([head], shards.blocks(fragments)), extra))
            data = self._copy(fragments)
        finally:
            self._copied.set()
        return _repeated(lambda: self._write(step, [head, data.numpy()], extra))

    def _copy(self, fragments: Sequence[Fragment]) -> torch.Tensor:
        count = shards.total_elements(fragments)
        if self._buffer is None or self._buffer.numel() < count:
            pinned = any(tensor.is_cuda for fragment in fragments for tensor in fragment.tensors.values())
            self._buffer = torch.empty(count, dtype=torch.float32, pin_memory=pinned)
        shards.copy_out(fragments, self._buffer)
        if self._buffer.is_pinned():
            torch.cuda.synchronize()
        return self._buffer[:count]

    def _write(self, step: int, shard: Iterable[Any], extra: Mapping[str, bytes]) -> dict[str, Written]:
        self._on_phase("save", step)
        where = catalog.folder(step)
        name = catalog.shard_name(self._attempt, self._rank, self._world_size)
        files = {name: self._store.write(f"{where}/{name}", shard)}
        for ending, content in extra.items():
            name = f"{self._attempt}-{ending}"
            files[name] = self._store.write(f"{where}/{name}", [content])
        return files

    def _commit(self, manifest: Manifest, written: dict[str, Written]) -> int:
        files = dict(written)
        for rank in range(1, self._world_size):
            files.update(self._wait_for(manifest.step, rank))
        self._on_phase("commit", manifest.step)
        whole = replace(manifest, files=files)
        _repeated(lambda: catalog.commit(self._store, whole, self._fence))
        try:
            _repeated(lambda: catalog.remove_old(self._store, self._keep, self._fence))
        except Exception as error:  # the checkpoint is saved all the same; the next save removes what is left over
            print(f"old checkpoints could not be removed: {error}", flush=True)
        return sum(file.size for file in files.values())

    def _wait_for(self, step: int, rank: int) -> dict[str, Written]:
        assert self._notes is not None
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while time.monotonic() < deadline:
            content = self._notes.read(self._note_name(step, rank))
            if content is None:
                time.sleep(POLL_S)
                continue
            note = json.loads(content)
            if "error" in note:
                raise RuntimeError(f"rank {rank} could not save: {note['error']}")
            return {file: Written(*values) for file, values in note["files"].items()}
        raise TimeoutError(f"rank {rank} has not saved within {COMMIT_TIMEOUT_S:.0f} s")

    def _give_up(self, step: int, error: str) -> None:
        """Leave nothing of this attempt; what a newer one has written beside it stays."""
        try:
            if self._rank:
                self._note(step, {"error": error})
            else:
                self._store.remove_files(catalog.folder(step), f"{self._attempt}-")
        except Exception:  # no rank 0, or no storage: the manifest is missing either way
            return

    def _note(self, step: int, content: dict[str, object]) -> None:
        assert self._notes is not None
        self._notes.write(self._note_name(step, self._rank), json.dumps(content).encode())

    def _note_name(self, step: int, rank: int) -> str:
        return f"{self._attempt}/{step}/{rank}"


def _repeated(call: Callable[[], Result]) -> Result:
    """Call until it succeeds, as long as cluster/stores.py is patient.

    Wrong shards or a newer attempt will be there next time too.
    """
    return repeated(call, pause_s=RETRY_PAUSE_S, never=(shards.ShardError, Superseded), retried=Exception)
