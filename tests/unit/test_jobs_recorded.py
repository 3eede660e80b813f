"""Initial weights replayed in slices (jobs/worker/recorded.py): the same however they are cut, and well drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jobs.tasks import get
from jobs.tasks.observations import Observations
from jobs.tasks.table_columns import Column
from jobs.worker import replay
from jobs.worker.recorded import Recorded, Unrecordable, record
from tests.support import tiny_models

SEED = 5
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
MARIAN = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
MARIAN |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WAV2VEC2 = {**SMALL, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
YOLOS = {**SMALL, "patch_size": 8, "num_detection_tokens": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
MIXTRAL = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
NUMBERS = [Column(name, "number") for name in ("a", "b", "c")]
NAMES = [Column("d", "category", categories=("x", "y"))]
TABLE = {"columns": [*NUMBERS, *NAMES], "labels": ["no", "yes"]}
ITEMS = {"items": [f"item {number}" for number in range(40)]}
IMAGES = {"size": (16, 16), "channels": 3}
BUILT = [
    ("tabular", "mlp", {"hidden_size": 16, "frequencies": 4}, TABLE),
    ("tabular", "ft-transformer", {"hidden_size": 16, "frequencies": 4}, TABLE),
    ("recommendation", "sasrec", {"hidden_size": 16}, ITEMS),
    ("recommendation", "two-tower", {"hidden_size": 16}, ITEMS),
    ("forecasting", "transformer", {}, {"context_length": 16, "horizon": 4}),
    ("forecasting", "gru", {}, {"context_length": 16, "horizon": 4}),
    ("policy", "policy-cnn", {"hidden_size": 16}, {"seen": Observations((16, 16)), "labels": ["0", "1"]}),
    ("gan", "gan-cnn", {"width": 8}, IMAGES),
    ("image-embedding", "embedding-cnn", {"width": 8}, {**IMAGES, "identities": list("abcdefgh")}),
    ("image-embedding", "embedding-vit", {"hidden_size": 16}, {**IMAGES, "identities": list("abcdefgh")}),
    ("image-classification", "cnn", {"width": 8}, {**IMAGES, "labels": ["a", "b"]}),
    ("image-classification", "vit", {**SMALL, "patch_size": 8}, {**IMAGES, "labels": ["a", "b"]}),
    ("object-detection", "detection-cnn", {"width": 16, "blocks": 1}, {**IMAGES, "categories": ["a"]}),
    ("object-detection", "yolos", YOLOS, {"size": (32, 32), "channels": 3, "categories": ["a"]}),
    ("speech-recognition", "conv-transformer", {"hidden_size": 16}, {"symbols": list("_abc"), "rate": 8_000}),
    ("speech-recognition", "crnn", {"hidden_size": 16}, {"symbols": list("_abc"), "rate": 8_000}),
    ("speech-recognition", "wav2vec2", WAV2VEC2, {"symbols": list("_abc"), "rate": 16_000}),
    ("causal-lm", "lstm", {"hidden_size": 32}, {}),
    ("causal-lm", "lstm", {"hidden_size": 32, "tie_word_embeddings": True}, {}),
    ("causal-lm", "llama", SMALL, {}),
    ("causal-lm", "llama", {**SMALL, "tie_word_embeddings": True}, {}),
    ("causal-lm", "gpt2", GPT2, {}),
    ("causal-lm", "mixtral", MIXTRAL, {}),
    ("causal-lm", "mamba", MAMBA, {}),
    ("causal-lm", "rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, {}),
    ("text-classification", "ngram", {"hidden_size": 16, "buckets": 64}, {"labels": ["a", "b"]}),
    ("text-classification", "bert", SMALL, {"labels": ["a", "b"]}),
    ("seq2seq", "t5", T5, {}),
    ("seq2seq", "marian", MARIAN, {}),
]
"""Task, architecture, `model.config`, and what the task would have learned of the data."""


def builder(task: str, architecture: str, config: dict[str, Any], learned: dict[str, Any]) -> Callable[[], Any]:
    made = get(task)()
    for name, value in learned.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    if hasattr(made, "tokenizer"):
        made.tokenizer = tiny_models.tokenizer()
    return lambda: made.build(architecture, config)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of some thousand elements are of several blocks then, and of a part."""
    monkeypatch.setattr(replay, "BLOCK", 500)


def filled(made: Recorded, name: str, cuts: list[int]) -> torch.Tensor:
    """Fill a parameter in slices between `cuts`, from the last to the first."""
    whole = torch.full((cuts[-1],), torch.nan)
    for first, last in reversed(list(itertools.pairwise(cuts))):
        made.fill(name, first, whole[first:last])
    return whole


@pytest.mark.parametrize("case", BUILT, ids=[f"{task}-{name}" for task, name, *_ in BUILT])
def test_every_architecture_is_the_same_in_slices_and_drawn_as_without_recording(case: Any) -> None:
    build = builder(*case)
    made, again = record(build, SEED), record(build, SEED)
    torch.manual_seed(1)
    ordinary = build()
    buffers = {name: buffer.clone() for name, buffer in made.model.named_buffers()}
    slices = {}
    for name, parameter in made.model.named_parameters():
        assert parameter.is_meta, name
        numel = parameter.numel()
        slices[name] = filled(made, name, sorted({0, 1, numel // 3, numel // 2 + 1, numel}))
    model = again.materialise()
    expected = dict(ordinary.named_parameters())
    assert list(slices) == list(expected) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(slices[name], parameter.data.view(-1)), name
        assert not parameter.isnan().any(), name
        check_alike(name, parameter.detach(), expected[name].detach())
        assert parameter.requires_grad == expected[name].requires_grad
    for name, buffer in ordinary.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def check_alike(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare mean and deviation within six times what chance does; constants exactly."""
    if expected.numel() == 1 or expected.std() == 0:
        assert torch.equal(found, expected), name
        return
    chance = 6 / expected.numel() ** 0.5
    deviation = float(expected.std())
    assert abs(float(found.std()) - deviation) <= chance * deviation, name
    assert abs(float(found.mean() - expected.mean())) <= 1.5 * chance * deviation, name


@pytest.mark.parametrize(
    "case", [BUILT[17], BUILT[20], BUILT[22], BUILT[-1]], ids=["lstm", "llama", "mixtral", "marian"]
)
def test_a_model_made_real_computes_and_learns(case: Any) -> None:
    model = record(builder(*case), SEED).materialise()
    ids = torch.arange(6).view(1, 6)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if case[0] == "seq2seq" else {})}
    loss = model(**inputs).logits.logsumexp(-1).sum()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    assert len(list(model.parameters())) == len(list(builder(*case)().parameters()))  # what is tied stays tied


def test_another_seed_and_another_name_draw_other_numbers() -> None:
    made, other = record(builder(*BUILT[19]), SEED), record(builder(*BUILT[19]), SEED + 1)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    first, second = (filled(made, name, [0, 1024]) for name in names)
    assert not torch.isclose(first, second).any()
    assert not torch.isclose(first, filled(other, names[0], [0, 1024])).any()
    assert not torch.isclose(first[:500], first[500:1000]).any()  # blocks of one parameter, too


def test_the_random_states_of_the_process_stay() -> None:
    build = builder(*BUILT[19])
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    record(build, SEED).materialise()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


class Own(torch.nn.Module):
    """A user's own module, which draws its weights in every way but torch.nn.init's."""

    def __init__(self) -> None:
        super().__init__()
        self.given = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.rows = torch.nn.Parameter(torch.empty(5, 300))
        for number, row in enumerate(self.rows.data):
            row.normal_(mean=float(number), std=0.01)
        self.counted = torch.nn.Parameter(torch.from_numpy(np.random.normal(size=1000)).float())
        self.scaled = torch.nn.Parameter(torch.randn(40, 50) * 3 + 1)
        self.copied = torch.nn.Parameter(self.scaled.detach().T.clone())
        self.pointed = torch.nn.Linear(30, 40)
        self.pointed.weight.data = torch.ones(40, 30)
        with torch.no_grad():
            self.pointed.weight[3] = torch.arange(30.0)
            self.pointed.weight[:, 7] = 5
            self.pointed.bias.copy_(torch.linspace(-1, 1, 40))
        self.tail = torch.nn.Parameter(self.rows.data[2:].flatten())
        self.register_buffer("table", torch.eye(4) * len([x for x in torch.ones(3).tolist() if x]))
        self.scale = torch.full((2,), 7.0) if bool(torch.zeros(1)) else torch.full((2,), 8.0)
        self.orthogonal = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(20, 10)))
        self.truncated = torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.empty(60, 50), std=1, a=-0.5, b=0.5))


def test_modules_of_ones_own_are_replayed_whatever_they_do() -> None:
    made = record(Own, SEED)
    names = {name: parameter.numel() for name, parameter in made.model.named_parameters()}
    cut = {name: filled(made, name, [0, numel // 2, numel]) for name, numel in names.items()}
    model = made.materialise()
    assert all(torch.equal(cut[name], parameter.data.view(-1)) for name, parameter in model.named_parameters())
    assert made.whole.keys() == {"given", "counted", "scaled", "copied", "pointed.weight", "pointed.bias", "orthogonal"}
    assert model.given.tolist() == [1.0, 2.0, 3.0]
    assert (model.rows.mean(1) - torch.arange(5)).abs().max() < 0.01
    assert torch.equal(model.copied, model.scaled.T)
    assert torch.equal(model.tail, model.rows[2:].flatten())
    expected = torch.ones(40, 30)
    expected[3], expected[:, 7] = torch.arange(30.0), 5
    assert torch.equal(model.pointed.weight, expected)
    assert torch.equal(model.pointed.bias, torch.linspace(-1, 1, 40))
    assert torch.equal(model.table, torch.eye(4) * 3)
    assert model.scale.tolist() == [8.0, 8.0]
    assert torch.allclose(model.orthogonal.T @ model.orthogonal, torch.eye(10), atol=1e-5)
    assert 0.4 < model.truncated.abs().max() <= 0.5
    assert abs(float(model.counted.detach().std()) - 1) < 0.15


def test_ranks_that_have_drawn_other_numbers_before_make_the_same_model() -> None:
    first = record(Own, SEED).materialise().state_dict()
    torch.rand(9), np.random.rand(9)
    second = record(Own, SEED).materialise().state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


class Half(torch.nn.Module):
    """Forgets a part of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(10, 10))
        self.weight.data[:7].zero_()


class Empty(torch.nn.Module):
    """Forgets a weight that it writes to from another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(10).add(1))


class Looking(torch.nn.Module):
    """Depends on what it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(10))
        self.sign = 1 if self.weight[0] > 0 else -1


class Listed(torch.nn.Module):
    """Keeps a parameter in a list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))
        self.weights = [self.weight]


class ThroughNumpy(torch.nn.Module):
    """Writes to a weight through numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))
        self.weight.detach().numpy()[:] = 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Half, "weight: nothing is ever written to its elements from 70 on"),
        (Empty, "weight: nothing is ever written to some of its elements"),
        (Looking, "depends on values that it draws"),
        (Listed, "the model keeps parameters in its weights"),
        (ThroughNumpy, "read-only"),
    ],
)
def test_what_would_be_wrong_is_refused(kind: type[torch.nn.Module], said: str) -> None:
    with pytest.raises(Unrecordable, match=said):
        record(kind, SEED)


class Crossed(torch.nn.Module):
    """Draws its weights through numpy, and has a part that is drawn as usual."""

    built = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        type(self).built += 1
        self.weight = torch.nn.Parameter(torch.zeros(size, size))
        self.weight.detach().numpy()[:] = np.random.normal(size=(size, size))
        self.within = torch.nn.Linear(size, 2)
        self.register_buffer("table", torch.ones(size))


class Wrapping(torch.nn.Module):
    """Looks at what it draws, and is made with another module, so that it cannot be made again without it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = torch.nn.Parameter(torch.randn(10))
        self.sign = 1 if self.weight[0] > 0 else -1


class Around(torch.nn.Module):
    """Makes both."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.wrapping = Wrapping(torch.nn.Linear(size, size))


class Mixed(torch.nn.Module):
    """Mostly what can be recorded."""

    def __init__(self, odd: bool = True) -> None:
        super().__init__()
        self.first = torch.nn.Linear(30, 40)
        self.crossed = torch.nn.ModuleList([Crossed(30), Crossed(31)] if odd else [])
        self.around = Around(20) if odd else None
        self.last = torch.nn.Linear(40, 30)
        if odd:
            with torch.no_grad():
                self.crossed[1].within.weight.normal_()
                self.crossed[0].within.bias.mul_(2)


def test_a_module_that_cannot_be_recorded_is_built_alone_and_the_others_stay_recorded() -> None:
    made, again, plain = record(Mixed, SEED), record(Mixed, SEED), record(lambda: Mixed(odd=False), SEED)
    names = {name: parameter.numel() for name, parameter in made.model.named_parameters()}
    odd = {name for name in names if name.startswith(("crossed", "around"))}
    assert made.alone.keys() == {"crossed.0", "crossed.1", "around"}
    assert made.whole.keys() == odd - {"crossed.1.within.weight"}  # which was drawn again, over what was built
    torch.rand(9), np.random.rand(9), random.random()
    cut = {name: filled(made, name, [0, numel // 3, numel]) for name, numel in reversed(names.items())}
    Crossed.built = 0
    model = again.materialise()
    assert Crossed.built == 2, "each is built once for all of its parameters"
    assert all(torch.equal(cut[name], parameter.data.view(-1)) for name, parameter in model.named_parameters())
    assert all(torch.equal(cut[name], filled(plain, name, [0, names[name]])) for name in names.keys() - odd)
    assert not torch.isin(model.crossed[0].weight, model.crossed[1].weight).any()
    assert abs(float(model.crossed[1].weight.detach().std()) - 1) < 0.15
    assert model.crossed[0].within.bias.abs().max() > 1 / 30**0.5  # drawn up to this, then doubled
    assert model.around.wrapping.sign == (1 if model.around.wrapping.weight[0] > 0 else -1)
    assert torch.equal(model.crossed[1].table, torch.ones(31))
    other = record(Mixed, SEED + 1).materialise()
    assert not torch.isin(model.crossed[0].weight, other.crossed[0].weight).any()


def test_what_is_made_whole_for_a_moment_is_said_with_its_bytes() -> None:
    assert record(Mixed, SEED).said == [
        "every worker builds 2 modules of class Crossed whole, one at a time, and keeps its part: crossed.1 has "
        "4.1 kB. It cannot be recorded: ValueError: assignment destination is read-only",
        "every worker builds 1 module of class Around whole, one at a time, and keeps its part: around has 1.7 kB. It "
        "cannot be recorded: the construction depends on values that it draws, and Wrapping is made of other modules "
        "or tensors",
    ]
    assert record(Own, SEED).said == [
        "every worker makes 4 parameters whole, one at a time, since they are computed from other tensors: scaled has "
        "8.0 kB"
    ]


class Unsteady(torch.nn.Module):
    """Draws from what nobody has seeded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))
        self.weight.detach().numpy()[:] = np.random.default_rng().normal(size=10)


def test_modules_that_cannot_be_built_again_or_whose_parameters_hide_are_refused() -> None:
    with pytest.raises(Unrecordable, match="Unsteady is another one each time that it is built"):
        record(lambda: torch.nn.Sequential(Unsteady(), torch.nn.Linear(2, 2)), SEED)
    with pytest.raises(Unrecordable, match=r"read-only, and Hiding keeps parameters where they are not found"):
        record(lambda: torch.nn.Sequential(Hiding()), SEED)


class Hiding(ThroughNumpy):
    """Keeps its weight in a list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.weight]


def test_slices_outside_of_a_parameter_are_refused() -> None:
    made = record(lambda: torch.nn.Linear(3, 4), SEED)
    for start, count in ((0, 13), (12, 1), (-1, 2)):
        with pytest.raises(ValueError, match="weight has 12 elements"):
            made.fill("weight", start, torch.empty(count))
    with pytest.raises(KeyError):
        made.fill("wight", 0, torch.empty(1))
