"""The sentences about what was measured."""

from collections import Counter

from jobs.driver import figures
from jobs.spec import TrainingSpec
from jobs.worker.quantize import Layers


def test_what_was_measured_is_said_in_one_sentence():
    assert figures.evaluated({"loss": 0.44861, "accuracy": 0.8125}) == "held out: loss 0.4486, accuracy 0.8125"
    both = {"first": {"loss": 6.955, "perplexity": 1048.0}, "final": {"loss": 3.751, "perplexity": 42.56}}
    assert figures.trained(both) == "held out: loss 6.955 → 3.751, perplexity 1048 → 42.56"
    assert figures.trained({"final": {"loss": 3.751}}) == "held out: loss 3.751", "a run that went on began elsewhere"
    assert figures.trained({}).startswith("nothing was held out")


def test_quantising_says_which_layers_what_it_saved_and_what_it_cost():
    layers = Layers(Counter(q_proj=2, k_proj=2), Counter(lm_head=1)).as_dict()
    report = {"layers": layers, "bytes": 1 << 20, "parent_bytes": 4 << 20, "eval_loss": 2.02, "parent_eval_loss": 2.0}
    said = figures.quantised({**report, "loss_change": 0.01})
    assert said == (
        "4 of 5 linear layers quantised (2 k_proj, 2 q_proj; left as they are: 1 lm_head); weights 4.0 → 1.0 MiB; "
        "held-out loss 2 → 2.02 (+1.00%)"
    )
    assert figures.quantised({**report, "parent_eval_loss": 0.0}).endswith("held-out loss 0 → 2.02")


def test_a_run_that_sees_its_rows_more_often_than_it_seems_says_so():
    few = TrainingSpec(epochs=1, global_batch_size=32)
    assert figures.passes(few, 1, 5) == [
        "a step takes training.global_batch_size 32 rows and there are 5: it sees each of them at least 6 times",
        "training.epochs 1 comes to 1 whole steps: 6.4 passes",
    ]
    assert figures.passes(few, 4, 100) == []
    assert figures.passes(TrainingSpec(steps=10, global_batch_size=8), 10, 4) == [
        "a step takes training.global_batch_size 8 rows and there are 4: it sees each of them 2 times"
    ]
