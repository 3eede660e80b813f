"""FLOPs of forward and backward passes: PaLM's formula, torch's own counter, and what is not told."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from jobs.worker import flops, recomputing
from jobs.worker.flops import FlopCounter, ModelFlops
from jobs.worker.torch_internals import TorchDispatchMode
from jobs.worker.traffic import sent_share

LAYERS, HIDDEN, TOKENS, ROWS, VOCABULARY = 3, 32, 24, 2, 50


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def ids() -> torch.Tensor:
    return torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % VOCABULARY


def counted(model: torch.nn.Module, inputs: torch.Tensor) -> FlopCounter:
    counter = FlopCounter()
    with counter:
        out = model(inputs)
    counter.backward = True
    with counter:
        (out.logits if hasattr(out, "logits") else out).float().square().mean().backward()
    return counter


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_decoder_takes_what_palm_says(attention: str) -> None:
    model = llama(attention)
    in_products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    counter = counted(model, ids())
    assert counter.flops == ROWS * TOKENS * (6 * in_products + 12 * LAYERS * HIDDEN * TOKENS)
    assert counter.unknown == set()


def test_documents_on_a_gpu_count_as_whole_rows_do() -> None:
    """Which is what attention of sequences of different lengths is told; on the meta device it computes nothing."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (torch.empty(2 * 24, 4, 8, device="meta", requires_grad=True) for _ in range(3))
    ends = torch.empty(5, dtype=torch.int32, device="meta")
    counter = FlopCounter()
    with counter:
        made = varlen_attn(query, key, value, ends, ends, 24, 24, window_size=(-1, 0))
        assert isinstance(made, torch.Tensor)
    forward = counter.flops
    counter.backward = True
    with counter:
        made.sum().backward()
    assert (forward, counter.flops - forward) == (4 * 2 * 4 * 24 * 24 * 8, 8 * 2 * 4 * 24 * 24 * 8)
    assert counter.unknown == set()


def test_of_experts_those_count_that_a_token_goes_to() -> None:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    counter = counted(MixtralForCausalLM(config).train(), ids())
    of_layer = 4 * HIDDEN * HIDDEN + 6 * HIDDEN + 2 * 3 * HIDDEN * 48  # attention, router, two of six experts
    active = LAYERS * of_layer + VOCABULARY * HIDDEN
    assert counter.flops == ROWS * TOKENS * (6 * active + 12 * LAYERS * HIDDEN * TOKENS)
    assert counter.unknown == set()


def test_torch_counts_the_same_where_it_sees_all_and_nothing_is_computed_twice() -> None:
    with FlopCounterMode(display=False) as torch_s:
        llama("eager")(ids()).logits.float().square().mean().backward()
    assert counted(llama("eager"), ids()).flops == torch_s.get_total_flops()


def test_what_is_computed_again_to_save_memory_does_not_count() -> None:
    plain, saving = llama("eager"), llama("eager")
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FlopCounterMode(display=False) as torch_s:
        saving(ids()).logits.float().square().mean().backward()
    found = counted(saving, ids()).flops
    assert found == counted(plain, ids()).flops
    assert torch_s.get_total_flops() > 1.2 * found, "torch counts it"


def test_counting_changes_no_bit_of_a_gradient() -> None:
    one, other = llama(), llama()
    one(ids()).logits.float().square().mean().backward()
    counted(other, ids())
    for (name, expected), found in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad), name


def test_convolutions_and_frozen_weights() -> None:
    """Of two convolutions of the same size, the first needs no gradient of its images, a frozen one none of itself."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1))
    images = torch.rand(2, 4, 6, 6)
    one = 2 * 2 * 36 * 4 * 4 * 9
    assert counted(model, images).flops == (1 + 1 + 2 + 1) * one
    model[0].requires_grad_(False)
    assert counted(model, images).flops == (1 + 1 + 1) * one


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 16, num_layers=2, batch_first=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return states (B, T, 16) of rows (B, T, 8)."""
        states: torch.Tensor = self.lstm(rows)[0]
        return states


def test_recurrent_layers_count_on_cpus() -> None:
    model = Recurrent()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rows = torch.rand(3, 5, 8, requires_grad=True)
    counter = counted(model, rows)
    assert counter.flops == 6 * 3 * 5 * weights
    assert counter.unknown == set()


def test_an_operation_that_multiplies_and_is_not_known_is_named() -> None:
    with FlopCounter() as counter:
        torch.mv(torch.rand(3, 4), torch.rand(4))
        torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4), scale_factor=2.0, mode="bilinear")
    assert counter.unknown == {"aten.mv.default"}


def step_of(found: ModelFlops, model: Any, *batches: dict[str, torch.Tensor] | None) -> float:
    for batch in batches:
        with found.forward(batch):
            out = model(**(batch or {"rows": torch.rand(1, 4)}))
        with found.backward():
            out.sum().backward()
    return found.end_step()


class Selective(torch.nn.Module):
    """Multiplies the rows that are not negative."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (b, 3) of rows (B, 4)."""
        out: torch.Tensor = self.head(rows[rows[:, 0] >= 0])
        return out


def test_a_shape_is_counted_twice_and_known_from_then_on() -> None:
    found, model = ModelFlops(), Selective()
    of_a_row = 2 * 2 * 4 * 3
    small, large = {"rows": torch.rand(2, 4)}, {"rows": torch.rand(5, 4)}
    assert step_of(found, model, small, large) == 7 * of_a_row
    assert step_of(found, model, small, small) == 4 * of_a_row
    assert [found._counts[key] for key in found._counts] == [[2 * of_a_row] * 2, [5 * of_a_row]]
    assert step_of(found, model, small, None) == 2 * of_a_row, "None: rows that are no part of the step"


def test_what_depends_on_more_than_shapes_is_told_only_where_it_was_counted() -> None:
    found, model = ModelFlops(), Selective()
    of_a_row = 2 * 2 * 4 * 3
    assert step_of(found, model, {"rows": torch.ones(3, 4)}) == 3 * of_a_row
    assert step_of(found, model, {"rows": torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, 4)}) == 2 * of_a_row
    assert math.isnan(step_of(found, model, {"rows": torch.ones(3, 4)}))


def test_beyond_many_shapes_nothing_is_counted() -> None:
    found, model = ModelFlops(), Selective()
    for rows in range(1, flops.MOST_SHAPES + 1):
        assert step_of(found, model, {"rows": torch.ones(rows, 4)}) > 0
    assert math.isnan(step_of(found, model, {"rows": torch.ones(flops.MOST_SHAPES + 1, 4)}))
    assert step_of(found, model, {"rows": torch.ones(1, 4)}) > 0


def test_nothing_is_told_of_a_model_with_an_unknown_operation() -> None:
    found = ModelFlops()
    weight = torch.rand(3, 4, requires_grad=True)
    for _ in range(3):
        assert math.isnan(step_of(found, lambda rows: weight @ rows[0], {"rows": torch.rand(1, 4)}))
    assert any(name.startswith("aten.mv") for name in found.unknown)


def test_no_peak_is_guessed() -> None:
    assert math.isnan(flops.peak(torch.device("cpu"), "bf16"))


def test_what_a_rank_sends_of_a_collective() -> None:
    assert sent_share("allreduce_", 4) == 1.5
    assert sent_share("_allgather_base_", 4) == sent_share("_reduce_scatter_base_", 4) == 0.75
    assert sent_share("allreduce_", 1) == 0
    assert sent_share("barrier", 4) == 0
    assert sent_share("send", 4) is None


def test_selective_checkpointing_makes_no_product_again_and_changes_no_bit() -> None:
    plain, saving, most = llama(), llama(), llama()
    recomputing.enable(saving, True)
    recomputing.enable(most, "selective")
    operations = {}
    for name, model in {"plain": plain, "all": saving, "selective": most}.items():
        with Operations() as seen:
            model(ids()).logits.float().square().mean().backward()
        operations[name] = seen.counts
    for (name, expected), *found in zip(plain.named_parameters(), saving.parameters(), most.parameters(), strict=True):
        assert all(torch.equal(expected.grad, each.grad) for each in found), name
    for product in ("mm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert operations["all"][product] > operations["plain"][product]
        assert operations["selective"][product] == operations["plain"][product]
    assert operations["selective"]["silu"] == operations["all"]["silu"] == 2 * operations["plain"]["silu"]
    assert counted(most, ids()).flops == counted(plain, ids()).flops


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
