"""VllmEngine: the Engine protocol over vLLM, in environments that have it. `docs/engine.md` says how to make one.

vLLM pins other versions of torch and transformers than Tandem, so it is imported when an engine starts and never
before. It keeps its model in a process of its own; this one only passes requests on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

from serve.engines import sampling_defaults
from serve.engines.grammar import Grammars
from serve.engines.precision import best_device, dtype_for
from serve.engines.protocol import (
    Delta,
    EngineError,
    EngineLoad,
    GenerationRequest,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from serve.engines.rate import Rate
from serve.engines.replica import GenerativeReplica
from serve.engines.table import ReplicaSetup, VllmOptions

LEAST_TEMPERATURE = 0.01
"""vLLM takes a lower one for this."""


def load(setup: ReplicaSetup) -> GenerativeReplica:
    """Read the model of `setup`; the replica's `start` loads it into vLLM."""
    options = setup.options
    assert isinstance(options, VllmOptions)
    engine = VllmEngine.from_directory(
        setup.directory,
        precision=setup.precision,  # type: ignore[arg-type]  # the table says which it knows
        compile=options.compile,
        cache_memory_bytes=None if options.cache_gib is None else int(options.cache_gib * 2**30),
        max_context=setup.max_context,
        max_batch=setup.max_batch,
        threads=setup.threads,
    )
    return GenerativeReplica(engine, setup.identity, sampling_defaults.read(setup.directory), options.tool_format)


class VllmEngine:
    """One model in one vLLM."""

    def __init__(self, directory: Path, tokenizer: Any, max_context: int, arguments: Mapping[str, Any]) -> None:
        """`arguments` are those of vLLM's AsyncEngineArgs, beside the model's."""
        self.tokenizer = tokenizer
        self.max_context = max_context
        self._directory = directory
        self._arguments = dict(arguments)
        self._vocab_size = len(tokenizer)
        ends = tokenizer.eos_token_id
        self._grammars = Grammars(tokenizer, self._vocab_size, frozenset() if ends is None else frozenset([ends]))
        self._llm: Any = None
        self._running = 0
        self._rate = Rate()

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        *,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        max_context: int | None = None,
        max_batch: int = 16,
        threads: int | None = None,
        cache_memory_bytes: int | None = None,
        compile: bool = False,
    ) -> VllmEngine:
        """Read an exported model directory; `start` loads it. `compile` lets vLLM compile the model, which is slow.

        `threads` and `cache_memory_bytes` matter on a CPU: vLLM reads them from the environment of the process.
        """
        from transformers import AutoConfig

        from jobs import tasks
        from tracking import manifest

        task: Any = tasks.get(manifest.read(directory).task).load(directory)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        if cache_memory_bytes is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, cache_memory_bytes // 2**30))
        own = AutoConfig.from_pretrained(directory).get_text_config().max_position_embeddings
        dtype = str(dtype_for(precision, best_device())).removeprefix("torch.")
        arguments = {"dtype": dtype, "max_num_seqs": max_batch, "enforce_eager": not compile}
        return cls(directory, task.tokenizer, min(max_context or own, own), arguments)

    async def start(self) -> None:
        """Start vLLM's process and load the model there."""
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(self._directory),
            max_model_len=self.max_context,
            max_logprobs=-1,
            disable_log_stats=True,
            # llguidance, as in the torch engine; one vLLM has one backend, and only this one reads grammars of calls
            structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
            **self._arguments,
        )
        self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)

    async def stop(self) -> None:
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    def healthy(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def load(self) -> EngineLoad:
        """vLLM queues what does not run; both count as running here."""
        cache = self._llm.vllm_config.cache_config if self._llm else None
        total = (cache.num_gpu_blocks or 0) * cache.block_size if cache else 0
        return EngineLoad(self._running, 0, 0, total, self._rate.per_second())

    def report(self) -> dict[str, Any]:
        from importlib.metadata import version

        name = (
            "vllm-cpu" if self._llm is not None and self._llm.vllm_config.device_config.device_type == "cpu" else "vllm"
        )
        return {"runner": name, "version": version(name), "max_context": self.max_context, **self._arguments}

    async def check(self, request: GenerationRequest) -> None:
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise RequestError("prompt", "has no tokens")
        if len(prompt) >= self.max_context:
            raise RequestError("prompt", f"has {len(prompt)} tokens; the context of {self.max_context} leaves no room")
        ids = {"prompt": prompt, "logit_bias": tuple(params.logit_bias), "stop_token_ids": params.stop_token_ids}
        for field, tokens in ids.items():
            if tokens and (min(tokens) < 0 or max(tokens) >= self._vocab_size):
                raise RequestError(field, f"has a token id outside 0..{self._vocab_size - 1}")
        if 0 < params.temperature < LEAST_TEMPERATURE:
            raise RequestError("temperature", f"vLLM has none between 0 and {LEAST_TEMPERATURE}: give one of them")
        if params.json_schema is not None or params.grammar is not None:  # vLLM itself would refuse it too late
            await asyncio.to_thread(self._grammars.constraint, params.json_schema, params.grammar)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion; see the protocol."""
        from vllm.exceptions import VLLMClientError, VLLMError

        await self.check(request)
        room = self.max_context - len(request.prompt_token_ids)
        wanted = _parameters(request.params, room)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        tokens = 0
        self._running += 1
        try:
            async with aclosing(self._llm.generate(prompt, wanted, request.request_id)) as outputs:
                async for output in outputs:
                    tokens += len(output.outputs[0].token_ids)
                    self._rate.add(len(output.outputs[0].token_ids))
                    yield _delta(request, output, tokens)
        except RequestError:
            raise
        except (ValueError, VLLMClientError) as error:
            raise RequestError(_field(str(error)), str(error)) from error
        except (RuntimeError, OSError, VLLMError) as error:  # EngineDeadError is one
            raise EngineError(f"vLLM failed: {error!r}") from error
        finally:
            self._running -= 1


def _parameters(params: SamplingParams, room: int) -> Any:
    """Return the same in vLLM's words."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structured = None
    if params.grammar is not None:
        structured = StructuredOutputsParams(grammar=params.grammar)
    elif params.json_schema is not None:
        structured = StructuredOutputsParams(json=params.json_schema)
    same = (
        "temperature",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "ignore_eos",
        "min_tokens",
    )
    return VllmSamplingParams(
        **{name: getattr(params, name) for name in same},
        max_tokens=max(1, min(params.max_tokens, room)),
        # vLLM has no top_p of 0, which leaves the most likely token
        top_p=params.top_p or 1.0,
        top_k=max(0, params.top_k) if params.top_p else 1,
        stop_token_ids=list(params.stop_token_ids),
        skip_special_tokens=not params.visible_tokens,
        seed=None if params.seed is None else params.seed % 2**63,
        stop=list(params.stop),
        logit_bias=dict(params.logit_bias) or None,
        logprobs=params.logprobs,
        prompt_logprobs=(params.logprobs or 0) if params.prompt_logprobs else None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def _delta(request: GenerationRequest, output: Any, completion_tokens: int) -> Delta:
    """Return what one of vLLM's outputs adds. Raises EngineError when vLLM gave the request up."""
    told = output.outputs[0]
    if told.finish_reason not in (None, "stop", "length"):
        raise EngineError(f"vLLM gave the request up: {told.finish_reason}")
    prompt, params = request.prompt_token_ids, request.params
    only_scored = params.max_tokens == 0  # vLLM chooses at least one
    return Delta(
        text="" if only_scored else told.text,
        token_ids=() if only_scored else tuple(told.token_ids),
        finish_reason="length" if only_scored and told.finish_reason else told.finish_reason,
        prompt_tokens=len(prompt),
        completion_tokens=0 if only_scored else completion_tokens,
        logprobs=() if only_scored else _logprobs(told.token_ids, told.logprobs, params),
        prompt_logprobs=_logprobs(prompt, output.prompt_logprobs, params),
    )


def _logprobs(tokens: Any, told: Any, params: SamplingParams) -> tuple[TokenLogprobs, ...]:
    entries = []
    for token, ranked in zip(tokens, told or (), strict=False):
        if ranked is None:  # the first token of a prompt
            entries.append(TokenLogprobs(token, None, ()))
            continue
        best = sorted(((one.rank, at, one.logprob) for at, one in ranked.items()))[: params.logprobs or 0]
        entries.append(TokenLogprobs(token, ranked[token].logprob, tuple((at, value) for _, at, value in best)))
    return tuple(entries)


def _field(message: str) -> str:
    """Return the parameter that vLLM's message is about, as far as it can be told."""
    return "response_format" if "grammar" in message.lower() or "schema" in message.lower() else "request"
