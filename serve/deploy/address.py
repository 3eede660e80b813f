"""Where Ray Serve listens: chosen once, when it starts, because a running Serve cannot move."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayTaskError

from cluster.errors import UserError
from serve.deploy.ray_serve_internals import running_client
from serve.served import PORT_BEFORE
from serve.shortfalls import SILENT
from serve.spec import HttpSpec

ANY = ("0.0.0.0", "::")
DEFAULT_PORT = 8000
PORTS_TRIED = 100


def start(http: HttpSpec) -> tuple[str, int]:
    """Start Serve's controller and proxies, or check that those which run listen where the spec says."""
    client = running_client()
    if client is not None and not ray_serve.status().applications:
        ray_serve.shutdown()  # left over without an application: its address binds nobody
        client = None
    if client is not None:
        return running_address(client.http_config, http)
    host, port = http.host, free_port(http, before=os.environ.get(PORT_BEFORE, ""))
    try:
        ray_serve.start(proxy_location=location_of(http), http_options={"host": host, "port": port})
    except RayTaskError as error:  # the head's proxy: somebody took the port since it was looked at
        ray_serve.shutdown()
        raise UserError(f"Ray Serve cannot listen on {host}:{port}: {str(error.cause or error).strip()}") from None
    return host, port


def running_address(running: Any, wanted: HttpSpec) -> tuple[str, int]:
    if running.host != wanted.host or wanted.port not in (None, running.port):
        asked = f"{wanted.host}:{wanted.port or DEFAULT_PORT}"
        raise UserError(
            f"Ray Serve already listens on {running.host}:{running.port}, the spec asks for {asked}: its address "
            "cannot change while it runs; run `tandem serve down` first, or leave http.host and http.port out"
        )
    location = location_of(wanted)
    if "proxies" in wanted.model_fields_set and str(running.location.value) != location:
        raise UserError(
            f"Ray Serve runs with {running.location.value} proxies, and http.proxies: {wanted.proxies} asks for "
            f"{location}: that cannot change while it runs; run `tandem serve down` first, or leave http.proxies out"
        )
    return running.host, running.port


def location_of(http: HttpSpec) -> str:
    """Return what Ray Serve calls the nodes that listen."""
    return "HeadOnly" if http.proxies == "head" else "EveryNode"


def free_port(http: HttpSpec, first: int = DEFAULT_PORT, before: str = "") -> int:
    """Return the port the spec names, or else that of `before`, or else the first free one from `first` on.

    Raises:
        UserError: the port or the host cannot be listened on; why, and what to change.
    """
    if http.port is not None:
        if mistake := _mistake(http.host, http.port):
            raise UserError(f"http.port {http.port} on {http.host} {mistake}")
        return http.port
    for port in [*([int(before)] if before.isdigit() else []), *range(first, first + PORTS_TRIED)]:
        mistake = _mistake(http.host, port)
        if mistake is None:
            return port
        if mistake != TAKEN:
            raise UserError(f"http.host {http.host} {mistake}")
    raise UserError(f"no free port on {http.host} from {first} to {first + PORTS_TRIED - 1}")


TAKEN = "is taken: name another one, or none for a free one"
MISTAKES = {
    errno.EADDRINUSE: TAKEN,
    errno.EACCES: "may not be listened on by this user: ports below 1024 need rights, so name a higher one",
    errno.EADDRNOTAVAIL: "is no address of the node where Ray Serve listens: name one of its own, or 0.0.0.0 for all",
}


def _mistake(host: str, port: int) -> str | None:
    """Say why nothing can listen there; None: something can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return "is no address, and no name that can be resolved here"
        except OSError as error:
            return MISTAKES.get(error.errno or 0, f"cannot be listened on: {error.strerror}")
    return None


def silent_proxies(proxies: dict[str, Any]) -> list[str]:
    """Return the ids of the nodes whose proxy does not listen (yet). Pure.

    One whose port is taken is started again and again, and is STARTING most of the time.
    """
    return sorted(node for node, status in proxies.items() if str(status.value) in SILENT)


def is_running() -> bool:
    """Tell whether this cluster has a Serve controller."""
    return running_client() is not None
