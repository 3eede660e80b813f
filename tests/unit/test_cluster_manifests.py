"""Every manifest that is written is valid: by KubeRay's own schemas, read strictly, and by what these do not see."""

from __future__ import annotations

import copy
import itertools
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tandem
from cluster import growth, specfile
from cluster.kubernetes import manifests, output, plan, shape
from cluster.kubernetes.spec import DeploymentSpec
from cluster.work import Group, JobWork, ServiceWork
from jobs import work as job_work
from serve import work as serve_work
from tests.support import crds

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "cluster" / "kubernetes" / "deployment.yaml"
BASE = "name: lab\nimage: registry.example/tandem:0.1.0\n"
GRACE = "terminationGracePeriodSeconds"
STORAGE = {
    "claim": "storage: {claim: {size: 1Ti, storage_class: nfs}}\n",
    "existing claim": "storage: {claim: {name: data, mount: /data}}\n",
    "store": "storage: {store: {uri: s3://bucket/lab, secret: s3-keys}}\n",
}
GCS = {
    "in memory": "",
    "redis": "gcs: {redis: {address: 'redis.db:6379', secret: redis-password}}\n",
    "rocksdb": "gcs: {rocksdb: {size: 2Gi, storage_class: fast, keep: true}}\n",
    "rocksdb on a claim": "gcs: {rocksdb: {claim: gcs}}\n",
}
BESIDE = {
    "defaults": "",
    "queued": "kueue: {queue: team-a, priority: high}\nworkers: {gpus: 0, min: 2, max: 4}\n",
    "own mlflow": "mlflow: {uri: 'https://mlflow.example'}\nworkers: {max: 1, priority_class: research}\n"
    "network: {prometheus: monitoring, clients: [web]}\nsecrets: [hugging-face]\nenv: {HF_HUB_OFFLINE: '1'}\n",
    "incremental": "service: {upgrade: incremental, gateway_class: istio}\ntoken_secret: ray-token\npull_secret: pull\n"
    "job: {delete_cluster: true, keep_s: 600, deadline_s: 7200, start_deadline_s: 900, retries: 3}\n",
}
JOB = JobWork(
    name="digits",
    entrypoint="python -m jobs.driver digits.yaml",
    files={"digits.yaml": "name: digits\n", "own/task.py": "x = 1\n"},
    metadata={"tandem.name": "digits"},
    workers=Group("resources", 1, 1, 0),
    saves_every_steps=10,
)
SERVICE = ServiceWork("chat", {"applications": []}, 8000, 305.0, (Group("models.chat", 1, 1, 0),))


def deployment(text: str) -> DeploymentSpec:
    return specfile.loads(BASE + text, DeploymentSpec)


def made(text: str, job: JobWork | None = JOB, service: ServiceWork | None = SERVICE) -> list[dict[str, Any]]:
    found = manifests.objects(deployment(text), job, service, with_cluster=True)
    return [each for file in found.values() for each in file]


def of_kind(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def case(storage: str, gcs: str, beside: str) -> Any:
    return pytest.param(STORAGE[storage] + GCS[gcs] + BESIDE[beside], id=f"{storage}, {gcs}, {beside}")


CASES = [case(*names) for names in itertools.product(STORAGE, GCS, BESIDE)]
SOME = [case(list(STORAGE)[number % 3], list(GCS)[number % 4], list(BESIDE)[number // 3]) for number in range(12)]
"""Each value of each, in fewer cases: writing YAML takes a while."""


@pytest.mark.skipif(crds.missing() is not None, reason=crds.missing() or "")
@pytest.mark.parametrize("text", CASES)
def test_every_ray_object_passes_kuberays_own_schemas_read_strictly(text: str) -> None:
    for each in made(text):
        if each["apiVersion"] == "ray.io/v1":
            assert crds.findings(each) == []


@pytest.mark.skipif(find_spec("kubernetes") is None, reason="kubernetes, the client, is not installed: pip install it")
@pytest.mark.parametrize("text", SOME)
def test_everything_else_has_the_fields_of_kubernetes_own_client(text: str) -> None:
    models = import_module("kubernetes.client")
    for each in made(text):
        kinds = [(f"V1{each['kind']}", each)] if each["apiVersion"] != "ray.io/v1" else []
        for kind, part in [*kinds, *(("V1PodTemplateSpec", pod) for _, pod in shape.templates(each))]:
            read = getattr(models, kind).from_dict(part)
            assert models.ApiClient().sanitize_for_serialization(read) == part  # an unknown field would be gone


@pytest.mark.skipif(crds.missing() is not None, reason=crds.missing() or "")
def test_the_strict_reading_finds_a_misspelt_field_deep_in_a_pod() -> None:
    job = of_kind(made(STORAGE["claim"]), "RayJob")
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["livenesProbe"] = container.pop("livenessProbe")
    [found] = crds.findings(job)
    assert "livenesProbe" in found


@pytest.mark.parametrize("text", SOME)
def test_everything_fits_together_and_is_the_same_each_time(text: str) -> None:
    spec = deployment(text)
    existing = ["data", "gcs"]
    assert shape.findings(made(text), existing) == []
    first, second = (manifests.build(spec, JOB, SERVICE, with_cluster=True) for _ in range(2))
    assert first == second
    read = [each for file in first.values() for each in yaml.safe_load_all(file)]
    assert read == made(text)  # remarks change nothing


def test_pods_are_waited_for_as_long_as_their_work_takes() -> None:
    objects = made(STORAGE["claim"] + "checkpoint_s: 240\n")
    graces = {
        each["kind"]: [
            pod["spec"]["terminationGracePeriodSeconds"] for at, pod in shape.templates(each) if "Group" in at
        ]
        for each in objects
        if each["apiVersion"] == "ray.io/v1"
    }
    assert graces == {"RayCluster": [270, 270], "RayJob": [270, 270], "RayService": [335, 335]}


def test_a_head_is_ready_before_anything_is_served_and_a_worker_when_its_gateway_answers() -> None:
    config = of_kind(made(STORAGE["claim"]), "RayService")["spec"]["rayClusterConfig"]
    [head] = config["headGroupSpec"]["template"]["spec"]["containers"]
    [worker] = config["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert head["readinessProbe"]["exec"]["command"][-1] == "--head"
    assert head["livenessProbe"]["exec"]["command"][-2:] == ["--serve-if-listening", "8000"]
    assert worker["readinessProbe"]["exec"]["command"][-2:] == ["--serve", "8000"]


def test_budgets_hold_what_a_job_cannot_do_without() -> None:
    four = JobWork(**{**vars(JOB), "workers": Group("resources", 4, 8, 1)})
    objects = made(STORAGE["claim"], four)
    stays = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "PodDisruptionBudget"}
    assert {name: spec["minAvailable"] for name, spec in stays.items()} == {
        "lab-head": 1, "digits-head": 1, "digits-worker": 3, "chat-head": 1, "chat-worker": 1,
    }  # fmt: skip
    assert stays["chat-worker"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    group = of_kind(objects, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (4, 4, 4)


def test_a_queued_job_waits_suspended_with_a_fixed_number_of_pods() -> None:
    job = of_kind(made(STORAGE["claim"] + BESIDE["queued"]), "RayJob")
    labels = {key: value for key, value in job["metadata"]["labels"].items() if key.startswith("kueue")}
    assert labels == {"kueue.x-k8s.io/queue-name": "team-a", "kueue.x-k8s.io/priority-class": "high"}
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["spec"]["suspend"], cluster["enableInTreeAutoscaling"]) == (True, False)
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == cluster["workerGroupSpecs"][0]["replicas"] == 2


def test_the_files_of_a_job_lie_where_its_submitter_reads_them() -> None:
    objects = made(STORAGE["claim"])
    job, files = of_kind(objects, "RayJob"), of_kind(objects, "ConfigMap")["data"]
    mounts = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["volumeMounts"]
    folder = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"]
    assert {mount["mountPath"]: files[mount["subPath"]] for mount in mounts} == {
        f"{folder}/{path}": text for path, text in JOB.files.items()
    }


def test_mlflow_answers_to_the_name_that_rays_pods_call_it_by() -> None:
    objects = made(STORAGE["store"])
    arguments = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    [head] = of_kind(objects, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in head["env"]}
    assert env["MLFLOW_TRACKING_URI"].removeprefix("http://") in given["--allowed-hosts"].split(",")
    assert given["--artifacts-destination"] == "s3://bucket/lab/mlflow"
    assert env["TANDEM_STORAGE"] == "s3://bucket/lab"
    assert head["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]


def test_the_head_knows_how_many_workers_kuberay_may_start() -> None:
    cluster = of_kind(made(STORAGE["claim"]), "RayCluster")["spec"]
    (group,) = cluster["workerGroupSpecs"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in head["env"]}
    grown = growth.at_full_size([], env)
    assert len(grown) == group["maxReplicas"] > 0
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (grown[0].total_cpus, grown[0].total_gpus) == (float(limits["cpu"]), float(limits["nvidia.com/gpu"]))


def test_no_secret_is_in_any_file() -> None:
    text = "".join(manifests.build(deployment(STORAGE["store"]), JOB, SERVICE, with_cluster=True).values())
    assert "password=" not in text
    [database] = [each for each in yaml.safe_load_all(text) if each["kind"] == "StatefulSet"]
    env = {each["name"]: each for each in database["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["POSTGRES_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "lab-postgres", "key": "password"}


def test_work_is_packed_into_pods_the_largest_first() -> None:
    spec = deployment("workers: {cpus: 8, gpus: 2}\n")
    groups = [Group("models.a", 3, 2, 1), Group("models.b", 2, 4, 0)]
    assert plan.pods_for(spec, groups) == 2
    assert plan.pods_for(spec, [Group("gateway", 5, 0, 0)]) == 0


BROKEN = {
    "selector does not match": ("Deployment", ("spec", "selector", "matchLabels", "app.kubernetes.io/component"), "x"),
    "has no volume": ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volumes"), []),
    "neither made nor named": ("Deployment", ("spec", "template", "spec", "volumes", 1), {
        "name": "storage", "persistentVolumeClaim": {"claimName": "other"}}),
    "no port of the pods": ("Service", ("spec", "ports", 0, "targetPort"), "web"),
    "selector matches no pod": ("Service", ("spec", "selector"), {"app": "x"}),
    "podSelector matches no pod": ("NetworkPolicy", ("spec", "podSelector"), {"matchLabels": {"app": "x"}}),
    "takes minAvailable": ("PodDisruptionBudget", ("spec", "minAvailable"), "50%"),
    "secret in plain text": ("StatefulSet", ("spec", "template", "spec", "containers", 0, "env", 2), {
        "name": "POSTGRES_PASSWORD", "value": "x"}),
    "has no tag": ("StatefulSet", ("spec", "template", "spec", "containers", 0, "image"), "postgres"),
    "must be the same": ("Deployment", ("spec", "template", "spec", "containers", 0, "resources", "limits"), {
        "memory": "9Gi"}),
    "a user other than 0": ("Deployment", ("spec", "template", "spec", "securityContext"), {}),
    "is no Service here": ("StatefulSet", ("spec", "serviceName"), "db"),
    "apiVersion must be": ("Deployment", ("apiVersion",), "extensions/v1beta1"),
    "restartPolicy Always": ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "restartPolicy"), "Always"),
    "rayVersion is missing": ("RayCluster", ("spec", "rayVersion"), None),
    "is not token": ("RayCluster", ("spec", "authOptions"), {"mode": "disabled"}),
    "is not v2": ("RayCluster", ("spec", "autoscalerOptions", "version"), "v1"),
    "not in order": ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplicas"), -1),
    "is not above the 60 s": ("RayJob", (
        "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "terminationGracePeriodSeconds"), 30),
    "memory without sizeLimit": ("RayJob", (
        "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 0, "emptyDir"), {"medium": "Memory"}),
    "suspend: true goes with": ("RayJob", ("spec",), {"entrypoint": "x", "suspend": True}),
    "without suspend: true": ("RayJob", ("metadata", "labels", "kueue.x-k8s.io/queue-name"), "q"),
    "needs clusterUpgradeOptions.gatewayClassName": ("RayService", ("spec", "upgradeStrategy"), {
        "type": "NewClusterWithIncrementalUpgrade"}),
    "no port named serve": ("RayService", (
        "spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "ports"), []),
    "redisAddress is missing": ("RayCluster", ("spec", "gcsFaultToleranceOptions"), {"backend": "redis"}),
    "storage is missing": ("RayCluster", ("spec", "gcsFaultToleranceOptions"), {"backend": "rocksdb"}),
    "leave room for the names": ("RayService", ("metadata", "name"), "a" * 48),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BROKEN)
def test_what_schemas_do_not_see_is_found(sentence: str) -> None:
    kind, (*path, last), value = BROKEN[sentence]
    objects = copy.deepcopy(made(STORAGE["claim"]))
    place: Any = next(each for each in objects if each["kind"] == kind)
    for key in path:
        place = place[key]
    place[last] = value
    assert any(sentence in finding for finding in shape.findings(objects)), shape.findings(objects)


def test_remarks_stand_above_their_keys() -> None:
    text = output.document({"a": {"b": [{"c": 1}], "d": "x\ny\n"}}, {"a.b.0.c": "why", "a.d": "two\nlines", "e": "no"})
    assert text == "a:\n  b:\n    # why\n    - c: 1\n  # two\n  # lines\n  d: |\n    x\n    y\n"


def test_the_command_writes_the_example_with_a_job_and_an_endpoint(tmp_path: Path) -> None:
    job, serve = ROOT / "jobs/specs/digits.yaml", ROOT / "serve/specs/digits.yaml"
    arguments = ["cluster", "manifests", str(EXAMPLE), "--job", str(job), "--serve", str(serve), "--cluster"]
    options = ["--serve-set", "keys.required=never", "--serve-set", "name=eyes", "-o", str(tmp_path / "made")]
    result = CliRunner().invoke(tandem.app, [*arguments, *options], catch_exceptions=False)
    names = ["storage", "mlflow", "raycluster", "rayjob", "rayservice", "network"]
    assert (result.exit_code, sorted(p.name for p in (tmp_path / "made").iterdir())) == (
        0,
        sorted(f"{name}.yaml" for name in names),
    )
    printed = CliRunner().invoke(tandem.app, [*arguments, *options[:-2], "-o", "-"], catch_exceptions=False)
    kinds = [each["kind"] for each in yaml.safe_load_all(printed.stdout)]
    assert [kind for kind in kinds if kind.startswith("Ray")] == ["RayCluster", "RayJob", "RayService"]


def test_files_that_a_job_names_travel_with_it(tmp_path: Path) -> None:
    spec = {"name": "x", "phase": "pretrain", "model": {"architecture": "llama"}, "data": {"train": "python-stdlib"}}
    spec["training"] = {"steps": 1, "deepspeed": "./settings.json"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "settings.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "secrets.json").write_text("{}")
    assert sorted(job_work.read(tmp_path / "x.yaml", []).files) == ["settings.json", "x.yaml"]


def test_specs_of_jobs_and_endpoints_are_read_as_they_are() -> None:
    job = job_work.read(ROOT / "jobs/specs/digits.yaml", ["training.epochs=1"])
    assert job.entrypoint == "python -m jobs.driver digits.yaml --set training.epochs=1"
    assert (job.workers.count, job.workers.cpus, job.trains, list(job.files)) == (2, 1, True, ["digits.yaml"])
    service = serve_work.read(ROOT / "serve/specs/chat.yaml", ["keys.required=never", "drain_s=100"])
    [application] = service.config["applications"]
    assert application["args"]["spec"]["http"] | {"slow_reader_s": 0} == {
        "host": "0.0.0.0", "port": 8000, "proxies": "head", "slow_reader_s": 0,
    }  # fmt: skip
    assert service.drain_s > 100
    assert len(service.said) == 2
