"""How many replicas serve so many users, each with so many tokens a second. Pure; estimates.

A decoding step gives every user of a replica one token. It reads the weights once and each user's keys and values, so
its time is the larger of those bytes over the memory's bandwidth, and of its FLOPs over what the device computes (the
roofline of Williams et al. 2009; for decoding Pope et al. 2022, arXiv:2211.05102, section 2). The replica takes as many
users as keep a step within 1 / rate seconds and fit its memory. Prompts are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.plan.facts import Facts
from jobs.plan.setting import FREE

READ = 0.6
"""Share of a device's bandwidth that decoding is assumed to reach, where it was not measured."""


@dataclass(frozen=True)
class Demand:
    """What is to be served."""

    users: int
    """At once."""
    tokens_per_second: float
    """Of each."""
    context: int
    """Tokens that each has before it: prompt and answer."""


@dataclass(frozen=True)
class Server:
    """What one replica runs on."""

    memory_bytes: int
    bandwidth: float
    """Bytes/s that it reaches."""
    flops: float
    """FLOP/s that it reaches."""
    width: int
    """Bytes of a weight, and of a number in keys and values."""


@dataclass(frozen=True)
class Replicas:
    """What it takes."""

    count: int | None
    """None: no number of replicas does it."""
    users_of_each: int
    limit: str
    """What keeps a replica from taking more."""
    fastest: float
    """Tokens a second of a user who is alone."""


def replicas(facts: Facts, server: Server, demand: Demand) -> Replicas | None:
    """Return how many replicas it takes, each on one device; None where the model is no causal transformer."""
    decoder = facts.decoder
    if decoder is None:
        return None
    weights = server.width * facts.parameters
    cache = 2 * server.width * decoder.layers * decoder.keys * demand.context
    flops = 2 * (facts.parameters - facts.embedding) + 4 * decoder.layers * decoder.queries * demand.context
    alone = 1 / max((weights + cache) / server.bandwidth, flops / server.flops)
    limits = {
        "memory": (server.memory_bytes * (1 - FREE) - weights) / cache,
        "bandwidth": (server.bandwidth / demand.tokens_per_second - weights) / cache,
        "FLOP/s": server.flops / demand.tokens_per_second / flops,
    }
    limit = min(limits, key=lambda name: limits[name])
    users = max(0, math.floor(limits[limit] + 1e-9))
    count = math.ceil(demand.users / users) if users else None
    return Replicas(count, min(users, demand.users), limit, alone)
