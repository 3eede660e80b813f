"""ServeSpec → what the endpoint asks of the machines it is to run on, and its config for KubeRay's RayService."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import specfile
from cluster.errors import UserError
from cluster.work import Group, Place, ServiceWork
from serve.deploy.ray_serve_internals import CONTROLLER_ENV
from serve.deploy.times import LEAVE_S
from serve.engines import table
from serve.spec import LOOPBACK, ServeSpec

PORT = 8000
"""Where a RayService's gateways listen: the port named `serve`."""
APPLICATION, IMPORT_PATH = "tandem-up", "serve.deploy.kuberay:build"


def read(path: Path, overrides: Sequence[str], name: str | None = None) -> ServiceWork:
    """Read an endpoint's spec, and let it listen where a Kubernetes Service reaches it.

    Raises:
        UserError: the spec is wrong, or asks for what pods cannot give.
    """
    given = specfile.load(path, ServeSpec, overrides)
    spec, said = listening(given)
    if wrong := list(_mistakes(spec)):
        raise UserError("\n".join(f"{path}: {sentence}" for sentence in wrong))
    groups = [
        Group(f"models.{model}", wanted.at_start, wanted.resources.cpus_per_replica, wanted.resources.gpus_per_replica)
        for model, wanted in spec.models.items()
    ]
    return ServiceWork(
        name=name or spec.name,
        config=config(spec),
        port=spec.http.port or PORT,
        drain_s=spec.drain_s + LEAVE_S,
        groups=tuple(groups),
        places=tuple(_places(spec)),
        said=said,
    )


def listening(spec: ServeSpec) -> tuple[ServeSpec, tuple[str, ...]]:
    """Return the spec with a host and a port that a Service reaches, and what was changed, in sentences. Pure."""
    said, http = [], spec.http
    if http.host in LOOPBACK:
        said.append(f"http.host: 0.0.0.0 in the pods instead of {http.host}, which nobody outside of them reaches")
        http = http.model_copy(update={"host": "0.0.0.0"})
    if http.port is None:
        said.append(f"http.port: {PORT}")
        http = http.model_copy(update={"port": PORT})
    return spec.model_copy(update={"http": http}), tuple(said)


def config(spec: ServeSpec) -> Mapping[str, Any]:
    """Return what Ray Serve's REST API takes: one application that brings all others up (serve/deploy/kuberay.py)."""
    wanted = spec.model_dump(mode="json", exclude_unset=True)
    wanted["http"] = spec.http.model_dump(mode="json", exclude_none=True)
    return {
        "proxy_location": "Disabled",
        "controller_options": {"runtime_env": {"env_vars": CONTROLLER_ENV}},
        "applications": [
            {"name": APPLICATION, "route_prefix": None, "import_path": IMPORT_PATH, "args": {"spec": wanted}},
        ],
    }


def _mistakes(spec: ServeSpec) -> Iterator[str]:
    if spec.http.tls is not None:
        yield "http.tls: KubeRay asks gateways by plain http: let the ingress speak TLS, and leave it out"
    if spec.asks_for_keys and spec.keys.store is None:
        yield (
            "keys.store: callers need keys beyond loopback, and a file would be in one pod: name a PostgreSQL "
            "(postgresql://USER@HOST/DATABASE, its password as PGPASSWORD in a Secret), or say keys: {required: never}"
        )
    for name, model in spec.models.items():
        if table.is_own(model.engine.name):
            yield (
                f"models.{name}.engine: {model.engine.name} is code of your own, which a RayService does not carry: "
                "install it in the image, and deploy with `tandem serve up` on a RayCluster"
            )
    if (spec.http.port or PORT) < 1024:
        yield f"http.port: {spec.http.port} needs rights that pods have not: use one above 1023"


def _places(spec: ServeSpec) -> Iterator[Place]:
    for name, model in spec.models.items():
        if not model.model.startswith("models:/"):
            yield Place(f"models.{name}.model", os.path.expanduser(model.model))
