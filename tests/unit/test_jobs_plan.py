"""What a plan counts: parameters, bytes by part and stage, FLOPs, time, tokens; each worked out by hand beside it."""

import dataclasses
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cluster.errors import UserError
from jobs.plan import compute, devices, facts, memory, passes, speed
from jobs.plan.facts import Decoder, Facts
from jobs.plan.rates import Rates
from jobs.spec_sections import LoraSpec
from jobs.tasks import get
from jobs.worker import recomputing
from jobs.worker.lora import add_lora
from jobs.worker.torch_internals import TorchDispatchMode

BILLIONS = Facts("X", parameters=7_500_000_000, trainable=7_500_000_000, embedding=0, vectors=0, largest=10**8)
DECODER = Decoder(2, 64, 64, 32, 96, True, True, 300)
LLAMA = Facts("X", 1000, 1000, 100, 10, 100, DECODER)
KINDS = (True, "selective", False)
RATES = Rates("X", "fp32", 1, 1, 0, 0, [[64, 64, 1e9]], [[64, 1e9]], [[64, 1e9]],
              1e9, 1e9, 1e9, [0.0, 0.0, 0.0, 0.0], 1e9, 1e9, 0.0)  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def setting(stage: int, precision: str = "bf16", world: int = 64, offload: str = "none", **more) -> memory.Setting:
    return memory.Setting(stage, offload, precision, world, **{"on_gpu": True, **more})  # type: ignore[arg-type]


def built(architecture: str, **config):
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_llama_is_counted_by_hand():
    found = facts.of(built("llama", **SMALL, vocab_size=300, intermediate_size=96, num_key_value_heads=2))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # q and o, k and v, the gated MLP, two norms
    assert found.parameters == found.trainable == 2 * 300 * 64 + 2 * layer + 64
    assert (found.embedding, found.vectors, found.largest) == (300 * 64, 5 * 64, 300 * 64)
    assert found.decoder == Decoder(2, 64, 64, 32, 96, True, True, 300)


def test_a_gpt2_is_counted_by_hand():
    """The embedding is the head too, so only positions are looked up and nothing else."""
    found = facts.of(built("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=32))
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64 + 4 * 64
    assert found.parameters == 300 * 64 + 32 * 64 + 2 * layer + 2 * 64
    assert found.embedding == 32 * 64
    assert found.decoder == Decoder(2, 64, 64, 64, 256, False, False, 300, stepped=True)


def test_a_cnn_is_counted_as_torch_has_it_and_is_no_decoder():
    task = get("image-classification")({"image_size": 8})
    images = [
        {"image": torch.randint(0, 255, (8, 8), dtype=torch.uint8).numpy(), "label": str(n % 3)} for n in range(6)
    ]
    task.fit(task.observe(images))
    model = task.build("cnn", {})
    found = facts.of(model)
    assert found.parameters == sum(math.prod(p.shape) for p in model.state_dict().values() if p.is_floating_point())
    assert found.decoder is None


def test_adapters_are_what_is_trained():
    """Rank 4 on the seven linear layers of each of two: 4 · (in + out)."""
    config = {**SMALL, "vocab_size": 300, "intermediate_size": 96, "num_key_value_heads": 2}
    with torch.device("meta"):
        plain = facts.of(built("llama", **config))
        found = facts.of(add_lora(built("llama", **config), LoraSpec(rank=4)))
    added = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert found.trainable == added
    assert found.frozen == plain.parameters
    assert found.kind == "LlamaForCausalLM"
    assert found.decoder == plain.decoder


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "gigabytes"),
    [
        (0, 120.0),  # 16 bytes: fp32 weights, gradients, two moments, as in the paper
        (1, 61.40625),  # (2 + 6) whole, 12 / 64; the paper has 31.4 with gradients of 2 bytes
        (2, 16.875),  # 2 whole, 16 / 64; the paper: 16.6
        (3, 2.109375),  # 18 / 64; the paper: 1.9
    ],
)
def test_the_example_of_the_zero_paper(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 devices; here gradients are summed in fp32."""
    found = memory.need(BILLIONS, setting(stage))
    assert found.state / 1e9 == pytest.approx(gigabytes, rel=1e-9)


def test_in_fp32_every_stage_keeps_four_bytes_of_each():
    assert [memory.need(BILLIONS, setting(stage, "fp32")).state / 7.5e9 for stage in range(4)] == pytest.approx(
        [16, 8 + 8 / 64, 4 + 12 / 64, 16 / 64]
    )


def test_frozen_weights_have_neither_gradients_nor_moments():
    adapted = dataclasses.replace(BILLIONS, trainable=75_000_000)
    assert memory.need(adapted, setting(2)).state == 2 * 7_500_000_000 + 16 * math.ceil(75_000_000 / 64)


def test_what_is_held_in_few_bits_takes_these_and_one_weight_made_of_them():
    """A tenth is adapters and what stays whole; the rest is in half a byte and a scale of four for each 64."""
    adapted = dataclasses.replace(BILLIONS, trainable=75_000_000)
    held = dataclasses.replace(adapted, held=6_400_000_000, held_bytes=3_600_000_000, held_largest=10**8)
    for stage, width in ((0, 4), (1, 2), (2, 2)):
        whole, few = (memory.need(each, setting(stage)) for each in (adapted, held))
        assert whole.weights - few.weights == 6_400_000_000 * width - 3_600_000_000
        copies = 2 * 6_400_000_000 if stage == 0 else 0  # of whole fp32 weights autocast has others
        assert few.buffers - whole.buffers == 6 * 10**8 - copies
    of = setting(1, on_gpu=False, undivided="held")
    assert [each.stage for each in memory.settings(of)] == [0, 1, 2]


def test_offload_moves_the_state_to_the_host_and_nothing_is_lost():
    plain, moved = (memory.need(BILLIONS, setting(2, offload=offload)) for offload in ("none", "cpu"))
    assert moved.state == moved.weights == 15 * 10**9
    assert moved.host - plain.host == plain.state - plain.weights


def test_a_cpus_memory_holds_the_process_and_the_copy_for_checkpoints_too():
    found = memory.need(BILLIONS, setting(3, "fp32", on_gpu=False))
    assert (found.process, found.host) == (520 << 20, 0)
    assert found.peak - found.unsaved_peak == found.saving
    assert found.saving == 12 * math.ceil(7_500_000_000 / 64)
    assert not any(each.offload == "cpu" for each in memory.settings(setting(3, on_gpu=False)))


def test_the_lowest_stage_that_fits_is_recommended_and_offload_only_where_nothing_else_does():
    needs = [(each, memory.need(BILLIONS, each)) for each in memory.settings(setting(0))]

    def chosen(gigabytes: float) -> tuple[int, str] | None:
        found = memory.recommended(needs, int(gigabytes * 1e9))
        return (found.stage, found.offload) if found else None

    assert [chosen(size) for size in (200, 80, 24, 10)] == [(0, "none"), (1, "none"), (2, "none"), (3, "none")]
    assert chosen(5) == (3, "cpu")
    assert chosen(1) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("keys", [4, 2])
def test_activations_are_what_autograd_keeps(precision, keys):
    """Two models that differ by two layers: the tensors saved for backward differ by what the account says of two."""
    tokens, dtype = 2 * 32, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def kept(layers: int) -> tuple[int, int]:
        sizes = {**SMALL, "num_hidden_layers": layers, "num_key_value_heads": keys}
        model = built("llama", **sizes, vocab_size=300, intermediate_size=96).to(dtype).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False).logits
        assert logits.requires_grad
        decoder = facts.of(model).decoder
        planned = memory.activations(decoder, setting(1, precision, 1, tokens=tokens))
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()), planned

    (more, planned_more), (few, planned_few) = kept(4), kept(2)
    statistics = 2 * tokens * 4 * (2 + 4)  # one fp32 number of each norm and head, which the account leaves out
    assert planned_more - planned_few == more - few - statistics


def test_computing_again_keeps_one_layer_and_the_input_of_each():
    decoder = Decoder(10, 64, 64, 64, 256, False, False, 300)
    plain, again = (memory.activations(decoder, setting(1, tokens=7, checkpointing=on)) for on in (False, True))
    layer = 2 * (64 + 4 * 64 + 64 + 2 * 256) + 2 * 2 * 64
    assert plain - again == 7 * (10 * layer - (10 * 2 * 64 + layer))


def test_selective_checkpointing_keeps_products_and_attention():
    """Two models that differ by two layers: of what lives after the forward pass, by what the account says of two."""

    def alive(layers: int) -> tuple[int, int]:
        sizes = {**SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2}
        model = built("llama", **sizes, vocab_size=300, intermediate_size=96).train()
        recomputing.enable(model, "selective")
        with Living(model.parameters()) as living:
            logits = model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False).logits
        assert logits.requires_grad
        of = setting(1, "fp32", 1, tokens=64, checkpointing="selective")
        return living.bytes(), memory.activations(facts.of(model).decoder, of)

    (more, planned_more), (few, planned_few) = alive(4), alive(2)
    statistics = 2 * 64 * 4 * 4  # one fp32 number of each head
    assert planned_more - planned_few == more - few - statistics


class Living(TorchDispatchMode):
    """Tells what of the tensors that are made within it still lives, in bytes; views of `others` are not made."""

    def __init__(self, others):
        super().__init__()
        self._others = {each.untyped_storage()._cdata for each in others}
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._others:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def test_selective_checkpointing_is_between_the_others_and_repeats_no_product():
    decoder = Decoder(10, 64, 64, 64, 256, True, True, 300)
    every, some, none = (memory.activations(decoder, setting(1, tokens=7, checkpointing=on)) for on in KINDS)
    assert every < some < none
    times = [speed.passes_s(LLAMA, DECODER, setting(1, tokens=7, checkpointing=on), 128, RATES) for on in KINDS]
    assert times[0] > times[1] == times[2]


def test_muon_has_one_moment_of_matrices_and_blends_their_gradients():
    """Of 10 elements 6 are matrices' on one worker: moments of 8 bytes for four, of 4 for six; all else as before."""
    model = Facts("X", 10, 10, 0, 0, 4, matrices=6)
    for stage in (0, 1, 2, 3):
        adamw, muon = (
            memory.need(model, setting(stage, "fp32", 1, optimizer=each, on_gpu=False)) for each in ("adamw", "muon")
        )
        assert (adamw.moments, muon.moments) == (80, 56)
        assert (adamw.saving, muon.saving) == (120, 96)
        assert muon.step - adamw.step == (24 if stage else 0)
        same = {"moments": 0, "saving": 0, "step": 0, "most": 0, "host": 0}
        assert dataclasses.replace(adamw, **same) == dataclasses.replace(muon, **same)


def test_the_matrices_of_a_llama_are_counted_without_embeddings_head_and_norms():
    found = facts.of(built("llama", **SMALL, vocab_size=300, intermediate_size=96, num_key_value_heads=2))
    assert found.matrices == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert facts.of(torch.nn.Embedding(3, 4)).matrices == 0


def test_of_small_tensors_a_cpu_keeps_the_most_there_ever_was():
    moments = [passes.Bytes(large=10, small=5), passes.Bytes(large=2, small=7)]
    assert passes.most(moments, on_gpu=True) == 15
    assert passes.most(moments, on_gpu=False) == 10 + 7
    assert (passes.of((32 << 20) - 1, 2), passes.of(32 << 20)) == (
        passes.Bytes(small=(64 << 20) - 2),
        passes.Bytes(large=32 << 20),
    )


def test_gradients_meet_activations_only_where_micro_batches_are_summed():
    """Of 10,000 tokens the activations are far more than what gradients are reduced through."""
    once, summed = (memory.need(LLAMA, setting(0, "fp32", 1, tokens=10_000, micro_batches=count)) for count in (1, 2))
    assert once.most == once.activations
    assert summed.most - once.most == 4 * LLAMA.trainable


def test_offload_to_the_memory_that_the_cpu_computes_in_is_counted_where_it_is_asked_for():
    asked = setting(2, "fp32", 2, offload="cpu", on_gpu=False)
    assert asked in memory.settings(asked)
    assert len(memory.settings(asked)) == 5


def test_parameters_on_nvme_are_in_no_memory_but_for_small_ones_and_the_optimizer_has_masters_of_its_own():
    """Of fp32 weights; bf16 has masters anyway. One worker gathers what it would have had in memory otherwise."""
    model = Facts("X", 10**9, 10**9, 0, 0, 10**7, persistent=10**6)
    asked = setting(3, "fp32", 4, offload="cpu", on_gpu=False, in_files=True)
    there, away = (memory.need(model, dataclasses.replace(asked, in_files=each)) for each in (False, True))
    assert (there.weights, there.masters) == (10**9, 0)
    assert (away.weights, away.masters) == (10**6, 10**9)
    one = dataclasses.replace(asked, world_size=1)
    there, away = (memory.need(model, dataclasses.replace(one, in_files=each)) for each in (False, True))
    assert away.buffers - there.buffers == 4 * 2 * 10**7
    assert [each.in_files for each in memory.settings(asked)] == [False] * 4 + [True]
    assert asked.named == "3, offload, parameters on NVMe"
    on_gpu = dataclasses.replace(asked, on_gpu=True, precision="bf16")
    there, away = (memory.need(model, dataclasses.replace(on_gpu, in_files=each)) for each in (False, True))
    assert there.host - away.host == 2 * (250_000_000 - 250_000)


# -- time, tokens, devices -------------------------------------------------------------------------------------------


def test_flops_of_a_token_by_hand():
    attention = 12 * 2 * 64 * 128
    assert compute.flops_per_token(LLAMA, 128) == 6 * 900 + attention
    assert compute.flops_per_token(LLAMA, 128, again=True) == (6 * 900 + attention) * 4 / 3
    frozen = dataclasses.replace(LLAMA, parameters=1050, trainable=50)
    assert compute.flops_per_token(frozen, 128) == 4 * 900 + 6 * 50 + attention
    assert compute.flops_per_token(dataclasses.replace(LLAMA, decoder=None), 128) is None


def test_time_and_cost_by_hand():
    """6e9 FLOPs a token, 1,000 tokens on a rank, 40 % of 1e15: 15 ms; 240,000 such steps are an hour, on 8 at 2.5."""
    work = compute.Work(8000, 240_000, compute.step_s(6e9, 1000, 1e15, 0.4))
    assert work.step_s == pytest.approx(0.015)
    assert (work.tokens, work.duration_s) == (1_920_000_000, pytest.approx(3600))
    assert work.cost(2.5, 8) == pytest.approx(20)
    assert compute.Work(8000, None, 0.015).cost(2.5, 8) is None
    assert compute.optimal_tokens(LLAMA) == 20_000


@pytest.mark.parametrize("name", ["h100", "H100", "rtx4090", "RTX 4090", "A100_80"])
def test_devices_are_found_however_they_are_written(name):
    assert devices.named(name).flops["bf16"] > devices.named(name).flops["fp32"] > 1e13


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX A6000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_has_for_it_and_no_other(name, key):
    """A slice, and another board of the same kind, reach other figures."""
    found = devices.of_cuda(name)
    assert (found and found.key) == key


def test_every_device_that_a_plan_knows_is_found_on_a_machine_that_has_it():
    assert set(devices.NAMES.values()) == set(devices.KNOWN)
    assert all(devices.key_of(key.upper()) == key for key in devices.KEYS)


@pytest.mark.parametrize(
    ("name", "hint"), [("h10", "'h100'"), ("a100", "'a100-80' or 'a100-40'"), ("xyz", "known: h100")]
)
def test_an_unknown_device_is_refused_with_what_is_close(name, hint):
    with pytest.raises(UserError, match=f"--device: '{name}' is no device.*{hint}"):
        devices.named(name)
