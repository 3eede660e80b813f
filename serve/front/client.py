"""How Tandem's own commands ask an endpoint: past any proxy, and trusting its own certificate."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from serve.front import tls

TIMEOUT_S = 10.0


def get(url: str, certificate: str | None = None, bearer: str | None = None) -> bytes | None:
    """Return the body of a 200; None for another answer, or none.

    Args:
        certificate: file of the endpoint's own certificate; where it is not on this machine, or None, the machine's
            authorities decide.
        bearer: secret to send along.
    """
    try:
        return _asked(url, certificate, bearer)
    except (urllib.error.URLError, OSError):
        return None


def answers(address: str, certificate: str | None = None) -> bool:
    """Tell whether a gateway at `host:port` answers, whether or not its models are ready."""
    host, _, port = address.rpartition(":")
    url = f"http{'s' if certificate else ''}://{f'[{host}]' if ':' in host else host}:{port}/health"
    try:
        _asked(url, certificate, None)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def trust(certificate: str | None) -> ssl.SSLContext:
    """Return what a client needs to reach an endpoint by TLS."""
    here = certificate is not None and Path(certificate).is_file()
    return tls.trusting(str(certificate)) if here else ssl.create_default_context()


def _asked(url: str, certificate: str | None, bearer: str | None) -> bytes:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {bearer}"} if bearer else {})
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=trust(certificate)))
    with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S) as response:
        body: bytes = response.read()
        return body
