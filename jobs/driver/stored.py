"""A job whose storage is an object store: what of it is kept there, and how each node comes to what it needs.

    <URI>/runs/<key>/     notes (jobs/storage/keeper.py), lease/ (jobs/store_lease.py), checkpoints/, model/, ray/, and
                          shards/ of a prediction
          data/<digest>/  prepared rows (jobs/data/stored.py)
          models/<key>/   weights of exported models (jobs/worker/elsewhere.py)

Each node has a folder of its own, $TANDEM_HOME/stores/<name>, in which everything is where it is in a storage that is
a folder. That of the driver's node is the one that counts: its notes are kept in the store, and couriers
(jobs/storage/couriers.py) keep the folder of the run on the other nodes as it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import stores, topology
from cluster.errors import UserError
from jobs import progress
from jobs.checkpoint.store import Store, Written
from jobs.data import stored
from jobs.data.prepare import Arriving, Prepared
from jobs.driver import reach
from jobs.notes import write
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.storage.courier import Bring
from jobs.storage.couriers import Couriers
from jobs.storage.keeper import Keeper, NotKept
from jobs.worker import elsewhere
from tracking import manifest, model_store

MODEL = "model.json"
"""Says in a run's folder where its model is stored."""


class Stored:
    """The store's side of one attempt at a job."""

    def __init__(self, uri: str, keeper: Keeper, folder: RunFolder) -> None:
        """Take the storage's URI, who keeps the run's notes in it, and their folder here."""
        self.uri, self._keeper, self._folder = uri, keeper, folder
        self._store = Store(uri)

    @property
    def run(self) -> str:
        """Where the store keeps the run: a URI."""
        return stores.joined(self.uri, "runs", self._folder.key)

    @property
    def checkpoints(self) -> str:
        """Where the run's checkpoints are, unless the spec names another place: a URI."""
        return stores.joined(self.run, "checkpoints")

    @property
    def ray_state(self) -> str:
        """Where Ray Train keeps its own state: a URI."""
        return stores.joined(self.run, "ray")

    def told_to_workers(self, spec: JobSpec) -> JobSpec:
        """Return the spec with the place of the exported weights: the store, unless it names one. Pure."""
        if spec.model.export is not None:
            return spec
        return spec.model_copy(
            update={"model": spec.model.model_copy(update={"export": stores.joined(self.uri, "models")})}
        )

    def fetch(self, directory: Path) -> bool:
        """Have a folder of prepared data on this node, if it is stored; say whether it is there."""
        return stored.fetch(self._store, directory, _progress("fetch"))

    def push(self, prepared: Prepared) -> None:
        """Store the prepared data, for the other nodes and other jobs."""
        stored.push(self._store, Path(prepared.directory), _progress("store"))

    def fetch_columns(self, place: Path) -> bool:
        """Have what a model has made of prepared rows on this node, if it is stored; say whether it is there."""
        return stored.fetch_columns(self._store, place.parent, place.name, _progress("fetch"))

    def keep_columns(self, place: Path, made: Mapping[str, Written]) -> None:
        """Note that all files of it are stored, and have them on this node."""
        stored.push_columns(self._store, place.parent, place.name, made)
        self.fetch_columns(place)

    @contextmanager
    def on_nodes(self, spec: JobSpec, prepared: Prepared | None, parent: Path | None) -> Iterator[str]:
        """Keep the run's folder on all nodes that may work for it meanwhile, with the data and the parent.

        Args:
            parent: the folder of what the job starts from; None where that is nothing, or is fetched from a hub.

        Yields:
            What workers wait for: the token of `await_copy`.

        Raises:
            CourierLost: what a living node has written did not all come here; the run may look as it is not.
        """
        arriving = prepared.arriving if prepared and not prepared.is_whole else None
        bring = [Bring(_bring_data, (self.uri, prepared.directory, arriving))] if prepared is not None else []
        if prepared is not None and prepared.reference:
            bring.append(Bring(_bring_columns, (self.uri, prepared.directory, prepared.reference)))
        bring += [Bring(_bring_model, (model_store.portable(parent),))] if parent is not None else []

        def wanted() -> dict[str, str]:
            return {node.node_id: node.address for node in reach.candidates(spec, {}, topology.own_nodes())}

        couriers = Couriers(self._folder.path, wanted, bring, progress.say)
        couriers.start()
        try:
            yield couriers.token
        finally:
            couriers.settle()
            couriers.stop()
        couriers.check()

    def put_model(self) -> str:
        """Store the folder of the run's model, whose weights are in the store or in it; return its URI.

        A folder of its own for each content: what was put there by an attempt that did not come to its end stays.

        Raises:
            UserError: the store does not take it, or what is noted of it.
        """
        contract = (self._folder.model / manifest.FILE_NAME).read_bytes()
        uri = stores.joined(self.uri, "runs", self._folder.key, "model", hashlib.sha256(contract).hexdigest()[:8])
        model_store.put(self._folder.model, uri)
        write(self._folder.path / MODEL, {"uri": uri})
        elsewhere.note(self._folder, ())  # its weights are a version's from now on, and no attempt's to remove
        self._keeper.settle()
        return uri

    def model_of(self, run: str) -> str:
        """Return the URI of the model that a finished run of this storage, a sweep's trial, has stored.

        Raises:
            UserError: its note is not there.
        """
        try:
            return str(json.loads(self._store.read(f"runs/{run}/{MODEL}"))["uri"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            where = stores.shown(stores.joined(self.uri, "runs", run, MODEL))
            raise UserError(f"{where} does not say where the model of a finished trial is: {error}") from error


@contextmanager
def kept(uri: str | None, folder: RunFolder, keeper: Keeper | None) -> Iterator[Stored | None]:
    """Keep a run's notes in the store meanwhile; None for a storage that is a folder."""
    if uri is None or keeper is None:
        yield None
        return
    keeper.start()
    try:
        yield Stored(uri, keeper, folder)
    except BaseException:
        keeper.stop()
        try:
            keeper.settle()
        except NotKept as error:  # what has happened before counts
            progress.say(f"error: {error}")
        raise
    keeper.stop()
    keeper.settle()


def _bring_data(uri: str, directory: str, arriving: Arriving | None) -> None:
    """Have prepared data on this node; of such that is not whole yet, what training begins with."""
    if stored.fetch(Store(uri), Path(directory)):
        return
    if arriving is not None:
        with suppress(FileNotFoundError):
            arriving.bring()
            return
    if not stored.fetch(Store(uri), Path(directory)):  # it was made whole at this moment, or was removed
        raise UserError(f"data: {Path(directory).name} is not in {stores.shown(uri)} any more: submit the job again")


def _bring_columns(uri: str, directory: str, name: str) -> None:
    stored.fetch_columns(Store(uri), Path(directory), name)  # those that the workers make come later


def _bring_model(reference: str) -> None:
    if not model_store.here(reference).is_dir():
        raise UserError(
            f"model.from: {model_store.shown(reference)} is not on the node {socket.gethostname()}: put the model into "
            "the store with `tandem tracking upload`, and name that"
        )


def _progress(phase: str) -> Any:
    throttle, began = progress.Throttle(0.5), time.monotonic()

    def told(done: int, total: int) -> None:
        if time.monotonic() - began > 1.0 and (done == total or throttle.ready()):
            progress.report(phase, done, total)

    return told
