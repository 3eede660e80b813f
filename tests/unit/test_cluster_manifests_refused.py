"""Wrong deployments are refused before kubectl would: exit code 2, the key with its line, and a way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.kubernetes import syntax
from tandem import _manifests

ROOT = Path(__file__).parents[2]
GOOD = "name: lab\nimage: registry.example/tandem:0.1.0\nstorage: {claim: {mount: /data}}\n"
JOB = """\
name: digits
phase: pretrain
task: image-classification
model: {architecture: cnn}
data: {train: sklearn-digits}
training: {steps: 10}
"""
SERVE = "models: {digits: {model: 'models:/digits@champion'}}\nkeys: {required: never}\n"
WITHOUT = "storage: {claim: {mount: /data}}\n"


def refusal(folder: Path, deployment: str, job: str | None = None, serve: str | None = None) -> str:
    """Return what the command says of these specs; all of them are files in `folder`."""
    for name, text in (("deployment", deployment), ("job", job), ("serve", serve)):
        if text is not None:
            (folder / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        _manifests(
            folder / "deployment.yaml",
            [],
            (folder / "job.yaml" if job else None, []),
            (folder / "serve.yaml" if serve else None, []),
            with_cluster=False,
        )
    assert caught.value.exit_code == 2
    return str(caught.value)


DEPLOYMENTS = {
    "image latest": (GOOD.replace(":0.1.0", ":latest"), "deployment.yaml:2: `image`: latest is another image"),
    "image without a tag": (GOOD.replace(":0.1.0", ""), "`image`: has no tag"),
    "name": (GOOD.replace("name: lab", "name: Lab_1"), "deployment.yaml:1: `name`: takes small letters"),
    "name too long": (GOOD.replace("lab", "a" * 54), "`name`: " + "a" * 54 + ": has 54 characters, and at most 53"),
    "memory": (GOOD + "workers: {memory: 32 GB}\n", "`workers.memory`: takes an amount such as 32Gi"),
    "misspelt key": (GOOD + "workers: {memmory: 32Gi}\n", "memory"),
    "shm above memory": (GOOD + "workers: {memory: 16Gi, shm: 16Gi}\n", "`workers.shm`: 16Gi is not less than"),
    "little shm": (GOOD + "head: {shm: 64Mi}\n", "`head.shm`: 64Mi is too little for Ray's object store"),
    "redis without an address": (GOOD + "gcs: {redis: {secret: r}}\n", "`gcs.redis.address`: is left out"),
    "rocksdb without a volume": (GOOD + "gcs: {rocksdb: {}}\n", "deployment.yaml:4: `gcs.rocksdb`: has no volume"),
    "rocksdb on the shared volume": (
        GOOD.replace("{mount", "{name: data, mount") + "gcs: {rocksdb: {claim: data}}\n",
        "`gcs.rocksdb.claim`: data is the shared storage",
    ),
    "two kinds of gcs": (GOOD + "gcs: {redis: {address: 'r:1'}, rocksdb: {size: 1Gi}}\n", "takes either `redis` or"),
    "two kinds of storage": (
        GOOD.replace("{claim", "{store: {uri: 's3://b/c'}, claim"),
        "takes either `claim` or `store`",
    ),
    "min above max": (GOOD + "workers: {min: 5, max: 4}\n", "min 5 is above max 4"),
    "priority class": (GOOD + "workers: {priority_class: High!}\n", "`workers.priority_class`: takes small letters"),
    "node selector": (GOOD + "workers: {node_selector: {'a/b/c!': x}}\n", "takes a name, or a domain"),
    "grace below a checkpoint": (GOOD + "checkpoint_s: 300\ngrace_s: 60\n", "`grace_s`: 60 is not above checkpoint_s"),
    "a secret as a variable": (GOOD + "env: {HF_TOKEN: abc}\n", "`env.HF_TOKEN`: is a secret in a file"),
    "a secret in a variable": (
        GOOD + "env: {URL: 'postgresql://me:word@db/x'}\n",
        "`env.URL`: is a secret in a file that others read",
    ),
    "a variable that is Ray's": (GOOD + "env: {RAY_ADDRESS: 'x:1'}\n", "`env.RAY_ADDRESS`: is set by Ray"),
    "mlflow twice": (GOOD + "mlflow: {uri: 'http://m.example', memory: 4Gi}\n", "`mlflow.memory`: is of a server"),
    "mlflow on loopback": (GOOD + "mlflow: {uri: 'http://127.0.0.1:5000'}\n", "`mlflow.uri`: http://127.0.0.1:5000"),
    "store with a password": (
        GOOD.replace("{claim: {mount: /data}}", "{store: {uri: 's3://key:word@bucket/x'}}"),
        "storage.store.uri",
    ),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_wrong_deployment(name: str, tmp_path: Path) -> None:
    text, sentence = DEPLOYMENTS[name]
    assert sentence in refusal(tmp_path, text)


TOKENS = {
    "hugging face": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "hexadecimal": "0123456789abcdef0123456789abcdef",
    "anything long": "Wq3-zz_LLpo77!bvE",
    "aws": "AKIAIOSFODNN7EXAMPLE",
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("key", ["secrets: [{}]", "token_secret: '{}'", "pull_secret: '{}'"])
def test_a_secret_in_place_of_its_name_is_refused_and_not_repeated(key: str, name: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + key.replace("{}", TOKENS[name].replace("!", "")) + "\n")
    assert "takes the name of a Secret" in said
    assert TOKENS[name].replace("!", "") not in said


JOBS = {
    "more gpus than a pod has": (
        GOOD, JOB + "resources: {gpus_per_worker: 2}\n", "`workers`: a pod has 8 CPUs and 1 GPUs, and one"
    ),
    "more workers than pods": (
        GOOD + "workers: {max: 3}\n",
        JOB + "resources: {workers: 4, gpus_per_worker: 1}\n",
        "deployment.yaml:4: `workers.max`: 3 pods cannot hold what job: resources asks for: raise it to 4",
    ),
    "retries without storage": (
        GOOD.replace(WITHOUT, "") + "job: {retries: 2}\nworkers: {max: 1}\n",
        JOB + "checkpoint: {every_steps: 5}\n",
        "`job.retries`: 2 retries have new pods, and without `storage`",
    ),
    "retries that begin anew": (
        GOOD + "job: {retries: 2}\n",
        JOB + "checkpoint: {every_steps: 5, resume: never}\n",
        "`job.retries`: and the job's checkpoint.resume: never do not go together",
    ),
    "retries without checkpoints": (
        GOOD + "job: {retries: 2}\n", JOB, "`job.retries`: and the job's checkpoint.every_steps, which is left out"
    ),
    "no storage for several pods": (GOOD.replace(WITHOUT, ""), JOB, "`storage`: is left out, and the pods of a job"),
    "storage on a pod's disk": (GOOD, JOB + "storage: /home/me/runs\n", "`storage`: /home/me/runs would be"),
    "storage beside the volume": (GOOD, JOB + "storage: /data/../runs\n", "/data/../runs would be written"),
    "data beside the spec": (
        GOOD,
        JOB.replace("sklearn-digits", "pictures/"),
        "job.yaml: `data.train`: pictures/ is not in the pods: use a path below /data",
    ),
    "a queue and a cluster that stays": (
        GOOD + "kueue: {queue: q}\njob: {delete_cluster: false}\n", JOB, "`job.delete_cluster`: must be true"
    ),
    "kept after it was not deleted": (
        GOOD + "job: {delete_cluster: false, keep_s: 60}\n", JOB, "`job.keep_s`: has no effect"
    ),
    "a long name": (GOOD, JOB.replace("digits\n", "d" * 50 + "\n", 1), "`name`: " + "d" * 50 + ": has 50 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_could_not_run(name: str, tmp_path: Path) -> None:
    deployment, job, sentence = JOBS[name]
    assert sentence in refusal(tmp_path, deployment, job)


SERVES = {
    "grace below drain_s": (GOOD + "grace_s: 100\n", SERVE + "drain_s: 200\n", "`grace_s`: 100 is not above drain_s"),
    "incremental without a gateway": (
        GOOD + "service: {upgrade: incremental}\n", SERVE, "deployment.yaml:4: `service.gateway_class`: is left out"
    ),
    "a gateway without incremental": (
        GOOD + "service: {gateway_class: istio}\n", SERVE, "`service.gateway_class`: has an effect with"
    ),
    "incremental in a queue": (
        GOOD + "kueue: {queue: q}\nservice: {upgrade: incremental, gateway_class: istio}\n", SERVE, "`service.upgrade`"
    ),
    "keys in a file": (GOOD, SERVE.partition("keys")[0], "keys.store: callers need keys beyond loopback"),
    "tls": (GOOD, SERVE + "http: {tls: {certificate: c.pem, key: k.pem}}\n", "http.tls: KubeRay asks"),
    "a model that is not there": (
        GOOD, SERVE.replace("models:/digits@champion", "/home/me/model"), "`models.digits.model`: /home/me/model is"
    ),
    "more replicas than fit": (
        GOOD + "workers: {max: 1}\n",
        SERVE.replace("champion'", "champion', replicas: 3, resources: {gpus_per_replica: 1}"),
        "`workers.max`: 1 pods cannot hold what service: models.digits asks for: raise it to 3",
    ),
    "an engine of one's own": (
        GOOD, SERVE.replace("champion'", "champion', engine: 'mine:ENGINE'"), "models.digits.engine: mine:ENGINE is"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVES)
def test_an_endpoint_that_could_not_be_served(name: str, tmp_path: Path) -> None:
    deployment, serve, sentence = SERVES[name]
    assert sentence in refusal(tmp_path, deployment, None, serve)


def test_a_file_that_a_config_map_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text(GOOD)
    (tmp_path / "my job.yaml").write_text(JOB)
    with pytest.raises(UserError, match=r"'my job\.yaml' cannot be a key of a ConfigMap"):
        _manifests(tmp_path / "deployment.yaml", [], (tmp_path / "my job.yaml", []), (None, []), with_cluster=False)


def test_a_job_and_an_endpoint_of_one_name(tmp_path: Path) -> None:
    assert "digits is the name of the RayJob too" in refusal(tmp_path, GOOD, JOB, SERVE + "name: digits\n")


def test_a_cluster_and_an_endpoint_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text(GOOD)
    (tmp_path / "serve.yaml").write_text(SERVE + "name: lab\n")
    with pytest.raises(UserError, match="lab is the name of the RayCluster too"):
        _manifests(tmp_path / "deployment.yaml", [], (None, []), (tmp_path / "serve.yaml", []), with_cluster=True)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + "gcs: {redis: {}}\ngrace_s: 1\n", JOB + "storage: /x\n", SERVE)
    assert [key in said for key in ("`gcs.redis.address`", "`grace_s`", "`storage`")] == [True] * 3


def test_the_command_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text(GOOD.replace(":0.1.0", ":latest"))
    command = [sys.executable, "-m", "tandem", "cluster", "manifests", str(tmp_path / "deployment.yaml")]
    result = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, (tmp_path / "out").exists()) == (2, False)
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1Gi", 2**30), ("500m", "0.5"), ("1.5", "1.5"), ("2e3", 2000), ("1k", 1000), ("3Ti", 3 * 2**40)],
)
def test_amounts(text: str, value: object) -> None:
    assert syntax.quantity(text) == type(syntax.quantity(text))(str(value))


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "-1", "1GB", "1gi", "0x10", "1e"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="takes an amount"):
        syntax.quantity(text)


@pytest.mark.parametrize(
    "image",
    ["a:1", "registry.example:5000/team/tandem:0.1.0-gpu", "ghcr.io/x/y_z:v1", f"a/b@sha256:{'0' * 64}"],
)
def test_images_that_stay_the_same(image: str) -> None:
    assert syntax.wrong_image(image) is None


@pytest.mark.parametrize("image", ["a", "registry:5000/a", "a:latest", "A:1", "a b:1", "a:1:2"])
def test_images_that_do_not(image: str) -> None:
    assert syntax.wrong_image(image) is not None


def test_names_of_jobs_become_names_of_objects() -> None:
    assert [syntax.as_name(name) for name in ("My_Job.v2", "2nd", "--x--")] == ["my-job-v2", "x2nd", "x"]
