"""What schemas do not see: whether a deployment, and the job and endpoint in it, can work. Pure.

Each rule gives (key, sentence): what is wrong, and the way out. A key of the deployment's spec has its line added by
whoever tells it; those of other specs begin with `job:` or `service:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from cluster import specfile
from cluster.kubernetes import plan, syntax
from cluster.kubernetes.spec import DeploymentSpec
from cluster.redact import is_secret
from cluster.work import Group, JobWork, Place, ServiceWork

Mistake = tuple[str, str]
MANAGED = ("RAY_", "MLFLOW_TRACKING_URI", "TANDEM_", "REDIS_", "KUBERAY_", "CUDA_VISIBLE_DEVICES")
"""Variables that Ray, the operator or the manifests set."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
"""Paths of files that travel in a ConfigMap."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LEAST_OBJECT_STORE = 80 * 1024**2
"""Below this Ray's object store does not start."""


def mistakes(
    spec: DeploymentSpec, job: JobWork | None = None, service: ServiceWork | None = None, *, with_cluster: bool = False
) -> list[Mistake]:
    """List all that is wrong.

    Args:
        with_cluster: whether a RayCluster is written that belongs to neither.
    """
    found = [
        *_names(spec, job, service, with_cluster),
        *_memory(spec),
        *_gcs(spec),
        *_env(spec),
        *_grace(spec, job, service),
    ]
    found += _mlflow(spec)
    if job is not None:
        found += [*_fits(spec, "job", (job.workers,)), *_job(spec, job)]
    if service is not None:
        found += [*_fits(spec, "service", service.groups), *_service(spec, service)]
    return found


def told(mistake: Mistake, path: Path, overrides: Sequence[str], others: Mapping[str, Path | None]) -> str:
    """Return a mistake as one sentence with its file, its line where the key is given, and its key.

    Args:
        path: the deployment's spec.
        overrides: what was changed in it.
        others: the files of the job and of the service.
    """
    key, sentence = mistake
    kind, colon, inner = key.partition(": ")
    if colon:
        return f"{others.get(kind)}: `{inner}`: {sentence}"
    return f"{specfile.place(path, key, overrides)}: `{key}`: {sentence}"


def _names(
    spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None, with_cluster: bool
) -> Iterator[Mistake]:
    if wrong := syntax.wrong_name(spec.name, syntax.CLUSTER_NAME):
        yield "name", f"{spec.name}: {wrong}"
    owners = [("job: name", job.name if job else None), ("service: name", service.name if service else None)]
    taken = {spec.name: "the RayCluster"} if with_cluster else {}
    for key, name in owners:
        if name is None:
            continue
        if wrong := syntax.wrong_name(name, syntax.OWNER_NAME):
            yield key, f"{name}: {wrong}; give it another name with --set name=…"
        if name in taken:
            yield key, f"{name} is the name of {taken[name]} too, and their services would be one: change one of them"
        taken[name] = "the RayJob" if key.startswith("job") else "the RayService"


def _memory(spec: DeploymentSpec) -> Iterator[Mistake]:
    for key, pod in (("head", spec.head), ("workers", spec.workers)):
        memory, shm = syntax.quantity(pod.memory), syntax.quantity(pod.shm)
        if shm >= memory:
            yield (
                f"{key}.shm",
                f"{pod.shm} is not less than {key}.memory, {pod.memory}: what lies in /dev/shm counts as the pod's "
                "memory, which would be gone before it is full; a quarter of the memory is usual",
            )
        elif plan.object_store(pod.shm) < LEAST_OBJECT_STORE:
            yield f"{key}.shm", f"{pod.shm} is too little for Ray's object store: 256Mi is the least"


def _gcs(spec: DeploymentSpec) -> Iterator[Mistake]:
    if spec.gcs and spec.gcs.redis and not spec.gcs.redis.address:
        yield "gcs.redis.address", "is left out: name your Redis as host:port, or use gcs.rocksdb"
    if spec.gcs and spec.gcs.rocksdb and not (spec.gcs.rocksdb.claim or spec.gcs.rocksdb.size):
        yield (
            "gcs.rocksdb",
            "has no volume: name an existing claim (ReadWriteOnce) as `claim`, or the size of a new one as `size`",
        )
    if spec.gcs and spec.gcs.rocksdb and _is_shared(spec, spec.gcs.rocksdb.claim):
        yield (
            "gcs.rocksdb.claim",
            f"{spec.gcs.rocksdb.claim} is the shared storage: RocksDB has one writer, so give it a claim of its own",
        )


def _is_shared(spec: DeploymentSpec, claim: str | None) -> bool:
    return bool(claim and spec.storage and spec.storage.claim and spec.storage.claim.name == claim)


def _env(spec: DeploymentSpec) -> Iterator[Mistake]:
    for name, value in spec.env.items():
        if is_secret(name) or syntax.looks_secret(value):
            yield (
                f"env.{name}",
                "is a secret in a file that others read: create a Secret with this key, and list its name in `secrets`",
            )
        elif name.startswith(MANAGED):
            yield f"env.{name}", "is set by Ray, KubeRay or this command: leave it out"


def _grace(spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None) -> Iterator[Mistake]:
    if spec.grace_s is None:
        return
    why = {"job": f"checkpoint_s, {spec.checkpoint_s} s"}
    if service is not None:
        why["service"] = f"drain_s of the endpoint and what ends a replica, {service.drain_s:g} s"
    for kind, what in why.items():
        needed = plan.needed_s(spec, job, service if kind == "service" else None)
        if spec.grace_s <= needed:
            yield (
                "grace_s",
                f"{spec.grace_s} is not above {what}: pods would be killed before their work has ended; leave it out, "
                f"or set it to {needed + plan.MARGIN_S}",
            )


def _mlflow(spec: DeploymentSpec) -> Iterator[Mistake]:
    given = spec.mlflow.model_fields_set
    if "uri" in given and spec.mlflow.uri and (also := sorted(given - {"uri"})):
        yield f"mlflow.{also[0]}", "is of a server that is made, and mlflow.uri names one of your own: keep one of them"
    if spec.mlflow.uri and (urlsplit(spec.mlflow.uri).hostname or "") in LOOPBACK:
        yield "mlflow.uri", f"{spec.mlflow.uri} is each pod's own loopback: name an address that pods reach"


def _fits(spec: DeploymentSpec, kind: str, groups: Iterable[Group]) -> Iterator[Mistake]:
    """Refuse work that the largest cluster could not hold: Ray and KubeRay would wait for ever."""
    too_large = False
    for group in groups:
        if plan.in_a_pod(spec, group) < 1:
            too_large = True
            yield (
                "workers",
                f"a pod has {spec.workers.cpus} CPUs and {spec.workers.gpus} GPUs, and one process of {kind}: "
                f"{group.key} takes {group.cpus:g} CPUs and {group.gpus:g} GPUs: raise workers.cpus or workers.gpus, "
                "or ask for less",
            )
    needed = 0 if too_large else plan.pods_for(spec, groups)
    if needed > spec.workers.max:
        yield (
            "workers.max",
            f"{spec.workers.max} pods cannot hold what {kind}: {', '.join(group.key for group in groups)} asks for: "
            f"raise it to {needed}, or ask for less",
        )


def _job(spec: DeploymentSpec, job: JobWork) -> Iterator[Mistake]:
    yield from _places(spec, "job", job.places)
    for path in job.files:
        if not PLAIN.fullmatch(path):
            yield (
                "job: its files",
                f"{path!r} cannot be a key of a ConfigMap: rename it to letters, digits, '-', '_', '.'",
            )
    yield from _queue(spec)
    yield from _retries(spec, job)
    if spec.storage is None and spec.workers.max > 1:
        yield (
            "storage",
            "is left out, and the pods of a job need one place that all of them reach: name a claim or a store, or set "
            "workers.max to 1 for a try",
        )
    if spec.job.keep_s and not spec.job.delete_cluster:
        yield "job.keep_s", "has no effect with delete_cluster: false, and KubeRay refuses it: leave it out"


def _queue(spec: DeploymentSpec) -> Iterator[Mistake]:
    if spec.kueue is not None and not spec.job.delete_cluster:
        yield (
            "job.delete_cluster",
            "must be true with `kueue`: a job waits in its queue suspended, which KubeRay takes only where the cluster "
            "goes with its job; leave it out, or leave kueue out",
        )


def _retries(spec: DeploymentSpec, job: JobWork) -> Iterator[Mistake]:
    if not spec.job.retries:
        return
    if spec.storage is None:
        yield (
            "job.retries",
            f"{spec.job.retries} retries have new pods, and without `storage` what is saved goes with the old ones: "
            "name a claim or a store, or set retries to 0",
        )
    if job.trains and not job.resumes:
        yield (
            "job.retries",
            "and the job's checkpoint.resume: never do not go together: each retry would begin anew; leave one of them "
            "out",
        )
    elif job.trains and job.saves_every_steps is None:
        yield (
            "job.retries",
            "and the job's checkpoint.every_steps, which is left out: a lost cluster leaves no checkpoint to go on "
            "from; set checkpoint.every_steps, or retries to 0",
        )


def _service(spec: DeploymentSpec, service: ServiceWork) -> Iterator[Mistake]:
    yield from _places(spec, "service", service.places)
    if spec.service.upgrade == "incremental" and spec.service.gateway_class is None:
        yield (
            "service.gateway_class",
            "is left out, and upgrade: incremental shifts traffic by a gateway: name its class, or use new-cluster",
        )
    if spec.service.upgrade != "incremental" and spec.service.gateway_class is not None:
        yield "service.gateway_class", "has an effect with upgrade: incremental only: leave it out"
    if spec.service.upgrade == "incremental" and spec.kueue is not None:
        yield "service.upgrade", "incremental needs the autoscaler, which is off with `kueue`: use new-cluster"


def _places(spec: DeploymentSpec, kind: str, places: Iterable[Place]) -> Iterator[Mistake]:
    """Refuse paths that pods would not find, or would lose."""
    for place in places:
        if "://" in place.where or _is_below(place.where, spec.mount):
            continue
        lost = "would be written to the pod's own disk, and lost with it" if place.written else "is not in the pods"
        on_claim = f"a path below {spec.mount}"
        way_out = on_claim if spec.mount else "a URI (s3://…), or give `storage` a claim and use a path on it"
        yield f"{kind}: {place.key}", f"{place.where} {lost}: use {way_out}"


def _is_below(path: str, mount: str | None) -> bool:
    return mount is not None and (path == mount or path.startswith(f"{mount}/")) and ".." not in path.split("/")
