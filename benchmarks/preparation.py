"""Preparing text: MB/s, and the most memory that each process takes, beside Hugging Face's `datasets.map`.

    python benchmarks/preparation.py [--gb 0.2] [--processes 2] [--rounds 1] [--kinds tandem,datasets]
    python benchmarks/preparation.py --gb 1,4,16 --kinds tandem

Text of N GB is generated, one document a line of JSON (600 characters on average, words by Zipf's law; after the first
0.5 GB the same documents come again, each with a number of its own before it, so that none is the copy of another),
with a byte-level BPE of 8,192 tokens that was trained on some of it. Then, in turns, each as a process of its own:

    tandem    the preparation of a causal-lm job (jobs/data/prepare.py) by processes of this machine: check, hash,
              split, encode, pack into rows of 513 tokens, write Arrow files with their digests
    datasets  load_dataset("json"), map(tokenise, batched), map(pack, batched, rows of 513 tokens), save_to_disk
    tasks     as `tandem`, by tasks of a Ray cluster on this machine
    raydata   the work of `datasets` by Ray Data: read_json, map_batches twice, write_parquet

All with the same tokenizer and as many processes. Memory is the largest VmHWM of the process that began and of each of
its children, which counts pages of mapped files as well; `own` is the largest RssAnon seen, without these. CPU seconds
are those of the process and of children that it has waited for: not of Ray's workers. With several sizes, the last
lines give each kind's memory and rate at the largest size over those at the smallest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

LENGTH = 512
LOOK_S = 0.2
DRAWN_BYTES = 500_000_000
MEMORY = ("first_mb", "first_own_mb", "child_mb", "child_own_mb")


def generate(path: Path, size: int) -> None:
    """Write about `size` bytes of documents: drawn ones, then the same with other numbers."""
    drawn = min(size, DRAWN_BYTES)
    number, written = draw_documents(path, drawn), path.stat().st_size
    with path.open("rb") as first, path.open("ab") as file:
        while written < size:
            line = first.readline() if first.tell() < drawn else b""
            if not line:
                first.seek(0)
                continue
            again = b'{"text": "%d%s' % (number, line[line.index(b". ") :])
            file.write(again)
            written, number = written + len(again), number + 1


def draw_documents(path: Path, size: int) -> int:
    """Write about `size` bytes of documents that are drawn; return how many they are."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [1 / rank for rank in range(1, len(letters) + 1)]
    words = ["".join(draw.choices(letters, weights, k=draw.randint(2, 10))) for _ in range(50_000)]
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    written, number = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            stream = draw.choices(words, shares, k=200_000)
            at = 0
            while at < len(stream):
                count = draw.randint(20, 200)
                line = json.dumps({"text": f"{number}. " + " ".join(stream[at : at + count]).capitalize() + "."}) + "\n"
                file.write(line)
                written, at, number = written + len(line), at + count, number + 1
    return number


def train_tokenizer(path: Path, folder: Path) -> None:
    """Train the tokenizer that both use on the first lines."""
    from jobs.tasks import tokenization

    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(10_000), file, strict=False)]
    tokenization.train("bpe", 8192, texts).save_pretrained(folder)


def by_tandem(folder: Path, processes: int) -> None:
    """Prepare the text as a job does, with as many processes as this one may use CPUs."""
    from jobs.data import prepare
    from jobs.data.ranges import Sizes
    from jobs.spec import JobSpec

    spec = {
        "name": "x",
        "phase": "pretrain",
        "task": {"name": "causal-lm", "sequence_length": LENGTH, "tokenizer": {"from": str(folder / "tokenizer")}},
        "model": {"architecture": "llama"},
        "data": {"train": "text.jsonl", "eval_fraction": 0.01},
        "training": {"steps": 1},
    }
    _on(processes)
    checked, sizes = JobSpec.model_validate(spec), Sizes(spread_bytes=0)
    made = prepare.prepare(checked, folder, folder / "made", parent=None, on_progress=lambda *_: None, sizes=sizes)
    print(json.dumps({"tokens": (made.train_rows + made.eval_rows) * LENGTH}))


def _on(processes: int) -> None:
    """Leave this process so many CPUs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processes])


def by_tasks(folder: Path, processes: int) -> None:
    """Prepare the text as a job does on a cluster of so many CPUs."""
    _connect(processes)
    by_tandem(folder, processes)


def _connect(processes: int) -> None:
    import ray

    shipped = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=processes, runtime_env=shipped, **quiet)


def by_raydata(folder: Path, processes: int) -> None:
    """Tokenise and pack as `by_datasets` does, in blocks of a cluster of so many CPUs."""
    import numpy as np
    import pyarrow
    import ray

    _connect(processes)
    ray.data.DataContext.get_current().enable_progress_bars = False
    place = str(folder / "tokenizer")

    def loaded() -> Any:
        import transformers

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if not hasattr(transformers, "of_this_worker"):  # what is pickled into a task is new in each
            transformers.of_this_worker = transformers.AutoTokenizer.from_pretrained(place)
        return transformers.of_this_worker

    def tokenise(batch: pyarrow.Table) -> pyarrow.Table:
        texts, tokenizer = batch.column("text").to_pylist(), loaded()
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return pyarrow.table({"input_ids": [[*each, tokenizer.eos_token_id] for each in ids]})

    def pack(batch: pyarrow.Table) -> pyarrow.Table:
        stream = batch.column("input_ids").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        count = (len(stream) - 1) // LENGTH
        rows = np.lib.stride_tricks.sliding_window_view(stream, LENGTH + 1)[: count * LENGTH : LENGTH]
        return pyarrow.table({"input_ids": list(rows)})

    data = ray.data.read_json(str(folder / "text.jsonl"), lines=True)
    tokens = data.map_batches(tokenise, batch_format="pyarrow", batch_size=1000)
    tokens.map_batches(pack, batch_format="pyarrow", batch_size=1000).write_parquet(str(folder / "made" / "rows"))
    rows = ray.data.read_parquet(str(folder / "made" / "rows")).count()
    print(json.dumps({"tokens": rows * LENGTH}))


def by_datasets(folder: Path, processes: int) -> None:
    """Tokenise and pack as the examples of transformers do (run_clm.py)."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*each, tokenizer.eos_token_id] for each in ids]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = [token for ids in batch["input_ids"] for token in ids]
        return {"input_ids": [stream[at : at + LENGTH + 1] for at in range(0, len(stream) - LENGTH, LENGTH)]}

    text = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), cache_dir=str(folder / "made"))["train"]
    tokens = text.map(tokenise, batched=True, num_proc=processes, remove_columns=["text"])
    rows = tokens.map(pack, batched=True, num_proc=processes)
    rows.save_to_disk(folder / "made" / "rows", num_proc=processes)
    print(json.dumps({"tokens": len(rows) * LENGTH}))


ON_RAY = ("tasks", "raydata")
KINDS = {"tandem": by_tandem, "datasets": by_datasets, "tasks": by_tasks, "raydata": by_raydata}


def watched(command: list[str]) -> dict[str, float]:
    """Run a process; return its seconds and the most memory of it and of its largest child, in MB."""
    began, before = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    most: dict[tuple[bool, str], float] = {}
    while process.poll() is None:
        time.sleep(LOOK_S)
        for pid in [process.pid, *_children(process.pid)]:
            for name, value in _memory(pid).items():
                key = (pid == process.pid, name)
                most[key] = max(most.get(key, 0.0), value)
    said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    names = {(True, "VmHWM"): "first_mb", (True, "RssAnon"): "first_own_mb"}
    names |= {(False, "VmHWM"): "child_mb", (False, "RssAnon"): "child_own_mb"}
    found = {name: most.get(key, 0.0) for key, name in names.items()}
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - before}
    return {**spent, **found, **json.loads(said.splitlines()[-1])}


def _cpu_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _memory(pid: int) -> dict[str, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if line.startswith(("VmHWM", "RssAnon"))}


def compare(folder: Path, gb: float, processes: int, rounds: int, kinds: list[str]) -> dict[str, dict[str, float]]:
    """Print a line for each run, and the first one's best over that of each other; return what each kind took."""
    generate(folder / "text.jsonl", int(gb * 1e9))
    train_tokenizer(folder / "text.jsonl", folder / "tokenizer")
    size, took = (folder / "text.jsonl").stat().st_size, dict[str, dict[str, float]]()
    for kind in kinds * rounds:
        command = [sys.executable, __file__, "--as", kind, "--folder", str(folder), "--processes", str(processes)]
        found = watched(command)
        shutil.rmtree(folder / "made", ignore_errors=True)
        found["rate"] = size / 1e6 / found["seconds"]
        found["per_cpu"] = 0.0 if kind in ON_RAY else size / 1e6 / found["cpu_seconds"]
        took[kind] = {name: max(value, took.get(kind, {}).get(name, 0.0)) for name, value in found.items()}
        memory = ", ".join(f"{name} {found[name]:.0f}" for name in MEMORY)
        by_cpu = f" {found['per_cpu']:6.1f} MB a CPU second" if found["per_cpu"] else ""
        print(f"{kind:9s} {size / 1e9:.2f} GB {found['seconds']:7.1f} s {found['rate']:6.1f} MB/s{by_cpu}", end="  ")
        print(f"{memory}  tokens {found['tokens']}", flush=True)
    for other in kinds[1:]:
        first, second = took[kinds[0]], took[other]
        both = first["per_cpu"] and second["per_cpu"]
        by_cpu = f", {first['per_cpu'] / second['per_cpu']:.2f} in MB a CPU second" if both else ""
        print(f"{kinds[0]} / {other}: {first['rate'] / second['rate']:.2f} in MB/s{by_cpu}", flush=True)
    return took


def print_growth(sizes: list[float], took: list[dict[str, dict[str, float]]]) -> None:
    """Print what each kind took at the largest size over what it took at the smallest."""
    least, most = sizes.index(min(sizes)), sizes.index(max(sizes))
    for kind in took[least]:
        small, large = took[least][kind], took[most][kind]
        ratios = [f"{name} {large[name] / small[name]:.2f}" for name in ("rate", *MEMORY) if small[name]]
        print(f"{kind}: {sizes[most]:g} GB / {sizes[least]:g} GB: {', '.join(ratios)}")


def main() -> None:
    """Compare; or be one of those that are compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", default="0.2", help="a size, or several with commas between")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kinds", default="tandem,datasets", help=f"of {', '.join(KINDS)}, with commas between")
    parser.add_argument("--as", dest="kind", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        KINDS[arguments.kind](arguments.folder, arguments.processes)
        return
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    sizes, took = [float(each) for each in arguments.gb.split(",")], []
    for gb in sizes:
        with tempfile.TemporaryDirectory() as folder:
            took.append(compare(Path(folder), gb, arguments.processes, arguments.rounds, kinds))
    if len(sizes) > 1:
        print_growth(sizes, took)


if __name__ == "__main__":
    main()
