"""The trained model of a worker group → the run's model directory: a parameter at a time, or whole on rank 0.

A parameter at a time wherever the model can be taken apart, at every ZeRO stage; else the log says why it is not.
"""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path

import torch

from cluster.errors import UserError
from cluster.stored_weights import StoredFile
from jobs.checkpoint import resume
from jobs.tasks import Task, adapters
from jobs.worker import (
    apart,
    elsewhere,
    export,
    export_in_parts,
    heap,
    proof,
    refill,
    start,
    weight_files,
    weight_stream,
)
from jobs.worker.elsewhere import Elsewhere, StoreFailed
from jobs.worker.export import DTYPES, WrongExport, together
from jobs.worker.export_in_parts import Piece
from jobs.worker.fault_injection import damage
from jobs.worker.setup import Worker


def export_weights(worker: Worker) -> None:
    """Write the trained model below the run's folder, with the evaluations beside it. Collective."""
    worker.injector.inject("export", worker.steps)
    trained = proof.of_trained(worker)
    heap.lean()
    worker.engine.settle()  # after the pass that this has made, where nothing is held out
    lora = worker.spec.model.lora
    if lora is not None and not lora.merge:
        _apart(worker, trained)
        _end(worker)
        return
    found = _skeleton_and_pieces(worker)
    why = resume.first_of(found if isinstance(found, str) else None)
    exports, check_newest = worker.spec.model.export, worker.saver.check_newest
    with elsewhere.begun(exports, worker.folder, worker.first, check_newest) as place:
        if why is None:
            assert isinstance(found, tuple), "else there is a reason"
            _in_parts(worker, trained, *found, place)
        else:
            how = "gathers the whole model" if worker.engine.sliceable else "makes the whole model once more, in fp32,"
            _say(worker, f"rank 0 {how} to write it: {why}")
            _whole(worker, trained, place)
    _end(worker)


def _say(worker: Worker, sentence: str) -> None:
    """Have the run say something, if the disk takes it."""
    if worker.first:
        with suppress(OSError):
            worker.folder.add_remarks([sentence])


def _end(worker: Worker) -> None:
    """Write the evaluations: with them the run has its model."""
    if worker.first:
        worker.folder.write_evaluations(worker.evaluations)
    torch.distributed.barrier()


def _skeleton_and_pieces(worker: Worker) -> tuple[torch.nn.Module, list[Piece]] | str:
    """Return the model without weights and what its files are made of, or why rank 0 has to have it whole."""
    heap.trim()
    skeleton = start.skeleton(worker.spec, worker.task, worker.model_directory)
    if isinstance(skeleton, str):
        return skeleton
    pieces = export_in_parts.plan(skeleton, worker.engine.model.module, DTYPES[worker.precision])
    return pieces if isinstance(pieces, str) else (skeleton, pieces)


def _whole(worker: Worker, trained: proof.Measured, place: Elsewhere | None) -> None:
    """Write it by rank 0, who has all of it in memory three times; to a store once it is checked."""
    weights = worker.engine.state_dict()

    def check(written: Path) -> None:
        _perhaps_damaged(worker, written / weight_files.SINGLE)
        proof.of_files(written, trained, worker.task, worker.precision, worker.engine.device)
        worker.saver.check_newest()  # else it would replace what a newer attempt has left
        if place is not None:
            place.move(written)

    problem = None
    with together():
        if weights is not None:
            try:
                export.export(
                    worker.folder.model,
                    worker.task,
                    weights,
                    lambda: start.unadapted(worker.spec, worker.task, worker.model_directory),
                    worker.precision,
                    worker.spec.model.lora,
                    check,
                )
            except StoreFailed as error:
                problem = str(error)
    if (told := resume.gathered(problem)[0]) is not None:
        raise StoreFailed(told)


def _apart(worker: Worker, trained: proof.Measured) -> None:
    """Write the adapters alone, and have what the files say measured on their base: by all ranks, or by rank 0."""
    first, live = worker.first, worker.engine.model.module
    assert worker.model_directory is not None
    name = resume.gathered(export.name_aside(worker.folder.model))[0]
    with export.aside(worker.folder.model, first, name) as partial:
        noted = worker.folder.data()
        base = apart.base(worker.model_directory, noted.weights if noted else "") if first else None
        apart.save(partial, live, base)
        with together():
            if first:
                apart.save_config(live, DTYPES[worker.precision], partial)
                worker.task.save(partial)
                _perhaps_damaged(worker, partial / adapters.WEIGHTS)
        with export.on_all_nodes(partial, first, copies=worker.copies):
            _check_apart(worker, trained, partial)
        if first:
            worker.saver.check_newest()


def _check_apart(worker: Worker, trained: proof.Measured, written: Path) -> None:
    """Have what the files of adapters say measured on their base: by all ranks, or by rank 0. Collective."""
    loaded = type(worker.task).load(written, worker.task.options)
    begun = _for_all(start.described_by(written, loaded) if _is_whole(worker) else "the base is held in few bits")
    if isinstance(begun, str):
        _checked_by_one(worker, trained, written, begun)
    else:
        with closing(begun):
            _measured_by_all(worker, trained, loaded, begun)


def _is_whole(worker: Worker) -> bool:
    """Whether the model in training has all its weights as they are, and none in few bits."""
    return worker.spec.model.lora is None or worker.spec.model.lora.base == "whole"


def _checked_by_one(worker: Worker, trained: proof.Measured, written: Path, why: str) -> None:
    """Have rank 0 load what was written, all of it, and measure it. Collective.

    Args:
        why: all ranks together cannot.

    Raises:
        WrongExport: on every rank, where it is not what was trained.
    """
    _say(worker, f"rank 0 loads the whole model to check what was written: {why}")
    wrong = resume.gathered(_wrong(worker, trained, written) if worker.first else None)[0]
    if wrong is not None:
        raise WrongExport(wrong)


def _wrong(worker: Worker, trained: proof.Measured, written: Path) -> str | None:
    """Have this rank load the files, and return what is wrong with them.

    Where the base is held in few bits, it is held so again: on the base as it is, the loss is another one.
    """
    try:
        if _is_whole(worker):
            proof.of_files(written, trained, worker.task, worker.precision, worker.engine.device)
        else:
            begun = start.begin_whole(worker.spec, worker.task, worker.model_directory)
            apart.put_back(begun.model, written)
            loaded = type(worker.task).load(written, worker.task.options)
            proof.of_model(begun.model, trained, loaded, worker.precision, worker.engine.device)
            begun.close()
    except UserError as error:
        return str(error)
    return None


def _in_parts(
    worker: Worker,
    trained: proof.Measured,
    skeleton: torch.nn.Module,
    pieces: list[Piece],
    place: Elsewhere | None,
) -> None:
    """Write it a parameter at a time, and have every rank check its part of the files."""
    first, live = worker.first, worker.engine.model.module
    name = resume.gathered(export.name_aside(worker.folder.model))[0]
    with export.aside(worker.folder.model, first, name) as partial:
        digests = resume.gathered(export_in_parts.write(partial, pieces, first, place))[0]
        if worker.spec.model.lora is not None:
            export_in_parts.save_adapters(partial / "adapter", live, first)
        with together():
            if first:
                export_in_parts.save_config(skeleton, DTYPES[worker.precision], partial)
                worker.task.save(partial)
                if place is not None:
                    shards = export_in_parts.files(pieces)
                    place.name(
                        partial, {each.name: StoredFile(each.nbytes, digests[each.name], each.numel) for each in shards}
                    )
                _perhaps_damaged(worker, partial / weight_files.SINGLE, place)
        with export.on_all_nodes(partial, first, copies=worker.copies):
            _check(worker, trained, partial, pieces, digests, place)
        if first:
            worker.saver.check_newest()  # as above


def _check(
    worker: Worker,
    trained: proof.Measured,
    written: Path,
    pieces: list[Piece],
    digests: dict[str, str],
    place: Elsewhere | None,
) -> None:
    """Read the files back, by all ranks, from where they are: no rank has a copy of them besides its own weights.

    Raises:
        WrongExport: on every rank, where one finds that they are not what was trained.
    """
    engine = worker.engine
    agree(weight_stream.verify(written, digests, engine.rank, engine.world_size, place))
    loaded = type(worker.task).load(written, worker.task.options)
    files = None if place is None else place.weights(written, digests.keys())
    begun = _for_all(start.described_by(written, loaded, files))
    if isinstance(begun, str):
        agree(f"{written} does not load in parts: {begun}" if engine.sliceable else None)
        _checked_by_one(worker, trained, written, begun)
        return
    assert begun.files is not None
    with closing(begun):
        agree(export_in_parts.difference(pieces, begun.files.read, engine.rank, engine.world_size))
        _measured_by_all(worker, trained, loaded, begun)


def _for_all(begun: start.Start | str) -> start.Start | str:
    """Return what reads a model, or why it can be read whole only: on all ranks where one says so. Collective."""
    why = resume.first_of(begun if isinstance(begun, str) else None)
    if why is None:
        return begun
    if isinstance(begun, start.Start):
        begun.close()
    return why


def _measured_by_all(worker: Worker, trained: proof.Measured, loaded: Task, begun: start.Start) -> None:
    """Have all ranks read a model, in parts or into the memory of the trained one, and compare its loss. Collective.

    The training ends here: nothing of it is whole afterwards.

    Raises:
        WrongExport: it is not the trained model's.
    """
    assert begun.fill is not None
    engine = worker.engine
    engine.forget_moments()
    heap.trim()
    if engine.sliceable:
        model = engine.divided(begun.model, begun.fill)
    else:
        model, in_turn = begun.model, refill.InTurn(begun.fill, engine.rank, engine.world_size)
        refill.refill(model, in_turn, engine.model.module, DTYPES[worker.precision], engine.device)
        in_turn.check()
    begun.close()
    proof.of_read(worker, loaded, model, trained)


def agree(problem: str | None) -> None:
    """Raise what any rank has found, on all of them. Collective.

    Raises:
        WrongExport: there is something.
    """
    if (found := resume.first_of(problem)) is not None:
        raise WrongExport(f"the exported files are not the model that was trained: {found}")


def _perhaps_damaged(worker: Worker, weights: Path, place: Elsewhere | None = None) -> None:
    if worker.injector.inject("exported", worker.steps) == "damage":
        damage(weights) if place is None else place.damage(weights.name)
