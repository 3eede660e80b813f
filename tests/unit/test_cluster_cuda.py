"""GPUs of one kind may be forked for; what a process of another kind would import is not known."""

import pytest

from cluster.cuda_internals import CannotFork, kind_of

ONE = {"name": "H100", "major": 9, "minor": 0, "uuid": "a", "pci_bus_id": 1}


def test_gpus_that_differ_in_their_numbers_alone_are_of_one_kind():
    assert kind_of([ONE, {**ONE, "uuid": "b", "pci_bus_id": 2}]) == {"name": "H100", "major": 9, "minor": 0}


@pytest.mark.parametrize(("gpus", "said"), [([ONE, {**ONE, "name": "L4"}], "H100, L4"), ([], "could not be asked")])
def test_others_are_not_forked_for(gpus, said):
    with pytest.raises(CannotFork, match=said):
        kind_of(gpus)
