"""A loss that is no number ends a run: nothing that was measured of such a model means anything."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.driver.failures import Limits, RankError, classify, decide
from jobs.worker import proof
from jobs.worker.evaluate import NotFinite, check_finite
from jobs.worker.losses import LossSpike, NonFiniteGradient, NonFiniteLoss, RecentLosses, check_gradient


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(NotFinite, match=rf"the loss of m on the held-out rows is {loss}: ") as caught:
        check_finite(loss, "m on the held-out rows")
    assert caught.value.exit_code == 1
    check_finite(0.0, "m")
    check_finite(1e300, "m")


def test_such_a_model_is_not_tried_again() -> None:
    error = RankError.of(NotFinite("the loss is nan"))
    failure = classify({0: error, 1: error}, 9)
    assert decide(failure, [], Limits(non_finite="skip")).action == "stop"


def test_a_gradient_that_is_not_finite_costs_its_batch() -> None:
    check_gradient(1e30, 2.0, 10)
    for norm in (math.nan, math.inf):
        with pytest.raises(
            NonFiniteGradient, match="the gradient of step 10 is NaN or infinite, with a loss of 2"
        ) as got:
            check_gradient(norm, 2.0, 10)
    error = RankError.of(got.value)
    failure = classify({0: error, 1: error}, 9)
    assert failure.kind == "non-finite loss"
    assert decide(failure, [], Limits()).action == "stop"
    skipped = decide(failure, [], Limits(non_finite="skip"))
    assert skipped.action == "skip batch"
    assert "the batch of step 10 is left out" in skipped.reason


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_training_that_ends_in_such_a_model_exports_none(loss: float) -> None:
    data = SimpleNamespace(split_seed=0, eval_max_rows=None)
    worker: Any = SimpleNamespace(
        spec=SimpleNamespace(data=data),
        shared=None,
        micro_batch=8,
        eval_rows=[0],
        held_out={},
        evaluations={"final": {"loss": loss}},
    )
    with pytest.raises(NotFinite, match="the trained model on the held-out rows"):
        proof.of_trained(worker)
    worker.evaluations["final"]["loss"] = 2.0
    assert proof.of_trained(worker).loss == 2.0


def test_a_loss_is_looked_at_before_its_step() -> None:
    recent = RecentLosses(factor=5.0)
    for step in range(1, 20):
        recent.check(2.0, step)
    with pytest.raises(LossSpike, match=r"step 20 is 11, after 2"):
        recent.check(11.0, 20)
    for loss in (math.nan, math.inf):
        with pytest.raises(NonFiniteLoss, match=rf"the loss of step 20 is {loss}; the step was not applied"):
            recent.check(loss, 20)
