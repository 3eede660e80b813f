"""The folder of a run: the protocol between the job's driver, its workers and its guard. This module owns every name.

storage/runs/<name>-<spec digest>-<k>/
    status.json      RUNNING, FINISHED, FAILED or KILLED          driver, guard → whoever submits the spec again
    lease/           who owns the run (jobs/lease.py)             driver → guard, whoever submits the spec again
    control.json     what failures have changed (Control)         driver → workers
    precision.json   what the run computes in, once decided       driver → driver of a later attempt
    data.json        what the encoded rows were decided by        driver → driver of a later attempt
    zero.json, micro_batches.json  what `auto` came to            jobs/run_choices.py
    attempt.json     the newest start of the group (Attempt)      first rank → driver
    plan.json        what the newest start should take (Outlook)  first rank → driver
    failures.jsonl   failed attempts, oldest first                driver → post-mortem page
    saves.json       how saving checkpoints went (Saves)          first rank → driver
    STOP, SAVE       requests for a checkpoint (and an end)       driver → workers
    spool/           metrics on their way to MLflow               workers → driver
    logs/, stacks/   what each rank printed; where it hung        workers → post-mortem page
    pulses/          each rank's sign of life                     workers → driver
    paces/  stragglers.jsonl  who is slow (jobs/paces.py)         workers, driver → driver
    faults/, rows/   proof of injected faults; rows of each step  workers → tests
    predict.json     what the predictions are decided by          driver → driver of a later attempt
    parts/           predictions by shard (jobs/predict/parts.py) workers, driver → driver
    checkpoints/     model/  evaluations.json                     workers → driver
    exports.json     folders in a store (jobs/worker/elsewhere)   first rank → first rank of a later attempt
    first.json       metrics before the first step                first rank → first rank of a later attempt
    sums.json        gathered.npz: what was measured last         workers → driver
    arrivals.jsonl   files of rows, with data.start_early         driver → workers
    profile/         each rank's trace and table of operators     workers → driver
    ray/             Ray Train's own state
    guard.log        what the guard printed
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cluster.precision import Precision
from jobs.notes import DamagedNote, lines, made, read, write
from jobs.paces import Paces
from jobs.plan.outlook import Outlook
from jobs.run_choices import Choices
from jobs.run_notes import Attempt, Control, Saves

if TYPE_CHECKING:
    from jobs.data.identity import Noted

TAIL_BYTES = 65536


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, over any number of attempts. `key` names the run everywhere."""

    path: Path
    resumed: bool = False
    lease: int = field(default=0, compare=False)
    """Number of the lease (jobs/lease.py) under which this job has it; 0: it looks on only."""

    @property
    def key(self) -> str:
        """The name of the folder."""
        return self.path.name

    # -- where things lie --------------------------------------------------------------------------------------------

    @property
    def spool(self) -> Path:
        """The folder of the metrics that are on their way to MLflow."""
        return self.path / "spool"

    @property
    def rank_0_spool(self) -> Path:
        """The file of the first rank's metrics."""
        return self.spool / "rank-0.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go unless the spec names another place."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The model directory that the run leaves."""
        return self.path / "model"

    @property
    def profile(self) -> Path:
        """Where a profile's traces and tables go."""
        return self.path / "profile"

    @property
    def compiled(self) -> Path:
        """Where what is compiled is kept, for all runs beside it."""
        return self.path.parent.parent / "compiled"

    @property
    def arrivals(self) -> Path:
        """The list of the files of rows, where training begins before all are there (jobs/data/arrivals.py)."""
        return self.path / "arrivals.jsonl"

    @property
    def ray_state(self) -> Path:
        """Where Ray Train keeps its own state."""
        return self.path / "ray"

    @property
    def guard_log(self) -> Path:
        """What the guard printed."""
        return self.path / "guard.log"

    def log(self, attempt: str, rank: int) -> Path:
        """Return the file of what a rank prints in an attempt; its folder is there."""
        return _in_folder(self.path / "logs", f"{attempt}-rank-{rank}.log")

    def stacks(self, attempt: str, rank: int) -> Path:
        """Return the file of a rank's Python stacks, should it hang; its folder is there."""
        return _in_folder(self.path / "stacks", f"{attempt}-rank-{rank}.txt")

    def pulse(self, attempt: str, rank: int) -> Path:
        """Return the file of a rank's sign of life (jobs/worker/watchdog.py); its folder is there."""
        return _in_folder(self.path / "pulses", f"{attempt}-rank-{rank}")

    def pulses(self) -> list[Path]:
        """Return the signs of life of all ranks that have not ended by themselves."""
        return sorted((self.path / "pulses").glob("*-rank-*"))

    def fault_marker(self, fault: str) -> Path:
        """Return the file that proves that a fault was injected; its folder is there."""
        return _in_folder(self.path / "faults", fault)

    def rows_log(self, rank: int) -> Path:
        """Return the file of the rows that a rank took at each step, where a test asks for it; its folder is there."""
        return _in_folder(self.path / "rows", f"{rank}.jsonl")

    # -- how it stands -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a new attempt at the job: it runs; requests and notes of an earlier one are gone, skips stay."""
        control = self.control()
        self.write_status("RUNNING")
        notes = ("attempt.json", "plan.json", "failures.jsonl", "saves.json", "evaluations.json")
        for name in ("STOP", "SAVE", *notes):
            (self.path / name).unlink(missing_ok=True)
        for left in (*self.pulses(), *(self.path / "stacks").glob("*-rank-*")):
            left.unlink(missing_ok=True)
        self.paces.clear()
        self.write_control(Control(control.skip, control.micro_batch))

    def status(self) -> str | None:
        """Return how the run stands, if anything was noted."""
        try:
            return str(read(self.path / "status.json").get("status") or "") or None
        except (OSError, ValueError):
            return None

    def write_status(self, status: str) -> None:
        """Note how the run stands."""
        write(self.path / "status.json", {"status": status})

    def attempt(self) -> Attempt | None:
        """Return the newest attempt that got as far as to say so."""
        values = read(path := self.path / "attempt.json")
        lists = {name: tuple(values.get(name, ())) for name in ("nodes", "pids", "oom_kills")}
        return made(path, Attempt, {**values, **lists}) if values else None

    def write_attempt(self, attempt: Attempt) -> None:
        """Note the newest start of the worker group."""
        write(self.path / "attempt.json", asdict(attempt))

    def outlook(self) -> Outlook | None:
        """Return what the newest start of the worker group was expected to take, if that is known by now."""
        values = read(path := self.path / "plan.json")
        return made(path, Outlook, {**values, "said": tuple(values.get("said", ()))}) if values else None

    def write_outlook(self, outlook: Outlook) -> None:
        """Note what the newest start of the worker group is expected to take, or what it took."""
        write(self.path / "plan.json", asdict(outlook))

    def saves(self) -> Saves:
        """Return how saving checkpoints went."""
        return made(path := self.path / "saves.json", Saves, read(path))

    def note_save(self, error: str | None) -> None:
        """Note that a checkpoint was saved, or why it could not be."""
        write(self.path / "saves.json", asdict(self.saves().and_one(error)))

    def control(self) -> Control:
        """Return what failures have changed."""
        values = read(path := self.path / "control.json")
        lists = {name: tuple(values.get(name, ())) for name in ("skip", "excluded")}
        return made(path, Control, {**values, **lists})

    def write_control(self, control: Control) -> None:
        """Note what failures have changed."""
        write(self.path / "control.json", asdict(control))

    def precision(self) -> Precision | None:
        """Return what the run computes in, if an attempt has decided."""
        if not (values := read(path := self.path / "precision.json")):
            return None
        if (kept := values.get("precision")) not in get_args(Precision):
            raise DamagedNote(path, f"it says precision {kept!r}, not one of {', '.join(get_args(Precision))}")
        return kept

    def keep_precision(self, precision: Precision) -> None:
        """Note what the run computes in, for attempts to come."""
        write(self.path / "precision.json", {"precision": precision})

    def data(self) -> Noted | None:
        """Return what decides the run's data, if an attempt has noted it."""
        from jobs.data.identity import Noted  # with the spec's own modules: the guard of a job does without

        values = read(path := self.path / "data.json")
        return made(path, Noted, values) if values else None

    def keep_data(self, noted: Noted) -> None:
        """Note what decides the run's data, for attempts to come."""
        write(self.path / "data.json", asdict(noted))

    @property
    def paces(self) -> Paces:
        """How fast its ranks work."""
        return Paces(self.path)

    @property
    def choices(self) -> Choices:
        """What `auto` came to."""
        return Choices(self.path)

    # -- requests to the workers -------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask the workers for a checkpoint and an end."""
        (self.path / "STOP").touch()

    def stop_requested(self) -> bool:
        """Say whether the workers are to save and end."""
        return (self.path / "STOP").exists()

    def request_save(self) -> None:
        """Ask the workers for a checkpoint."""
        (self.path / "SAVE").touch()

    def save_requested(self) -> bool:
        """Say whether the workers are to save."""
        return (self.path / "SAVE").exists()

    def save_granted(self) -> None:
        """Take the request for a checkpoint back: one is being written."""
        (self.path / "SAVE").unlink(missing_ok=True)

    # -- what came of it ---------------------------------------------------------------------------------------------

    def failures(self) -> list[dict[str, Any]]:
        """Return the failed attempts of the worker group, oldest first."""
        return [entry for entry in lines(self.path / "failures.jsonl") if isinstance(entry, dict)]

    def add_failure(self, entry: dict[str, Any]) -> None:
        """Add a failed attempt, on the disk when this returns."""
        with (self.path / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def remarks(self) -> list[str]:
        """Return what the workers have said of the model and how it is trained, in order."""
        return [remark for remark in lines(self.path / "remarks.jsonl") if isinstance(remark, str)]

    def add_remarks(self, sentences: Sequence[str]) -> None:
        """Add what has not been said yet; rank 0 of a group alone does so."""
        known = set(self.remarks())
        if not known.issuperset(sentences):
            with (self.path / "remarks.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sentence) + "\n" for sentence in sentences if sentence not in known)

    def hung_attempts(self) -> list[str]:
        """Return the attempts whose ranks left stacks when they hung."""
        left = (path for path in (self.path / "stacks").glob("*-rank-*.txt") if path.stat().st_size)
        return sorted({path.name.rpartition("-rank-")[0] for path in left})

    def evidence(self, attempt: str | None) -> Iterator[tuple[str, Path]]:
        """Yield ("logs" or "stacks", file) of what an attempt left, or all of them for None."""
        pattern = f"{attempt}-rank-*" if attempt else "*-rank-*"
        for kind in ("logs", "stacks"):
            for path in sorted((self.path / kind).glob(pattern)):
                yield kind, path

    def last_step(self) -> int:
        """Return the last step that the first rank has spooled; 0 before the first."""
        try:
            with self.rank_0_spool.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
                spooled = file.read().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(spooled):
            with suppress(ValueError, KeyError, TypeError):  # half a line, as a killed writer leaves it
                if b'"loss"' in line:
                    return int(json.loads(line)["step"])
        return 0

    def evaluations(self) -> dict[str, dict[str, float]] | None:
        """Return the metrics on held-out rows, `first`, `latest` and `final`; None before the run is at its end."""
        path = self.path / "evaluations.json"
        return read(path) if path.is_file() else None

    def sums(self) -> dict[str, Any]:
        """Return what the last evaluation added up and gathered, for the task to draw; empty without one."""
        import numpy as np

        kept = self.path / "gathered.npz"
        arrays = dict(np.load(kept, allow_pickle=False)) if kept.is_file() else {}
        return {**read(self.path / "sums.json"), **arrays}

    def write_sums(self, sums: Mapping[str, Any]) -> None:
        """Note what the last evaluation added up and gathered."""
        import numpy as np

        arrays = {key: value for key, value in sums.items() if isinstance(value, np.ndarray)}
        if arrays:
            np.savez(self.path / "gathered.npz", **arrays)
        write(self.path / "sums.json", {key: value for key, value in sums.items() if key not in arrays})

    def first_evaluation(self) -> dict[str, float]:
        """Return the metrics before the first step; empty where nothing was held out."""
        return read(self.path / "first.json")

    def write_first_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics before the first step: an attempt that goes on does not measure them again."""
        write(self.path / "first.json", dict(metrics))

    def write_evaluations(self, evaluations: dict[str, dict[str, float]]) -> None:
        """Note the metrics on held-out rows: the last thing that the workers do."""
        write(self.path / "evaluations.json", evaluations)


def _in_folder(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / name
