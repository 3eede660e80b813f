"""Run a spec's worker group on the running cluster, with no metrics sent to MLflow; print the run's folder."""

import sys
from pathlib import Path

from rival import precision_here

from cluster import connect, home, specfile
from jobs.claim import claim
from jobs.data import prepare
from jobs.driver import phases, warm
from jobs.driver.job import Job
from jobs.driver.stopping import Stop
from jobs.spec import JobSpec
from jobs.worker import loop


def main() -> None:
    """Do what the driver does, less tracking."""
    path = Path(sys.argv[1])
    spec = specfile.load(path, JobSpec)
    connect.init_ray(runtime_env=connect.runtime_env(env_vars=warm.environment(spec)))
    storage = home.home() / "storage"
    folder, _ = claim(storage, spec)
    precision, stop = precision_here(), Stop(folder, trains=True)
    job = Job(spec, path.parent, storage, folder, None, None, {}, precision, stop)  # type: ignore[arg-type]  # no sender
    prepared = prepare.prepare(spec, path.parent, storage, parent=None, on_progress=lambda *event: None)
    phases.run_workers(job, loop.train_worker, prepared)
    folder.write_status("FINISHED")
    print(folder.path)


if __name__ == "__main__":
    main()
