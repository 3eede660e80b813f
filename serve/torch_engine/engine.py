"""TorchEngine: the Engine protocol over any transformers causal decoder, embedded in the process.

    engine = TorchEngine.from_directory(Path("…"), max_batch=16, threads=2)
    await engine.start()
    async for delta in engine.generate(GenerationRequest("1", prompt_ids, SamplingParams(temperature=0))):
        print(delta.text, end="")

The prompt is token ids: chat templates and tokenization are the gateway's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve.engine import Delta, EngineError, EngineLoad, GenerationRequest, RequestError
from serve.torch_engine.loop import Completion, StepLoop
from serve.torch_engine.runner import ModelRunner
from serve.torch_engine.sampler import RequestSampler
from serve.torch_engine.scheduler import Scheduler, Sequence
from serve.torch_engine.text import Decoder, TextStream

Precision = Literal["auto", "bf16", "fp32"]
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True)
class TorchEngineOptions:
    """How much the engine may use."""

    max_batch: int = 16
    """Sequences that run at once; more wait in a queue."""
    max_context: int | None = None
    """Most tokens of prompt and completion; None takes the model's own, up to 4096. Cache memory grows with
    max_batch times this."""
    prefill_tokens: int = 256
    """Prompt tokens run in one step, at most: how long a new prompt may hold running streams up."""
    threads: int | None = None
    """CPU threads of a step; None takes the CPUs this process was given."""


class TorchEngine:
    """Continuous batching on one model. Takes the model over: do not use it for anything else."""

    def __init__(self, model: Any, tokenizer: Any, options: TorchEngineOptions | None = None) -> None:
        """Assign only; `start` does the work. Raises ValueError for options the model cannot meet."""
        options = options or TorchEngineOptions()
        _check_options(options)
        self.tokenizer = tokenizer
        self.max_context = _max_context(model, options)
        self._decode = Decoder(tokenizer)
        self._runner = ModelRunner(model, options.max_batch, self.max_context)
        scheduler = Scheduler(options.max_batch, options.prefill_tokens)
        self._steps = StepLoop(self._runner, scheduler, eos_tokens(model, tokenizer), options.threads or _cpus())

    @classmethod
    def from_directory(
        cls, directory: Path, *, precision: Precision = "auto", device: str = "auto", **options: Any
    ) -> TorchEngine:
        """Load an exported model directory (Hugging Face layout and tandem.json) through its task.

        `precision` "auto" is bf16 where the device computes in it, else fp32. Options are TorchEngineOptions' fields.
        """
        from jobs import tasks
        from tracking import manifest

        task_class = tasks.get(manifest.read(directory).task)
        if not task_class.generates:
            raise ValueError(f"task {task_class.name!r} of {directory} does not generate text; use `engine: task`")
        task: Any = task_class.load(directory)
        place = _device(device)
        model = task.load_model(directory, _dtype(precision, place)).to(place)
        return cls(model, task.tokenizer, TorchEngineOptions(**options))

    async def start(self) -> None:
        """Start the engine's thread; returns when the model is ready. Raises UnsupportedArchitecture."""
        await asyncio.wrap_future(self._steps.start())

    async def stop(self) -> None:
        await asyncio.to_thread(self._steps.stop)

    def healthy(self) -> bool:
        return self._steps.alive

    def load(self) -> EngineLoad:
        return self._steps.load()

    @property
    def cache_memory_bytes(self) -> int:
        """Most memory that keys and values can take, whatever runs; known after `start`."""
        return self._runner.cache.memory_bytes

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion; see the protocol."""
        sequence = self._sequence(request)
        events = sequence.context.events
        self._steps.submit(sequence)
        try:
            while True:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._steps.cancel(sequence)

    def _sequence(self, request: GenerationRequest) -> Sequence:
        """Check a request and give it what its completion needs. Raises RequestError."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise RequestError("prompt", "has no tokens")
        if len(prompt) >= self.max_context:
            raise RequestError("prompt", f"has {len(prompt)} tokens; the context of {self.max_context} leaves no room")
        if min(prompt) < 0 or max(prompt) >= self._runner.vocab_size:
            raise RequestError("prompt", f"has a token id outside 0..{self._runner.vocab_size - 1}")
        completion = Completion(
            sampler=RequestSampler(params, prompt, self._runner.vocab_size, self._runner.device),
            text=TextStream(self._decode, params.stop),
            loop=asyncio.get_running_loop(),
        )
        return Sequence(request, min(params.max_tokens, self.max_context - len(prompt)), completion)


def eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a completion, as the generation config, the config and the tokenizer name them."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(found)


def _check_options(options: TorchEngineOptions) -> None:
    for name in ("max_batch", "max_context", "prefill_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _max_context(model: Any, options: TorchEngineOptions) -> int:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if options.max_context is None:
        return min(own or DEFAULT_MAX_CONTEXT, DEFAULT_MAX_CONTEXT)
    if own is not None and options.max_context > own:
        raise ValueError(f"max_context {options.max_context} exceeds the {own} positions of the model")
    return options.max_context


def _cpus() -> int:
    """Return the CPUs this process was given: Ray says so in OMP_NUM_THREADS, the kernel in the affinity mask."""
    assigned = os.environ.get("OMP_NUM_THREADS", "")
    return int(assigned) if assigned.isdigit() and int(assigned) > 0 else len(os.sched_getaffinity(0))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(precision: Precision, device: Any) -> Any:
    import torch

    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        on_cpu = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precision = "bf16" if on_gpu or on_cpu else "fp32"
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; choose auto, bf16 or fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32
