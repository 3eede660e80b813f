"""What comes and goes in a step beside weights, masters and moments, moment by moment. Pure; estimates.

    loss        gradients of earlier micro-batches, what the forward pass keeps, logits and their gradient
    head        the same with the output head's gradient in place of the logits, which are gone
    layer       the same with what a layer's backward pass works with in place of the logits' gradient
    reduce      all gradients, the bucket they are moved to, and what is copied of them to be reduced
    step        this rank's gradients, and a copy of them where the sums are not flat already

On a GPU the largest of these counts. On a CPU what was freed counts too: glibc gives memory back at once where a tensor
has 32 MiB or more, and keeps smaller ones on its heap for the next. So of small tensors the most that there ever was
stays, whatever large ones do meanwhile, and the holes between them too.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.plan.facts import HEAP, Decoder, Facts
from jobs.plan.setting import Setting
from jobs.worker.zero import SMALL_BUCKETS, SUMMED_AT_ONCE

BUCKET = 500_000_000
"""DeepSpeed's own `reduce_bucket_size`, in elements."""
LIVE = 1_000_000_000
"""DeepSpeed's own `stage3_max_live_parameters`, and the size of the groups in which stage 3 steps, in elements."""
HOLES = {0: 0.33, 1: 0.27, 2: 0.27, 3: 0.5}
"""As a share of small tensors, what the heap loses to holes that the next one does not fit into, by ZeRO stage: as
mallinfo2 has it of glibc 2.36 (0.32, 0.30, 0.24, 0.53). Stage 3 gathers and frees weights between activations."""
CHUNK = {True: 1 << 28, False: 1 << 20}
"""Bytes of fp32 logits at a time, on a GPU and on a CPU (jobs/tasks/cross_entropy.py)."""


@dataclass(frozen=True)
class Bytes:
    """Memory in large tensors and in small ones."""

    large: int = 0
    small: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.large + other.large, self.small + other.small)

    @property
    def all(self) -> int:
        """Both."""
        return self.large + self.small


def of(size: int, count: int = 1) -> Bytes:
    """Return so many tensors of a size in bytes."""
    return Bytes(small=size * count) if size < HEAP else Bytes(large=size * count)


def most(moments: list[Bytes], on_gpu: bool, holes: float = 0.0, resting: int = 0) -> int:
    """Return the most at once over all moments.

    Args:
        holes: what the heap of a CPU's process loses, as a share of small tensors.
        resting: small tensors that are there all the time, between which the others have to fit.
    """
    if on_gpu:
        return max(each.all for each in moments)
    small = max(each.small for each in moments)
    return max(each.large for each in moments) + small + round(holes * (small + resting))


def moments(facts: Facts, setting: Setting) -> list[Bytes]:
    """Return what there is at each moment of a step, when earlier ones have been taken."""
    before, during = _before(facts, setting), of(_during(facts, setting))
    apart = _apart(facts, setting)
    stepping = 0 if apart else gradients(facts, setting) + step(facts, setting)
    found = [*_reducing(facts, setting), Bytes(stepping)]
    if facts.decoder is not None:
        held = sum((of(*each) for each in kept(facts.decoder, setting)), before + during)
        whole = setting.width * setting.tokens * facts.decoder.vocabulary
        chunk = min(CHUNK[setting.on_gpu], 4 * setting.tokens * facts.decoder.vocabulary)
        found.append(held + of(whole, 2) + of(chunk))
        head = of(setting.stored * facts.largest)
        found.append(held + of(whole) + head)
        found.append(sum((of(*each) for each in _working(facts.decoder, setting)), held + head))
    return [each + Bytes(apart) for each in found]


def resting(facts: Facts, setting: Setting) -> int:
    """Return the bytes of weights and moments that are small tensors: those of ZeRO's stages are flattened."""
    return 12 * facts.small if setting.stage == 0 else 0


def gradients(facts: Facts, setting: Setting) -> int:
    """Return the bytes of gradients when a step begins its update."""
    if setting.stage == 0:
        return 4 * facts.trainable
    if _sums_whole(setting):
        return 6 * facts.trainable
    return 4 * setting.share(facts.trainable)


def kept(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    """Return what a micro-batch keeps for the backward pass: (bytes of a tensor, how many).

    The account of Korthikanti et al. 2022 (arXiv:2205.05198, equation 2) without attention scores, which fused kernels
    do not keep, and dropout masks; for any width of queries, keys and MLP, with transformers' RMSNorm, whose input is
    kept in fp32 and whose normalised value once more.
    """
    if setting.checkpointing is False:
        return [(size, count * decoder.layers) for size, count in _layer(decoder, setting)]
    if setting.checkpointing == "selective":
        products = [(size, count * decoder.layers) for size, count in _products(decoder, setting)]
        return [*products, *_made_again(decoder, setting)]
    return [(setting.tokens * setting.width * decoder.hidden, decoder.layers), *_layer(decoder, setting)]


def logits(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    """Return logits, their gradient, and the part of them that is in fp32: (bytes of a tensor, how many)."""
    whole = setting.tokens * setting.width * decoder.vocabulary
    return [(whole, 2), (min(CHUNK[setting.on_gpu], 4 * setting.tokens * decoder.vocabulary), 1)]


def _layer(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    width, tokens = setting.width, setting.tokens
    return [
        (tokens * width * decoder.hidden, 4),
        (tokens * width * decoder.queries, 2),
        (tokens * width * decoder.keys, 2),
        (tokens * width * decoder.intermediate, _kept_of_mlp(decoder)),
        *([(tokens * 4 * decoder.hidden, 2)] if decoder.rms_norm else []),
    ]


def _products(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    """Return what selective checkpointing keeps of a layer: its input, outputs of linear layers and of attention."""
    row = setting.tokens * setting.width
    return [
        (row * decoder.hidden, 3),
        (row * decoder.queries, 2),
        (row * decoder.keys, 2),
        (row * decoder.intermediate, _products_of_mlp(decoder)),
    ]


def _made_again(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    """Return what a layer's backward pass has then besides: the rest of what is kept without checkpointing."""
    row = setting.tokens * setting.width
    return [
        (row * decoder.hidden, 3),
        (row * decoder.queries, 1),
        (row * decoder.keys, 1),
        (row * decoder.intermediate, _kept_of_mlp(decoder) - _products_of_mlp(decoder)),
        *([(setting.tokens * 4 * decoder.hidden, 2)] if decoder.rms_norm else []),
    ]


def _products_of_mlp(decoder: Decoder) -> int:
    return 2 if decoder.gated else 1


def _kept_of_mlp(decoder: Decoder) -> int:
    """Return how many tensors of an MLP's width are kept: a GELU in steps keeps its input, tanh and two factors."""
    return 4 if decoder.gated else 5 if decoder.stepped else 2


def _working(decoder: Decoder, setting: Setting) -> list[tuple[int, int]]:
    """Return what the backward pass of a layer's MLP, its widest part, works with: (bytes of a tensor, how many)."""
    row = setting.tokens * setting.width
    return [(row * decoder.intermediate, 4 if decoder.gated else 2), (row * decoder.hidden, 3)]


def _split(facts: Facts, width: int) -> Bytes:
    """Return all gradients, each a tensor of its own."""
    return Bytes(width * (facts.trainable - facts.small), width * facts.small)


def _sums_whole(setting: Setting) -> bool:
    """Say whether every rank has whole fp32 sums beside bf16 gradients: BF16_Optimizer."""
    return setting.stage == 1 and setting.precision == "bf16" and setting.offload == "none"


def _before(facts: Facts, setting: Setting) -> Bytes:
    """Return the gradients that are there when the backward pass of the last micro-batch begins."""
    again = setting.micro_batches > 1
    if _sums_whole(setting):
        return Bytes(4 * facts.trainable) + (_split(facts, 2) if again else Bytes())
    if setting.stage == 3:
        return Bytes(4 * setting.share(facts.trainable))
    if not again:
        return Bytes()
    return _split(facts, 4) if setting.stage < 2 else Bytes(4 * setting.share(facts.trainable))


def _apart(facts: Facts, setting: Setting) -> int:
    """Return what offload keeps apart from the device where this is the same memory: gradients, weights, ways there."""
    if setting.on_gpu or setting.offload == "none" or not setting.stage:
        return 0
    mine = setting.share(facts.trainable)
    if setting.stage == 3:
        return 4 * mine
    summed = setting.width * mine if setting.micro_batches > 1 else 0
    return (4 + setting.width) * mine + 2 * setting.width * facts.largest + summed


def _during(facts: Facts, setting: Setting) -> int:
    """Return what is there during both passes: autocast's copies, gathered weights, and a GPU's buckets."""
    return _gathered(facts, setting) + _made(facts, setting)


def _made(facts: Facts, setting: Setting) -> int:
    """Return what the largest weight that is held in few bits takes while it is made of them, in two steps."""
    return (4 + setting.width) * facts.held_largest


def _gathered(facts: Facts, setting: Setting) -> int:
    if setting.stage == 0:
        return 2 * facts.numbers if setting.precision == "bf16" else 0
    if setting.stage == 3:
        live = LIVE if setting.on_gpu else SMALL_BUCKETS["stage3_max_live_parameters"]
        there = setting.world_size == 1 and not setting.in_files
        gathered = 0 if there else min(facts.parameters, live + facts.largest)
        return setting.width * (gathered + _bucket(facts, setting))
    return _buckets(facts, setting) if setting.on_gpu and not _sums_whole(setting) else 0


def _bucket(facts: Facts, setting: Setting) -> int:
    """Return the elements of a bucket of stage 3; a CPU's has memory only where it was written to."""
    return BUCKET if setting.on_gpu else min(SMALL_BUCKETS["reduce_bucket_size"], facts.trainable)


def _buckets(facts: Facts, setting: Setting) -> int:
    """Return the bytes of the buckets of stages 1 and 2: two on a GPU, where one is filled as the other is reduced."""
    return _moved(setting) * (2 * BUCKET if setting.on_gpu else min(BUCKET, facts.trainable))


def _moved(setting: Setting) -> int:
    """Return the bytes of a gradient in a bucket of stages 1 and 2."""
    return 4 if setting.stage == 1 else setting.width


def _reducing(facts: Facts, setting: Setting) -> list[Bytes]:
    """Return what there is when gradients are reduced, the forward pass being undone."""
    trained, mine = facts.trainable, setting.share(facts.trainable)
    if setting.stage == 0 or _sums_whole(setting):
        whole = _split(facts, 4) if setting.stage == 0 else Bytes(4 * trained) + _split(facts, 2)
        return [whole + Bytes(_copied(facts, setting))]
    if setting.stage == 3:
        copies = 2 if facts.largest > _bucket(facts, setting) else 1  # what no bucket holds is reduced in a copy
        return [Bytes(4 * mine + _during(facts, setting)) + of(setting.stored * facts.largest, copies)]
    summed = Bytes(_buckets(facts, setting) + max(_copied(facts, setting), 4 * mine))
    if setting.stage == 1:  # moved there one by one: large ones are gone then
        return [_split(facts, 4), summed + Bytes(small=4 * facts.small)]
    return [summed + _before(facts, setting)]


def buffers(facts: Facts, setting: Setting) -> int:
    """Return what gradients are reduced through, and what of other ranks' weights is gathered."""
    during = _during(facts, setting)
    if setting.stage == 3:
        return during
    if setting.stage == 0 or _sums_whole(setting):
        return during + _copied(facts, setting)
    return _made(facts, setting) + _buckets(facts, setting) + _copied(facts, setting)


def _copied(facts: Facts, setting: Setting) -> int:
    """Return the bytes of gradients that stages 0 to 2 copy to sum them over the ranks."""
    if setting.stage == 0:
        return 4 * min(BUCKET, facts.joined)
    if _sums_whole(setting):  # they are sent in bf16
        return 2 * min(SUMMED_AT_ONCE, facts.trainable)
    return _moved(setting) * min(BUCKET, facts.trainable) if setting.on_gpu else 0


def step(facts: Facts, setting: Setting) -> int:
    """Return the copy of its gradients that a rank steps with, where the sums are not flat already.

    Muon has another one of its matrices', blended with their momentum.
    """
    blended = facts.matrices if setting.optimizer == "muon" else 0
    if setting.stage == 3:
        most = LIVE if setting.on_gpu else max(SMALL_BUCKETS["sub_group_size"], facts.largest)
        return 4 * setting.share(min(facts.trainable, most)) + 4 * setting.share(min(blended, most))
    if setting.stage and setting.precision == "fp32":
        return 4 * setting.share(facts.trainable) + 4 * setting.share(blended)
    return 4 * setting.share(blended) if setting.stage else 0
