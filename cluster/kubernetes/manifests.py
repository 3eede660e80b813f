"""A deployment's spec, and the job and endpoint in it → files of manifests, checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.errors import UserError
from cluster.kubernetes import beside, output, plan, pods, ray_objects, shape
from cluster.kubernetes.pods import Object
from cluster.kubernetes.spec import DeploymentSpec
from cluster.work import JobWork, ServiceWork

CLUSTER, JOB, SERVICE = "raycluster.yaml", "rayjob.yaml", "rayservice.yaml"
HEADS = {
    "storage.yaml": "The volume that all pods share. Apply it first; it holds data, checkpoints and models.",
    "mlflow.yaml": "MLflow and its PostgreSQL.",
    CLUSTER: "A Ray cluster that stays.",
    JOB: "A job with a cluster of its own.",
    SERVICE: "An endpoint with a cluster of its own.",
    "network.yaml": "Who may reach which port. It acts where the cluster's network plugin knows NetworkPolicy.",
}


def build(
    spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None, *, with_cluster: bool
) -> dict[str, str]:
    """Return the files by name, in the order in which they are applied.

    Args:
        with_cluster: whether a RayCluster is written that belongs to no job or endpoint.
    """
    made = objects(spec, job, service, with_cluster=with_cluster)
    remarks = _remarks(spec, job, service)
    return {
        name: output.file(_head(spec, name), [output.document(each, remarks.get(each["kind"], {})) for each in found])
        for name, found in made.items()
        if found
    }


def objects(
    spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None, *, with_cluster: bool
) -> dict[str, list[Object]]:
    """Return the objects by file.

    Raises:
        UserError: they do not fit together, which is a defect of Tandem's.
    """
    uri = beside.tracking_uri(spec)
    owners = [spec.name] * with_cluster + [work.name for work in (job, service) if work is not None]
    made = {
        "storage.yaml": beside.storage(spec),
        "mlflow.yaml": beside.tracking(spec),
        CLUSTER: ray_objects.ray_cluster(spec, uri) if with_cluster else [],
        JOB: ray_objects.ray_job(spec, job, uri) if job else [],
        SERVICE: ray_objects.ray_service(spec, service, uri) if service else [],
        "network.yaml": _policies(spec, owners, service),
    }
    existing = [name for name in _claims(spec) if name]
    if wrong := shape.findings([each for found in made.values() for each in found], existing):
        raise UserError("\n".join(["a defect of Tandem's, please report it with your spec:", *wrong]))
    return made


def told(spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None) -> list[str]:
    """Return what somebody who applies the files has to know: what was chosen, and what must be there before."""
    found = list(service.said if service else ())
    for kind, groups in (("job", (job.workers,) if job else ()), ("endpoint", service.groups if service else ())):
        size = plan.size(spec, groups)
        if groups and size.least > spec.workers.min:
            found.append(f"the {kind} begins with {size.least} worker pods, so many are always there for it")
    if job is None and service is None and spec.workers.min == 0:
        found.append(
            "workers.min: 0: a job is refused while the pods that hold it are not there; set min, or use --job"
        )
    if service is not None and spec.service.upgrade == "incremental":
        found.append("service.upgrade: name the namespace of the gateway in network.clients")
    if spec.kueue is not None:
        found.append("kueue: the number of worker pods is fixed, since Kueue counts what a cluster asks for at once")
    if spec.mlflow.uri is None:
        name = beside.password_secret(spec)
        found.append(
            f"before: kubectl -n {spec.namespace} create secret generic {name} "
            '--from-literal=password="$(openssl rand -hex 24)"'
        )
    wanted = [*spec.secrets, *(each["secretRef"]["name"] for each in pods.secrets(spec)), spec.pull_secret]
    wanted += [spec.token_secret, spec.gcs.redis.secret if spec.gcs and spec.gcs.redis else None]
    if names := list(dict.fromkeys(name for name in wanted if name)):
        found.append(f"before: these Secrets must be in namespace {spec.namespace}: {', '.join(names)}")
    if spec.gcs and spec.gcs.rocksdb:
        found.append("before: KubeRay's operator needs --feature-gates=GCSFaultToleranceEmbeddedStorage=true (alpha)")
    if job and spec.gcs and spec.job.retries:
        found.append("gcs: a retry is a new cluster, which does not go on with the old one's state; checkpoints do")
    if spec.storage is None:
        found.append("storage is left out: what pods write is lost with them")
    return found


def _policies(spec: DeploymentSpec, owners: Sequence[str], service: ServiceWork | None) -> list[Object]:
    found = []
    for owner in owners:
        port = service.port if service and owner == service.name else None
        found += [each for each in beside.policies(spec, [owner], port) if each["metadata"]["name"] == f"{owner}-ray"]
    beyond = [each for each in beside.policies(spec, owners, None) if not each["metadata"]["name"].endswith("-ray")]
    return [*found, *beyond]


def _claims(spec: DeploymentSpec) -> list[str | None]:
    return [
        spec.storage.claim.name if spec.storage and spec.storage.claim else None,
        spec.gcs.rocksdb.claim if spec.gcs and spec.gcs.rocksdb else None,
    ]


def _head(spec: DeploymentSpec, name: str) -> str:
    lines = [HEADS[name], "Made by `tandem cluster manifests`: change the spec and make it again, not this file."]
    if name == "mlflow.yaml":
        lines.append(f"The Secret {beside.password_secret(spec)} (key: password) must be there before.")
    if name in (CLUSTER, JOB, SERVICE):
        lines.append("KubeRay 1.7 or later.")
        if spec.gcs and spec.gcs.rocksdb:
            lines.append("The operator needs --feature-gates=GCSFaultToleranceEmbeddedStorage=true (alpha).")
    return "\n".join(lines)


def _remarks(spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None) -> Mapping[str, dict[str, str]]:
    """Return what is said beside keys about which a person decides, by kind and path."""
    found = {kind: _of_cluster(place) for kind, place in PLACES.items()}
    found["PersistentVolumeClaim"] = {
        "spec.accessModes": "Pods on several nodes write here: the storage class must be able to (NFS, EFS, CephFS)."
    }
    found["PodDisruptionBudget"] = {
        "spec.minAvailable": "A node's drain waits while fewer would be left; delete the pod by hand if it has to go.",
        "spec.unhealthyPodEvictionPolicy": "A worker without a gateway is never Ready, so that no request gets there.",
    }
    found["StatefulSet"] = {"spec.replicas": "One server: back its volume up."}
    if service is not None:
        found["RayService"]["spec.rayClusterDeletionDelaySeconds"] = "So long the streams of an old cluster may take."
    if job is not None:
        found["RayJob"]["spec.backoffLimit"] = "Each retry is a new cluster, which goes on from the newest checkpoint."
        found["RayJob"]["spec.suspend"] = "Kueue starts it."
    return found


PLACES = {"RayCluster": "spec.", "RayJob": "spec.rayClusterSpec.", "RayService": "spec.rayClusterConfig."}


def _of_cluster(place: str) -> dict[str, str]:
    grace = "A checkpoint, or the streams of an endpoint, and half a minute."
    return {
        f"{place}rayVersion": "The image's; KubeRay decides by it, and token authentication needs it.",
        f"{place}headGroupSpec.template.spec.terminationGracePeriodSeconds": grace,
        f"{place}workerGroupSpecs.0.template.spec.terminationGracePeriodSeconds": grace,
    }
