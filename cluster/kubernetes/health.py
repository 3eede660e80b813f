"""The probes of Ray's pods: does this node's raylet answer, on the head the GCS, and does a gateway?

    python -m cluster.kubernetes.health --head
    python -m cluster.kubernetes.health --serve 8000                       a gateway has to answer here
    python -m cluster.kubernetes.health --head --serve-if-listening 8000   one that listens has to answer

It exits with 0 or 1 and says why. Only the standard library is imported: a kubelet runs it every few seconds.
"""

from __future__ import annotations

import argparse
import http.client
import sys

AGENT_PORT, DASHBOARD_PORT = 52365, 8265
RAYLET_PATH, GCS_PATH, SERVE_PATH = "/api/local_raylet_healthz", "/api/gcs_healthz", "/-/healthz"
SUCCESS = "success"
"""What each of the three answers, and begins with."""
TIMEOUT_S = 3.0


def answer(port: int, path: str) -> str | None:
    """Return what a server of this pod answers, with its status where that is not 200; None: nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(1000).decode("utf-8", "replace").strip()
        return text if response.status == 200 else f"{response.status} {text}"
    except ConnectionRefusedError:
        return None
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()


def wrong(name: str, said: str | None, *, must_listen: bool = True) -> str | None:
    """Return what is wrong, in a sentence; None: nothing. Pure."""
    if said is None:
        return f"{name} does not listen" if must_listen else None
    return None if said.startswith(SUCCESS) else f"{name}: {said[:200]}"


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.kubernetes.health", description="Probe this pod.")
    parser.add_argument("--head", action="store_true", help="the GCS too")
    parser.add_argument("--serve", type=int, metavar="PORT", help="a gateway must answer on this port")
    parser.add_argument("--serve-if-listening", type=int, metavar="PORT", help="one that listens must answer")
    parser.add_argument("--agent-port", type=int, default=AGENT_PORT)
    parser.add_argument("--dashboard-port", type=int, default=DASHBOARD_PORT)
    options = parser.parse_args(arguments)
    found = [wrong("raylet", answer(options.agent_port, RAYLET_PATH))]
    if options.head:
        found.append(wrong("GCS", answer(options.dashboard_port, GCS_PATH)))
    if options.serve:
        found.append(wrong("gateway", answer(options.serve, SERVE_PATH)))
    if options.serve_if_listening:
        found.append(wrong("gateway", answer(options.serve_if_listening, SERVE_PATH), must_listen=False))
    said = [sentence for sentence in found if sentence]
    if said:
        print("; ".join(said))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
