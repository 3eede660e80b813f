"""Whether finished objects fit together, which no schema sees: selectors, ports, volumes, secrets. Pure.

Asked of everything before it is written. A finding is a defect of the builders, or of a file that somebody changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from cluster.kubernetes import ray_shape, syntax
from cluster.redact import is_secret

Object = dict[str, Any]
APIS = {
    "ConfigMap": "v1", "Deployment": "apps/v1", "NetworkPolicy": "networking.k8s.io/v1",
    "PersistentVolumeClaim": "v1", "PodDisruptionBudget": "policy/v1", "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1",
    "RayService": "ray.io/v1", "Service": "v1", "StatefulSet": "apps/v1",
}  # fmt: skip
LONGEST_PORT_NAME = 15


def findings(objects: Sequence[Object], existing: Sequence[str] = ()) -> list[str]:
    """List what is wrong.

    Args:
        existing: names of claims that are in the cluster already.
    """
    found: list[str] = []
    for each in objects:
        where = f"{each.get('kind')} {each.get('metadata', {}).get('name')}"
        for sentence in (*_header(each), *_body(each, objects), *ray_shape.findings(each)):
            found.append(f"{where}: {sentence}")
        for place, template in templates(each):
            for sentence in _pod(template, objects, existing):
                found.append(f"{where}: {place}: {sentence}")
    seen = [(each.get("kind"), each.get("metadata", {}).get("name")) for each in objects]
    return found + [
        f"{kind} {name} is there twice" for kind, name in dict.fromkeys(seen) if seen.count((kind, name)) > 1
    ]


def templates(each: Object) -> Iterator[tuple[str, Object]]:
    """Yield the templates of the pods that an object makes, with their places."""
    spec = each.get("spec") or {}
    if each.get("kind") in ("Deployment", "StatefulSet"):
        yield "template", spec.get("template", {})
    for place, cluster in ray_shape.clusters(each):
        for name, group in ray_shape.groups(cluster):
            yield f"{place}{name}.template", group.get("template", {})
    if "submitterPodTemplate" in spec:
        yield "submitterPodTemplate", spec["submitterPodTemplate"]


def _header(each: Object) -> Iterator[str]:
    kind, metadata = each.get("kind"), each.get("metadata") or {}
    if kind not in APIS:
        yield f"the kind {kind} is none that is written"
    elif each.get("apiVersion") != APIS[kind]:
        yield f"apiVersion must be {APIS[kind]}, not {each.get('apiVersion')}"
    if wrong := syntax.wrong_subdomain(str(metadata.get("name", ""))):
        yield f"metadata.name {wrong}"
    if kind == "Service" and (wrong := syntax.wrong_name(str(metadata.get("name", "")))):
        yield f"metadata.name {wrong}"
    if not metadata.get("namespace"):
        yield "metadata.namespace is missing"
    yield from _labels(metadata.get("labels") or {})


def _labels(labels: Mapping[str, str]) -> Iterator[str]:
    for key, value in labels.items():
        if wrong := syntax.wrong_label_key(key) or syntax.wrong_label_value(str(value)):
            yield f"label {key}: {value}: {wrong}"


def _body(each: Object, objects: Sequence[Object]) -> Iterator[str]:
    spec, kind = each.get("spec") or {}, each.get("kind")
    if kind in ("Deployment", "StatefulSet"):
        own = spec.get("template", {}).get("metadata", {}).get("labels", {})
        if not selects(spec.get("selector") or {}, own) or not spec.get("selector"):
            yield "selector does not match the labels of its own template"
    if kind == "StatefulSet" and not _named(objects, "Service", spec.get("serviceName")):
        yield f"serviceName {spec.get('serviceName')} is no Service here"
    if kind == "Service":
        yield from _service(spec, objects)
    if kind == "PodDisruptionBudget":
        yield from _budget(spec, objects)
    if kind == "NetworkPolicy" and not _selected(spec.get("podSelector") or {}, objects):
        yield "podSelector matches no pod here"
    if kind == "PersistentVolumeClaim" and not _storage(spec):
        yield "resources.requests.storage is missing"


def _service(spec: Object, objects: Sequence[Object]) -> Iterator[str]:
    found = _selected({"matchLabels": spec.get("selector") or {}}, objects) if spec.get("selector") else []
    if not found:
        yield "selector matches no pod here"
    ports = {p["name"] for pod in found for c in pod["spec"]["containers"] for p in c.get("ports", [])}
    for port in spec.get("ports") or [{}]:
        target = port.get("targetPort", port.get("port"))
        if found and isinstance(target, str) and target not in ports:
            yield f"targetPort {target} is no port of the pods"


def _budget(spec: Object, objects: Sequence[Object]) -> Iterator[str]:
    if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
        yield "takes minAvailable as a whole number: KubeRay's pods have an owner without a scale subresource"
    if not _selected(spec.get("selector") or {}, objects):
        yield "selector matches no pod here"


def _storage(spec: Object) -> Any:
    return spec.get("resources", {}).get("requests", {}).get("storage")


def _pod(template: Object, objects: Sequence[Object], existing: Sequence[str]) -> Iterator[str]:
    spec = template.get("spec") or {}
    yield from _labels(template.get("metadata", {}).get("labels") or {})
    security = spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "securityContext.runAsNonRoot and a user other than 0 are missing"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for volume in volumes.values():
        yield from _volume(volume, objects, existing)
    claimed = {c["metadata"]["name"] for o in objects for c in (o.get("spec") or {}).get("volumeClaimTemplates", [])}
    containers = spec.get("containers") or []
    if not containers:
        yield "has no container"
    for container in containers:
        for sentence in _container(container, {*volumes, *claimed}, spec):
            yield f"container {container.get('name')}: {sentence}"
        yield from _memory(container, volumes)


def _volume(volume: Object, objects: Sequence[Object], existing: Sequence[str]) -> Iterator[str]:
    claim = volume.get("persistentVolumeClaim", {}).get("claimName")
    if claim and claim not in existing and not _named(objects, "PersistentVolumeClaim", claim):
        yield f"volume {volume['name']}: the claim {claim} is neither made nor named as existing"
    config = volume.get("configMap", {}).get("name")
    if config and not _named(objects, "ConfigMap", config):
        yield f"volume {volume['name']}: the ConfigMap {config} is not made"
    if volume.get("emptyDir", {}).get("medium") == "Memory" and not volume["emptyDir"].get("sizeLimit"):
        yield f"volume {volume['name']}: memory without sizeLimit"


def _container(container: Object, volumes: set[str], spec: Object) -> Iterator[str]:
    if wrong := syntax.wrong_image(str(container.get("image", ""))):
        yield f"image {container.get('image')}: {wrong}"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"volumeMount {mount['name']} has no volume"
    for port in container.get("ports", []):
        if syntax.wrong_label_name(port["name"]) or len(port["name"]) > LONGEST_PORT_NAME:
            yield f"port {port['name']}: takes {LONGEST_PORT_NAME} small letters, digits and '-' at most"
    for variable in container.get("env", []):
        if "value" in variable and (is_secret(variable["name"]) or syntax.looks_secret(str(variable["value"]))):
            yield f"env {variable['name']} is a secret in plain text: use secretKeyRef"
    amounts = container.get("resources") or {}
    limit, request = (amounts.get(side, {}).get("memory") for side in ("limits", "requests"))
    if limit is None or limit != request:
        yield "requests and limits of memory must be the same"
    if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation must be false"
    yield from _grace(container, spec)


def _grace(container: Object, spec: Object) -> Iterator[str]:
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if "--seconds" in command:
        waits = int(command[command.index("--seconds") + 1])
        if spec.get("terminationGracePeriodSeconds", 30) <= waits:
            yield f"terminationGracePeriodSeconds is not above the {waits} s that preStop waits"


def _memory(container: Object, volumes: Mapping[str, Object]) -> Iterator[str]:
    limit = container.get("resources", {}).get("limits", {}).get("memory")
    for mount in container.get("volumeMounts", []):
        size = volumes.get(mount["name"], {}).get("emptyDir", {}).get("sizeLimit")
        is_memory = volumes.get(mount["name"], {}).get("emptyDir", {}).get("medium") == "Memory"
        if is_memory and size and limit and _bytes(size) >= _bytes(limit):
            yield f"volume {mount['name']}: {size} of memory are not less than the container's {limit}"


def _bytes(amount: Any) -> Decimal:
    return syntax.quantity(str(amount))


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Tell whether a label selector takes a pod with these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    wanted = selector.get("matchExpressions") or []
    return all(labels.get(each["key"]) in each["values"] for each in wanted if each["operator"] == "In")


def _selected(selector: Mapping[str, Any], objects: Sequence[Object]) -> list[Object]:
    every = [template for each in objects for _, template in templates(each)]
    return [pod for pod in every if selects(selector, pod.get("metadata", {}).get("labels") or {})]


def _named(objects: Sequence[Object], kind: str, name: Any) -> bool:
    return any(each.get("kind") == kind and each["metadata"]["name"] == name for each in objects)
