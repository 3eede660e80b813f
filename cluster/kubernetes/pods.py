"""The pods of a Ray cluster: head and workers. Pure: plain data in, plain data out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.growth import VARIABLE as NODE_TYPES
from cluster.kubernetes import plan
from cluster.kubernetes.spec import DeploymentSpec, HeadSpec, WorkersSpec
from cluster.ray_process_internals import HEAD_SETTINGS, STOP_WAIT

Object = dict[str, Any]

USER = 1000
"""The user of the images (cluster/images)."""
HOME = "/home/tandem"
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
DASHBOARD, CLIENT, GCS, METRICS = 8265, 10001, 6379, 8080
HEALTH = ("python", "-m", "cluster.kubernetes.health")
LEAVE = ("python", "-m", "cluster.kubernetes.leave")


@dataclass(frozen=True)
class Setting:
    """What all pods of one cluster have in common."""

    spec: DeploymentSpec
    owner: str
    """The RayCluster, RayJob or RayService."""
    needed_s: int
    grace_s: int
    tracking_uri: str
    serve_port: int | None = None
    """Where gateways listen; None: nothing is served."""
    grows_to: int | None = None
    """So many workers KubeRay's autoscaler may start; None: it changes nothing."""


def head(setting: Setting) -> Object:
    """Return the head's group: drivers, the GCS, the dashboard and gateways; no CPUs for other work."""
    ports = [("gcs", GCS), ("dashboard", DASHBOARD), ("client", CLIENT), ("metrics", METRICS)]
    ports += [("serve", setting.serve_port)] if setting.serve_port else []
    container = _container(setting, "ray-head", setting.spec.head, [], ports)
    params = {"dashboard-host": "0.0.0.0", "num-cpus": "0", **_params(setting.spec.head)}
    return {"rayStartParams": params, "template": _pod(setting, "head", container, setting.spec.head)}


def workers(setting: Setting, least: int, most: int, scales: bool) -> Object:
    """Return the group of workers.

    Args:
        scales: whether KubeRay's autoscaler changes their number.
    """
    wanted = setting.spec.workers
    container = _container(setting, "ray-worker", wanted, _gpus(wanted), _worker_ports(setting))
    pod = _pod(setting, "worker", container, wanted)
    pod["spec"]["automountServiceAccountToken"] = False
    if wanted.gpus:
        pod["spec"]["tolerations"] = [{"key": wanted.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    if wanted.priority_class:
        pod["spec"]["priorityClassName"] = wanted.priority_class
    bounds = {"replicas": least, "minReplicas": least, "maxReplicas": most if scales else least}
    return {"groupName": "workers", **bounds, "rayStartParams": _params(wanted), "template": pod}


def environment(setting: Setting) -> list[Object]:
    """Return the variables of every Ray container."""
    spec = setting.spec
    plain = {
        **HEAD_SETTINGS,
        STOP_WAIT: str(spec.checkpoint_s),
        "MLFLOW_TRACKING_URI": setting.tracking_uri,
        "TANDEM_HOME": f"{spec.mount}/tandem" if spec.mount else f"{HOME}/.tandem",
        **spec.env,
    }
    if setting.grows_to is not None:
        each = {"CPU": spec.workers.cpus, **({"GPU": spec.workers.gpus} if spec.workers.gpus else {})}
        plain[NODE_TYPES] = json.dumps({"workers": {"resources": each, "max_workers": setting.grows_to}})
    if spec.storage and spec.storage.store:
        plain["TANDEM_STORAGE"] = spec.storage.store.uri
    return [{"name": name, "value": value} for name, value in plain.items()]


def secrets(spec: DeploymentSpec) -> list[Object]:
    """Return the references to Secrets whose keys become variables."""
    store = spec.storage.store.secret if spec.storage and spec.storage.store else None
    return [{"secretRef": {"name": name}} for name in dict.fromkeys([*spec.secrets, *([store] if store else [])])]


def resources(cpus: int, memory: str, further: Mapping[str, int] | None = None) -> Object:
    """Return what a container gets: as much as it may use, so that nothing is taken from it later."""
    amounts = {"cpu": str(cpus), "memory": memory, **{name: str(count) for name, count in (further or {}).items()}}
    return {"requests": dict(amounts), "limits": dict(amounts)}


def unprivileged(user: int) -> Object:
    """Return a pod's securityContext."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def confined() -> Object:
    """Return a container's securityContext."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _params(pod: HeadSpec | WorkersSpec) -> dict[str, str]:
    return {"object-store-memory": str(plan.object_store(pod.shm))}


def _gpus(wanted: WorkersSpec) -> list[tuple[str, int]]:
    return [(wanted.gpu_resource, wanted.gpus)] if wanted.gpus else []


def _worker_ports(setting: Setting) -> list[tuple[str, int]]:
    return [("metrics", METRICS), *([("serve", setting.serve_port)] if setting.serve_port else [])]


def _container(
    setting: Setting,
    name: str,
    pod: HeadSpec | WorkersSpec,
    devices: Sequence[tuple[str, int]],
    ports: Sequence[tuple[str, int]],
) -> Object:
    spec, is_head = setting.spec, name == "ray-head"
    env = environment(setting)
    if not devices:  # without a GPU of its own, the NVIDIA runtime would show a pod all of the node's
        env.append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"})
    container: Object = {
        "name": name,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "env": env,
        "ports": [{"name": port, "containerPort": number} for port, number in ports],
        "resources": resources(pod.cpus, pod.memory, dict(devices)),
        "securityContext": confined(),
        "volumeMounts": _mounts(spec),
        **_probes(setting, is_head),
        "lifecycle": {"preStop": {"exec": {"command": [*LEAVE, "--seconds", str(setting.needed_s)]}}},
    }
    if is_head:
        container["lifecycle"]["preStop"]["exec"]["command"].append("--head")
    if from_secrets := secrets(spec):
        container["envFrom"] = from_secrets
    return container


def _probes(setting: Setting, is_head: bool) -> Object:
    """Return the probes of a Ray container.

    A head is ready without Serve: KubeRay sends the Serve config to a ready head only, and puts its label on a head
    whose gateway answers. A worker takes requests as soon as it is ready, so there the gateway counts.
    """
    common = [*HEALTH, *(["--head"] if is_head else [])]
    live = [*common, *(["--serve-if-listening", str(setting.serve_port)] if setting.serve_port else [])]
    ready = [*common, *(["--serve", str(setting.serve_port)] if setting.serve_port and not is_head else [])]
    return {
        "startupProbe": _probe(common, period=5, failures=60),
        "livenessProbe": _probe(live, period=10, failures=12),
        "readinessProbe": _probe(ready, period=5, failures=2 if setting.serve_port else 10),
    }


def _probe(command: Sequence[str], period: int, failures: int) -> Object:
    return {
        "exec": {"command": list(command)},
        "periodSeconds": period,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }


def _mounts(spec: DeploymentSpec) -> list[Object]:
    mounts = [{"name": "shared-mem", "mountPath": "/dev/shm"}]
    place = spec.mount or f"{HOME}/.tandem"
    return [*mounts, {"name": "storage", "mountPath": place}]


def _volumes(spec: DeploymentSpec, shm: str) -> list[Object]:
    memory = {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}
    if spec.storage and spec.storage.claim:
        claim = spec.storage.claim.name or f"{spec.name}-storage"
        return [memory, {"name": "storage", "persistentVolumeClaim": {"claimName": claim}}]
    return [memory, {"name": "storage", "emptyDir": {}}]


def _pod(setting: Setting, component: str, container: Object, pod: HeadSpec | WorkersSpec) -> Object:
    spec = setting.spec
    body: Object = {
        "restartPolicy": "Never",  # autoscaler v2 and KubeRay replace a pod that has ended
        "terminationGracePeriodSeconds": setting.grace_s,
        "securityContext": unprivileged(USER),
        "containers": [container],
        "volumes": _volumes(spec, pod.shm),
    }
    if pod.node_selector:
        body["nodeSelector"] = dict(pod.node_selector)
    if spec.pull_secret:
        body["imagePullSecrets"] = [{"name": spec.pull_secret}]
    return {"metadata": {"labels": labels(setting.owner, component)}, "spec": body}


def labels(owner: str, component: str) -> dict[str, str]:
    """Return the labels by which budgets and policies find pods: the names of KubeRay's clusters are made up."""
    return {INSTANCE: owner, COMPONENT: component}
