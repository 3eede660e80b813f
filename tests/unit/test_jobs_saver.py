"""A checkpoint is saved beside training: what it holds, what waits for it, and what happens when storage fails."""

import os
import threading
from dataclasses import replace

import pytest
import torch

from jobs.checkpoint import catalog, saver, shards
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.saver import Saver
from jobs.checkpoint.shards import KINDS, Fragment, Reader
from jobs.checkpoint.store import Store


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(saver, "RETRY_PAUSE_S", 0.0)


class ThreadNotes(dict):
    """Notes between the ranks of one process."""

    write = dict.__setitem__

    def read(self, name: str) -> bytes | None:
        return self.pop(name, None)


def fragment(value: float, start: int = 0, numel: int = 1000) -> Fragment:
    return Fragment("w", start, {kind: torch.full((numel,), value + i) for i, kind in enumerate(KINDS)})


def manifest(step: int, world_size: int = 1) -> Manifest:
    return Manifest(step, step, world_size, 1)


def saved_value(store: Store, step: int) -> float:
    found, _ = catalog.newest_valid(store)
    assert found is not None
    assert found.step == step
    out = torch.zeros(1)
    Reader(store, [f"{catalog.folder(step)}/{name}" for name in found.shards]).read("exp_avg", "w", 999, out)
    return float(out)


def test_what_is_saved_is_the_state_before_it_changed(tmp_path):
    store, state = Store(str(tmp_path)), fragment(1.0)
    one = Saver(store, "a", 0, 1, Keep())
    one.begin(manifest(10), [state], {"buffers.safetensors": b"123"})
    one.wait_copied()
    for tensor in state.tensors.values():
        tensor.fill_(99.0)
    one.finish()
    assert saved_value(store, 10) == 2.0
    (outcome,) = one.outcomes()
    assert (outcome.step, outcome.error) == (10, None)
    assert outcome.size == sum(f.stat().st_size for f in (tmp_path / "step-00000010").glob("*.safetensors"))
    assert one.outcomes() == []


def test_state_in_files_is_written_from_them_without_a_copy_and_may_change_afterwards(tmp_path):
    mapped = {
        kind: torch.from_file(str(tmp_path / kind), shared=True, size=1000, dtype=torch.float32).fill_(1.0 + i)
        for i, kind in enumerate(KINDS)
    }
    store = Store(str(tmp_path / "store"))
    one = Saver(store, "a", 0, 1, Keep())
    in_memory = replace(fragment(1.0), parameter="v")
    one.begin(manifest(10), [in_memory, Fragment("w", 0, mapped)], direct=True)
    one.wait_copied()
    for tensor in mapped.values():
        tensor.fill_(99.0)
    one.finish()
    assert saved_value(store, 10) == 2.0
    assert [outcome.error for outcome in one.outcomes()] == [None]
    assert one._buffer is None


def test_a_checkpoint_is_valid_only_when_every_rank_has_written(tmp_path):
    store = Store(str(tmp_path))
    notes = ThreadNotes()
    ranks = [Saver(store, "a", rank, 2, Keep(), notes=notes) for rank in range(2)]
    ranks[0].begin(manifest(10, 2), [fragment(1.0, 0, 500)])
    ranks[0].wait_copied()
    assert not store.exists("step-00000010/MANIFEST.json")
    ranks[1].begin(manifest(10, 2), [fragment(1.0, 500, 500)])
    for rank in ranks:
        rank.finish()
    assert saved_value(store, 10) == 2.0


def test_a_rank_that_fails_leaves_no_checkpoint_and_the_next_save_works(tmp_path):
    class Broken(Store):
        def write(self, name, chunks, **how):
            raise OSError(28, "No space left on device")

    store, broken, notes = Store(str(tmp_path)), Broken(str(tmp_path)), ThreadNotes()
    first = Saver(store, "a", 0, 2, Keep(), notes=notes)
    second = Saver(broken, "a", 1, 2, Keep(), notes=notes)
    first.begin(manifest(10, 2), [fragment(1.0, 0, 500)])
    second.begin(manifest(10, 2), [fragment(1.0, 500, 500)])
    first.finish()
    second.finish()
    assert "rank 1 could not save: OSError: [Errno 28]" in first.outcomes()[0].error
    assert "No space left" in second.outcomes()[0].error
    assert catalog.newest_valid(store) == (None, [])
    second._store = store
    for rank, one in enumerate((first, second)):
        one.begin(manifest(20, 2), [fragment(3.0, 500 * rank, 500)])
    first.finish()
    second.finish()
    assert saved_value(store, 20) == 4.0


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([], "weight of 'w' has 1000 elements, of which 500 to 1000 are in no shard"),
        ([fragment(5.0, 600, 400)], "weight of 'w' has 1000 elements, of which 500 to 600 are in no shard"),
        ([fragment(5.0, 400, 600)], "weight of 'w' has 1000 elements, of which 400 to 500 are there twice"),
        ([fragment(5.0, 500, 501)], "weight of 'w' has 1000 elements, the shards hold 1001"),
        (
            [replace(fragment(5.0, 500, 500), tensors={"weight": torch.zeros(500)})],
            "exp_avg of 'w' has 1000 elements, of which 500 to 1000 are in no shard",
        ),
        ([fragment(5.0, 500, 500), replace(fragment(5.0), parameter="v")], "'v' is no parameter of the model"),
    ],
)
def test_shards_that_do_not_add_up_to_the_model_are_not_committed(tmp_path, capsys, second, said):
    store, notes = Store(str(tmp_path)), ThreadNotes()
    ranks = [Saver(store, "a", rank, 2, Keep(), notes=notes) for rank in range(2)]

    def save(step: int, fragments: list[Fragment]) -> None:
        whole = replace(manifest(step, 2), elements={"w": 1000})
        ranks[0].begin(whole, [fragment(1.0, 0, 500)])
        ranks[1].begin(whole, fragments)
        for rank in ranks:
            rank.finish()

    save(10, [fragment(1.0, 500, 500)])
    save(20, second)
    committed, refused = ranks[0].outcomes()
    assert committed.error is None
    assert refused.error.startswith("ShardError: the shards do not add up to the model: ")
    assert said in refused.error
    assert "trying again" not in capsys.readouterr().out
    assert saved_value(store, 10) == 2.0, "the checkpoint before it is still the newest"
    save(30, [fragment(1.0, 500, 500)])
    assert saved_value(store, 30) == 2.0, "and the next save works"
    found, _ = catalog.newest_valid(store)
    assert found.elements == {"w": 1000}


def test_a_write_that_fails_once_is_repeated(tmp_path):
    class Flaky(Store):
        left = 2

        def write(self, name, chunks, **how):
            if self.left:
                self.left -= 1
                raise OSError(5, "Input/output error")
            return super().write(name, chunks, **how)

    store = Flaky(str(tmp_path))
    one = Saver(store, "a", 0, 1, Keep())
    one.begin(manifest(10), [fragment(1.0)])
    one.finish()
    assert one.outcomes()[0].error is None
    assert saved_value(store, 10) == 2.0


def test_training_waits_only_while_the_state_is_copied(tmp_path):
    class Slow(Store):
        released = threading.Event()

        def write(self, name, chunks, **how):
            assert self.released.wait(10)
            return super().write(name, chunks, **how)

    store = Slow(str(tmp_path))
    one = Saver(store, "a", 0, 1, Keep())
    one.begin(manifest(10), [fragment(1.0)])
    one.wait_copied()  # returns, although nothing has been written
    assert one.outcomes() == []
    store.released.set()
    one.finish()
    assert saved_value(store, 10) == 2.0


def test_without_memory_for_a_copy_training_waits_until_the_state_itself_is_written(tmp_path):
    class Slow(Store):
        released, written, failures = threading.Event(), [], 1

        def write(self, name, chunks, **how):
            assert self.released.wait(10)
            if self.failures:
                self.failures -= 1
                next(iter(chunks))
                raise OSError(5, "Input/output error")
            self.written.append(name)
            return super().write(name, chunks, **how)

    store, state = Slow(str(tmp_path)), fragment(1.0, numel=shards.BLOCK + 7)
    one = Saver(store, "a", 0, 1, Keep())
    one.begin(manifest(10), [state], direct=True)
    threading.Timer(0.1, store.released.set).start()
    one.wait_copied()
    assert len(store.written) >= 1, "the shard, at the second try"
    for tensor in state.tensors.values():
        tensor.fill_(99.0)
    one.finish()
    (outcome,) = one.outcomes()
    assert outcome.error is None
    assert outcome.stalled_s > 0.05
    assert one.held == 0
    assert saved_value(store, 10) == 2.0


def test_a_copy_and_the_state_itself_make_the_same_file(tmp_path):
    state = [fragment(1.0, numel=shards.BLOCK + 7), fragment(5.0, numel=3)]
    for name in ("copied", "direct"):
        one = Saver(Store(str(tmp_path / name)), "a", 0, 1, Keep())
        one.begin(manifest(10), state, direct=name == "direct")
        one.finish()
        assert (one.held > 0) == (name == "copied")
    files = [(tmp_path / name / "step-00000010" / "a-00000-of-00001.safetensors") for name in ("copied", "direct")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_old_checkpoints_go(tmp_path):
    store = Store(str(tmp_path))
    one = Saver(store, "a", 0, 1, Keep(newest=2))
    for step in (10, 20, 30):
        one.begin(manifest(step), [fragment(float(step))])
    one.finish()
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000030"]
    assert [outcome.step for outcome in one.outcomes()] == [10, 20, 30]
