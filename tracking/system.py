"""Sample a node's CPU, memory, disk, network and GPUs into a spool, under MLflow's own names for system metrics."""

import importlib.util
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracking.spool import Spool

MEGABYTE = 1e6

logger = logging.getLogger(__name__)


class SystemSampler:
    """Append one record every `interval_s` seconds (1 or more) from a daemon thread.

    Keys are `system/<node>/cpu_utilization_percentage` and so on, so that the nodes of a run do not overwrite each
    other. The step is the wall clock in whole seconds: it rises through restarts, where a counter would start again.
    """

    def __init__(self, spool: Spool, node: str, interval_s: float = 5.0, disk: Path = Path("/")) -> None:
        self._spool = spool
        self._node = node
        self._interval_s = interval_s
        self._disk = disk
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tandem-system-sampler", daemon=True)

    def start(self) -> "SystemSampler":
        """Start the thread and return."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; the spool stays open."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        probe = Probe(self._disk)
        with gpu_handles() as gpus:
            while not self._stopping.wait(self._interval_s):
                sample = {**probe.sample(), **gpu_sample(gpus)}
                now = time.time()
                metrics = {f"system/{self._node}/{key}": value for key, value in sample.items()}
                self._spool.append(int(now), metrics, int(now * 1000))


class Probe:
    """Read this node's CPU, memory, disk and network; network counts from the construction on."""

    def __init__(self, disk: Path) -> None:
        import psutil

        self._psutil = psutil
        self._disk = str(disk)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call only sets the start of the interval

    def sample(self) -> dict[str, float]:
        """Return the values now; percentages of CPU are over the time since the last sample."""
        memory = self._psutil.virtual_memory()
        disk = self._psutil.disk_usage(self._disk)
        network = self._psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
        }


@contextmanager
def gpu_handles() -> Iterator[list[Any]]:
    """Yield NVML's handles of the node's GPUs: none without nvidia-ml-py or without a driver."""
    if importlib.util.find_spec("pynvml") is None:
        yield []
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no GPU metrics: %s", error)
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def gpu_sample(handles: list[Any]) -> dict[str, float]:
    """Return memory, utilisation and power of each GPU; a value that a GPU does not give is left out."""
    values: dict[str, float] = {}
    for index, handle in enumerate(handles):
        for name, value in _readings(handle):
            values[f"gpu_{index}_{name}"] = value
    return values


def _readings(handle: Any) -> Iterator[tuple[str, float]]:
    import pynvml

    def attempt(name: str, *arguments: Any) -> Any | None:
        try:
            return getattr(pynvml, name)(handle, *arguments)
        except pynvml.NVMLError:  # for example a MIG slice, which has no utilisation of its own
            return None

    if memory := attempt("nvmlDeviceGetMemoryInfo"):
        yield "memory_usage_megabytes", memory.used / MEGABYTE
        yield "memory_usage_percentage", 100 * memory.used / memory.total
    if utilization := attempt("nvmlDeviceGetUtilizationRates"):
        yield "utilization_percentage", float(utilization.gpu)
    if (milliwatts := attempt("nvmlDeviceGetPowerUsage")) is not None:
        yield "power_usage_watts", milliwatts / 1000
        if limit := attempt("nvmlDeviceGetEnforcedPowerLimit"):
            yield "power_usage_percentage", 100 * milliwatts / limit
