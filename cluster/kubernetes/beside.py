"""What is beside a Ray cluster: the shared volume, MLflow with PostgreSQL, and who may reach which port. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.kubernetes import pods
from cluster.kubernetes.pods import Object
from cluster.kubernetes.spec import DeploymentSpec

MLFLOW, POSTGRES = 5000, 5432
POSTGRES_USER = 999
"""The user of the image `postgres`."""
AUTOSCALER_METRICS, DASHBOARD_METRICS = 44217, 44227
PART_OF = {"app.kubernetes.io/part-of": "tandem"}
TRACKING, DATABASE = "mlflow", "postgres"


def tracking_uri(spec: DeploymentSpec) -> str:
    """Return where Ray's pods find MLflow."""
    return spec.mlflow.uri or f"http://{spec.name}-mlflow.{spec.namespace}.svc:{MLFLOW}"


def storage(spec: DeploymentSpec) -> list[Object]:
    """Return the shared claim, unless it exists."""
    claim = spec.storage.claim if spec.storage else None
    if claim is None or claim.name is not None:
        return []
    body: Object = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": claim.size}}}
    if claim.storage_class:
        body["storageClassName"] = claim.storage_class
    return [_object(spec, "v1", "PersistentVolumeClaim", f"{spec.name}-storage", body)]


def tracking(spec: DeploymentSpec) -> list[Object]:
    """Return PostgreSQL and MLflow, unless there is a server already."""
    if spec.mlflow.uri is not None:
        return []
    return [_database_service(spec), _database(spec), _server_service(spec), _server(spec)]


def policies(spec: DeploymentSpec, owners: Sequence[str], serve_port: int | None) -> list[Object]:
    """Return who may reach what. Ray's token guards its own ports but not metrics, the endpoint, MLflow or PostgreSQL.

    Args:
        owners: the RayCluster, RayJob and RayService that are written.
    """
    found = [_ray_policy(spec, owner, serve_port) for owner in owners]
    if spec.mlflow.uri is None:
        ray = [{"podSelector": _ray_pods(owner, "head", "worker")} for owner in owners]
        callers = [*ray, *map(_namespace, spec.network.clients)]
        server = [{"podSelector": {"matchLabels": pods.labels(spec.name, TRACKING)}}]
        found.append(_policy(spec, f"{spec.name}-mlflow", TRACKING, [_rule(callers, MLFLOW)]))
        found.append(_policy(spec, f"{spec.name}-postgres", DATABASE, [_rule(server, POSTGRES)]))
    return found


def _ray_policy(spec: DeploymentSpec, owner: str, serve_port: int | None) -> Object:
    own = {"podSelector": _ray_pods(owner, "head", "worker", "submitter")}
    operator = _namespace(spec.network.operator)
    rules: list[Object] = [{"from": [own]}, _rule([operator], pods.DASHBOARD, *([serve_port] if serve_port else []))]
    if spec.network.prometheus:
        metrics = (pods.METRICS, AUTOSCALER_METRICS, DASHBOARD_METRICS)
        rules.append(_rule([_namespace(spec.network.prometheus)], *metrics))
    if serve_port:
        rules.append(_rule([{"podSelector": {}}, *map(_namespace, spec.network.clients)], serve_port))
    body = {"podSelector": _ray_pods(owner, "head", "worker"), "policyTypes": ["Ingress"], "ingress": rules}
    return _object(spec, "networking.k8s.io/v1", "NetworkPolicy", f"{owner}-ray", body)


def _ray_pods(owner: str, *components: str) -> Object:
    some = {"key": pods.COMPONENT, "operator": "In", "values": list(components)}
    return {"matchLabels": {pods.INSTANCE: owner}, "matchExpressions": [some]}


def _policy(spec: DeploymentSpec, name: str, component: str, rules: list[Object]) -> Object:
    selector = {"matchLabels": pods.labels(spec.name, component)}
    body = {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules}
    return _object(spec, "networking.k8s.io/v1", "NetworkPolicy", name, body)


def _rule(callers: list[Object], *ports: int) -> Object:
    return {"from": callers, "ports": [{"protocol": "TCP", "port": port} for port in ports]}


def _namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _server(spec: DeploymentSpec) -> Object:
    wanted, labels = spec.mlflow, pods.labels(spec.name, TRACKING)
    container: Object = {
        "name": "mlflow",
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "tracking.server"],
        "args": _arguments(spec),
        # libpq's own variable: a password in the URL would be seen in the list of processes.
        "env": [{"name": "PGPASSWORD", **_password(spec)}],
        "ports": [{"name": "http", "containerPort": MLFLOW}],
        "resources": pods.resources(wanted.cpus, wanted.memory),
        "securityContext": pods.confined(),
        "startupProbe": _http("/health", 5, 60),
        "readinessProbe": _http("/health", 10, 3),
        "livenessProbe": _http("/health", 20, 3),
        "volumeMounts": [{"name": "root", "mountPath": "/mlflow"}],
    }
    volumes: list[Object] = [{"name": "root", "emptyDir": {}}]
    if spec.storage and spec.storage.claim:
        claim = spec.storage.claim.name or f"{spec.name}-storage"
        container["volumeMounts"].append({"name": "storage", "mountPath": spec.mount})
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})
    if spec.storage and spec.storage.store and spec.storage.store.secret:
        container["envFrom"] = [{"secretRef": {"name": spec.storage.store.secret}}]
    pod: Object = {
        "automountServiceAccountToken": False,
        "securityContext": pods.unprivileged(pods.USER),
        "containers": [container],
        "volumes": volumes,
    }
    if spec.pull_secret:
        pod["imagePullSecrets"] = [{"name": spec.pull_secret}]
    body: Object = {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": {**labels, **PART_OF}}, "spec": pod},
    }
    return _object(spec, "apps/v1", "Deployment", f"{spec.name}-mlflow", body)


def _arguments(spec: DeploymentSpec) -> list[str]:
    database = f"postgresql+psycopg://mlflow@{spec.name}-postgres:{POSTGRES}/mlflow"
    given = {"root": "/mlflow", "host": "0.0.0.0", "port": str(MLFLOW), "backend-store-uri": database}
    given["artifacts-destination"] = artifacts(spec)
    given["allowed-hosts"] = ",".join(hosts(spec))
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def artifacts(spec: DeploymentSpec) -> str:
    """Return where MLflow keeps artifacts: beside everything else, or in the pod where nothing else is named."""
    if spec.storage and spec.storage.store:
        return f"{spec.storage.store.uri.rstrip('/')}/mlflow"
    return f"{spec.mount}/mlflow" if spec.mount else "/mlflow/artifacts"


def hosts(spec: DeploymentSpec) -> list[str]:
    """Return the names by which the server may be called: the Service's, and those that the spec adds."""
    name = f"{spec.name}-mlflow"
    names = [name, f"{name}.{spec.namespace}", f"{name}.{spec.namespace}.svc"]
    names += [f"{name}.{spec.namespace}.svc.cluster.local", "localhost", "127.0.0.1"]
    return [*(f"{each}:{MLFLOW}" for each in names), *spec.mlflow.hosts]


def _database(spec: DeploymentSpec) -> Object:
    wanted, labels = spec.mlflow.postgres, pods.labels(spec.name, DATABASE)
    ready = {"exec": {"command": ["pg_isready", "--username", "mlflow", "--dbname", "mlflow"]}}
    container: Object = {
        "name": "postgres",
        "image": wanted.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": "POSTGRES_USER", "value": "mlflow"},
            {"name": "POSTGRES_DB", "value": "mlflow"},
            {"name": "POSTGRES_PASSWORD", **_password(spec)},
            {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"},
        ],
        "ports": [{"name": "postgres", "containerPort": POSTGRES}],
        "resources": pods.resources(1, "1Gi"),
        "securityContext": pods.confined(),
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 6},
        "livenessProbe": {**ready, "periodSeconds": 20, "timeoutSeconds": 5, "failureThreshold": 6},
        "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
    }
    claim: Object = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": wanted.size}}}
    if wanted.storage_class:
        claim["storageClassName"] = wanted.storage_class
    body: Object = {
        "serviceName": f"{spec.name}-postgres",
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": {**labels, **PART_OF}},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 60,
                "securityContext": pods.unprivileged(POSTGRES_USER),
                "containers": [container],
            },
        },
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
    }
    return _object(spec, "apps/v1", "StatefulSet", f"{spec.name}-postgres", body)


def password_secret(spec: DeploymentSpec) -> str:
    """Return the name of the Secret with the database's password."""
    return spec.mlflow.postgres.secret or f"{spec.name}-postgres"


def _password(spec: DeploymentSpec) -> Object:
    return {"valueFrom": {"secretKeyRef": {"name": password_secret(spec), "key": "password"}}}


def _server_service(spec: DeploymentSpec) -> Object:
    ports = [{"name": "http", "port": MLFLOW, "targetPort": "http"}]
    body = {"selector": pods.labels(spec.name, TRACKING), "ports": ports}
    return _object(spec, "v1", "Service", f"{spec.name}-mlflow", body)


def _database_service(spec: DeploymentSpec) -> Object:
    ports = [{"name": "postgres", "port": POSTGRES, "targetPort": "postgres"}]
    body = {"clusterIP": "None", "selector": pods.labels(spec.name, DATABASE), "ports": ports}
    return _object(spec, "v1", "Service", f"{spec.name}-postgres", body)


def _http(path: str, period: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _object(spec: DeploymentSpec, api: str, kind: str, name: str, body: Object) -> Object:
    metadata = {"name": name, "namespace": spec.namespace, "labels": {pods.INSTANCE: spec.name, **PART_OF}}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": body}
