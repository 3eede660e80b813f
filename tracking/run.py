"""One MLflow run per job, across any number of restarts: opened by key, logged to, ended truthfully."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.names import check_key
from cluster.redact import redacted
from tracking.client import ask, connect, create_once
from tracking.errors import ServerUnreachable, TrackingError
from tracking.mlflow_internals import (
    EXTERNAL_TAG,
    MAX_DIGEST_CHARS,
    MAX_PARAM_CHARS,
    MAX_PARAMS_PER_BATCH,
    MAX_TAG_CHARS,
    MAX_TAGS_PER_BATCH,
    SPLIT_TAG,
)
from tracking.records import Point, metric_name
from tracking.spool import MAX_BATCH

RUN_KEY_TAG = "tandem.run_key"
CHECKPOINT_TAG = "tandem.checkpoint"
DIRECTORY_TAG = "tandem.directory"


Status = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """An MLflow run. Every method may be repeated without logging anything twice."""

    def __init__(self, client: Any, run_id: str, experiment_id: str) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._client = client

    @staticmethod
    def open(
        key: str,
        name: str,
        experiment: str = "tandem",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        tracking_uri: str | None = None,
    ) -> "Run":
        """Return the run of this key, RUNNING: the one that exists, also if it had ended, or a new one.

        Raises ServerUnreachable within seconds when the server is down; `SpoolSender` takes a function that calls
        this, and repeats it.
        """
        check_key("run key", key)
        client = connect(tracking_uri)
        experiment_id = _experiment_id(client, experiment)
        found = create_once(
            client,
            find=lambda: _find(client, experiment_id, key),
            create=lambda: client.create_run(experiment_id, run_name=name, tags={RUN_KEY_TAG: key}),
        )
        run = Run(client, found.info.run_id, experiment_id)
        if found.info.status != "RUNNING":
            ask(client, lambda: client.update_run(run.run_id, status="RUNNING"))
        run.set_tags(tags or {})
        run.log_params(params or {})
        return run

    @staticmethod
    def find(key: str, experiment: str = "tandem", tracking_uri: str | None = None) -> "Run | None":
        """Return the run of this key as it is, or None: for a supervisor that ends what its driver could not."""
        client = connect(tracking_uri)
        found = ask(client, lambda: client.get_experiment_by_name(experiment))
        raw = ask(client, lambda: _find(client, found.experiment_id, check_key("run key", key))) if found else None
        return Run(client, raw.info.run_id, raw.info.experiment_id) if raw else None

    @property
    def url(self) -> str:
        """Where the run's page is."""
        return f"{self._client.tracking_uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, FAILED or KILLED, as the server has it."""
        return str(self._raw().info.status)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested ones under dotted names, secrets masked, long values cut with a note.

        MLflow never changes a param: a restart with another value finds it in the tag `tandem.param.<name>`.
        """
        from mlflow.entities import Param

        known = self._raw().data.params if params else {}
        values = {_key(k): _clipped(v, MAX_PARAM_CHARS) for k, v in _flat(redacted(params))}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        self._log_batches("params", new, MAX_PARAMS_PER_BATCH)
        self.set_tags({f"tandem.param.{k}": v for k, v in values.items() if known.get(k, v) != v})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, secrets masked; a later value replaces an earlier one."""
        from mlflow.entities import RunTag

        all_tags = [RunTag(_key(k), _clipped(v, MAX_TAG_CHARS)) for k, v in redacted(tags).items()]
        self._log_batches("tags", all_tags, MAX_TAGS_PER_BATCH)

    def log_dict(self, content: Mapping[str, Any], artifact: str) -> None:
        """Store a JSON or YAML artifact (by the ending of its name), secrets masked."""
        ask(self._client, lambda: self._client.log_dict(self.run_id, redacted(content), artifact))

    def log_text(self, text: str, artifact: str) -> None:
        """Store a text artifact as it is."""
        ask(self._client, lambda: self._client.log_text(self.run_id, text, artifact))

    def log_bytes(self, content: bytes, artifact: str) -> None:
        """Store an artifact as it is, in the run's top folder: a picture, for instance."""
        with tempfile.TemporaryDirectory(prefix="tandem-artifact-") as folder:
            path = Path(folder) / artifact
            path.write_bytes(content)
            ask(self._client, lambda: self._client.log_artifact(self.run_id, str(path)))

    def log_file(self, path: Path, folder: str) -> None:
        """Store a file as it is, under its own name in a folder of the run."""
        ask(self._client, lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def log_dataset(self, name: str, digest: str, split: str = "train") -> None:
        """Note which data the run reads. The whole digest is in the tag `tandem.dataset.<split>`: MLflow keeps 36."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:MAX_DIGEST_CHARS], source_type="tandem", source=json.dumps({"digest": digest}))
        entry = DatasetInput(dataset, [InputTag(SPLIT_TAG, split)])
        ask(self._client, lambda: self._client.log_inputs(self.run_id, [entry]))
        self.set_tags({f"tandem.dataset.{split}": f"{name}@{digest}"})

    def log_points(self, points: Sequence[Point]) -> None:
        """Send up to 1,000 points in one request; the same points again change nothing."""
        from mlflow.entities import Metric

        batch = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        ask(self._client, lambda: self._client.log_batch(self.run_id, metrics=batch), attempts=1)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log a few finite numbers now, such as an evaluation's. Steps of a loop belong in a Spool."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [Metric(metric_name(k), float(v), now_ms, step) for k, v in metrics.items()]
        self._log_batches("metrics", rows, MAX_BATCH)

    def log_checkpoint(self, name: str, directory: Path | str, step: int, metrics: Mapping[str, float]) -> str:
        """Show a checkpoint as a logged model, ranked by its metrics, and return its id; the files stay in place.

        `directory` is a path or a URI.
        """
        where = directory if isinstance(directory, str) else str(directory.absolute())
        model = create_once(
            self._client,
            find=lambda: self._find_checkpoint(step),
            create=lambda: self._client.create_logged_model(
                self.experiment_id,
                name=check_key("checkpoint name", name),
                source_run_id=self.run_id,
                tags={CHECKPOINT_TAG: str(step), DIRECTORY_TAG: where, EXTERNAL_TAG: "true"},
            ),
        )
        if str(model.status) != "READY":
            ask(self._client, lambda: self._client.finalize_logged_model(model.model_id, "READY"))
        self._link(model.model_id, step)
        self._log_model_metrics(model.model_id, step, metrics)
        return str(model.model_id)

    def drop_checkpoint(self, step: int) -> None:
        """Take the checkpoint of this step off the run's logged models: its files are gone."""
        model = ask(self._client, lambda: self._find_checkpoint(step))
        if model is not None:
            ask(self._client, lambda: self._client.delete_logged_model(model.model_id))

    def end(self, status: Status, wait_s: float = 10.0) -> None:
        """Set the final status; while the server is down, keep trying for `wait_s`, then raise ServerUnreachable."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise TrackingError(f"a run cannot end {status!r}: FINISHED, FAILED or KILLED")
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return ask(self._client, lambda: self._client.set_terminated(self.run_id, status))
            except ServerUnreachable:
                if time.monotonic() > deadline:
                    raise

    def _raw(self) -> Any:
        return ask(self._client, lambda: self._client.get_run(self.run_id))

    def _find_checkpoint(self, step: int) -> Any | None:
        query = f"source_run_id = '{self.run_id}' AND tags.`{CHECKPOINT_TAG}` = '{step}'"
        found = self._client.search_logged_models([self.experiment_id], filter_string=query, max_results=1)
        return found[0] if found else None

    def _link(self, model_id: str, step: int) -> None:
        """Make the model an output of the run; MLflow fails with a database error on a second time."""
        from mlflow.entities import LoggedModelOutput

        outputs = self._raw().outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            ask(self._client, lambda: self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)]))

    def _log_model_metrics(self, model_id: str, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [
            Metric(metric_name(k), float(v), now_ms, step, model_id=model_id, run_id=self.run_id)
            for k, v in metrics.items()
        ]
        self._log_batches("metrics", rows, MAX_BATCH)

    def _log_batches(self, kind: Literal["metrics", "params", "tags"], items: Sequence[Any], size: int) -> None:
        for start in range(0, len(items), size):
            batch = {kind: items[start : start + size]}
            ask(self._client, partial(self._client.log_batch, self.run_id, **batch))


def _experiment_id(client: Any, name: str) -> str:
    found = create_once(
        client, find=lambda: client.get_experiment_by_name(name), create=lambda: client.create_experiment(name)
    )
    if found.lifecycle_stage != "active":
        raise TrackingError(f"experiment {name!r} is deleted: restore it in MLflow or use another name")
    return str(found.experiment_id)


def _find(client: Any, experiment_id: str, key: str) -> Any | None:
    """Return the oldest run of this key, so that everybody who searches settles on the same one."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", order_by=["start_time ASC"])
    return found[0] if found else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts under dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(key: str) -> str:
    return metric_name(str(key))


def _clipped(value: Any, limit: int) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    note = f" … [{len(text)} characters in all]"
    return text if len(text) <= limit else text[: limit - len(note)] + note
