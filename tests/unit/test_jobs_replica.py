"""Weights are made where DeepSpeed wants them, and are copied there only if they lie elsewhere."""

from collections.abc import Sequence

import pytest
import torch

from jobs.worker import replica
from jobs.worker.recorded import Recorded, record

BF16 = torch.bfloat16


class Three(torch.nn.Module):
    """Two matrices, of which one is tied, a frozen one, and a bias; an odd number of elements in all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.second = torch.nn.Linear(5, 7, bias=False)
        self.frozen = torch.nn.Linear(3, 3, bias=False)
        self.frozen.requires_grad_(False)
        self.second.weight = self.first.weight
        self.third = torch.nn.Linear(7, 2, bias=False)
        self.counter = torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


@pytest.fixture
def built() -> tuple[torch.nn.Module, replica.Flats, Recorded]:
    recorded = record(Three, 3)
    model = recorded.model
    groups = [[model.first.weight, model.third.weight], [model.first.bias]]
    return model, replica.build(model, recorded.fill, BF16, torch.device("cpu"), groups, ranks=4), recorded


def copied(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def refused(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    raise AssertionError("it is copied")


def test_weights_are_those_of_the_whole_model_rounded_and_tied_ones_stay_tied(built) -> None:
    model, _, _ = built
    expected = record(Three, 3).materialise().state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name == "counter" else BF16)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert model.second.weight is model.first.weight
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["counter", "frozen.weight"]


def test_a_group_with_its_padding_is_left_where_it_is(built) -> None:
    model, flats, _ = built
    group = [model.first.weight, model.third.weight]
    flat = replica.flatten(flats, refused, [*group, torch.zeros(7, dtype=BF16)])
    assert flat.shape == (56,), "35 and 14 elements, padded to a multiple of twice the ranks"
    assert flat.data_ptr() == model.first.weight.data_ptr()
    assert torch.equal(flat, torch.cat([copied(group), torch.zeros(7, dtype=BF16)]))
    flat[36] = 3.0
    assert model.third.weight.view(-1)[1] == 3.0


@pytest.mark.parametrize("case", ["order", "part", "between", "two at the end", "no room", "another", "elsewhere"])
def test_what_lies_otherwise_is_copied(built, case: str) -> None:
    model, flats, _ = built
    first, third, zeros = model.first.weight, model.third.weight, torch.zeros(3, dtype=BF16)
    if case == "elsewhere":
        first.data, third.data = first.data.clone(), third.data.clone()
    tensors = {
        "order": [third, first],
        "part": [first],
        "between": [first, zeros, third],
        "two at the end": [first, third, zeros, zeros],
        "no room": [first, third, torch.zeros(8, dtype=BF16)],
        "another": [model.frozen.weight, zeros],
        "elsewhere": [first, third],
    }[case]
    flat = replica.flatten(flats, copied, tensors)
    assert torch.equal(flat, copied(tensors))
    assert flat.data_ptr() not in {each.data_ptr() for each in tensors}
