"""What is around a rank's work: its log, which outlives the cluster, its node's metrics, its folder for swap files."""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO, Any

from cluster.errors import UserError
from jobs.checkpoint import resume
from jobs.storage.arrival import await_copy
from jobs.worker import compiling, swap
from jobs.worker.config import WorkerConfig
from jobs.worker.watchdog import MARGIN_S, Pulse, Watchdog
from tracking.spool import Spool
from tracking.system import SystemSampler


def arrived(config: WorkerConfig) -> None:
    """Return when the folder of the run is on this node, with what workers need besides.

    Raises:
        UserError: it is not.
    """
    if config.token:
        await_copy(config.folder.path, config.token)
    elif not config.folder.path.is_dir():
        raise UserError(
            f"storage: {config.folder.path} is not there on the node {socket.gethostname()}: `storage` has to be a "
            "folder that all nodes share, or an object store such as s3://bucket/folder"
        )


@contextmanager
def logged(config: WorkerConfig) -> Iterator[Watchdog]:
    """Keep what this rank prints, its traceback, and its stacks should it hang, in the run's folder."""
    import ray
    import ray.train

    rank, attempt = ray.train.get_context().get_world_rank(), resume.attempt_name()
    pulse = Pulse(config.folder.pulse(attempt, rank), ray.get_runtime_context().get_node_id())
    compiles = config.spec.training is not None and config.spec.training.compile
    margin_s = compiling.MARGIN_S if compiles else MARGIN_S
    watchdog = Watchdog(config.folder.stacks(attempt, rank), config.spec.failures.hang_after_s, pulse, margin_s)
    file = config.folder.log(attempt, rank).open("a", buffering=1)
    tee_out, tee_err = Tee(sys.stdout, file), Tee(sys.stderr, file)
    try:
        with redirect_stdout(tee_out), redirect_stderr(tee_err):  # type: ignore[type-var]
            yield watchdog
    except BaseException:
        tee_err.keep(traceback.format_exc())
        raise
    finally:
        watchdog.stop()
        with suppress(OSError):  # a full disk does not take the last line
            file.close()


class Tee:
    """What is printed, to where it went before and to a file that outlives the cluster."""

    def __init__(self, stream: Any, file: IO[str]) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        """Write to both; a disk that is full costs the file a line, not the run its worker."""
        self.keep(text)
        return int(self._stream.write(text) or 0)

    def keep(self, text: str) -> None:
        """Write to the file alone."""
        with suppress(OSError):
            self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def swap_folder(config: WorkerConfig) -> Iterator[Path | None]:
    """Hold a folder for this rank's swap files, where the spec offloads to NVMe."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    with swap.held(config.spec.training, config.folder.key, resume.attempt_name(), rank) as folder:
        yield folder


@contextmanager
def system_metrics(directory: Path) -> Iterator[None]:
    """Sample this node's CPU, memory, disk, network and GPUs meanwhile, on the first rank of each node."""
    import ray.train

    context = ray.train.get_context()
    if context.get_local_rank():
        yield
        return
    node = f"node-{context.get_node_rank()}"
    spool = Spool(directory / f"system-{node}.jsonl")
    sampler = SystemSampler(spool, node).start()
    try:
        yield
    finally:
        sampler.stop()
        spool.close()
