"""The shipped table specs beside scikit-learn's gradient boosting, on the same splits.

    python benchmarks/tables.py [--seeds 8] [--architecture ft-transformer]

For each spec and each `data.split_seed`, the rows that a job would hold out are held out; the task's own network is
trained by the spec's settings, in one process and without DeepSpeed, and HistGradientBoosting with its defaults (it
takes missing values and categories as they are), once as it is and once stopped early. Printed: AUC or R2 of each on
the held-out rows, by seed and on average, so that no split is chosen, and the seconds that training took.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import r2_score, roc_auc_score

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from cluster import specfile  # noqa: E402
from jobs.data.corpora import BUILT_IN  # noqa: E402
from jobs.data.examples import Example  # noqa: E402
from jobs.data.splitting import content_of, held_out  # noqa: E402
from jobs.spec import JobSpec  # noqa: E402
from jobs.tasks import Columns, get  # noqa: E402
from jobs.tasks.tabular import Tabular  # noqa: E402
from jobs.worker.schedules import learning_rate  # noqa: E402

SPECS = ("breast-cancer", "diabetes")


def split(spec: JobSpec, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the rows that a job with this `data.split_seed` trains on, and those that it holds out."""
    (name,) = [spec.data.train] if isinstance(spec.data.train, str) else spec.data.train or []
    rows = [row for row in BUILT_IN[name]().read() if isinstance(row, Example)]
    task = get(spec.task.name)(spec.task.options)
    contents = np.array([content_of(task.content(row)) for row in rows], dtype=np.uint64)
    held = held_out(contents, spec.data.eval_fraction, seed)
    return [row for row, out in zip(rows, held, strict=True) if not out], [
        row for row, out in zip(rows, held, strict=True) if out
    ]


def network(spec: JobSpec, train: Sequence[Example], held: Sequence[Example], config: dict[str, Any]) -> float:
    """Train as the spec says; return AUC or R2 on the held-out rows."""
    task = get(spec.task.name)(spec.task.options)
    assert isinstance(task, Tabular)
    task.fit(task.observe(train))
    rows, training = task.encode(train), spec.training
    assert training is not None
    assert training.epochs is not None
    torch.manual_seed(training.seed)
    model = task.build(config["architecture"], config["config"]).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=training.betas, eps=training.epsilon)
    steps = max(1, round(training.epochs * len(train) / training.global_batch_size))
    for step, chosen in enumerate(_batches(len(train), training.global_batch_size, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, steps)
        total, count = task.loss(model, task.collate({name: column[chosen] for name, column in rows.items()}))
        optimizer.zero_grad()
        (total / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
    return _scored(task, model.eval(), task.encode(held))


def _batches(rows: int, size: int, steps: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    order = np.concatenate([draw.permutation(rows) for _ in range(-(-steps * size // rows))])
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def _scored(task: Tabular, model: torch.nn.Module, rows: Columns) -> float:
    with torch.no_grad():
        found = task.measure(model, task.collate(rows))
    scores, truths = found["scores"].numpy(), found["truths"].numpy()
    return float(roc_auc_score(truths, scores[:, 1]) if task.kind == "classification" else r2_score(truths, scores))


def boosting(spec: JobSpec, train: Sequence[Example], held: Sequence[Example], early: bool) -> float:
    """Fit gradient boosting with its defaults; return AUC or R2 on the held-out rows."""
    target = spec.task.options["target_column"]
    names = [name for name in train[0] if name != target]
    (x, y), (seen, truth) = (
        (np.array([[row[name] for name in names] for row in part]), np.array([row[target] for row in part]))
        for part in (train, held)
    )
    if y.dtype.kind == "f":
        fitted = HistGradientBoostingRegressor(random_state=0, early_stopping=early).fit(x, y)
        return float(r2_score(truth, fitted.predict(seen)))
    tree = HistGradientBoostingClassifier(random_state=0, early_stopping=early).fit(x, y)
    return float(roc_auc_score(truth == tree.classes_[1], tree.predict_proba(seen)[:, 1]))


def compared(name: str, seeds: int, architecture: str | None) -> None:
    """Print one spec's figures."""
    spec = specfile.load(ROOT / "jobs" / "specs" / f"{name}.yaml", JobSpec)
    assert spec.model is not None
    config: dict[str, Any] = {"architecture": spec.model.architecture, "config": spec.model.config}
    if architecture is not None:
        config = {"architecture": architecture, "config": {}}
    found: dict[str, list[float]] = {"ours": [], "boosting": [], "stopped early": []}
    took = 0.0
    for seed in range(seeds):
        train, held = split(spec, seed)
        began = time.perf_counter()
        found["ours"].append(network(spec, train, held, config))
        took += time.perf_counter() - began
        found["boosting"].append(boosting(spec, train, held, early=False))
        found["stopped early"].append(boosting(spec, train, held, early=True))
    measure = "AUC" if name == "breast-cancer" else "R2"
    print(f"{name}: {measure} of {len(held)} held-out rows, data.split_seed 0 to {seeds - 1}")
    for what, values in found.items():
        each = " ".join(f"{value:.4f}" for value in values)
        print(f"  {what:14} mean {np.mean(values):.4f}  least {min(values):.4f}  {each}")
    print(f"  {took / seeds:.1f} s of training each, {config['architecture']}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--architecture", default=None, help="the network, with its defaults; left out: the spec's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in SPECS:
        compared(name, options.seeds, options.architecture)


if __name__ == "__main__":
    main()
