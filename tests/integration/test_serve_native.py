"""The native kernels against plain torch, and NativeRunner against transformers in bf16."""

import ctypes
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.engines.torch.batch import BLOCK, Batch
from serve.engines.torch.check import UnsupportedArchitecture
from serve.engines.torch.linear import Weights
from serve.engines.torch.native import build, library, structure
from serve.engines.torch.native.runner import NativeRunner, refusal
from serve.engines.torch.native.structure import Matrix
from serve.engines.torch.native.weights import GROUP, Packed, pack, quantise_int4, quantise_int8
from tests.support import tiny_models

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
CONTEXT = 160
VOCABULARY = 300


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Linear layers


def multiply(packed: Packed, x: torch.Tensor, vectors: bool = False) -> torch.Tensor:
    out = torch.empty(len(x), packed.n)
    struct = packed.struct
    library.load().tandem_linear(ctypes.byref(struct), x.data_ptr(), *x.shape, int(vectors), out.data_ptr())
    return out


def plain_weight(matrix: Matrix, kind: Weights) -> torch.Tensor:
    """The weight that the quantised layer stands for, in double precision."""
    weight = matrix.values
    if kind == "int8":
        values, scale = quantise_int8(weight)
        return values.double() * scale.double()[:, None]
    if kind == "int4":
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64))
        values, scale = quantise_int4(padded)
        return (values.double() * scale.double().repeat_interleave(GROUP, 1))[:, : weight.shape[1]]
    return weight.double()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (40, 100), (96, 257), (300, 64), (17, 31)])
def test_linear_of_any_number_of_rows_is_the_plain_product(kind: Weights, outputs: int, inputs: int) -> None:
    random_state = torch.Generator().manual_seed(outputs)
    bias = torch.randn(outputs, generator=random_state)
    matrix = Matrix(torch.randn(outputs, inputs, generator=random_state).bfloat16(), None, bias)
    packed, weight = pack(matrix, kind), plain_weight(matrix, kind)
    for rows in (*range(1, 20), 31, 32, 33, 47, 48, 64, 70, 300):
        x = torch.randn(rows, inputs, generator=random_state).bfloat16()
        expected = x.double() @ weight.T + bias.double()
        # fixed-point activations keep 15 bits of each row's largest value
        tolerance = (1e-5 if kind == "bf16" else 3e-4) * inputs**0.5 * float(weight.abs().max())
        for vectors in (False, True):
            actual = multiply(packed, x, vectors)[:, :outputs]
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=tolerance)


def test_a_row_far_larger_than_its_neighbours_does_not_blur_them() -> None:
    weight = torch.randn(32, 64).bfloat16()
    x = torch.randn(6, 64).bfloat16()
    x[2] *= 1e6
    expected = x.double() @ plain_weight(Matrix(weight), "int8").T
    actual = multiply(pack(Matrix(weight), "int8"), x).double()
    assert ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-3


def test_zero_rows_and_zero_weights_give_zero() -> None:
    for kind in ("int8", "int4"):
        assert not multiply(pack(Matrix(torch.zeros(32, 64).bfloat16()), kind), torch.randn(3, 64).bfloat16()).any()  # type: ignore[arg-type]
        assert not multiply(pack(Matrix(torch.randn(32, 64).bfloat16()), kind), torch.zeros(3, 64).bfloat16()).any()  # type: ignore[arg-type]


def test_int8_that_was_stored_is_taken_as_it_is() -> None:
    values, scale = quantise_int8(torch.randn(48, 64))
    x = torch.randn(5, 64).bfloat16()
    actual = multiply(pack(Matrix(values, scale), "bf16"), x)[:, :48]
    expected = x.double() @ (values.double() * scale.double()[:, None]).T
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


def test_int8_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(64, 256)
    values, scale = quantise_int8(weight)
    assert ((values * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()


def test_int4_error_is_that_of_sixteen_levels_and_scales_are_exact_in_bf16() -> None:
    weight = torch.randn(64, 256)
    values, scale = quantise_int4(weight)
    groups, steps = weight.unflatten(1, (-1, GROUP)), scale.float()[..., None]
    restored = values.unflatten(1, (-1, GROUP)) * steps
    assert values.min() >= -8
    assert values.max() <= 7
    assert float((restored - groups).norm() / groups.norm()) < 0.1  # plain rounding to the largest of 32 gives 0.09
    products = values.unflatten(1, (-1, GROUP)).float() * steps
    assert torch.equal(products, products.bfloat16().float())


# The whole forward pass


def tiny(kind: str, **changes: Any) -> Any:
    """Build a random bf16 model whose logits are far from flat."""
    sizes = {"hidden_size": 72, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 100}
    if kind.startswith("gemma"):
        sizes |= {"query_pre_attn_scalar": 16, "sliding_window": 24}
    model = tiny_models.decoder(kind, **{**sizes, **changes})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data = 0.06 * torch.randn_like(parameter) * (4 if "embed" in name or "wte" in name else 1)
    return model.to(torch.bfloat16).eval()


VARIANTS = {
    "llama": tiny,
    "llama, wide heads": lambda _: tiny("llama", head_dim=80, num_key_value_heads=1),
    "llama, biases, tied": lambda _: tiny("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda kind: tiny(kind, sliding_window=24),
    "qwen2": tiny,
    "qwen3": tiny,
    "gpt2": tiny,
    "gemma2": lambda kind: tiny(kind, attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
    "gemma3_text": tiny,
}


class Crowd:
    """Sequences over a shuffled cache, fed chunk by chunk."""

    def __init__(self, runner: NativeRunner, blocks: int, seed: int = 0) -> None:
        self.runner = runner
        self.random = random.Random(seed)
        self.free = list(range(1, blocks))
        self.random.shuffle(self.free)
        self.texts: list[list[int]] = []
        self.done: list[int] = []
        self.tables: list[list[int]] = []
        self.all_hidden = False
        """Whether steps give the hidden states of all their tokens in place of logits."""

    def add(self, tokens: list[int]) -> None:
        self.texts.append(list(tokens))
        self.done.append(0)
        self.tables.append([])

    def step(self, counts: dict[int, int]) -> torch.Tensor:
        """Run `counts[i]` more tokens of sequence i; return the logits [sequences, vocabulary] after each."""
        tokens, positions, slots, starts, contexts = [], [], [], [0], []
        for i, count in counts.items():
            begin, end = self.done[i], self.done[i] + count
            while len(self.tables[i]) * BLOCK < end:
                self.tables[i].append(self.free.pop())
            tokens += self.texts[i][begin:end]
            positions += range(begin, end)
            slots += [self.tables[i][p // BLOCK] * BLOCK + p % BLOCK for p in range(begin, end)]
            starts.append(starts[-1] + count)
            contexts.append(end)
            self.done[i] = end
        most = max(len(self.tables[i]) for i in counts)
        table = [self.tables[i] + [0] * (most - len(self.tables[i])) for i in counts]
        rows = [torch.tensor(row, dtype=torch.int32) for row in (tokens, positions, slots, starts, contexts, table)]
        last = rows[3][1:] - 1
        hidden = torch.arange(0 if self.all_hidden else len(tokens), len(tokens), dtype=torch.int32)
        wanted = last[:0] if self.all_hidden else last
        batch = Batch(*rows, logits_at=wanted, decoding=0, hidden_at=hidden)  # type: ignore[call-arg]
        return self.runner.run(batch)[int(self.all_hidden)]

    def prefill(self) -> dict[int, torch.Tensor]:
        """Feed all prompts in random chunks; return each one's last logits."""
        last: dict[int, torch.Tensor] = {}
        while left := {i: len(t) - self.done[i] for i, t in enumerate(self.texts) if self.done[i] < len(t)}:
            chosen = self.random.sample(sorted(left), self.random.randint(1, len(left)))
            counts = {i: self.random.randint(1, left[i]) for i in chosen}
            last |= dict(zip(counts, self.step(counts), strict=True))
        return last


def prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCABULARY) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def prepared(model: Any, weights: Weights = "bf16", threads: int = 1, blocks: int = 64) -> NativeRunner:
    runner = NativeRunner(model, threads, weights, CONTEXT)
    assert runner.prepare(blocks, 1 << 30) == blocks
    return runner


@torch.inference_mode()
def behind_best(model: Any, text: list[int], prompt: int) -> float:
    """By how many nats the worst of the generated tokens is less likely than the reference's best."""
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float().log_softmax(-1)
    chosen = logits[prompt - 1 : -1].gather(1, torch.tensor(text[prompt:])[:, None])[:, 0]
    return float((logits[prompt - 1 : -1].amax(-1) - chosen).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_of_a_crowd_is_what_transformers_finds_best(variant: str) -> None:
    model = VARIANTS[variant](variant)
    model.set_attn_implementation("eager")
    assert refusal(model) is None
    starts = prompts(6, 70)
    crowd = Crowd(prepared(model, threads=2), 64)
    for prompt in starts:
        crowd.add(prompt)
    best = crowd.prefill()
    for _ in range(20):
        for i, logits in best.items():
            crowd.texts[i].append(int(logits.argmax()))
        best = dict(enumerate(crowd.step(dict.fromkeys(range(6), 1))))
    for prompt, text in zip(starts, crowd.texts, strict=True):
        assert behind_best(model, text, len(prompt)) < 0.05


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.02), ("int8", 0.03)])
def test_logits_are_those_of_the_model(variant: str, weights: Weights, bound: float) -> None:
    model = VARIANTS[variant](variant)
    text = prompts(1, 100, seed=3)[0] + [5] * 20
    crowd = Crowd(prepared(model, weights), 64)
    crowd.add(text)
    actual = crowd.step({0: len(text)})[0]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([text])).logits[0, -1].float()
    assert float((actual - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2", "gemma3_text"])
def test_hidden_states_are_those_of_the_model(variant: str) -> None:
    model = VARIANTS[variant](variant)
    text = prompts(1, 100, seed=3)[0] + [5] * 20
    crowd = Crowd(prepared(model, threads=2), 64)
    crowd.add(text)
    crowd.all_hidden = True
    actual = torch.cat([crowd.step({0: 7}), crowd.step({0: len(text) - 7})])
    with torch.inference_mode():
        expected = model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0].float()
    assert actual.shape == expected.shape
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.max()) < 0.04
    mean = torch.nn.functional.cosine_similarity(actual.mean(0), expected.mean(0), dim=0)
    assert float(mean) > 0.9995


def test_int4_model_is_the_model_of_its_restored_weights() -> None:
    model = tiny("llama", hidden_size=64, head_dim=32, intermediate_size=128)
    runner = prepared(model, "int4")
    text = prompts(1, 100, seed=3)[0]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            values, scale = quantise_int4(module.weight.data)
            module.weight.data = (values.float() * scale.float().repeat_interleave(GROUP, 1)).bfloat16()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([text])).logits[0, -1].float()
    for chunks in ([len(text)], [1] * len(text)):
        crowd = Crowd(runner, 64)
        crowd.add(text)
        for count in chunks:
            actual = crowd.step({0: count})[0]
        assert float((actual - expected).norm() / expected.norm()) < 0.02


def test_a_crowd_of_seventy_decodes_what_each_alone_decodes() -> None:
    model = tiny("qwen3")
    starts = prompts(70, 12)
    crowd = Crowd(prepared(model, threads=2, blocks=200), 200)
    for prompt in starts:
        crowd.add(prompt)
    together = crowd.prefill()
    runner = prepared(model)
    for i in range(0, 70, 7):
        alone = Crowd(runner, 64)
        alone.add(starts[i])
        logits = alone.step({0: len(starts[i])})[0]
        assert float((together[i] - logits).norm() / logits.norm()) < 0.02


def test_more_rows_than_a_chunk_of_activations() -> None:
    model = tiny("llama", max_position_embeddings=700)
    runner = NativeRunner(model, 2, "bf16", 700)
    runner.prepare(64, 1 << 30)
    text = prompts(1, 1, seed=5)[0] + [random.Random(2).randrange(VOCABULARY) for _ in range(610)]
    crowd = Crowd(runner, 64)
    crowd.add(text)
    actual = crowd.step({0: len(text)})[0]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([text])).logits[0, -1].float()
    assert float((actual - expected).norm() / expected.norm()) < 0.02


def test_what_an_earlier_owner_left_in_a_block_does_not_matter() -> None:
    model = tiny("llama")
    runner = prepared(model)
    crowd = Crowd(runner, 64)
    crowd.add([7] * 40)
    expected = crowd.step({0: 40})[0].clone()
    for tensor in [kept for kept in runner._kept if isinstance(kept, torch.Tensor) and kept.dtype == torch.uint8]:
        tensor.fill_(255)  # every number of the cache becomes a bf16 nan
    again = Crowd(runner, 64)
    again.add([7] * 40)
    assert torch.equal(again.step({0: 40})[0], expected)


def test_sequences_that_share_a_block_see_what_one_of_them_writes_in_the_same_step() -> None:
    model = tiny("llama")
    crowd = Crowd(prepared(model), 64)
    text = [random.Random(4).randrange(VOCABULARY) for _ in range(BLOCK + 5)]
    crowd.add(text)
    crowd.add(text)
    first, shared = crowd.free.pop(), crowd.free.pop()
    crowd.tables[0], crowd.tables[1], crowd.done[1] = [first], [first], BLOCK
    crowd.tables[1].append(shared)
    both = crowd.step({0: len(text), 1: 5})
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0.02)


def test_memory_bounds_the_cache_and_release_empties_the_model() -> None:
    model = tiny("llama")
    runner = NativeRunner(model, 1, "bf16", CONTEXT)
    blocks = runner.prepare(10_000, 1 << 20)
    assert runner.cache_memory_bytes <= 1 << 20
    assert blocks < 10_000
    runner.release()
    assert sum(p.numel() for p in model.parameters()) < VOCABULARY * 72 * 2
    crowd = Crowd(runner, blocks)
    crowd.add([1, 2, 3])
    assert crowd.step({0: 3}).isfinite().all()


def test_unknown_models_are_refused_with_the_reason() -> None:
    opt = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", hidden_size=48, ffn_dim=64, num_hidden_layers=1))
    assert "architecture 'opt'" in (refusal(opt.bfloat16()) or "")
    llama = tiny("llama")
    assert "float32" in (refusal(llama.float()) or "")
    llama.bfloat16().model.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(72, 100))
    assert "Sequential" in (refusal(llama) or "")
    with pytest.raises(UnsupportedArchitecture, match="Sequential"):
        NativeRunner(llama, 1).prepare(8, 1 << 20)
    yarn = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(structure.Unknown, match="dynamic"):
        structure.read(yarn)


# Building


def test_a_missing_compiler_is_a_reason_and_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compiler" in (build.refusal() or "")
    with pytest.raises(build.BuildError, match="compiler"):
        build.library()


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="failed"):
        build.library()
    assert not list(tmp_path.glob("tandem/kernels/*.so"))


# Threads


def test_more_threads_than_cores_give_the_same_logits() -> None:
    model = tiny("llama")
    expected = None
    for threads in (1, 2, 5):
        crowd = Crowd(prepared(model, "int8", threads), 64)
        for prompt in prompts(9, 30):
            crowd.add(prompt)
        logits = crowd.step({i: len(text) for i, text in enumerate(crowd.texts)})
        if expected is None:
            expected = logits
        assert torch.equal(logits, expected)


def test_an_idle_runner_takes_no_cpu() -> None:
    crowd = Crowd(prepared(tiny("llama"), threads=3), 64)
    crowd.add([1, 2, 3])
    crowd.step({0: 3})
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1
