"""One real embedded cluster for the whole test session, and the marks that the folders stand for."""

import gc
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import home, local, precision, processes
from cluster.connect import Connection, connection
from tests.support import canaries, machine, turns

SECOND = {
    "tests/e2e/": ("test_e2e_workloads", "test_e2e_sweep", "test_e2e_predict", "test_e2e_ways"),
    "tests/faults/": ("test_faults_cluster", "test_faults_hangs", "test_faults_ownership"),
}
"""By folder, the tests of another process than the folder's others, where there are two; each has its own cluster.

Both parts take about as long. What serves is in one of them: endpoints that start together choose the same port.
"""
TOGETHER = ("tests/integration/test_tracking_", "tests/integration/test_jobs_parents")
"""What asks a server of MLflow that the tests of one process share: it takes seconds to start."""
EARLY = "tests/faults/test_faults_serving"
"""What begins with a test that must be alone: as its part's first one it need not wait for one of the other part."""
TURNS = pytest.StashKey[turns.Turns | None]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and sort: `-m "not e2e"` leaves out both end-to-end tests and fault tests."""
    items.sort(key=lambda item: not item.nodeid.startswith(EARLY))
    for item in items:
        folder = item.path.parent.name
        if folder in ("e2e", "faults", "clusters"):
            item.add_marker(pytest.mark.e2e)
        if folder in ("faults", "clusters"):
            item.add_marker(pytest.mark.faults)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while modules are imported, and never look through what they leave: both cost seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: what uses a session's cluster is one of two parts, each of which is one process's."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            for folder, names in SECOND.items():
                if nodeid.startswith(folder):
                    second = nodeid.removeprefix(folder).startswith(names)
                    return f"{folder}, the {'second' if second else 'first'} part"
            return TOGETHER[0] if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Take this process's place among those of the run."""
    config.stash[TURNS] = turns.of_run(config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Wait for the test's turn: beside those of the run's other processes, or alone."""
    place = item.config.stash[TURNS]
    if place is None:
        return (yield)
    place.enter(turns.is_alone(item))
    try:
        return (yield)
    finally:
        place.leave(turns.is_alone(nextitem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin no test after the time in TANDEM_TESTS_UNTIL, in seconds since the epoch; the last line counts those."""
    if time.time() > float(os.environ.get("TANDEM_TESTS_UNTIL") or "inf"):
        pytest.skip("the time that this run had is over")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Let torch compute in one thread: for models as small as the tests' a second one only waits, and burns a core."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End with one line that names what could not be tested on this machine."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("passed"):
        skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())]
        reporter.write_line(machine.summary(machine.lacking(precision.cpu_flags(), machine.has_gpu()), skipped))


def free_port() -> int:
    """Return a port that nobody listens on, picked by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def cluster() -> Iterator[Connection]:
    """Start a Ray head with 4 logical CPUs and MLflow in a home of their own; afterwards nothing of them is left."""
    place = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))  # short: Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(place))
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        for name, value in canaries.ENVIRONMENT.items():
            patch.setenv(name, value)
        started = local.up(cpus=4, ray_port=free_port(), dashboard_port=free_port(), mlflow_port=free_port())
        try:
            yield connection()
        finally:
            _disconnect()
            local.down(job_grace_s=5)
            left = processes.members(started.id, started.sessions, started.started_at)
            kept = canaries.holders(place, canaries.ALL)
            shutil.rmtree(place, ignore_errors=True)
    assert not left, _describe(left)
    assert not kept, "secrets that the tests used were written down"


@pytest.fixture(scope="session")
def storage(cluster: Connection) -> Path:
    """Where the cluster's jobs keep their runs."""
    return home.home() / "storage"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the specs of one module's jobs."""
    return tmp_path_factory.mktemp("specs")


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _describe(left: list[psutil.Process]) -> str:
    return f"processes left by the cluster: {[process.as_dict(['pid', 'name', 'cmdline']) for process in left]}"
