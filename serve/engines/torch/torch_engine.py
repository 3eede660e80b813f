"""TorchEngine: the Engine protocol over any transformers causal decoder, embedded in the process.

    engine = TorchEngine.from_directory(Path("…"), max_batch=16, threads=2)
    await engine.start()
    async for delta in engine.generate(GenerationRequest("1", prompt_ids, SamplingParams(temperature=0))):
        print(delta.text, end="")

The prompt is token ids: chat templates and tokenization are the gateway's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from serve.engines import stats
from serve.engines.grammar import Constraint, Grammars
from serve.engines.precision import best_device, dtype_for
from serve.engines.protocol import Delta, GenerationRequest, Pooling, RequestError
from serve.engines.step_thread import SteppingEngine
from serve.engines.text import Decoder
from serve.engines.torch import startup
from serve.engines.torch.batch import Runner
from serve.engines.torch.blocks import BLOCK, BlockPool
from serve.engines.torch.completion import Completion, events
from serve.engines.torch.loop import StepLoop
from serve.engines.torch.pooling import Pooled
from serve.engines.torch.sampler import RequestSampler
from serve.engines.torch.scheduler import Scheduler, Sequence
from serve.engines.torch.sequence_text import SequenceText, resume

Precision = Literal["auto", "bf16", "fp32", "int8", "int4"]
DEFAULT_MAX_CONTEXT = 4096
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TorchEngineOptions:
    """How much the engine may use."""

    max_batch: int = 16
    """Sequences that run at once; more wait in a queue."""
    max_context: int | None = None
    """Most tokens of prompt and completion; None takes the model's own, up to 4096."""
    cache_memory_bytes: int | None = None
    """Most memory for keys and values. None takes what max_batch texts of max_context tokens need, and at most half of
    the memory that is free. With less, texts share what there is: the youngest give way and come back."""
    prefill_tokens: int = 256
    """Prompt tokens run in one step beside running streams, at most."""
    longest_stall_s: float = 0.1
    """How long such a step should take at most: on a slow machine fewer prompt tokens run in it."""
    threads: int | None = None
    """CPU threads of a step; None takes the CPUs this process was given."""
    runner: startup.RunnerName = "auto"
    """`native` computes bf16 and quantised weights on x86 CPUs, `torch` everything; auto takes the faster that can."""
    pooling: Pooling = "mean"
    """How `embed` makes one vector of the last hidden states of a text's tokens: their mean, or the last one."""
    compile: bool = False
    """torch.compile the torch runner's model; what that takes is logged and in `report`. On CPU its
    steps were slower than the packed weights it replaces."""


class TorchEngine(SteppingEngine[Sequence]):
    """Continuous batching on one model. Takes the model over: do not use it for anything else.

    `start` raises UnsupportedArchitecture for a model that no runner takes.
    """

    _steps: StepLoop

    def __init__(
        self, model: Any, tokenizer: Any, options: TorchEngineOptions | None = None, precision: Precision = "auto"
    ) -> None:
        """Assign only; `start` does the work. Raises ValueError for options the model cannot meet."""
        options = options or TorchEngineOptions()
        _check_options(options, precision)
        self.tokenizer = tokenizer
        self.max_context = _max_context(model, options)
        self._model = model
        self._options = options
        self._precision = precision
        self._vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.embedding_size = int(model.get_input_embeddings().embedding_dim)
        self._embedding_slots = asyncio.Semaphore(max(1, options.max_batch // 2))
        """Texts embedded at once: many of them in one request leave slots to streams."""
        self._eos = eos_tokens(model, tokenizer)
        self._decode = Decoder(tokenizer)
        self._grammars = Grammars(tokenizer, self._vocab_size, self._eos)
        self._threads = options.threads or startup.assigned_cpus()
        self._steps = StepLoop(self._prepare, self._eos, self._threads)
        self._runner: Runner | None = None

    @classmethod
    def from_directory(
        cls, directory: Path, *, precision: Precision = "auto", device: str = "auto", **options: Any
    ) -> TorchEngine:
        """Load an exported model directory (Hugging Face layout and tandem.json) through its task.

        `precision` "auto" is bf16 where the device computes in it, else fp32; "int8" and "int4" keep the linear layers'
        weights in as many bits and compute in the same. A directory quantised already is taken as it is.
        Options are TorchEngineOptions' fields.
        """
        from jobs import tasks
        from tracking import manifest

        task_class = tasks.get(manifest.read(directory).task)
        if not task_class.generates:
            raise ValueError(f"task {task_class.name!r} of {directory} does not generate text; use `engine: task`")
        task: Any = task_class.load(directory)
        place = _device(device)
        model = task.load_model(directory, _dtype(precision, place)).to(place)
        return cls(model, task.tokenizer, TorchEngineOptions(**options), precision)

    def report(self) -> dict[str, Any]:
        """Return what runs here (runner, threads, dtype, cache), and where compiling and steps spent their time."""
        return {
            "runner": self._runner.name if self._runner else None,
            "threads": self._threads,
            "computes_in": str(self._model.dtype).removeprefix("torch."),
            "max_context": self.max_context,
            "cache_tokens": self.load().cache_tokens_total,
            "compile_s": getattr(self._runner, "compile_s", 0.0),
            "step_seconds": dict(self._steps.seconds),
        }

    async def check(self, request: GenerationRequest) -> None:
        await self._checked(request)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion; see the protocol."""
        constraint = await self._checked(request)
        sequence = self._sequence(request, constraint)
        text = SequenceText(request, self._decode)
        if request.generated:
            await asyncio.to_thread(resume, sequence, text, self._eos)
        if request.stats is not None:
            request.stats.submit()
        self._steps.submit(sequence)
        try:
            async for event in events(sequence.context):
                for delta in text.deltas(event):
                    yield delta
                if text.ended:
                    return
        finally:
            self._steps.cancel(sequence)

    def resumes(self, request: GenerationRequest) -> bool:
        """See ResumingEngine: it can, unless the cache is smaller here than where the text was begun."""
        return len(request.prompt_token_ids) + len(request.generated) <= self.max_context

    async def embed(self, request_id: str, prompt_token_ids: tuple[int, ...]) -> np.ndarray:
        """Return a text's vector; see the protocol. It is read in the same steps as prompts of completions are."""
        if self._runner is not None and not self._runner.embeds:
            raise RequestError("model", f"{type(self._model).__name__} does not tell its hidden states")
        if not 0 < len(prompt_token_ids) <= self.max_context:
            raise RequestError("input", f"has {len(prompt_token_ids)} tokens; 1 to {self.max_context} can be embedded")
        self._check_vocabulary("input", prompt_token_ids)
        pooled, noted = Pooled(self._options.pooling, asyncio.get_running_loop()), stats.current()
        if noted is not None:
            noted.submit()
        sequence = Sequence(GenerationRequest(request_id, prompt_token_ids, stats=noted), 0, pooled, pooled=True)
        async with self._embedding_slots:
            self._steps.submit(sequence)
            try:
                async for event in events(pooled):
                    return event.vector
            finally:
                self._steps.cancel(sequence)
        raise AssertionError("the events ended without one")

    def _prepare(self) -> tuple[Runner, Scheduler]:
        """Called in the engine's thread."""
        options = self._options
        plan = startup.Plan(
            runner=options.runner,
            weights=startup.weights_of(self._model, self._precision),
            threads=self._threads,
            max_running=options.max_batch,
            max_context=self.max_context,
            cache_memory_bytes=options.cache_memory_bytes,
            compiled=options.compile,
        )
        self._runner, blocks = startup.ready_runner(self._model, plan)
        room = (blocks - 1) * BLOCK
        if room < self.max_context:
            logger.warning("the cache has room for %d tokens: no text may be longer", room)
            self.max_context = room
        pool = BlockPool(blocks)
        return self._runner, Scheduler(pool, options.max_batch, options.prefill_tokens, options.longest_stall_s)

    async def _checked(self, request: GenerationRequest) -> Constraint | None:
        """Check a request; return what its schema demands. Raises RequestError."""
        self._check_tokens(request)
        if request.params.json_schema is None and request.params.grammar is None:
            return None
        # a large vocabulary takes a second the first time, a complex schema some tenths
        return await asyncio.to_thread(self._grammars.constraint, request.params.json_schema, request.params.grammar)

    def _check_tokens(self, request: GenerationRequest) -> None:
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise RequestError("prompt", "has no tokens")
        room = self.max_context - len(prompt)
        if room < 1 and not (room == 0 and params.max_tokens == 0):
            raise RequestError("prompt", f"has {len(prompt)} tokens; the context of {self.max_context} leaves no room")
        self._check_vocabulary("prompt", prompt)
        self._check_vocabulary("generated", request.generated)
        for field, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            self._check_vocabulary(field, tuple(tokens))
        if params.min_tokens and len(self._eos.union(params.stop_token_ids)) >= self._vocab_size:
            raise RequestError("min_tokens", "cannot be reached: every token ends the text")

    def _check_vocabulary(self, place: str, ids: tuple[int, ...]) -> None:
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < self._vocab_size:
                raise RequestError(place, f"token id {token} is outside 0..{self._vocab_size - 1}")

    def _sequence(self, request: GenerationRequest, constraint: Constraint | None) -> Sequence:
        """Give a request what its completion needs."""
        prompt, params = request.prompt_token_ids, request.params
        ends = [token for token in (*self._eos, *params.stop_token_ids) if token < self._vocab_size]
        sampler = RequestSampler(params, prompt, constraint, ends)
        completion = Completion(sampler, asyncio.get_running_loop(), over=None if params.max_tokens else "length")
        return Sequence(request, min(params.max_tokens, self.max_context - len(prompt)), completion)


def eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a completion, as the generation config, the config and the tokenizer name them."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(found)


def _check_options(options: TorchEngineOptions, precision: Precision) -> None:
    for name in ("max_batch", "max_context", "cache_memory_bytes", "prefill_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.runner not in get_args(startup.RunnerName):
        raise ValueError(f"unknown runner {options.runner!r}; choose auto, native or torch")
    if options.compile and precision in ("int8", "int4"):
        raise ValueError(
            f"compile does not go with precision {precision}: its kernels cannot be compiled with the model"
        )


def _max_context(model: Any, options: TorchEngineOptions) -> int:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if options.max_context is None:
        return min(own or DEFAULT_MAX_CONTEXT, DEFAULT_MAX_CONTEXT)
    if own is not None and options.max_context > own:
        raise ValueError(f"max_context {options.max_context} exceeds the {own} positions of the model")
    return options.max_context


def _device(name: str) -> Any:
    import torch

    return best_device() if name == "auto" else torch.device(name)


def _dtype(precision: Precision, device: Any) -> Any:
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; choose auto, bf16, fp32, int8 or int4")
    if precision == "int4" and device.type != "cpu":
        raise ValueError("int4 weights are for CPUs: serve this model with vLLM, or in bf16 or int8")
    return dtype_for("auto" if precision in ("int8", "int4") else precision, device)  # type: ignore[arg-type]
