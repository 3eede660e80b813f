"""Faults happen where they should, once, and leave their proof."""

import pytest

from jobs.run_folder import RunFolder
from jobs.worker import fault_injection
from jobs.worker.fault_injection import Injector


def test_a_fault_happens_at_its_point_once(tmp_path):
    injector = Injector(RunFolder(tmp_path), 1, "raise:rank=1:step=3:phase=save;nan:rank=1:step=4;kill:rank=0:step=1")
    assert injector.inject("save", 2) is None
    assert injector.inject("step", 3) is None
    with pytest.raises(fault_injection.InjectedError):
        injector.inject("save", 3)
    assert injector.inject("save", 3) is None
    assert injector.inject("step", 4) == "nan"
    assert Injector(RunFolder(tmp_path), 1, "nan:rank=1:step=4").inject("step", 4) is None, "nor in another attempt"
    assert {path.name for path in (tmp_path / "faults").iterdir()} == {"raise-rank1-step3-save", "nan-rank1-step4-step"}


def test_the_rows_of_steps_are_noted_where_asked_for(tmp_path):
    injector = Injector(RunFolder(tmp_path), 1, "rows:rank=1:step=3")
    injector.record_rows(2, [[1]])
    injector.record_rows(3, [[4], [5]])
    assert (tmp_path / "rows" / "1.jsonl").read_text() == '{"step": 3, "rows": [4, 5]}\n'


def test_without_faults_nothing_happens(tmp_path):
    injector = Injector(RunFolder(tmp_path), 0, "")
    assert injector.inject("step", 1) is None
    assert not (tmp_path / "faults").exists()


@pytest.mark.parametrize("text", ["explode:step=1", "kill:rank=1", "kill:step=1:phase=never", "kill:steps=1:step=1"])
def test_a_mistake_is_named(tmp_path, text):
    with pytest.raises(ValueError, match="is no fault; write one of kill"):
        Injector(RunFolder(tmp_path), 0, text)
