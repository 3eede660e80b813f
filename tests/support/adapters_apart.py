"""A model whose adapters have learned, written apart from their base and merged, as a worker and the driver do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from jobs.spec import LoraSpec
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import apart
from jobs.worker.export import DTYPES, export
from jobs.worker.lora import add_lora
from tracking import manifest

TARGETS = {
    "all-linear": lambda is_gpt2: "all-linear",
    "head": lambda is_gpt2: ["lm_head"],
    "both": lambda is_gpt2: ["c_attn" if is_gpt2 else "q_proj", "wte" if is_gpt2 else "embed_tokens", "lm_head"],
}


def trained(parent: Path, targets: str, seed: int = 1) -> tuple[CausalLM, Any, LoraSpec]:
    """Return an adapted model whose adapters have learned."""
    is_gpt2 = json.loads((parent / "config.json").read_text())["model_type"] == "gpt2"
    lora = LoraSpec.model_validate({"rank": 3, "target_modules": TARGETS[targets](is_gpt2), "merge": False})
    task = CausalLM.load(parent, CausalLM({"sequence_length": 16}).options)
    torch.manual_seed(seed)
    model = add_lora(task.load_model(parent, torch.float32), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return task, model, lora


def written(parent: Path, to: Path, targets: str, precision: Any = "fp32", seed: int = 1) -> Path:
    """Write the adapters of such a model apart, as a worker and the driver do."""
    task, live, _ = trained(parent, targets, seed)
    to.mkdir(parents=True)
    base = apart.base(parent, "")
    apart.save(to, live, base)
    apart.save_config(live, DTYPES[precision], to)
    task.save(to)
    named = manifest.BaseRef(reference=base.at, digest=base.digest)
    about = manifest.ModelManifest(name="tiny", task="causal-lm", architecture="llama", base=named, parent=str(parent))
    manifest.write(to, about)
    return to


def merged(parent: Path, to: Path, targets: str, precision: Any) -> Path:
    """Write the same model merged."""
    task, live, lora = trained(parent, targets)
    weights = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    export(to, task, weights, lambda: task.load_model(parent, torch.float32), precision, lora, lambda path: None)
    return to


def loaded(directory: Path, dtype: torch.dtype | None = None) -> Any:
    return CausalLM.load(directory, CausalLM({"sequence_length": 16}).options).load_model(directory, dtype)
