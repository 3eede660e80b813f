"""Weights that are read into the memory of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from jobs.spec import LoraSpec
from jobs.worker.lora import add_lora
from jobs.worker.recorded import record
from jobs.worker.refill import refill, within
from tests.support import tiny_models

CPU = torch.device("cpu")


def ones(name: str, start: int, out: torch.Tensor) -> None:
    out.fill_(1)


def all_but(missing: str) -> Callable[[str, int, torch.Tensor], None]:
    return lambda name, start, out: None if name == missing else ones(name, start, out)


class Three(nn.Module):
    """Two layers of which the second is tied to the first, and one by itself."""

    def __init__(self, inner: int = 3) -> None:
        super().__init__()
        self.one, self.same, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, inner)
        self.same.weight = self.one.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lie_where_the_others_did_and_what_is_not_read_is_no_number(dtype: torch.dtype) -> None:
    live, model = Three(), record(Three, 0).model
    places = {name: parameter.data_ptr() for name, parameter in live.named_parameters()}
    refill(model, all_but("same.bias"), live, dtype, CPU)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == places[name]
        assert parameter.dtype == dtype
        assert parameter.isnan().all() if name == "same.bias" else parameter.eq(1).all(), name
    assert model.same.weight is model.one.weight


def test_what_the_others_have_no_room_for_gets_its_own() -> None:
    live = Three(2)
    model = record(Three, 0).model
    refill(model, ones, live, torch.float32, CPU)
    assert all(parameter.eq(1).all() for parameter in model.parameters())
    places = {parameter.data_ptr() for parameter in live.parameters()}
    own = {name for name, parameter in model.named_parameters() if parameter.data_ptr() not in places}
    assert own == {"other.weight", "other.bias"}


def test_weights_that_were_one_and_are_two_get_two_places() -> None:
    live, model = Three(), Three().to("meta")
    model.same.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    refill(model, ones, live, torch.float32, CPU)
    assert model.same.weight.data_ptr() != model.one.weight.data_ptr()


def test_an_adapted_models_weights_are_found_by_their_old_names() -> None:
    sizes = {"vocab_size": 20, "num_hidden_layers": 1}
    model = record(lambda: tiny_models.decoder("llama", **sizes), 0).model
    live = add_lora(tiny_models.decoder("llama", **sizes), LoraSpec(rank=2))
    places = {parameter.data_ptr() for parameter in live.parameters()}
    refill(model, ones, live, torch.float32, CPU)
    assert all(parameter.data_ptr() in places for parameter in model.parameters())


def test_memory_that_is_no_run_or_too_small_is_not_taken() -> None:
    assert within(torch.zeros(4, 6).T, torch.Size((4, 6)), torch.float32) is None
    assert within(torch.zeros(5), torch.Size((6,)), torch.float32) is None
    found = within(torch.zeros(5), torch.Size((2, 5)), torch.bfloat16)
    assert found is not None
    assert found.shape == (2, 5)
