"""The recurrent network: in the Hugging Face layout, refused by name where it cannot do, apart in packed rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.tasks import TaskError, isolation, packing
from jobs.tasks.causal_lm import CausalLM
from jobs.worker.export import save
from tests.support import tiny_models


@pytest.fixture
def task() -> CausalLM:
    made = CausalLM({"sequence_length": 16})
    made.tokenizer = tiny_models.tokenizer()
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_written_and_read_like_any_other(task: CausalLM, tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    built: Any = task.build("lstm", {"hidden_size": 16, "num_hidden_layers": 3, "tie_word_embeddings": tied}).eval()
    assert (built.lm_head.weight is built.embedding.weight) is tied
    save(built, tmp_path)
    task.save(tmp_path)
    task.check_parent(tmp_path, {"dropout": 0.3})
    loaded: Any = CausalLM.load(tmp_path).load_model(tmp_path)
    ids = torch.randint(320, (2, 9))
    assert torch.equal(built(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == built.generation_config.eos_token_id == [tiny_models.EOS]


def test_forget_gates_begin_open(task: CausalLM) -> None:
    lstm: Any = task.build("lstm", {"hidden_size": 4}).lstm
    assert lstm.bias_ih_l1.tolist() == [0] * 4 + [1] * 4 + [0] * 8
    assert not lstm.bias_hh_l1.any()
    assert 0.25 < lstm.weight_hh_l1.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("lsmt", {}, "no causal architecture of transformers; did you mean 'lstm'"),
        ("lstm", {"hiden_size": 8}, "lstm has no 'hiden_size'; did you mean 'hidden_size'"),
        ("lstm", {"dropout": 2.0}, "lstm cannot be built with this model.config"),
    ],
)
def test_a_config_of_which_no_model_can_be_made_is_refused(
    task: CausalLM, architecture: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        task.check_model(architecture, config)


def test_a_packed_row_is_taken_apart_for_it(task: CausalLM) -> None:
    torch.manual_seed(2)
    model = task.build("lstm", {"hidden_size": 16, "initializer_range": 1.0}).eval()
    assert isolation.leak(model, 16) == float("inf")
    said = task.prepare_model(model, {"position_ids"})
    assert said[0].startswith("LstmForCausalLM lets what is packed into one row see what stands before it")
    pieces = [(list(range(3, 9)), [-100, *range(4, 9)]), (list(range(40, 47)), [-100, *range(41, 47)])]
    together = packing.pack(pieces, 17, 0)
    apart = [packing.pack([piece], 17, 0) for piece in pieces]
    whole, count = task.loss(model, task.collate(together))
    alone = [task.loss(model, task.collate(rows)) for rows in apart]
    assert int(count) == sum(int(each) for _, each in alone) == 11
    torch.testing.assert_close(whole, alone[0][0] + alone[1][0])
