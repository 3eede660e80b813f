"""Where the gateways listen: chosen by `serve up`, before any of them is there."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from ray import serve as ray_serve

from cluster import topology
from cluster.errors import UserError
from cluster.ports import Claims
from serve.deploy.ray_serve_internals import running_client
from serve.deploy.where import Address
from serve.served import PORT_BEFORE
from serve.spec import HttpSpec

DEFAULT_PORT = 8000
PORTS_TRIED = 100


def start_serve() -> None:
    """Start Ray Serve without proxies, unless it runs: a user's own applications may need theirs."""
    if running_client() is None:
        ray_serve.start(proxy_location="Disabled")


def choose(http: HttpSpec, running: Address | None, claims: Claims) -> Address:
    """Return where the gateways of a spec shall listen: where those that run do, unless the spec says otherwise.

    Args:
        claims: held until they listen, so that an endpoint which another cluster on this machine brings up meanwhile
            gets another port.

    Raises:
        UserError: nothing can listen there.
    """
    certificate = http.tls.certificate if http.tls else None
    if running is not None and http.port in (None, running.port):
        return Address(http.host, running.port, certificate)
    return Address(http.host, free_port(http, claims, before=os.environ.get(PORT_BEFORE, "")), certificate)


def placement(http: HttpSpec) -> dict[str, Any]:
    """Return what ties gateways to the nodes that are to listen."""
    return {"resources": {topology.HEAD_RESOURCE: 0.001}} if http.proxies == "head" else {}


def free_port(http: HttpSpec, claims: Claims, first: int = DEFAULT_PORT, before: str = "") -> int:
    """Return the port the spec names, or else that of `before`, or else the first free one from `first` on; claim it.

    Raises:
        UserError: the port or the host cannot be listened on; why, and what to change.
    """
    if http.port is not None:
        if mistake := _mistake(http.host, http.port) if claims.take(http.port) else CLAIMED:
            raise UserError(f"http.port {http.port} on {http.host} {mistake}")
        return http.port
    for port in [*([int(before)] if before.isdigit() else []), *range(first, first + PORTS_TRIED)]:
        mistake = _mistake(http.host, port) if claims.take(port) else TAKEN
        if mistake is None:
            return port
        if mistake != TAKEN:
            raise UserError(f"http.host {http.host} {mistake}")
    raise UserError(f"no free port on {http.host} from {first} to {first + PORTS_TRIED - 1}")


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """Say why a gateway does not listen where it was to."""
    if isinstance(error, socket.gaierror):
        return f"http.host {host} {NO_NAME}"
    return f"http.port {port} on {host} {MISTAKES.get(error.errno or 0, f'cannot be listened on: {error.strerror}')}"


TAKEN = "is taken: name another one, or none for a free one"
CLAIMED = "is about to be listened on by another start: name another one, or none for a free one"
NO_NAME = "is no address, and no name that can be resolved here"
MISTAKES = {
    errno.EADDRINUSE: TAKEN,
    errno.EACCES: "may not be listened on by this user: ports below 1024 need rights, so name a higher one",
    errno.EADDRNOTAVAIL: "is no address of the node where the gateway listens: name one of its own, or 0.0.0.0 for all",
}


def _mistake(host: str, port: int) -> str | None:
    """Say why nothing can listen there; None: something can.

    Without SO_REUSEPORT, so that a port is found taken that others of the same user share.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return NO_NAME
        except OSError as error:
            return MISTAKES.get(error.errno or 0, f"cannot be listened on: {error.strerror}")
    return None


def is_running() -> bool:
    """Tell whether this cluster has a Serve controller."""
    return running_client() is not None
