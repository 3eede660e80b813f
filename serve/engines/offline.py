"""An engine without a server: the prompts of a data set, answered in the process that asks. What batch inference uses.

Jobs name it by its path (jobs/predict/predictors.py) and import nothing of this half. A prompt is rendered, tokenized
and answered as behind an endpoint; only HTTP and Ray Serve are left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cluster.weights_cache import local
from serve.engines import sampling_defaults, table
from serve.engines.precision import dtype_for
from serve.engines.protocol import EngineError, RequestError
from serve.engines.replica import GenerativeReplica
from serve.engines.table import EngineEntry, ReplicaSetup
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from serve.wire import Chunk, GenerateCall, Identity, Opened, Refused

Made = TypeVar("Made")


class Setup(Protocol):
    """What is to be loaded: jobs/predict/predictors.py has the class."""

    task: Any
    directory: Path | str
    precision: Any
    batch_size: int
    threads: int
    generation: Mapping[str, Any]
    settings: Path | None


def load(setup: Setup) -> OfflineEngine:
    """Load a model that generates, with its own sampling as the default; ready when this returns.

    The engine is the one that `auto` takes behind an endpoint.
    """
    entry = table.choose("generative", task=setup.task.name)
    replica = _decoder(setup) if entry.name == "torch" else _served(entry, setup)
    left_out = sampling_defaults.left_out(setup.settings) if setup.settings else None
    return OfflineEngine(replica, setup.generation, [left_out] if left_out else [])


def _decoder(setup: Setup) -> GenerativeReplica:
    """Load a decoder through its task: a directory of other tools, without a manifest of ours, does too."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = setup.task.load_model(Path(setup.directory), dtype_for(setup.precision, device)).to(device)
    options = TorchEngineOptions(max_batch=setup.batch_size, threads=setup.threads)
    engine = TorchEngine(model, setup.task.tokenizer, options, setup.precision)
    defaults = sampling_defaults.read(setup.settings) if setup.settings else {}
    return GenerativeReplica(engine, Identity("", None), defaults)


def _served(entry: EngineEntry, setup: Setup) -> GenerativeReplica:
    """Load what another engine's entry names, as a replica does."""
    module, _, function = entry.load.partition(":")
    given = ReplicaSetup(
        directory=local(setup.directory),
        identity=Identity("", None),
        task=setup.task.name,
        options=entry.options(),
        precision=setup.precision,
        max_context=None,
        max_batch=setup.batch_size,
        threads=setup.threads,
    )
    replica: GenerativeReplica = getattr(importlib.import_module(module), function)(given)
    return replica


class OfflineEngine:
    """Answers prompts, all that it is given at once, on an event loop in a thread of its own."""

    def __init__(self, replica: GenerativeReplica, generation: Mapping[str, Any], said: Sequence[str] = ()) -> None:
        """Start the replica.

        Args:
            generation: fields of SamplingParams; `seed` is the run's, of which each row's is made.
            said: what of the model's own settings is not honoured, in sentences.
        """
        self.said = said
        self._replica = replica
        self._max_tokens = int(generation["max_tokens"])
        self._seed = int(generation["seed"])
        self._sampling = {k: v for k, v in generation.items() if k not in ("max_tokens", "seed", "stop")}
        self._sampling["stop"] = tuple(generation.get("stop", ()))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tandem-offline", daemon=True).start()
        self._run(replica.start())

    def answer(self, numbered: Sequence[tuple[int, Any]]) -> list[dict[str, Any] | Exception]:
        """Generate for each prompt, a text or messages, with the number of its row.

        Returns:
            text, finish_reason, prompt_tokens and completion_tokens of each; RequestError where a prompt is at fault.

        Raises:
            EngineError: the engine itself failed.
        """

        async def every() -> list[dict[str, Any] | Exception]:
            return list(await asyncio.gather(*(self._one(number, prompt) for number, prompt in numbered)))

        return self._run(every())

    def close(self) -> None:
        """End the engine and its thread."""
        self._run(self._replica.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _one(self, number: int, prompt: Any) -> dict[str, Any] | Exception:
        sampling = {**self._sampling, "seed": seed_of(self._seed, number)}
        place = "text" if isinstance(prompt, str) else "messages"
        call = GenerateCall(f"row-{number}", prompt, sampling, self._max_tokens, place=place)
        texts, prompt_tokens, last = list[str](), 0, Chunk("", 0)
        async for message in self._replica.generate(call):
            if isinstance(message, Refused):
                return _refusal(message)
            if isinstance(message, Opened):
                prompt_tokens = message.prompt_tokens
            else:
                texts.append(message.text)
                last = message
        return {
            "text": "".join(texts),
            "finish_reason": last.finish_reason,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": last.completion_tokens,
        }

    def _run(self, work: Coroutine[Any, Any, Made]) -> Made:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def seed_of(seed: int, row: int) -> int:
    """Return the seed of a row, 63 bits: it depends on nothing but the run's and the row's number."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "little") >> 1


def _refusal(refused: Refused) -> Exception:
    """Return what a row is told; where it is the engine that failed, let the worker fail.

    Raises:
        EngineError: it did.
    """
    if refused.status >= 500:
        raise EngineError(refused.message)
    message = refused.message.removeprefix(f"{refused.param}: ")
    if refused.code == "no_chat_template":
        message = "this model has no chat template: it goes on from texts, whose column task.text_column names"
    return RequestError(refused.param or "prompt", message)
