"""What runs on the cluster: submitted jobs and Serve applications."""

from dataclasses import dataclass
from typing import Any

from cluster.connect import get_json, job_client
from cluster.daemons import ENDED


@dataclass(frozen=True)
class RunningJob:
    """A submitted job that has not ended."""

    submission_id: str
    status: str
    entrypoint: str
    started_at_ms: int | None


@dataclass(frozen=True)
class ServeApplication:
    """A Serve application and how many of its replicas run."""

    name: str
    status: str
    route_prefix: str | None
    replicas: int


def running_jobs() -> list[RunningJob]:
    """List the submitted jobs that have not ended, the oldest first."""
    listed = [job for job in job_client().list_jobs() if job.submission_id and job.status not in ENDED]
    jobs = [RunningJob(job.submission_id, str(job.status), job.entrypoint, job.start_time) for job in listed]
    return sorted(jobs, key=lambda job: job.started_at_ms or 0)


def serve_applications() -> list[ServeApplication]:
    """List the Serve applications by name."""
    reported: dict[str, Any] = get_json("/api/serve/applications/").get("applications") or {}
    return [
        ServeApplication(name, details["status"], details.get("route_prefix"), _running_replicas(details))
        for name, details in sorted(reported.items())
    ]


def _running_replicas(application: dict[str, Any]) -> int:
    deployments = application.get("deployments") or {}
    return sum(
        replica["state"] == "RUNNING" for deployment in deployments.values() for replica in deployment["replicas"]
    )
