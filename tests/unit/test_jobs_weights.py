"""Weights that cannot be read: one sentence, no second try, and no way round it."""

import errno
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs.tasks import TaskError
from jobs.tasks.causal_lm import CausalLM, CausalLMOptions
from jobs.worker.weights import Unreadable, is_permanent, readable
from tests.support import tiny_models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.language_model(tmp_path / "model")


def load(directory: Path) -> None:
    with readable(directory):
        CausalLM(CausalLMOptions()).load_model(directory, torch.float32, {})


def test_a_pickle_is_refused_and_nothing_is_said_about_reading_it_all_the_same(model: Path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(Unreadable, match=r"are a pickle \(pytorch_model.bin\), which may run any code") as found:
        load(model)
    assert "weights_only" not in str(found.value)


def test_missing_weights(model: Path):
    (model / "model.safetensors").unlink()
    with pytest.raises(Unreadable, match=r"cannot be loaded: .*no file named"):
        load(model)


def test_damaged_weights(model: Path):
    (model / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(Unreadable, match="cannot be loaded"):
        load(model)


def test_weights_of_another_shape(model: Path):
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file({**tensors, name: torch.zeros(3, 5)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(TaskError, match=r"do not fit the config: lm_head\.weight is \(3, 5\) there, and"):
        load(model)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), True),
        (MemoryError(), False),
        (RuntimeError("CUDA out of memory"), False),
        (RuntimeError("size mismatch"), True),
    ],
)
def test_what_another_try_may_mend_is_no_such_error(error, permanent):
    assert is_permanent(error) is permanent
