"""How long a step takes by measured rates. Pure; estimates.

compute         layers, attention and head at the rates that such passes had, and the cross-entropy
engine          what DeepSpeed adds for each parameter, and the copies through its buckets
communication   sums of gradients and gathered weights, by the bandwidth of two ranks
optimizer       the elements that this rank updates
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.plan.facts import Decoder, Facts
from jobs.plan.rates import Rates, at, of_layers
from jobs.plan.setting import Setting


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part."""

    compute_s: float
    engine_s: float
    communication_s: float
    optimizer_s: float

    @property
    def all_s(self) -> float:
        """All of it: nothing is assumed to overlap."""
        return self.compute_s + self.engine_s + self.communication_s + self.optimizer_s


def step(facts: Facts, setting: Setting, length: int, rates: Rates) -> StepTime | None:
    """Return the time of a step; None where the model is no causal transformer.

    Args:
        length: tokens of a row.
    """
    if facts.decoder is None or not setting.tokens:
        return None
    mine = facts.trainable if setting.stage == 0 else setting.share(facts.trainable)
    return StepTime(
        compute_s=setting.micro_batches * passes_s(facts, facts.decoder, setting, length, rates),
        engine_s=setting.micro_batches * facts.tensors * rates.overhead_s[setting.stage]
        + copied(facts, setting) / rates.bandwidth,
        communication_s=communication_s(facts, setting, rates),
        optimizer_s=mine / rates.updated_per_s,
    )


def passes_s(facts: Facts, decoder: Decoder, setting: Setting, length: int, rates: Rates) -> float:
    """Return the seconds of a micro-batch, forward and backward."""
    tokens, head = setting.tokens, decoder.hidden * decoder.vocabulary
    body = max(0, facts.parameters - facts.embedding - head)
    frozen = min(body, max(0, facts.frozen - facts.embedding - head))
    again = 4 / 3 if setting.checkpointing is True else 1  # products are not repeated by selective checkpointing
    layers = (6 * body - 2 * frozen) * tokens * again / of_layers(rates, decoder.hidden, tokens)
    squares = 12 * decoder.layers * decoder.queries * length * tokens * again / at(rates.attention, length)
    learned = 6 if facts.trainable > head else 4
    output = learned * head * tokens / at(rates.products, decoder.hidden)
    return layers + squares + output + tokens * decoder.vocabulary / rates.logits_per_s


def copied(facts: Facts, setting: Setting) -> int:
    """Return the bytes that are read and written to move gradients and weights about on a rank, in a step."""
    trained, mine, width = facts.trainable, setting.share(facts.trainable), setting.width
    if setting.stage == 0:
        return 16 * facts.joined
    weights = (4 + width) * mine if setting.masters_apart else 0
    if setting.stage == 1 and setting.precision == "bf16" and setting.offload == "none":
        return (10 * setting.micro_batches + 12) * trained + weights
    times = setting.micro_batches if setting.stage > 1 else 1
    moved = 2 * width * trained
    copies = 2 if setting.on_gpu or setting.stage == 3 else 1  # the bucket is summed in place
    return times * (copies * moved + (4 + width) * mine) + 8 * mine + weights


def communication_s(facts: Facts, setting: Setting, rates: Rates) -> float:
    """Return the seconds of collectives in a step; those of more ranks by the rule of rings."""
    world = setting.world_size
    if world == 1 or rates.reduced_per_s is None or rates.gathered_per_s is None:
        return 0.0
    ring = 2 * (world - 1) / world  # of two ranks, in whose terms the rates are, it is 1
    reduce_s = lambda size: ring * size / rates.reduced_per_s  # noqa: E731
    gather_s = lambda size: ring * size / rates.gathered_per_s  # noqa: E731
    width = 4 if setting.stage < 2 else setting.width
    if setting.stage == 0:
        return reduce_s(4 * facts.trainable)
    if setting.stage < 3:
        times = setting.micro_batches if setting.stage == 2 else 1
        return times * reduce_s(width * facts.trainable) + gather_s(setting.stored * facts.trainable)
    weights = 2 * setting.stored * facts.parameters
    calls = 3 * facts.tensors * rates.collective_s
    return setting.micro_batches * (gather_s(weights) + reduce_s(width * facts.trainable) / 2 + calls)
