"""Dynamic batching of `task.predict`, for every task that does not generate.

    engine = PredictiveEngine(task, model, max_batch=32, max_wait_ms=2, threads=1)
    await engine.start()
    answer = await engine.predict(instance)

Concurrent calls share a forward pass: a batch leaves when it is full, or when its first instance has waited
`max_wait_ms`; what arrives while one runs makes up the next. Prediction runs in a thread of its own, but where it takes
less than 3 ms, nothing is to be waited for and the last one is over for as long: handing over would cost as much again.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from serve.engines import stats
from serve.engines.precision import dtype_for
from serve.engines.protocol import EngineError, EngineLoad, RequestError
from serve.engines.replica import PredictiveReplica
from serve.engines.stats import RequestStats
from serve.engines.table import ReplicaSetup, TaskOptions

if TYPE_CHECKING:
    from jobs.tasks import Task

logger = logging.getLogger(__name__)
QUICK_S = 0.003
"""The event loop may stand still for so long."""
Prediction = dict[str, Any]


class Waiting(NamedTuple):
    """An instance that waits for its prediction."""

    instance: Any
    future: asyncio.Future[Prediction]
    stats: RequestStats | None


def load(setup: ReplicaSetup) -> PredictiveReplica:
    """Load the model of `setup` through its task; `start` makes the replica ready."""
    import torch

    from jobs import tasks

    options = setup.options
    assert isinstance(options, TaskOptions)
    dtype = dtype_for(setup.precision, torch.device("cpu"))  # type: ignore[arg-type]  # the table lists what it may be
    task = tasks.get(setup.task).load(setup.directory)
    model = task.served_model(task.load_model(setup.directory, dtype))
    make = EncoderEngine if task.embeds(model.config.to_dict()) else PredictiveEngine
    engine = make(task, model, setup.max_batch, options.max_wait_ms, setup.threads)
    return PredictiveReplica(engine, task.inputs(), setup.identity, task.outputs())


class Predictor(Protocol):
    """The part of a task that this engine uses."""

    def predict(self, model: Any, instances: list[Any]) -> list[Prediction]: ...


class PredictiveEngine:
    """Batch the predictions of one model. All methods are called on one event loop; none of them blocks it."""

    def __init__(
        self, task: Predictor, model: Any, max_batch: int = 32, max_wait_ms: float = 2.0, threads: int = 1
    ) -> None:
        if max_batch < 1 or threads < 1 or max_wait_ms < 0:
            raise ValueError(
                "max_batch and threads must be at least 1 and max_wait_ms at least 0, "
                f"got {max_batch}, {threads} and {max_wait_ms}"
            )
        self.task = task
        self.model = model
        self.max_batch = max_batch
        self.max_wait_s = max_wait_ms / 1000
        self._threads = threads
        self._waiting: deque[Waiting] = deque()
        self._running: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._executor: ThreadPoolExecutor | None = None
        self._batcher: asyncio.Task[None] | None = None
        self._alone_s = QUICK_S
        """What one instance takes, on average, without waiting."""
        self._ended_at = 0.0
        """When the last batch had run."""

    async def start(self) -> None:
        _set_threads(self._threads)
        self._executor = ThreadPoolExecutor(1, "tandem-task", initializer=_set_threads, initargs=(self._threads,))
        self._batcher = asyncio.create_task(self._serve(), name="tandem-task-batcher")

    async def stop(self) -> None:
        """Fail what waits with EngineError, wait for the batch that runs, and end the thread."""
        batcher, executor = self._batcher, self._executor
        self._batcher = self._executor = None
        if batcher is None or executor is None:
            return
        batcher.cancel()
        for waiting in [*self._running, *self._waiting]:
            if not waiting.future.done():
                waiting.future.set_exception(EngineError("the engine was stopped"))
        self._waiting.clear()
        await asyncio.to_thread(executor.shutdown)

    def healthy(self) -> bool:
        return self._batcher is not None and not self._batcher.done()

    def load(self) -> EngineLoad:
        return EngineLoad(len(self._running), len(self._waiting), 0, 0, 0.0)

    async def predict(self, instance: Any) -> Prediction:
        """Return the task's prediction for one instance.

        Raises what the task raises for this instance alone, and EngineError when the engine does not run.
        """
        if not self.healthy():
            raise EngineError("the engine is not running")
        noted = stats.current()
        if noted is not None:
            noted.submit()
        if self._is_at_once():
            return self._at_once(instance, noted)
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(instance, future, noted))
        self._arrived.set()
        return await future

    def _is_at_once(self) -> bool:
        """Whether an instance that comes now needs neither a thread nor company, which it would have under load."""
        if self.max_wait_s or self._waiting or self._running:
            return False
        return self._alone_s < QUICK_S and time.perf_counter() - self._ended_at > self._alone_s

    def _at_once(self, instance: Any, noted: RequestStats | None) -> Prediction:
        began = time.perf_counter()
        (result,) = self._predict([instance])
        self._ran(began, 1, noted)
        if isinstance(result, Exception):
            raise result
        return result

    def _ran(self, began: float, count: int, *noted: RequestStats | None) -> None:
        """Note that a batch has run, and how long an instance takes alone."""
        self._ended_at = time.perf_counter()
        if count == 1:
            self._alone_s += 0.1 * (self._ended_at - began - self._alone_s)
        for each in noted:
            if each is not None:
                each.ran(began, self._ended_at)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await self._fill()
            self._running = self._take()
            await self._answer(self._running)
            self._running = []

    async def _fill(self) -> None:
        """Wait until the batch is full or its time is up."""
        deadline = asyncio.get_running_loop().time() + self.max_wait_s
        while len(self._waiting) < self.max_batch:
            self._arrived.clear()
            remaining = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._arrived.wait(), remaining)
            except asyncio.TimeoutError:
                return

    def _take(self) -> list[Waiting]:
        """Take the next batch, leaving out calls whose caller has gone."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < self.max_batch:
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                batch.append(waiting)
        if self._waiting:
            self._arrived.set()
        else:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        instances = [waiting.instance for waiting in batch]
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        results: list[Prediction | Exception]
        try:
            results = await loop.run_in_executor(self._executor, self._predict, instances)
        except Exception as error:  # the thread itself is broken: nobody may be left waiting
            results = [EngineError(f"prediction failed: {error!r}") for _ in batch]
        self._ran(began, len(batch), *(waiting.stats for waiting in batch))
        for (_, future, _), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _predict(self, instances: Sequence[Any]) -> list[Prediction | Exception]:
        """Predict a batch; if it fails, predict its instances one by one, so that only the bad one fails."""
        try:
            return list(self._predict_all(instances))
        except Exception as error:
            if len(instances) == 1:
                return [error]
            kind = type(error).__name__  # what it says may quote an instance: whose request it is will have the rest
            logger.warning("a batch of %d failed (%s); trying its instances one by one", len(instances), kind)
        return [self._predict([instance])[0] for instance in instances]

    def _answers(self, instances: list[Any]) -> list[Prediction]:
        return self.task.predict(self.model, instances)

    def _predict_all(self, instances: Sequence[Any]) -> list[Prediction]:
        import torch

        with torch.inference_mode():
            results = self._answers(list(instances))
        if len(results) != len(instances):
            raise EngineError(f"the task gave {len(results)} predictions for {len(instances)} instances")
        return results


class TokenIds(NamedTuple):
    """An instance that is to become a vector."""

    ids: tuple[int, ...]


class EncoderEngine(PredictiveEngine):
    """The same for a task that makes vectors of texts, too: they share its batches."""

    def __init__(self, task: Task, model: Any, *options: Any) -> None:
        super().__init__(task, model, *options)
        self._encoder = task
        # A copy: truncation, which the task turns on and off in its own thread, is a state of the tokenizer.
        self.tokenizer = copy.deepcopy(task.tokenizer)  # type: ignore[attr-defined]
        self.max_context: int = task.max_length  # type: ignore[attr-defined]
        self.embedding_size = int(model.config.hidden_size)

    async def embed(self, request_id: str, prompt_token_ids: tuple[int, ...]) -> np.ndarray:
        """Return a text's vector; see the protocol."""
        try:
            vector: np.ndarray = (await self.predict(TokenIds(prompt_token_ids)))["vector"]
        except ValueError as error:
            raise RequestError("model", str(error)) from error
        if not np.isfinite(vector).all():
            raise EngineError("the model produced hidden states that are not finite")
        return vector

    def _answers(self, instances: list[Any]) -> list[Prediction]:
        texts = [instance.ids for instance in instances if isinstance(instance, TokenIds)]
        others = [instance for instance in instances if not isinstance(instance, TokenIds)]
        vectors = iter(self._encoder.embed(self.model, texts) if texts else ())
        answers = iter(super()._answers(others) if others else ())
        return [{"vector": next(vectors)} if isinstance(each, TokenIds) else next(answers) for each in instances]


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
