"""What a gateway counts as work while it admits requests, and what `up` says about scaling."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from cluster import specfile
from serve.api.admission import Admission, estimate
from serve.api.body import ApiError
from serve.api.callers import Caller
from serve.api.own_rates import OwnRates
from serve.deploy import scaling
from serve.deploy.access import Access, Queue, Standing
from serve.fair.turns import Turns
from serve.keys.limits import Limits
from serve.scaling.decider import Plan
from serve.scaling.decisions import GATEWAY_ROW
from serve.scaling.work import ModelWork
from serve.spec import ServeSpec
from serve.wire import Work

ANYONE = Caller("", Limits())


def admission(work: ModelWork, window: int = 9, most: int = 9) -> Admission:
    turns = Turns(window, most, most)
    return Admission(OwnRates(), None, lambda model: turns, 0.05, lambda model: work)


def test_a_text_waits_until_a_replica_has_read_its_prompt() -> None:
    async def scenario() -> None:
        work = ModelWork()
        with await admission(work).begin(ANYONE, "m", *estimate(40, 20, 1)) as ticket:
            assert work.told() == Work(30, 0, 30, 0)
            ticket.prompt(12)
            ticket.answer(5)
            assert work.told() == Work(32, 17, 0, 15)
        assert work.told() == Work(17, 17, 0, 0)

    asyncio.run(scenario())


def test_predictions_are_rows_and_count_when_they_are_there() -> None:
    async def scenario() -> None:
        work = ModelWork()
        with await admission(work).begin(ANYONE, "m", *estimate(400_000, 0, 1), rows=3):
            assert work.told() == Work(3, 0, 0, 3)
        assert work.told() == Work(3, 3, 0, 0)
        failing = await admission(work).begin(ANYONE, "m", *estimate(4, 0, 1), rows=3)
        with pytest.raises(ValueError, match="boom"), failing:
            raise ValueError("boom")
        assert work.told() == Work(3, 3, 0, 0)

    asyncio.run(scenario())


def test_who_is_refused_leaves_no_work() -> None:
    async def scenario() -> None:
        work = ModelWork()
        with pytest.raises(ApiError):
            await admission(work, window=0).begin(ANYONE, "m", *estimate(40, None, 1))
        assert work.told() == Work(0, 0, 0, 0)

    asyncio.run(scenario())


def test_another_max_queued_acts_in_a_running_gateway() -> None:
    async def scenario() -> None:
        access = Access("x", "g", None, 5.0)
        access.configure({"m": Queue(1, 9, 9)}, None)
        running = [await access.admission.begin(ANYONE, "m", *estimate(4, 2, 1)) for _ in range(2)]
        for most in (3, 1):
            access.configure({"m": Queue(1, most, most)}, None)
            waiting = [asyncio.create_task(access.admission.begin(ANYONE, "m", *estimate(4, 2, 1))) for _ in range(5)]
            await asyncio.sleep(0.01)
            assert access.waiting() == {"m": most}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for ticket in running:
            ticket.end()

    asyncio.run(scenario())


def test_a_key_pays_the_tokens_that_its_prompt_has_and_not_the_bytes_of_its_body() -> None:
    async def scenario() -> None:
        order: list[str] = []
        entrance = admission(ModelWork(), window=1)

        async def one(key: str, sent: int = 40) -> None:
            with await entrance.begin(Caller(key, Limits()), "m", *estimate(sent, 20, 1)) as ticket:
                order.append(key)
                ticket.prompt(10)
                await asyncio.sleep(0)

        with await entrance.begin(Caller("first", Limits()), "m", *estimate(40, 20, 1)):
            waiting = [asyncio.create_task(one("image", 400_000))]
            waiting += [asyncio.create_task(one(key)) for key in ("image", "text", "text", "text", "text")]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert order[:4] == ["image", "text", "image", "text"]

    asyncio.run(scenario())


def test_a_request_for_a_model_without_replicas_is_reported_soon() -> None:
    async def scenario() -> None:
        asked: list[str] = []
        access = Access("x", "g", None, 5.0)
        access.configure({"there": Queue(1, 9, 9), "asleep": Queue(1, 9, 9)}, None)

        async def standing() -> Mapping[str, Standing]:
            return {"there": Standing(1, 1)}

        access.start(standing, lambda: asked.append("soon"))
        await asyncio.sleep(0.01)
        for model, times in (("there", 0), ("asleep", 1)):
            with await access.admission.begin(ANYONE, model, *estimate(40, 20, 1)):
                assert access.work()[model].waiting == 30
            assert len(asked) == times
        await access.stop()

    asyncio.run(scenario())


def test_a_stream_of_a_model_that_is_taken_out_goes_on_to_its_end() -> None:
    async def scenario() -> None:
        access, once = Access("x", "g", None, 0.05), Caller("k", Limits(concurrency=1))
        access.configure({"m": Queue(1, 9, 9)}, None)
        ticket = await access.admission.begin(once, "m", *estimate(40, 20, 1))
        ticket.prompt(10)
        access.configure({}, None)
        ticket.answer(5)
        access.configure({"m": Queue(1, 9, 9)}, None)  # the name is back
        with pytest.raises(ApiError, match="at the same time"):
            await access.admission.begin(once, "m", *estimate(40, 20, 1))
        ticket.end()
        assert access.waiting().get("m", 0) == 0
        assert access.work().get("m") in (None, Work(0, 0, 0, 0)), "the new model has nothing of the old one's"
        for _ in range(2):
            with await access.admission.begin(once, "m", *estimate(40, 20, 1)):
                assert access.admission._turns("m").running == 1

    asyncio.run(scenario())


def spec(text: str) -> ServeSpec:
    return specfile.loads(text, ServeSpec)


@pytest.mark.parametrize(("there", "wanted"), [(None, 1), (0, 1), (2, 2), (9, 3)])
def test_up_keeps_the_number_that_load_has_brought(there: int | None, wanted: int) -> None:
    model = spec("models: {m: {model: d, replicas: {min: 0, max: 3}}}").models["m"]
    assert scaling.begin(model, there) == wanted


def test_what_may_scale_is_written_for_the_loop_and_nothing_else() -> None:
    text = """
models:
  fixed: {model: d, replicas: 2}
  m: {model: d, max_batch: 7, replicas: {min: 0, max: 3}, downscale_delay_s: 9, upscale_delay_s: 2}
gateway: {replicas: {min: 1, max: 4, target_ongoing: 10}}
"""
    told = scaling.plans(spec(text), {"fixed": "1", "m": "abc"})
    assert set(told) == {"m", GATEWAY_ROW}
    plan = Plan.read(told["m"])
    assert (plan.version, plan.slots, plan.requests) == ("abc", 7, None)
    assert (plan.bounds.least, plan.bounds.most, plan.bounds.hold_s, plan.bounds.up_after_s) == (0, 3, 9, 2)
    assert Plan.read(told[GATEWAY_ROW]).requests == 10
    assert scaling.plans(spec("models: {m: {model: d, replicas: 2}}"), {"m": "1"}) == {}
