"""What KubeRay 1.7 refuses in an object that its schemas take, found before `kubectl apply`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.kubernetes import syntax
from cluster.ray_process_internals import GCS_STORAGE, GCS_STORAGE_PATH

Object = dict[str, Any]
LONGEST = {"RayCluster": syntax.CLUSTER_NAME, "RayJob": syntax.OWNER_NAME, "RayService": syntax.OWNER_NAME}
OLDEST_WITH_TOKEN = (2, 52, 0)
MANAGED_BY_ROCKSDB = (GCS_STORAGE, GCS_STORAGE_PATH)
QUEUE = "kueue.x-k8s.io/queue-name"


def clusters(each: Object) -> Iterator[tuple[str, Object]]:
    """Yield the spec of the RayCluster that an object is or has, with its place."""
    spec = each.get("spec") or {}
    if each.get("kind") == "RayCluster":
        yield "", spec
    for key in ("rayClusterSpec", "rayClusterConfig"):
        if key in spec:
            yield f"{key}.", spec[key]


def groups(cluster: Object) -> Iterator[tuple[str, Object]]:
    """Yield the head's group and those of workers, with their names."""
    yield "headGroupSpec", cluster.get("headGroupSpec") or {}
    for group in cluster.get("workerGroupSpecs") or []:
        yield f"workerGroupSpecs[{group.get('groupName')}]", group


def findings(each: Object) -> Iterator[str]:
    """Yield what is wrong with a RayCluster, RayJob or RayService; nothing for other kinds."""
    kind, name = each.get("kind"), str(each.get("metadata", {}).get("name", ""))
    if kind in LONGEST and (wrong := syntax.wrong_name(name, LONGEST[kind])):
        yield f"metadata.name {wrong}"
    for place, cluster in clusters(each):
        for sentence in _cluster(cluster):
            yield f"{place}{sentence}"
    if kind == "RayJob":
        yield from _job(each)
    if kind == "RayService":
        yield from _service(each)


def _cluster(cluster: Object) -> Iterator[str]:
    yield from _token(cluster)
    yield from _gcs(cluster)
    yield from _scaling(cluster)
    for name, group in groups(cluster):
        containers = group.get("template", {}).get("spec", {}).get("containers") or []
        if not containers:
            yield f"{name} has no container"
        if name == "headGroupSpec":
            continue
        least, now, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not 0 <= least <= now <= most:
            yield f"{name}: minReplicas {least}, replicas {now} and maxReplicas {most} are not in order"


def _token(cluster: Object) -> Iterator[str]:
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the dashboard's port could run code"
        return
    parts = str(cluster.get("rayVersion", "")).split(".")
    if not all(part.isdigit() for part in parts):
        yield "rayVersion is missing or no version, and authOptions.mode: token needs it"
    elif tuple(map(int, parts)) < OLDEST_WITH_TOKEN:
        yield f"rayVersion {cluster['rayVersion']} is below 2.52.0, the first with authOptions.mode: token"


def _gcs(cluster: Object) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    storage = options.get("storage")
    if options.get("backend", "redis") == "redis":
        if not options.get("redisAddress"):
            yield "gcsFaultToleranceOptions.redisAddress is missing"
        if storage is not None:
            yield "gcsFaultToleranceOptions.storage is for the backend rocksdb"
        return
    if storage is None:
        yield "gcsFaultToleranceOptions.storage is missing"
    elif storage.get("claimName") and {"size", "storageClassName", "accessModes"} & storage.keys():
        yield "gcsFaultToleranceOptions.storage: claimName goes without size, storageClassName and accessModes"
    for key in ("redisAddress", "redisPassword", "redisUsername", "externalStorageNamespace"):
        if options.get(key):
            yield f"gcsFaultToleranceOptions.{key} is for the backend redis"
    for container in cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("containers", []):
        for variable in container.get("env", []):
            if variable["name"] in MANAGED_BY_ROCKSDB:
                yield f"env {variable['name']} is set by KubeRay for the backend rocksdb"


def _scaling(cluster: Object) -> Iterator[str]:
    options = cluster.get("autoscalerOptions") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        if options:
            yield "autoscalerOptions has no effect without enableInTreeAutoscaling"
        return
    if options.get("version") != "v2":
        yield "autoscalerOptions.version is not v2"
        return
    for name, group in groups(cluster):
        policy = group.get("template", {}).get("spec", {}).get("restartPolicy", "Never")
        if policy != "Never":
            yield f"{name}: restartPolicy {policy} does not go with autoscaler v2: Never"


def _job(each: Object) -> Iterator[str]:
    spec = each.get("spec") or {}
    if not spec.get("entrypoint"):
        yield "entrypoint is missing"
    queued = QUEUE in (each.get("metadata", {}).get("labels") or {})
    if queued and not spec.get("suspend"):
        yield f"has the label {QUEUE} without suspend: true, so that it would begin before Kueue lets it"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend: true goes with shutdownAfterJobFinishes: true only"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished goes with shutdownAfterJobFinishes: true only"


def _service(each: Object) -> Iterator[str]:
    spec = each.get("spec") or {}
    strategy, cluster = spec.get("upgradeStrategy") or {}, spec.get("rayClusterConfig") or {}
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        if not (strategy.get("clusterUpgradeOptions") or {}).get("gatewayClassName"):
            yield "upgradeStrategy: NewClusterWithIncrementalUpgrade needs clusterUpgradeOptions.gatewayClassName"
        if not cluster.get("enableInTreeAutoscaling"):
            yield "upgradeStrategy: NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling"
    head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("containers") or [{}]
    if "serve" not in {port["name"] for port in head[0].get("ports", [])}:
        yield "the head has no port named serve, by which KubeRay makes the endpoint's Service"
    if not spec.get("serveConfigV2"):
        yield "serveConfigV2 is missing"
