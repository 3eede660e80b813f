"""An endpoint as one application of a Serve config, which is all that KubeRay's RayService can deploy:

    applications: [{name: tandem-up, import_path: serve.deploy.kuberay:build, args: {spec: {models: …}}}]

The application has one replica, on the head, that takes no requests. It runs `serve.deploy.app up` as `tandem serve up`
would, in a process of its own, and is ready when the endpoint is: so a RayService is healthy when its models are, and
not before. The gateway and the models are applications of their own, as anywhere else, and KubeRay sees them too. A
changed spec in the config runs `up` again, which replaces what has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve as ray_serve

from cluster import topology
from cluster.ray_process_internals import JOB_MARKER, RAYLET_PID
from serve.deploy.names import log_with_serve
from serve.endpoints import MARK
from serve.spec import ServeSpec

logger = logging.getLogger(__name__)
DEPLOYMENT = "Up"
AGAIN_S = 5.0
"""A spec that does not fit yet, since pods are still on their way, is tried again after so long."""
NO_ROOM = "can never fit"
"""What `up` says of it; the cluster that says so may still grow."""


class UpFailed(RuntimeError):
    """The endpoint could not be brought up; the message is what `tandem serve up` would say."""


def build(arguments: dict[str, Any]) -> ray_serve.Application:
    """Return the application. A wrong spec is an error here, which the RayService's status shows.

    Args:
        arguments: `spec`: the endpoint's spec, as `tandem serve up` takes it.
    """
    spec = ServeSpec.model_validate(arguments["spec"])
    deployment = ray_serve.deployment(Up).options(
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {topology.HEAD_RESOURCE: 0.001}},
        user_config={"spec": spec.model_dump_json(exclude_unset=True)},
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(spec.start_timeout_s)


class Up:
    """Brings the endpoint up when it starts and whenever its spec changes."""

    def __init__(self, start_timeout_s: float) -> None:
        log_with_serve()
        self._timeout_s = start_timeout_s

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve waits for this: with the first replica before the application is RUNNING.

        Raises:
            UpFailed: with the sentence that `tandem serve up` would end with.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        while True:
            try:
                outcome = await bring_up(user_config["spec"])
                break
            except UpFailed as error:
                if NO_ROOM not in str(error) or asyncio.get_running_loop().time() > deadline:
                    raise
                logger.info("waiting for nodes: %s", error)
                await asyncio.sleep(AGAIN_S)
        logger.info("up: %s", outcome)


async def bring_up(spec: str) -> dict[str, Any]:
    """Run `serve.deploy.app up` to its end and return its outcome.

    Raises:
        UpFailed: it ended with an error, or without an outcome.
    """
    address = ray.get_runtime_context().gcs_address
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serve.deploy.app", "up", spec,
        env=driver_environment(os.environ, address), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = await _read(process)
        await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
    return outcome(said)


def driver_environment(own: Mapping[str, str], address: str) -> dict[str, str]:
    """Return the environment of a driver of its own: this replica's, without what makes it a worker. Pure."""
    kept = {name: value for name, value in own.items() if name not in WORKERS_OWN}
    return {**kept, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}


WORKERS_OWN = (RAYLET_PID, JOB_MARKER)
"""Variables of a worker, which a driver takes for its own."""


def outcome(lines: list[str]) -> dict[str, Any]:
    """Read what `up` has printed. Pure.

    Raises:
        UpFailed: it says an error, asks for code that a config does not carry, or says nothing.
    """
    for line in lines:
        if not line.startswith(MARK):
            continue
        message = json.loads(line[len(MARK) :])
        if "error" in message:
            raise UpFailed(message["error"])
        if "outcome" in message:
            found = dict(message["outcome"])
            if "code_wanted" in found:
                raise UpFailed(f"{found['code_wanted']} is code of your own: install it in the image")
            return found
    raise UpFailed("\n".join(["`up` ended without a word of its outcome:", *lines[-20:]]))


async def _read(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stdout is not None
    lines = []
    async for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip("\n")
        lines.append(line)
        if line.startswith(MARK) and "progress" in (message := json.loads(line[len(MARK) :])):
            logger.info("%s", message["progress"])
    return lines
