"""Dynamic batching of predictions: who shares a batch, and who fails."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from serve.engines.predictive import PredictiveEngine
from serve.engines.protocol import EngineError


class Doubling:
    """A task that doubles numbers, cannot take negative ones, and remembers its batches and threads."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        self.gate.wait(20)
        self.batches.append(instances)
        self.threads.add(threading.current_thread().name)
        if any(instance < 0 for instance in instances):
            raise ValueError("negative number")
        return [{"answer": model * instance} for instance in instances]


def serve(task: Any, scenario: Any, **options: Any) -> Any:
    async def run() -> Any:
        engine = PredictiveEngine(task, 2, **options)
        await engine.start()
        try:
            return await scenario(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


def test_concurrent_calls_share_batches_off_the_event_loop() -> None:
    task = Doubling()

    async def scenario(engine: PredictiveEngine) -> list[dict[str, Any]]:
        return await asyncio.gather(*(engine.predict(i) for i in range(10)))

    answers = serve(task, scenario, max_batch=4, max_wait_ms=5)
    assert answers == [{"answer": 2 * i} for i in range(10)]
    assert task.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(name.startswith("tandem-task") for name in task.threads)


def test_what_arrives_while_a_batch_runs_makes_up_the_next() -> None:
    task = Doubling()
    task.gate.clear()

    async def scenario(engine: PredictiveEngine) -> None:
        calls = [asyncio.create_task(engine.predict(0))]
        while engine.load().running == 0:
            await asyncio.sleep(0.001)
        calls += [asyncio.create_task(engine.predict(i)) for i in (1, 2, 3)]
        while engine.load().waiting < 3:
            await asyncio.sleep(0.001)
        task.gate.set()
        await asyncio.gather(*calls)

    serve(task, scenario, max_batch=8, max_wait_ms=0)
    assert task.batches == [[0], [1, 2, 3]]


def test_one_bad_instance_does_not_fail_its_neighbours() -> None:
    async def scenario(engine: PredictiveEngine) -> list[Any]:
        return await asyncio.gather(*(engine.predict(i) for i in (1, -1, 3)), return_exceptions=True)

    first, bad, last = serve(Doubling(), scenario)
    assert (first, last) == ({"answer": 2}, {"answer": 6})
    assert isinstance(bad, ValueError)
    assert str(bad) == "negative number"


def test_a_cancelled_call_is_not_predicted() -> None:
    task = Doubling()
    task.gate.clear()

    async def scenario(engine: PredictiveEngine) -> None:
        first = asyncio.create_task(engine.predict(1))
        while engine.load().running == 0:
            await asyncio.sleep(0.001)
        gone, stays = asyncio.create_task(engine.predict(2)), asyncio.create_task(engine.predict(3))
        await asyncio.sleep(0)
        gone.cancel()
        task.gate.set()
        assert [await first, await stays] == [{"answer": 2}, {"answer": 6}]

    serve(task, scenario, max_wait_ms=0)
    assert task.batches == [[1], [3]]


def test_a_wrong_number_of_predictions_is_an_error_not_a_mix_up() -> None:
    class Forgetful(Doubling):
        def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
            return super().predict(model, instances)[:-1]

    async def scenario(engine: PredictiveEngine) -> None:
        with pytest.raises(EngineError, match="gave 0 predictions for 1 instances"):
            await engine.predict(1)

    serve(Forgetful(), scenario)


def test_stop_fails_what_waits() -> None:
    task = Doubling()
    task.gate.clear()

    async def scenario(engine: PredictiveEngine) -> None:
        calls: list[Coroutine[Any, Any, Any]] = [engine.predict(i) for i in range(3)]
        tasks = [asyncio.create_task(call) for call in calls]
        while engine.load().running == 0:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(engine.stop())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        task.gate.set()
        await stopping
        assert [type(result) for result in results] == [EngineError] * 3
        with pytest.raises(EngineError, match="not running"):
            await engine.predict(1)

    serve(task, scenario, max_batch=1)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch and threads must be at least 1"):
        PredictiveEngine(Doubling(), 2, max_batch=0)


def test_what_is_quick_and_alone_is_answered_at_once() -> None:
    task = Doubling()

    async def scenario(engine: PredictiveEngine) -> Any:
        for number in range(5):
            assert await engine.predict(number) == {"answer": 2 * number}
            await asyncio.sleep(0.02)
        with pytest.raises(ValueError, match="negative"):
            await engine.predict(-1)
        return await engine.predict(7)

    assert serve(task, scenario, max_wait_ms=0) == {"answer": 14}
    assert threading.current_thread().name in task.threads


def test_what_is_quick_and_comes_in_crowds_shares_batches() -> None:
    task = Doubling()

    async def scenario(engine: PredictiveEngine) -> Any:
        for number in range(5):
            await engine.predict(number)
            await asyncio.sleep(0.02)
        return await asyncio.gather(*(engine.predict(number) for number in range(40)))

    assert serve(task, scenario, max_wait_ms=0, max_batch=64) == [{"answer": 2 * number} for number in range(40)]
    assert max(map(len, task.batches)) > 30


def test_what_is_slow_never_stops_the_event_loop() -> None:
    class Slow(Doubling):
        def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
            time.sleep(0.01)
            return super().predict(model, instances)

    task = Slow()

    async def scenario(engine: PredictiveEngine) -> None:
        for number in range(10):
            await engine.predict(number)
            await asyncio.sleep(0.02)

    serve(task, scenario, max_wait_ms=0)
    assert all(name.startswith("tandem-task") for name in task.threads)
