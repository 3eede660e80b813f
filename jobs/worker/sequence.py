"""Rows that several ranks share: each has some tokens and all heads, and for attention all tokens and some heads.

Between the two, ranks exchange with each other (Ulysses: Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).
Where backward passes exchange gradients the same way, each rank's gradient is that of the sum of all parts' losses by
its own weights; the sum over all ranks, which the engine makes anyway, is that of the whole. So ZeRO divides over all
ranks at any stage, and neither checkpoints nor exports know that rows are shared.

DeepSpeed's own wrapper (UlyssesSPAttentionHF, 0.19) is not used: it passes no mask on to sdpa, so that packed rows see
each other, and has ZeRO take the ranks that share rows out of the mean, at stages 0 to 2 but not at 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.errors import UserError
from jobs.checkpoint import resume
from jobs.data.rows import Rows
from jobs.spec import JobSpec
from jobs.tasks import Batch, Task, causality, document_attention, packed_attention
from jobs.tasks.shared_rows import SharesRows
from jobs.worker import start
from jobs.worker.deepspeed_engine import Engine

NAME = "tandem_shared_rows"
"""What transformers knows the attention by."""
TOKENS = 6
"""Of a part of the rows that are compared, at most."""
TOLERANCE = 1e-4
"""Between the logits of a row in parts and whole: for the Euclidean norm of the difference over that of the logits,
beyond four times what rounding makes of it."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands among those that share rows."""

    part: int
    """Which part of its rows is its own."""
    parts: int
    """Ranks that share each row."""
    reader: int
    """Which share of a step's rows is its group's."""
    readers: int
    """Groups."""


def place(rank: int, world_size: int, parts: int) -> Place:
    """Return where a rank stands: neighbours, who are mostly on one node, share rows. Pure.

    Raises:
        UserError: the ranks cannot be divided into such groups.
    """
    if world_size % parts:
        raise UserError(
            f"training.parallel.sequence is {parts}, and {world_size} workers cannot be divided into groups of so many"
        )
    return Place(rank % parts, parts, rank // parts, world_size // parts)


class SharedRows:
    """An attention for transformers: of whole rows as usual, and of parts together with the other ranks."""

    def __init__(self, parts: int) -> None:
        """Meet the ranks of one's group. Collective, over all ranks."""
        self._parts = parts
        self._group, _ = dist.new_subgroups(group_size=parts)
        self._index = known(self._group)
        self.counts = False
        """Whether calls are counted: while nothing is compiled, for a compiler looks at every number that it reads."""
        self.calls = 0
        """How often rows in parts came by while they were."""
        self.said: list[str] = []
        """What is to be said of it."""

    def attach(self, model: torch.nn.Module) -> None:
        """Have a model of transformers attend so, as far as it can be told."""
        packed_attention.put(model, NAME, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return what the tokens make of each other, (B, S, H, V).

        Args:
            module: asks.
            query: (B, H, S, D), of this rank's S tokens.
            key, value: (B, G, S, D) and (B, G, S, V).
            attention_mask: where documents end in the whole row (jobs/tasks/shared_rows.py); else the row is whole.
            dropout: share of weights that is dropped.
            scaling: what products are multiplied by.
            others: what other attentions are told.
        """
        documents = packed_attention.ends(attention_mask)
        if documents is None:
            how = {"dropout": dropout, "scaling": scaling, **others}
            return packed_attention.attention(module, query, key, value, attention_mask, **how)
        packed_attention.check_known(others)
        if self.counts:
            self.calls += 1
        fewest = _repeats(query.shape[1], key.shape[1], self._parts)
        if fewest > 1:
            key, value = (tensor.repeat_interleave(fewest, dim=1) for tensor in (key, value))
        query, key, value = to_heads((query, key, value), self._parts, self._index)
        made = document_attention.attend(query, key, value, documents, dropout=dropout, scale=scaling)
        return to_parts(made, self._parts, self._index), None


def _repeats(heads: int, shared: int, parts: int) -> int:
    """Return how often keys are repeated, at least, so that their heads can be divided as the queries' can. Pure."""
    groups = heads // shared
    return next(each for each in range(1, groups + 1) if groups % each == 0 and shared * each % parts == 0)


def to_heads(tensors: Sequence[torch.Tensor], parts: int, group: int) -> list[torch.Tensor]:
    """Give up all heads of a part of the tokens, (B, H, S, D), for all tokens of some heads, (B, H / P, P S, D)."""
    blocks = [tensor.unflatten(1, (parts, -1)).movedim(1, 0) for tensor in tensors]
    flat = torch.cat([block.reshape(parts, -1) for block in blocks], dim=1)
    received = exchange(flat, group).split([block[0].numel() for block in blocks], dim=1)
    shaped = [part.view(block.shape) for part, block in zip(received, blocks, strict=True)]
    return [part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in shaped]


def to_parts(made: torch.Tensor, parts: int, group: int) -> torch.Tensor:
    """Give up all tokens of some heads, (B, H / P, P S, D), for all heads of a part of the tokens, (B, S, H, D)."""
    block = made.unflatten(2, (parts, -1)).permute(2, 0, 3, 1, 4)
    received = exchange(block.reshape(parts, -1), group)
    return received.view(block.shape).permute(1, 2, 0, 3, 4).flatten(2, 3)


_groups: list[Any] = []
"""Process groups by their number: an operation takes no group."""


def known(group: Any) -> int:
    """Return the number by which a process group is known here."""
    _groups.append(group)
    return len(_groups) - 1


def exchange(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """Return blocks (P, N) of which block j of rank i has become block i of rank j. Collective, forward and backward.

    A compiler sees one operation. What counts a step's operations has to see the collective within, so that else there
    is none around it.
    """
    if torch.compiler.is_compiling():
        made: torch.Tensor = torch.ops.tandem.exchange(blocks, group)
        return made
    found: torch.Tensor = _Exchange.apply(blocks, group)
    return found


class _Exchange(torch.autograd.Function):
    """An exchange undoes itself."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: int) -> torch.Tensor:
        """Exchange blocks (P, N)."""
        ctx.group = group
        return _exchanged(blocks, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Exchange their gradients (P, N)."""
        return _exchanged(gradient, ctx.group), None


def _exchanged(blocks: torch.Tensor, group: int) -> torch.Tensor:
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=_groups[group])
    return received


def _keep(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.group = inputs[1]


def _back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.tandem.exchange(gradient, ctx.group), None


_operation = torch.library.custom_op(
    "tandem::exchange", _exchanged, mutates_args=(), schema="(Tensor blocks, int group) -> Tensor"
)
_operation.register_fake(lambda blocks, group: torch.empty_like(blocks.contiguous()))
_operation.register_autograd(_back, setup_context=_keep)


def begin(spec: JobSpec, task: Task, engine: Engine, rows: Rows) -> SharedRows | None:
    """Have the model attend together with the ranks that share its rows, where the spec wants that. Collective.

    Raises:
        UserError: it cannot.
    """
    assert spec.training is not None
    where = place(engine.rank, engine.world_size, spec.training.parallel.sequence)
    if where.parts == 1:
        return None
    assert isinstance(task, SharesRows), "a spec of another task is refused"
    with start.described(spec):
        batch = task.collate(rows.take(np.zeros(1, dtype=np.int64)))
        return share(task, engine.model.module, where, batch)


def share(task: SharesRows, model: torch.nn.Module, where: Place, batch: Batch) -> SharedRows:
    """Have a model attend together with the ranks that share its rows, and look whether it does. Collective.

    A row in parts is compared with the same one whole, as the model attended before, whatever the architecture.
    Weights, mode and random state are left as they are.

    Args:
        model: on the ranks' devices.
        batch: one that it will see, (B, S): the rows that are compared are packed if its own are.

    Raises:
        UserError: parts of rows make something else, or not all layers attend.
    """
    if not hasattr(packed_attention.unadapted(model), "set_attn_implementation"):
        raise _cannot(where.parts, model, "it is none of transformers'")
    shared = SharedRows(where.parts)
    each = max(1, min(TOKENS, batch["input_ids"].shape[1] // where.parts))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole = _row(model, where, each, packed="position_ids" in batch)
            expected = _logits(model, whole)
            noise = _distance(_logits(model, {name: part[:, :each] for name, part in whole.items()}), expected[:each])
            shared.attach(model)
            shared.counts = True
            mine = _logits(model, task.part(whole, where.part, where.parts))
    except (packed_attention.Unknown, TypeError, ValueError) as failure:
        raise _cannot(where.parts, model, f"it fails at a part of a row: {failure}") from failure
    finally:
        model.train(was_training)
        shared.counts = False
    error = _distance(mine, expected[where.part * each :][:each])
    if (found := resume.first_of(_wrong(model, shared.calls, error, noise))) is not None:
        raise _cannot(where.parts, model, found)
    shared.said = [said(where.parts, batch["input_ids"].shape[1])]
    return shared


def said(parts: int, length: int) -> str:
    """Say who has how much of a row of so many tokens. Pure."""
    each = -(-length // parts)
    padded = f", padded by {each * parts - length}" if each * parts > length else ""
    return f"{parts} workers share each row of {length} tokens{padded}: {each} on each, and a part of the heads"


def _row(model: torch.nn.Module, where: Place, each: int, *, packed: bool) -> Batch:
    """Return a row of random tokens, `each` for each of the ranks: (1, S)."""
    device, length = next(model.parameters()).device, each * where.parts
    vocabulary = causality.vocabulary_of(model)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    row = {"input_ids": ids, "labels": ids}
    if packed:  # the first piece ends within the second part
        first = min(each + each // 2, length - 1)
        row["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)])[None].to(device)
    return row


def _logits(model: Any, row: Batch) -> torch.Tensor:
    """Return the logits of a row of S tokens, (S, V) in fp32."""
    given = {name: tensor for name, tensor in row.items() if name != "labels"}
    found: torch.Tensor = model(**given, use_cache=False).logits[0].float()
    return found


def _wrong(model: Any, calls: int, error: float, noise: float) -> str | None:
    """Return in words what is wrong with a row that a model has seen in parts."""
    layers = model.config.get_text_config().num_hidden_layers
    if calls != layers:
        return f"{layers - calls} of its {layers} layers do not attend as workers could share it"
    if not error < TOLERANCE + 4 * noise:
        return f"what it makes of parts of a row differs from what it makes of the whole, by {error:.1e}"
    return None


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _cannot(parts: int, model: torch.nn.Module, why: str) -> UserError:
    return UserError(
        f"training.parallel.sequence is {parts}, and workers cannot share rows of {type(model).__name__}: {why}. "
        "Leave it out, or set it to 1"
    )
