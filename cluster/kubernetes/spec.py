"""DeploymentSpec: what `tandem cluster manifests` reads. Where Tandem runs on Kubernetes, and with what beside it.

What is asked of jobs and endpoints stays in their own specs. Only pydantic and the standard library are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.kubernetes import syntax
from cluster.strict import Strict, Text


def _named(check: Callable[[str], str | None]) -> AfterValidator:
    def validate(value: str) -> str:
        if wrong := check(value):
            raise ValueError(wrong)
        return value

    return AfterValidator(validate)


def _amount(value: str) -> str:
    if syntax.quantity(value) <= 0:
        raise ValueError("takes an amount above 0")
    return value


def _secret(value: str) -> str | None:
    if syntax.is_no_name(value):
        return (
            "takes the name of a Secret in the cluster, and this looks like a secret itself: create the Secret with "
            "kubectl, and name it here"
        )
    return syntax.wrong_subdomain(value)


def _variable(value: str) -> str | None:
    return None if value.replace("_", "a").isalnum() and not value[:1].isdigit() else "takes a variable's name"


ObjectName = Annotated[str, _named(syntax.wrong_name)]
LabelName = Annotated[str, _named(syntax.wrong_label_name)]
Subdomain = Annotated[str, _named(syntax.wrong_subdomain)]
LabelValue = Annotated[str, _named(syntax.wrong_label_value)]
LabelKey = Annotated[str, _named(syntax.wrong_label_key)]
Secret = Annotated[str, _named(_secret)]
Image = Annotated[str, _named(syntax.wrong_image)]
Variable = Annotated[str, _named(_variable)]
Amount = Annotated[str, Field(min_length=1), AfterValidator(_amount)]
MountPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]*[A-Za-z0-9]$")]
Seconds = Annotated[int, Field(ge=1, le=7 * 24 * 3600)]


class HeadSpec(Strict):
    """The pod of Ray's head. Jobs' drivers run there, and gateways; no worker does."""

    cpus: int = Field(4, ge=1, le=1_000)
    """CPUs, requested and at most."""
    memory: Amount = "16Gi"
    """Requested, and at most."""
    shm: Amount = "2Gi"
    """/dev/shm, which counts as memory: three quarters of it are Ray's object store."""
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of the nodes that may run it."""


class WorkersSpec(Strict):
    """The pods that compute; KubeRay adds and removes them as work asks for them."""

    cpus: int = Field(8, ge=1, le=10_000)
    """CPUs of a pod, requested and at most."""
    memory: Amount = "32Gi"
    """Of a pod, requested and at most."""
    shm: Amount = "8Gi"
    """/dev/shm of a pod, which counts as its memory: three quarters of it are Ray's object store."""
    gpus: int = Field(1, ge=0, le=64)
    """GPUs of a pod; 0 for CPU workers."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    min: int = Field(0, ge=0, le=10_000)
    """Pods that are always there; more where a job or an endpoint could not begin with so few."""
    max: int = Field(4, ge=1, le=10_000)
    """Pods at most."""
    idle_s: Seconds = 600
    """A pod beyond `min` without work for so long is taken away."""
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of the nodes that may run them, such as a GPU's type."""
    priority_class: Subdomain | None = None
    """A PriorityClass of the cluster."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkersSpec:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ClaimSpec(Strict):
    """A volume that all pods share."""

    name: Subdomain | None = None
    """Of an existing PersistentVolumeClaim (ReadWriteMany); left out: one is made."""
    size: Amount = "500Gi"
    """Of the one that is made."""
    storage_class: Subdomain | None = None
    """Of the one that is made: a class that can be written from many nodes (NFS, EFS, Filestore, CephFS)."""
    mount: MountPath = "/storage"
    """Where pods find it."""


class StoreSpec(Strict):
    """An object store."""

    uri: Annotated[str, Field(pattern=r"^(s3|gs|gcs|abfs|abfss|hdfs)://[^\s@?]+$")]
    """`s3://bucket/folder`; no credentials in it."""
    secret: Secret | None = None
    """The Secret whose keys are the store's variables (AWS_ACCESS_KEY_ID, …); left out: pods have rights."""


class StorageSpec(Strict):
    """Where data, checkpoints and models are kept: a claim, or an object store."""

    claim: ClaimSpec | None = None
    store: StoreSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> StorageSpec:
        if (self.claim is None) == (self.store is None):
            raise ValueError("takes either `claim` or `store`")
        return self


class RedisSpec(Strict):
    """A Redis of your own."""

    address: Text | None = None
    """`host:port`, or several with commas."""
    secret: Secret | None = None
    """The Secret with the key `password`."""


class RocksSpec(Strict):
    """A volume of the head: alpha, behind the operator's gate GCSFaultToleranceEmbeddedStorage."""

    claim: Subdomain | None = None
    """An existing claim (ReadWriteOnce); left out: KubeRay makes one."""
    size: Amount | None = None
    """Of the one that is made; 1Gi when left out."""
    storage_class: Subdomain | None = None
    """Of the one that is made."""
    keep: bool = False
    """Whether it stays when the RayCluster is deleted."""

    @model_validator(mode="after")
    def _made_or_there(self) -> RocksSpec:
        if self.claim is not None and (self.size or self.storage_class):
            raise ValueError("size and storage_class are of a claim that is made, and `claim` names one that exists")
        return self


class GcsSpec(Strict):
    """Where Ray's head keeps its state, so that a new head goes on with it; left out: it dies with its pod."""

    redis: RedisSpec | None = None
    rocksdb: RocksSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> GcsSpec:
        if (self.redis is None) == (self.rocksdb is None):
            raise ValueError("takes either `redis` or `rocksdb`")
        return self


class PostgresSpec(Strict):
    """The database of the MLflow server that is made."""

    image: Image = "postgres:17.6"
    """An image of PostgreSQL."""
    size: Amount = "20Gi"
    """Of its volume."""
    storage_class: Subdomain | None = None
    """Of its volume; the cluster's default when left out."""
    secret: Secret | None = None
    """The Secret with the key `password`; `<name>-postgres` when left out. It must exist before."""


class MlflowSpec(Strict):
    """The tracking server: one of your own by `uri`, or one that is made, with PostgreSQL."""

    uri: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    """Of a server that you have; nothing is made then."""
    cpus: int = Field(1, ge=1, le=64)
    """Requested, and at most."""
    memory: Amount = "2Gi"
    """Requested, and at most."""
    postgres: PostgresSpec = PostgresSpec()
    hosts: list[Text] = Field(default_factory=list)
    """Names besides the Service's own by which it may be called, such as an ingress's: MLflow answers 403 to others."""


class KueueSpec(Strict):
    """The queue of Kueue in which jobs and clusters wait for their quota."""

    queue: LabelName
    """The LocalQueue of the namespace."""
    priority: LabelName | None = None
    """A WorkloadPriorityClass."""


class JobSettings(Strict):
    """How KubeRay runs a RayJob."""

    retries: int = Field(0, ge=0, le=100)
    """So often the operator starts a new cluster after a failure; the job goes on from its newest checkpoint."""
    delete_cluster: bool = True
    """Whether the cluster goes when the job has ended."""
    keep_s: int = Field(0, ge=0, le=7 * 24 * 3600)
    """How long it stays after that, to be looked at."""
    deadline_s: Seconds | None = None
    """How long all attempts may take together."""
    start_deadline_s: Seconds | None = None
    """How long a cluster may take until the job runs."""


class ServiceSettings(Strict):
    """How KubeRay runs a RayService."""

    upgrade: Literal["new-cluster", "incremental", "none"] = "new-cluster"
    """When the pods change: a second cluster takes over at once or step by step, or nothing happens."""
    gateway_class: Subdomain | None = None
    """`incremental`: the class of the Gateway API that shifts the traffic."""
    step_percent: int = Field(10, ge=1, le=100)
    """`incremental`: so much of the traffic at a time …"""
    step_s: Seconds = 60
    """… each so many seconds."""


class DisruptionSpec(Strict):
    """What an eviction (a node's drain or upgrade) has to leave running."""

    head: int = Field(1, ge=0, le=1)
    """1: the head is not evicted; 0: it may be."""
    workers: int | None = Field(None, ge=0, le=10_000)
    """Worker pods that stay; one fewer than those that are always there when left out, but 1 where that is one."""


class NetworkSpec(Strict):
    """Who may reach the ports that Ray's token does not guard."""

    operator: LabelName = "kuberay-system"
    """The namespace of KubeRay's operator."""
    prometheus: LabelName | None = None
    """The namespace whose pods may read metrics; left out: none may."""
    clients: list[LabelName] = Field(default_factory=list)
    """Namespaces whose pods may call the endpoint and MLflow, besides this one."""


class DeploymentSpec(Strict):
    """Where Tandem runs on Kubernetes, and what is beside it."""

    name: ObjectName
    """What the RayCluster is called, and the beginning of the names of what is beside it."""
    namespace: LabelName = "default"
    """Where all of it goes; it must exist."""
    image: Image
    """An image with Tandem and its dependencies (`cluster/images`): the same one for all pods."""
    pull_secret: Secret | None = None
    """The Secret with which nodes pull it."""
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] = "2.60.0"
    """Of the image; KubeRay decides by it."""
    head: HeadSpec = HeadSpec()
    workers: WorkersSpec = WorkersSpec()
    storage: StorageSpec | None = None
    """Left out: each pod's own disk, for a try with one worker pod."""
    gcs: GcsSpec | None = None
    mlflow: MlflowSpec = MlflowSpec()
    kueue: KueueSpec | None = None
    job: JobSettings = JobSettings()
    service: ServiceSettings = ServiceSettings()
    disruption: DisruptionSpec = DisruptionSpec()
    network: NetworkSpec = NetworkSpec()
    secrets: list[Secret] = Field(default_factory=list)
    """Secrets whose keys become variables of every Ray pod: HF_TOKEN, PGPASSWORD, …"""
    env: dict[Variable, str] = Field(default_factory=dict)
    """Further variables of every Ray pod; none that is a secret."""
    token_secret: Secret | None = None
    """The Secret with the key `auth_token` that Ray asks for; left out: KubeRay makes one."""
    checkpoint_s: Seconds = 60
    """What writing a checkpoint may take: so long a job that is stopped, or a pod that has to go, is waited for."""
    grace_s: Seconds | None = None
    """How long a pod may take to end; what is needed and half a minute when left out."""

    @property
    def mount(self) -> str | None:
        """Where pods find the shared volume; None: there is none."""
        return self.storage.claim.mount if self.storage and self.storage.claim else None
