"""How fast phase `predict` is beside the plain loop: `task.predict` over the same rows, in one process.

    python benchmarks/predict.py MODEL DATA [--workers 1 2] [--batch 32]

MODEL is a model directory of a task that answers at once, DATA a file of rows. Both are read as a job reads them; the
loop reads, predicts in batches of the same size and writes JSON lines. A running cluster is needed (`tandem cluster
up`). The job's seconds are those from its first reading to its output (start and import of workers included); rows/s
at work are those that it tells when the last row is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jobs import submit  # noqa: E402
from jobs.data import sources  # noqa: E402
from jobs.data.examples import Example  # noqa: E402
from jobs.predict.columns import json_line  # noqa: E402
from jobs.progress import Progress  # noqa: E402
from jobs.tasks import get  # noqa: E402
from tracking import manifest  # noqa: E402


def plain(model: Path, task_options: dict[str, str], data: Path, rows: int, batch: int, output: Path) -> float:
    """Predict for the first rows in a loop; return the seconds of it, loading the model not among them."""
    import torch

    kind = get(manifest.read(model).task)
    task = kind.load(model, task_options)
    network = task.load_model(model, torch.float32)
    torch.set_num_threads(1)
    began = time.monotonic()
    waiting: list[Example] = []
    with output.open("w", encoding="utf-8") as file, torch.inference_mode():

        def flush() -> None:
            answers = task.predict(network, [task.instance(row) for row in waiting])
            file.writelines(f"{json_line({**row, **said})}\n" for row, said in zip(waiting, answers, strict=True))
            waiting.clear()

        for row in sources.open_source(str(data), data.parent).examples(rows):
            waiting.append(row)
            if len(waiting) == batch:
                flush()
        flush()
    return time.monotonic() - began


def job(model: Path, task: dict[str, str], data: Path, workers: int, batch: int, folder: Path) -> tuple[float, float]:
    """Run the phase; return its seconds, and its rows per second at work."""
    spec = {
        "name": f"predict-{workers}",
        "phase": "predict",
        "task": task,
        "model": {"from": str(model.absolute())},
        "data": {"predict": str(data.absolute())},
        "predict": {"output": str(folder / f"{workers}.jsonl"), "batch_size": batch, "precision": "fp32"},
        "resources": {"workers": workers},
        "storage": str(folder / "storage"),
    }
    path = folder / f"predict-{workers}.yaml"
    path.write_text(yaml.safe_dump(spec))
    rates = [0.0]

    def on_line(line: str, meaning: Progress | None) -> None:
        if meaning is not None and "rows_per_second" in meaning.values:
            rates.append(meaning.values["rows_per_second"])

    outcome = submit.follow(submit.submit(path, []), on_line)
    if outcome.status != "SUCCEEDED":
        raise SystemExit("\n".join(outcome.log))
    seconds = json.loads(Path(outcome.result["manifest"]).read_text())["seconds"]
    return seconds, rates[-1]


def main() -> None:
    """Print a line for the loop, and one for each number of workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--text-column", help="of a task that reads texts")
    options = parser.parse_args()
    name = manifest.read(options.model).task
    task_options = {"text_column": options.text_column} if options.text_column else {}
    rows = sum(1 for _ in sources.open_source(str(options.data), options.data.parent).examples())
    with tempfile.TemporaryDirectory(prefix="tandem-predict-") as place:
        folder = Path(place)
        loop_s = plain(options.model, task_options, options.data, rows, options.batch, folder / "plain.jsonl")
        print(f"plain loop, 1 process   {rows} rows  {loop_s:7.2f} s  {rows / loop_s:9,.0f} rows/s", flush=True)
        for workers in options.workers:
            told = job(options.model, {"name": name, **task_options}, options.data, workers, options.batch, folder)
            print(
                f"phase predict, {workers} workers {rows} rows  {told[0]:7.2f} s  {told[1]:9,.0f} rows/s at work",
                flush=True,
            )


if __name__ == "__main__":
    main()
