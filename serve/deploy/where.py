"""Where the gateways of an endpoint listen, as plain data: nothing of Ray is imported."""

from __future__ import annotations

from typing import NamedTuple

ANY = ("0.0.0.0", "::")
"""Hosts that mean all addresses of a node."""


class Address(NamedTuple):
    """Where gateways listen."""

    host: str
    port: int
    certificate: str | None = None
    """The file of the certificate where they speak TLS, on their nodes."""

    def url(self, node_ip: str) -> str:
        """Return the endpoint. `node_ip`: of a node that listens, for a host that means all of its addresses."""
        host = node_ip if self.host in ANY else self.host
        return f"http{'s' if self.certificate else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"
