"""Where Ray Serve listens: chosen once, when it starts, because a running Serve cannot move."""

from __future__ import annotations

import errno
import socket
from typing import Any

from ray import serve as ray_serve

from cluster.errors import UserError
from serve.deploy.ray_serve_internals import running_client
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
    host, port = http.host, free_port(http)
    location = "HeadOnly" if http.proxies == "head" else "EveryNode"
    ray_serve.start(proxy_location=location, http_options={"host": host, "port": port})
    return host, port


def running_address(running: Any, wanted: HttpSpec) -> tuple[str, int]:
    if running.host != wanted.host or wanted.port not in (None, running.port):
        asked = f"{wanted.host}:{wanted.port or DEFAULT_PORT}"
        raise UserError(
            f"Ray Serve already listens on {running.host}:{running.port}, the spec asks for {asked}: its address "
            "cannot change while it runs; run `tandem serve down` first, or leave http.host and http.port out"
        )
    return running.host, running.port


def free_port(http: HttpSpec, first: int = DEFAULT_PORT) -> int:
    """Return the port the spec names, or else the first free one from `first` on."""
    for port in [http.port] if http.port is not None else range(first, first + PORTS_TRIED):
        refused = _refusal(http.host, port)
        if refused is None:
            return port
        if not _is_taken(refused):
            raise UserError(_why(http.host, port, refused))
    if http.port is not None:
        raise UserError(f"http.port {http.port} on {http.host} is taken: name another one, or none for a free one")
    raise UserError(f"no free port on {http.host} from {first} to {first + PORTS_TRIED - 1}")


def _refusal(host: str, port: int) -> OSError | UnicodeError | None:
    """Return why the system would not let a server listen there, or None where it would."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be a host's
        return error
    return None


def _is_taken(refused: OSError | UnicodeError) -> bool:
    return isinstance(refused, OSError) and refused.errno == errno.EADDRINUSE


def _why(host: str, port: int, refused: OSError | UnicodeError) -> str:
    """Say what is wrong with an address that no other port number, or only a higher one, would mend."""
    if isinstance(refused, PermissionError):
        return f"http.port {port} on {host}: this user may not listen there; name a port from 1024 on"
    reason = (refused.strerror if isinstance(refused, OSError) else None) or str(refused)
    return f"http.host {host}: the head node cannot listen on it ({reason}); name one of its addresses, or 0.0.0.0"


def is_running() -> bool:
    """Tell whether this cluster has a Serve controller."""
    return running_client() is not None
