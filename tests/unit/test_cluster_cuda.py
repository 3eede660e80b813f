"""GPUs of one kind may be forked for; what a process of another kind would import is not known."""

import pytest

from cluster.cuda_internals import CannotFork, kind_of

ONE = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80}


def test_gpus_of_one_kind_may_differ_in_little():
    assert kind_of([ONE, {**ONE, "total_memory": 79}]) == ONE


@pytest.mark.parametrize(("gpus", "said"), [([ONE, {**ONE, "name": "L4"}], "H100.*L4"), ([], "could not be asked")])
def test_others_are_not_forked_for(gpus, said):
    with pytest.raises(CannotFork, match=said):
        kind_of(gpus)
