"""RayCluster, RayJob and RayService for KubeRay 1.7, and the budgets of their pods. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from cluster.kubernetes import plan, pods
from cluster.kubernetes.pods import Object, Setting
from cluster.kubernetes.spec import DeploymentSpec
from cluster.work import JobWork, ServiceWork

API = "ray.io/v1"
JOB_FOLDER = "/etc/tandem/job"
"""Where the submitter finds the spec; `ray job submit` sends it on as the job's working directory."""
LARGEST_CONFIG_MAP = 900_000
"""Bytes; Kubernetes takes a mebibyte, names and all."""
KUEUE_QUEUE, KUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def ray_cluster(spec: DeploymentSpec, tracking_uri: str) -> list[Object]:
    """Return a cluster that stays, for work that is sent to it."""
    setting = Setting(spec, spec.name, spec.checkpoint_s, plan.grace_s(spec, None, None), tracking_uri)
    size = plan.Size(spec.workers.min, spec.workers.max)
    body = cluster_spec(setting, size, scales=spec.kueue is None)
    return [_object(spec, "RayCluster", spec.name, body), *budgets(spec, spec.name, size.least)]


def ray_job(spec: DeploymentSpec, job: JobWork, tracking_uri: str) -> list[Object]:
    """Return a job with a cluster of its own; the spec travels as `tandem jobs submit` would send it."""
    setting = Setting(spec, job.name, spec.checkpoint_s, plan.grace_s(spec, job, None), tracking_uri)
    size = plan.size(spec, (job.workers,))
    body: Object = {
        "entrypoint": job.entrypoint,
        "runtimeEnvYAML": yaml.safe_dump({"working_dir": JOB_FOLDER}),
        "metadata": dict(job.metadata),
        "submissionMode": "K8sJobMode",
        "backoffLimit": spec.job.retries,
        "shutdownAfterJobFinishes": spec.job.delete_cluster,
    }
    if spec.job.delete_cluster:
        body["ttlSecondsAfterFinished"] = spec.job.keep_s
    if spec.job.deadline_s:
        body["activeDeadlineSeconds"] = spec.job.deadline_s
    if spec.job.start_deadline_s:
        body["preRunningDeadlineSeconds"] = spec.job.start_deadline_s
    if spec.kueue is not None:
        body["suspend"] = True  # until Kueue lets it in
    body["submitterPodTemplate"] = _submitter(spec, job)
    body["rayClusterSpec"] = cluster_spec(setting, size, scales=spec.kueue is None)
    files = _object(spec, "ConfigMap", f"{job.name}-spec", {}, api="v1", queued=False)
    del files["spec"]
    files["data"] = {_key(path): text for path, text in sorted(job.files.items())}
    return [files, _object(spec, "RayJob", job.name, body), *budgets(spec, job.name, size.least)]


def ray_service(spec: DeploymentSpec, service: ServiceWork, tracking_uri: str) -> list[Object]:
    """Return an endpoint with a cluster of its own, which KubeRay replaces when its pods change."""
    needed, grace = plan.needed_s(spec, None, service), plan.grace_s(spec, None, service)
    setting = Setting(spec, service.name, needed, grace, tracking_uri, service.port)
    size = plan.size(spec, service.groups)
    body: Object = {
        "serveConfigV2": yaml.safe_dump(dict(service.config), sort_keys=False, width=110),
        "upgradeStrategy": _upgrade(spec),
        # The old cluster's streams may end before it goes.
        "rayClusterDeletionDelaySeconds": grace,
        "rayClusterConfig": cluster_spec(setting, size, scales=spec.kueue is None),
    }
    unready = {"unhealthyPodEvictionPolicy": "AlwaysAllow"}  # a worker without a gateway is never ready
    return [_object(spec, "RayService", service.name, body), *budgets(spec, service.name, size.least, unready)]


def cluster_spec(setting: Setting, size: plan.Size, scales: bool) -> Object:
    """Return the spec of a RayCluster."""
    setting = replace(setting, grows_to=size.most if scales else None)
    spec = setting.spec
    body: Object = {"rayVersion": spec.ray_version, "authOptions": {"mode": "token"}}
    if spec.token_secret:
        body["authOptions"]["secretName"] = spec.token_secret
    if gcs := _gcs(spec):
        body["gcsFaultToleranceOptions"] = gcs
    body["enableInTreeAutoscaling"] = scales
    if scales:
        body["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": spec.workers.idle_s,
            "upscalingMode": "Default",
            "imagePullPolicy": "IfNotPresent",
            "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "500m", "memory": "1Gi"}},
            "securityContext": pods.confined(),
        }
    body["headGroupSpec"] = pods.head(setting)
    body["workerGroupSpecs"] = [pods.workers(setting, size.least, size.most, scales)]
    return body


def budgets(spec: DeploymentSpec, owner: str, least: int, further: Mapping[str, Any] | None = None) -> list[Object]:
    """Return the budgets of an owner's pods.

    Of pods whose owner has no scale subresource Kubernetes takes minAvailable alone, and as a whole number.
    """
    wanted = {"head": spec.disruption.head, "worker": plan.pods_that_stay(spec, least)}
    found = []
    for component, stay in wanted.items():
        if stay:
            body: Object = {"minAvailable": stay, "selector": {"matchLabels": pods.labels(owner, component)}}
            body |= dict(further or {}) if component == "worker" else {}
            name = f"{owner}-{component}"
            found.append(_object(spec, "PodDisruptionBudget", name, body, api="policy/v1", queued=False))
    return found


def _gcs(spec: DeploymentSpec) -> Object | None:
    if spec.gcs is None:
        return None
    if (redis := spec.gcs.redis) is not None:
        password = {"redisPassword": _from(redis.secret, "password")} if redis.secret else {}
        return {"backend": "redis", "redisAddress": redis.address, **password}
    rocks = spec.gcs.rocksdb
    assert rocks is not None
    named = {"claimName": rocks.claim, "size": rocks.size, "storageClassName": rocks.storage_class}
    storage = {key: value for key, value in named.items() if value is not None}
    return {
        "backend": "rocksdb",
        "storage": {**storage, "deletionPolicy": "Retain" if rocks.keep or rocks.claim else "DeleteWithCluster"},
    }


def _upgrade(spec: DeploymentSpec) -> Object:
    wanted = spec.service
    if wanted.upgrade == "incremental":
        options = {
            "gatewayClassName": wanted.gateway_class,
            "maxSurgePercent": 100,
            "stepSizePercent": wanted.step_percent,
            "intervalSeconds": wanted.step_s,
        }
        return {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    return {"type": "NewCluster" if wanted.upgrade == "new-cluster" else "None"}


def _submitter(spec: DeploymentSpec, job: JobWork) -> Object:
    """Return the pod that sends the job: Ray's own command reads the files there."""
    mounts = [
        # One by one: a whole ConfigMap would be a folder of links.
        {"name": "job", "mountPath": f"{JOB_FOLDER}/{path}", "subPath": _key(path), "readOnly": True}
        for path in sorted(job.files)
    ]
    container: Object = {
        "name": "ray-job-submitter",
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": pods.resources(1, "2Gi"),
        "securityContext": pods.confined(),
        "volumeMounts": mounts,
    }
    body: Object = {
        "restartPolicy": "Never",
        "securityContext": pods.unprivileged(pods.USER),
        "containers": [container],
        "volumes": [{"name": "job", "configMap": {"name": f"{job.name}-spec"}}],
    }
    if spec.pull_secret:
        body["imagePullSecrets"] = [{"name": spec.pull_secret}]
    return {"metadata": {"labels": pods.labels(job.name, "submitter")}, "spec": body}


def _key(path: str) -> str:
    """Return a file's key in a ConfigMap, which takes no '/'."""
    return path.replace("/", "..") if "/" in path else path


def _from(secret: str, key: str) -> Object:
    return {"valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _object(spec: DeploymentSpec, kind: str, name: str, body: Object, api: str = API, *, queued: bool = True) -> Object:
    labels = {pods.INSTANCE: name if queued else spec.name, "app.kubernetes.io/part-of": "tandem"}
    if spec.kueue is not None and queued:
        labels[KUEUE_QUEUE] = spec.kueue.queue
        if spec.kueue.priority:
            labels[KUEUE_PRIORITY] = spec.kueue.priority
    metadata = {"name": name, "namespace": spec.namespace, "labels": labels}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": body}
