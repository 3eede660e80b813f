"""Bytes a parameter of what an engine holds after its second backward pass, by stage and precision, on one rank.

python tests/support/plan_rank.py FOLDER 0-fp32 1-bf16-muon …

Leaves FOLDER/<case>.json, a case being STAGE-PRECISION[-OPTIMIZER]: bytes of all living tensors over the parameters,
buckets of gradients left out.
An engine leaves hooks behind, so each case has a process, forked off one that has imported what all need.
"""

import gc
import json
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.spec import JobSpec
from jobs.worker import zero
from jobs.worker.deepspeed_engine import Engine, import_deepspeed

BUCKET = 1_000_000


def living() -> int:
    """Return the bytes of all tensors, each storage once."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not each.is_meta]
    found += [each.grad for each in found if each.is_leaf and each.grad is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in found)}.values())


def held(stage: int, precision: str, optimizer: str) -> float:
    """Return what an engine holds with two passes and one step behind it, in bytes a parameter."""
    values = {"steps": 1, "precision": precision, "optimizer": optimizer, "deepspeed": {"zero_stage": stage}}
    model = {"name": "x", "phase": "pretrain", "model": {"architecture": "llama"}, "data": {"train": "x"}}
    spec = JobSpec.model_validate({**model, "training": values})
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4000, **sizes)
    before = living()
    network = LlamaForCausalLM(config)
    count = sum(parameter.numel() for parameter in network.parameters())
    settings = zero.deepspeed_config(spec.training, 1, 1, precision=precision, on_gpu=False)
    settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    engine = Engine(network, spec.training, settings, torch.device("cpu"))
    del network
    for passes in range(2):
        engine.backward(engine.model(input_ids=torch.arange(32)[None], use_cache=False).logits.float().mean())
        if not passes:
            engine.step()
    width = 2 if precision == "bf16" else 4
    return (living() - before - (BUCKET * width if stage == 3 else 0)) / count


def measure(case: str, folder: Path) -> None:
    """Be the one rank of a case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{case}", rank=0, world_size=1)
    stage, precision, *optimizer = case.split("-")
    (folder / f"{case}.json").write_text(json.dumps(held(int(stage), precision, *(optimizer or ["adamw"]))))


if __name__ == "__main__":
    import_deepspeed()
    for name in sys.argv[2:]:
        process = multiprocessing.get_context("fork").Process(target=measure, args=(name, Path(sys.argv[1])))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name} failed")
