"""A plan as a reader sees it: what the model is, a line for each ZeRO stage, then time, tokens and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.plan import memory
from jobs.plan.compute import TOKENS_PER_PARAMETER
from jobs.plan.outlook import GIB, duration
from jobs.plan.plan import Plan
from jobs.plan.prices import Price
from jobs.plan.setting import Recomputed

WIDTH = 140
"""Of the table where what it goes to has no width of its own."""
PARTS = ("weights", "gradients", "masters", "moments", "activations", "buffers", "saving", "step", "process")
AGAIN: Mapping[Recomputed, str] = {
    False: "",
    True: ", activations computed again",
    "selective": ", activations but products and attention computed again",
}
ASSUMED = "not counted: communication, offload, evaluation and checkpoints beyond what --mfu allows for; data loading"
MEASURED = "not counted: time of offload, evaluation, checkpoints and data loading"


def show(plan: Plan, price: Price | None = None) -> None:
    """Print a plan."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for line in head(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(table(plan))
    for line in [*verdict(plan), *work(plan, price), *notes(plan)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def head(plan: Plan) -> Iterator[str]:
    """Yield what is planned, in sentences."""
    facts, device = plan.facts, plan.device
    trained = "" if not facts.frozen else f", {facts.trainable:,} of them trained"
    yield f"{plan.name}: an estimate; nothing was started"
    yield (
        f"model    {facts.kind}, {facts.parameters:,} parameters ({short(facts.parameters)}){trained}; embedding "
        f"{short(facts.embedding)}, norms and biases {short(facts.vectors)}, largest parameter {short(facts.largest)}"
    )
    each = f"{device.memory_bytes / GIB:.1f} GiB"
    yield f"workers  {plan.world_size} × {device.name}, {each} each, {plan.precision}" + (
        f" ({device.source})" if device.source else ""
    )
    tokens = f" of {plan.row_tokens:,} tokens" if plan.row_tokens else ""
    again = AGAIN[plan.chosen.checkpointing]
    yield (
        f"batch    {plan.rows_per_step:,} rows{tokens} a step; micro-batches of {plan.micro_batch}, "
        f"{plan.accumulation} a worker{again}"
    )
    yield ""


def table(plan: Plan) -> Table:
    """Return a row for each stage and place of the state."""
    of_host = plan.device.on_gpu
    peak = max(need.peak for _, need in plan.needs)
    scale, unit = (GIB, "GiB") if peak >= 4 * GIB else (memory.MIB, "MiB")
    parts = [part for part in PARTS if any(getattr(need, part) for _, need in plan.needs)]
    made = Table("ZeRO", *(f"{part}" for part in parts), f"peak, {unit}", *(["host"] if of_host else []), "", box=None)
    for column in made.columns[1:-1]:
        column.justify = "right"
    for column in made.columns:
        column.no_wrap = True
    for setting, need in plan.needs:
        numbers = [getattr(need, part) for part in parts] + [need.peak] + ([need.host] if of_host else [])
        cells = [_number(number, scale) for number in numbers]
        made.add_row(setting.named, *cells, _mark(plan, setting, need))
    return made


def _mark(plan: Plan, setting: memory.Setting, need: memory.Need) -> str:
    marks = ["fits" if need.fits(plan.device.memory_bytes) else "too large"]
    if setting == plan.chosen:
        marks.append("the spec's")
    if setting == plan.recommended:
        marks.append("recommended")
    return ", ".join(marks)


def _number(value: int, scale: int) -> str:
    return f"{value / scale:,.1f}" if value else ""


def verdict(plan: Plan) -> Iterator[str]:
    """Yield what follows for the spec."""
    yield ""
    found, room = plan.recommended, plan.device.memory_bytes * (1 - memory.FREE) / GIB
    if found is None:
        least = min((need.peak, setting.stage, setting) for setting, need in plan.needs)
        yield (
            f"nothing fits into {room:.1f} GiB (a tenth is left free); the least is {least[0] / GIB:,.1f} GiB, ZeRO "
            f"{least[2].named}: more devices, a smaller training.micro_batch_size or "
            "training.gradient_checkpointing: true"
        )
        return
    offload = ", offload: cpu" if found.offload == "cpu" else ""
    offload += ", offload_parameters: nvme" if found.in_files else ""
    yield (
        f"recommended: training.deepspeed: {{zero_stage: {found.stage}{offload}}}, the lowest stage whose peak "
        f"is within {room:.1f} GiB (a tenth is left free)"
    )


def work(plan: Plan, price: Price | None) -> Iterator[str]:
    """Yield FLOPs, time, tokens and cost, as far as they are known."""
    if plan.flops_per_token is not None:
        yield f"compute  {plan.flops_per_token:.3g} FLOPs a token, {plan.work.tokens_per_step:,} tokens a step"
    if plan.work.step_s is not None:
        length = (
            f"{plan.work.steps:,} steps: {duration(plan.work.duration_s)}"
            if plan.work.duration_s is not None
            else "training.steps would say how long in all"
        )
        other = "" if plan.parts else " (--mfu says another)"
        yield f"time     {duration(plan.work.step_s)} a step by {plan.rates}{other}; {length}"
    if plan.parts is not None:
        shares = {name.removesuffix("_s"): seconds for name, seconds in asdict(plan.parts).items() if seconds}
        yield "step     " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in shares.items())
    yield from _tokens(plan)
    if price is not None:
        cost = plan.work.cost(price.per_hour, plan.world_size)
        of, by = f" {price.currency}" if price.currency else "", f" ({price.source})" if price.source else ""
        yield (
            "cost     not known without a duration"
            if cost is None
            else f"cost     {cost:,.2f}{of} at {price.per_hour:g} a device and hour{by}"
        )
    if plan.energy_kwh is not None:
        said = f"{plan.device.watts:g} W a device; a run measures its own where NVML tells"
        yield f"energy   {plan.energy_kwh:,.3g} kWh at most: {said}"
    yield from _served(plan)


def _served(plan: Plan) -> Iterator[str]:
    if plan.served is None:
        return
    demand, found = plan.served.demand, plan.served.replicas
    wanted = f"{demand.users:,} users at {demand.tokens_per_second:g} tokens/s behind {demand.context:,} tokens"
    if found.count is None:
        reason = (
            f"one that is alone gets {found.fastest:.3g} tokens/s" if found.limit != "memory" else "its memory is small"
        )
        yield f"serve    {wanted}: no number of replicas of one device does it, {reason} ({plan.served.by})"
        return
    yield (
        f"serve    {wanted}: {found.count:,} × one device, {found.users_of_each:,} users each, limited by "
        f"{found.limit}; prompts are not counted ({plan.served.by})"
    )


def _tokens(plan: Plan) -> Iterator[str]:
    if plan.optimal_tokens is None:
        return
    steps = max(1, round(plan.optimal_tokens / plan.work.tokens_per_step))
    rule = (
        f"{TOKENS_PER_PARAMETER} a parameter are about compute-optimal: {short(plan.optimal_tokens)}, {steps:,} steps"
    )
    tokens = plan.work.tokens
    if tokens is None:
        yield f"tokens   {rule}"
        return
    share = tokens / plan.facts.parameters
    verdict = "too few" if share < 10 else "more" if share > 40 else "about right"
    yield f"tokens   {short(tokens)}, {share:.2g} a parameter: {verdict}; {rule}"


def notes(plan: Plan) -> Iterator[str]:
    """Yield what was assumed and what is left out."""
    yield ""
    yield "peak = weights, masters, moments, process, saving, and the most at once of the others"
    if plan.device.on_gpu:
        yield "host = a worker's process, the copy that a checkpoint is written from, and what is offloaded"
    for sentence in plan.said:
        yield f"note: {sentence}"
    yield MEASURED if plan.parts else ASSUMED


def short(number: int) -> str:
    """Return a number in thousands, millions, billions or trillions."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def as_json(plan: Plan, price: Price | None = None) -> dict[str, Any]:
    """Return a plan for a program; memory in bytes."""
    found = plan.recommended
    return {
        "name": plan.name,
        "model": asdict(plan.facts),
        "device": {**asdict(plan.device), "count": plan.world_size},
        "precision": plan.precision,
        "micro_batch": plan.micro_batch,
        "memory": [
            {
                "zero_stage": setting.stage,
                "offload": setting.offload,
                "offload_parameters": "nvme" if setting.in_files else "cpu",
                **asdict(need),
                "peak": need.peak,
                "fits": need.fits(plan.device.memory_bytes),
            }
            for setting, need in plan.needs
        ],
        "recommended": None if found is None else {"zero_stage": found.stage, "offload": found.offload},
        "flops_per_token": plan.flops_per_token,
        "mfu": plan.mfu,
        "tokens_per_step": plan.work.tokens_per_step,
        "tokens": plan.work.tokens,
        "optimal_tokens": plan.optimal_tokens,
        "step_s": plan.work.step_s,
        "step_parts": None if plan.parts is None else asdict(plan.parts),
        "rates": plan.rates,
        "duration_s": plan.work.duration_s,
        "cost": None if price is None else plan.work.cost(price.per_hour, plan.world_size),
        "price": None if price is None else asdict(price),
        "energy_kwh": plan.energy_kwh,
        "serving": None if plan.served is None else asdict(plan.served),
        "notes": [*plan.said, MEASURED if plan.parts else ASSUMED],
    }
