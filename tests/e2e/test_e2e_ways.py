"""Ways to train what is large, on the real stack, as few tiny jobs that each go several of them.

shared      two workers share rows of packed documents; Muon at ZeRO stage 3; the weights go to a store
compiled    the same on one worker, compiled, with selective checkpointing; killed, and started again
adapted     what `shared` left, held in nf4 while adapters are trained beside it, which are kept apart
answers     of these adapters on their base
files       parameters on NVMe, and where libaio is installed optimizer states too; killed, and started again
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import home
from jobs import submit
from jobs.worker.compiling import SETTLED
from tests.support.fault_runs import Faulted, environment, mlflow_client, same_curve
from tests.support.machine import can_swap

STEPS, KILLED_AT = 16, 9
"""The second lies behind a checkpoint, and behind the steps in which a compiler works."""
KILL = f"kill:rank=0:step={KILLED_AT}"
SUMS = [f"{a} and {b} make {a + b}" for a in range(20) for b in range(10)]
QUESTIONS = [f"{a} and {a + 3}?" for a in range(40)]
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TASK = {"name": "causal-lm", "sequence_length": 64, "documents": "separate"}
TRAINING = {"steps": STEPS, "global_batch_size": 4, "learning_rate": 3e-3, "precision": "fp32"}
NEW: dict[str, Any] = {
    "phase": "pretrain",
    "task": {**TASK, "tokenizer": {"train": "bpe", "vocab_size": 320}},
    "model": {"architecture": "llama", "config": {**LLAMA, "tie_word_embeddings": True}},
    "data": {"train": "sums.jsonl", "eval_fraction": 0.1},
    "training": {**TRAINING, "optimizer": "muon"},
    "checkpoint": {"every_steps": 4},
}
ZERO_3 = {"zero_stage": 3}


@dataclass
class Jobs:
    """Sends jobs, each once, and some long before one is waited for: they mostly start and end."""

    folder: Path
    _sent: dict[str, str] = field(default_factory=dict)
    _ended: dict[str, Faulted] = field(default_factory=dict)

    def send(self, name: str, spec: dict[str, Any], fault: str = "") -> None:
        """Submit a job, unless it was."""
        if name in self._sent:
            return
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**spec, "name": name}))
        with environment(fault):
            self._sent[name] = submit.submit(path, [])

    def ended(self, name: str) -> Faulted:
        """Return what a job has left, once it has ended well."""
        if name not in self._ended:
            outcome = submit.follow(self._sent[name], lambda line, meaning: None)
            assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
            (run,) = (home.home() / "storage" / "runs").glob(f"{name}-????????-*")
            self._ended[name] = Faulted(outcome.status, run, outcome.log, outcome.result)
        return self._ended[name]


@pytest.fixture(scope="module")
def jobs(cluster: object, folder: Path) -> Jobs:
    """Two of the jobs are under way."""
    write(folder / "sums.jsonl", [{"text": text} for text in SUMS])
    jobs = Jobs(folder)
    shared = {**NEW["training"], "deepspeed": ZERO_3, "parallel": {"sequence": 2}}
    jobs.send(
        "shared",
        NEW
        | {"model": {**NEW["model"], "export": str(folder / "store")}, "training": shared}
        | {"resources": {"workers": 2}, "register": {"model": "shared", "alias": "candidate"}},
    )
    how = {"compile": True, "gradient_checkpointing": "selective"}
    jobs.send("compiled", NEW | {"training": {**NEW["training"], **how}}, KILL)
    return jobs


@pytest.fixture(scope="module")
def adapted(jobs: Jobs, folder: Path) -> Faulted:
    """Adapters for what was trained on shared rows."""
    jobs.ended("shared")
    asked = [{"role": "user", "content": question} for question in QUESTIONS]
    answers = [{"role": "assistant", "content": f"{2 * a + 3}"} for a in range(len(QUESTIONS))]
    write(folder / "chat.jsonl", [{"messages": list(pair)} for pair in zip(asked, answers, strict=True)])
    jobs.send(
        "adapted",
        {
            "phase": "finetune",
            "task": {"name": "causal-lm", "sequence_length": 64},
            "model": {"from": "models:/shared@candidate", "lora": {"rank": 4, "base": "nf4", "merge": False}},
            "data": {"train": "chat.jsonl", "eval_fraction": 0.1},
            "training": {**TRAINING, "learning_rate": 0.01, "deepspeed": {"zero_stage": 2}},
            "resources": {"workers": 2},
            "register": {"model": "adapted", "alias": "candidate"},
        },
    )
    send_files(jobs, folder, "cpu")
    return jobs.ended("adapted")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def learned(job: Faulted) -> None:
    """Assert that it has taken every step once, and makes less of a loss of what it has not seen."""
    evaluations = job.result["evaluations"]
    assert evaluations["final"]["loss"] < 0.95 * evaluations["first"]["loss"]
    assert sorted(job.losses()) == list(range(1, STEPS + 1))
    assert job.run.info.status == "FINISHED"


def test_two_workers_share_rows_of_packed_documents_and_learn_by_muon(jobs: Jobs, folder: Path) -> None:
    shared = jobs.ended("shared")
    learned(shared)
    params, said = shared.run.data.params, "\n".join(shared.log)
    keys = ("training.optimizer", "training.parallel.sequence", "task.documents", "training.deepspeed.zero_stage")
    assert [params[key] for key in keys] == ["muon", "2", "separate", "3"]
    assert "2 workers share each row of 64 tokens: 32 on each" in said
    assert "Muon trains 14 matrices" in said
    assert [path.name for path in (folder / "store").rglob("*.safetensors")] == ["model.safetensors"]
    assert not list(Path(shared.result["directory"]).glob("*.safetensors")), "they are in the store alone"


def test_compiled_it_learns_the_same_and_a_second_start_compiles_nothing(jobs: Jobs) -> None:
    compiled, shared = jobs.ended("compiled"), jobs.ended("shared")
    learned(compiled)
    same_curve(compiled.losses(), shared.losses())
    assert [failure["kind"] for failure in compiled.failures()] == ["worker killed"]
    assert compiled.run.data.params["training.gradient_checkpointing"] == "selective"
    asked = mlflow_client().get_metric_history(compiled.run.info.run_id, "compile_s")
    began = [int(point.step) for point in asked]
    assert min(began) <= SETTLED < max(began), "both starts have asked the compiler"
    (killed,) = (compiled.folder / "faults").iterdir()
    made = [path for path in (home.home() / "storage" / "compiled").rglob("*.so") if path.is_file()]
    assert made
    assert [path for path in made if path.stat().st_mtime_ns > killed.stat().st_mtime_ns] == []


def test_adapters_beside_a_base_of_few_bits_are_kept_apart(jobs: Jobs, adapted: Faulted) -> None:
    from tracking import manifest

    learned(adapted)
    assert adapted.run.data.params["model.lora.base"] == "nf4"
    assert "the base is held in nf4 while adapters are trained" in "\n".join(adapted.log)
    directory = Path(adapted.result["directory"])
    assert [path.name for path in directory.glob("*.safetensors")] == ["adapter_model.safetensors"]
    base, about = json.loads((directory / "base.json").read_text()), manifest.read(directory, verify=True)
    assert base["at"] == jobs.ended("shared").result["directory"]
    assert about.base is not None
    assert (about.base.reference, about.base.digest) == ("models:/shared/1", base["digest"])


def test_what_answers_is_the_base_with_its_adapters(jobs: Jobs, adapted: Faulted, folder: Path) -> None:
    """The engine that serves makes the tokens that transformers makes of both, merged."""
    from jobs.tasks import get

    write(folder / "questions.jsonl", [{"prompt": question} for question in QUESTIONS[:4]])
    greedy = {"format": "jsonl", "precision": "fp32", "generation": {"max_tokens": 6, "temperature": 0.0}}
    source = {"task": {"name": "causal-lm", "sequence_length": 64}, "model": {"from": "models:/adapted@candidate"}}
    jobs.send("answers", {"phase": "predict", "data": {"predict": "questions.jsonl"}, "predict": greedy, **source})
    result = jobs.ended("answers").result
    found = [json.loads(line)["prediction_text"] for line in Path(result["output"]).read_text().splitlines()]
    directory = Path(adapted.result["directory"])
    task = get("causal-lm").load(directory)
    model, tokenizer = task.load_model(directory), task.tokenizer
    expected = []
    for question in QUESTIONS[:4]:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(made, skip_special_tokens=True))
    assert found == expected
    assert any(found)


LOOKING = """
import json, os
from pathlib import Path
from jobs.tasks.causal_lm import CausalLM

class Looking(CausalLM):
    def loss(self, model, batch):
        files = Path({disk!r}).glob("tandem-*/*/parameters-*/*")
        found = {{str(path.parent.parent.name) + "/" + path.name: path.stat().st_size for path in files}}
        aside = Path({notes!r} + "-aside", str(os.getpid()))
        aside.write_text(json.dumps(found))  # whoever writes may be killed
        os.replace(aside, Path({notes!r}, str(os.getpid())))
        return super().loss(model, batch)
"""


def send_files(jobs: Jobs, folder: Path, offload: str) -> tuple[Path, Path]:
    """Submit a job with parameters in files; return the folder of these, and that of what its workers note."""
    disk, notes = folder / f"disk-{offload}", folder / f"notes-{offload}"
    disk.mkdir(exist_ok=True)
    notes.mkdir(exist_ok=True)
    notes.with_name(f"{notes.name}-aside").mkdir(exist_ok=True)
    (folder / f"looking_{offload}.py").write_text(LOOKING.format(disk=str(disk), notes=str(notes)))
    where = {**ZERO_3, "offload": offload, "offload_parameters": "nvme", "nvme_path": str(disk)}
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    jobs.send(
        f"files-{offload}",
        NEW
        | {"task": {**NEW["task"], "name": f"looking_{offload}:Looking"}, "training": {**TRAINING, "deepspeed": where}}
        | {"model": {**NEW["model"], "config": config}, "resources": {"workers": 2}},
        KILL,
    )
    return disk, notes


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_parameters_lie_in_files_and_a_killed_starts_are_removed(jobs: Jobs, folder: Path, offload: str) -> None:
    """Each worker notes, at every loss, which files are there, and how large they are."""
    if offload == "nvme" and not can_swap():
        pytest.skip("not run: libaio-dev is not installed")
    disk, notes = send_files(jobs, folder, offload)
    found = jobs.ended(f"files-{offload}")
    learned(found)
    assert [failure["kind"] for failure in found.failures()] == ["worker killed"]
    starts = set()
    for note in map(json.loads, (path.read_text() for path in notes.iterdir())):
        owners = {name.split("/")[0] for name in note}
        starts |= (of := {owner.rpartition("-")[0] for owner in owners})
        assert len(of) == 1, "those of another start are gone"
        assert owners == {f"{one}-{rank}" for one in of for rank in range(2)}
        assert sorted(note.values()).count(4 * 512 * 512 // 2) == 2 * 7, "a layer's matrices, half on each rank"
    assert len(starts) == 2
    assert list(disk.iterdir()) == []
