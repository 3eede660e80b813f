"""Model versions by reference: a name and an alias lead to a local directory, and nothing is uploaded.

MLflow's server refuses a path or a `file:` URI as a version's source unless it lies in the run's own artifact folder,
which is on the server. It keeps sources of schemes it does not know as they are, so versions carry `dir:///abs/path`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from cluster import stored_weights
from cluster.names import check_alias, check_name, suggest
from tracking import model_folder
from tracking.client import ask, connect, create_once
from tracking.errors import Refused, TrackingError
from tracking.manifest import FILE_NAME, ModelManifest, read

_SCHEME = "dir"
_KEY_TAG = "tandem.registration"
_MOST_CHARS = 4_800
"""MLflow's table holds 5,000."""
_CUT = "\n\n… (the rest is in README.md beside the weights)"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    uri: str
    """For example `models:/stdlib-lm/3`."""
    source: str
    """Where its files are: `dir:///abs/path`, or what another tool registered."""
    run_id: str | None = None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    created_at_ms: int = 0

    @property
    def directory(self) -> Path:
        """The model's directory; raises TrackingError for a version that another tool put elsewhere."""
        parts = urlsplit(self.source)
        if parts.scheme not in (_SCHEME, "file", ""):
            raise TrackingError(f"{self.uri} lies at {self.source}, which is no directory: register it with Tandem")
        return Path(unquote(parts.path))

    @property
    def size_bytes(self) -> int:
        """Size of the model's files when it was registered; 0 if it had no manifest."""
        return int(self.tags.get("tandem.bytes", 0))

    @property
    def evaluation(self) -> dict[str, float]:
        """The evaluation in the model's manifest when it was registered."""
        return dict(json.loads(self.tags.get("tandem.evaluation", "{}")))

    @property
    def quantization(self) -> str | None:
        """The quantisation method, or None for full precision."""
        return self.tags.get("tandem.quantization")

    @property
    def base(self) -> str | None:
        """What a version of adapters alone has to be put on; None for a whole model."""
        return self.tags.get("tandem.base")


def register(
    name: str,
    directory: Path,
    *,
    run_id: str | None,
    alias: str | None = None,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
) -> ModelVersion:
    """Make `directory` the next version of model `name`; the same directory and run again give the same version.

    Task, size, evaluation and quantisation are copied from its `tandem.json` into the version's tags, and its card
    (README.md) into the version's description.
    """
    check_name("model name", name)
    directory = _existing(directory)
    client = connect(tracking_uri)
    all_tags = {**_manifest_tags(directory), **(tags or {}), _KEY_TAG: _registration_key(directory, run_id)}
    _ensure_model(client, name)
    found = create_once(
        client,
        find=lambda: _find(client, name, all_tags[_KEY_TAG]),
        create=lambda: client.create_model_version(
            name,
            _source(directory),
            run_id=run_id,
            tags=all_tags,
            description=description_of(directory),
            await_creation_for=0,
        ),
    )
    if alias is None:
        return _version(client, name, int(found.version))
    return promote(name, int(found.version), alias, tracking_uri)


def resolve(uri: str, tracking_uri: str | None = None) -> Path:
    """Return the directory behind `models:/name/3`, `models:/name@alias`, `models:/name` (newest) or a plain path."""
    if not uri.startswith("models:/"):
        return _existing(Path(uri))
    version = find_version(uri, tracking_uri)
    if not version.directory.is_dir():
        raise TrackingError(
            f"{uri} is version {version.version}, in {version.directory}, which this machine does not have: "
            "mount that storage here or register the model from a directory that is shared"
        )
    return version.directory


def find_version(uri: str, tracking_uri: str | None = None) -> ModelVersion:
    """Return the version that a `models:/` URI means, wherever its files are."""
    name, version, alias = parse(uri)
    client = connect(tracking_uri)
    if alias:
        return _version(client, name, _aliased(client, name, alias))
    if version:
        return _version(client, name, version)
    return _newest(client, name)


def parse(uri: str) -> tuple[str, int | None, str | None]:
    """Split a `models:/` URI into name, version and alias: one of the latter, or none for the newest version."""
    rest = uri.removeprefix("models:/").strip("/")
    name, _, alias = rest.partition("@")
    name, _, version = name.partition("/")
    check_name("model name", name)
    if alias and not version:
        return name, None, check_alias(alias)
    if not version or version == "latest":
        return name, None, None
    if alias or not version.isdecimal():
        raise TrackingError(f"{uri!r} is no model URI: use models:/{name}/3, models:/{name}@alias or models:/{name}")
    return name, int(version), None


def versions(name: str | None = None, tracking_uri: str | None = None) -> list[ModelVersion]:
    """Return all versions of one model, or of all, newest first."""
    client = connect(tracking_uri)
    if name is not None:
        _model(client, name)
    aliases = {model.name: model.aliases for model in _all_models(client)}
    found = _pages(client, lambda token: client.search_model_versions(_by_name(name), page_token=token))
    listed = [_from_mlflow(raw, aliases.get(raw.name, {})) for raw in found]
    return sorted(listed, key=lambda v: (v.name, -v.version))


def models(tracking_uri: str | None = None) -> list[str]:
    """Return the names of all registered models."""
    return sorted(model.name for model in _all_models(connect(tracking_uri)))


def promote(name: str, version: int, alias: str, tracking_uri: str | None = None) -> ModelVersion:
    """Make `alias` mean this version of the model; endpoints that name it follow at their next `up`.

    Raises TrackingError, and moves nothing, when the version's files are on this machine and not what they were; or,
    where it holds adapters alone, the model that they were trained on.
    """
    check_alias(alias)
    client = connect(tracking_uri)
    found = _version(client, name, version)
    if found.source.startswith(f"{_SCHEME}:") and (found.directory / FILE_NAME).exists():
        read(found.directory, verify=True)
        model_folder.check_base(found.directory)
        stored_weights.verify(found.directory)
    ask(client, lambda: client.set_registered_model_alias(name, alias, str(version)))
    return _version(client, name, version)


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise TrackingError(f"no model directory at {directory.absolute()}")
    return directory.resolve()


def _source(directory: Path) -> str:
    return f"{_SCHEME}://{quote(directory.as_posix())}"


def _registration_key(directory: Path, run_id: str | None) -> str:
    return hashlib.sha256(f"{directory}\n{run_id}".encode()).hexdigest()[:32]


def _manifest_tags(directory: Path) -> dict[str, str]:
    if not (directory / FILE_NAME).exists():
        return {}
    return _tags_of(read(directory), stored_weights.size(directory))


def _tags_of(manifest: ModelManifest, stored_bytes: int) -> dict[str, str]:
    tags = {
        "tandem.task": manifest.task,
        "tandem.architecture": manifest.architecture,
        "tandem.bytes": str(stored_bytes + sum(file.bytes for file in manifest.files.values())),
        "tandem.evaluation": json.dumps(manifest.evaluation),
    }
    if manifest.quantization:
        tags["tandem.quantization"] = str(manifest.quantization.get("method", "unnamed"))
    if manifest.parent:
        tags["tandem.parent"] = manifest.parent
    if manifest.base:
        tags["tandem.base"] = manifest.base.reference
    return tags


def description_of(directory: Path) -> str | None:
    """Return the model's card without the head that hubs read, as much of it as MLflow's table takes."""
    path = directory / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2].lstrip()
    return text if len(text) <= _MOST_CHARS else text[:_MOST_CHARS] + _CUT


def _ensure_model(client: Any, name: str) -> None:
    create_once(client, lambda: _model_or_none(client, name), lambda: client.create_registered_model(name))


def _find(client: Any, name: str, key: str) -> Any | None:
    """Return the oldest version with this registration key, so that everybody settles on the same one."""
    found = client.search_model_versions(f"{_by_name(name)} AND tags.`{_KEY_TAG}` = '{key}'")
    return min(found, key=lambda raw: int(raw.version), default=None)


def _by_name(name: str | None) -> str | None:
    return None if name is None else f"name = '{name}'"


def _version(client: Any, name: str, version: int) -> ModelVersion:
    model = _model(client, name)
    try:
        return _from_mlflow(ask(client, lambda: client.get_model_version(name, str(version))), model.aliases)
    except Refused as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        newest = _newest(client, name).version
        raise TrackingError(f"model {name!r} has no version {version}: the newest is {newest}") from error


def _newest(client: Any, name: str) -> ModelVersion:
    model = _model(client, name)
    order = ["version_number DESC"]
    found = ask(client, lambda: client.search_model_versions(_by_name(name), max_results=1, order_by=order))
    if not found:
        raise TrackingError(f"model {name!r} has no versions: register one with a job's `register` section")
    return _from_mlflow(found[0], model.aliases)


def _aliased(client: Any, name: str, alias: str) -> int:
    aliases = _model(client, name).aliases
    if alias not in aliases:
        raise TrackingError(
            f"model {name!r} has no alias {alias!r}: {suggest(alias, aliases)} "
            f"(set one with `tandem tracking promote {name} VERSION --alias {alias}`)"
        )
    return int(aliases[alias])


def _model(client: Any, name: str) -> Any:
    check_name("model name", name)
    found = ask(client, lambda: _model_or_none(client, name))
    if found is None:
        known = [model.name for model in _all_models(client)]
        raise TrackingError(f"no registered model {name!r}: {suggest(name, known)}")
    return found


def _model_or_none(client: Any, name: str) -> Any | None:
    found = client.search_registered_models(_by_name(name))
    return found[0] if found else None


def _all_models(client: Any) -> list[Any]:
    return _pages(client, lambda token: client.search_registered_models(page_token=token))


def _pages(client: Any, page: Callable[[str | None], Any]) -> list[Any]:
    """Return the items of all pages of a search."""
    found: list[Any] = []
    token = None
    while True:
        batch = ask(client, partial(page, token))
        found.extend(batch)
        token = batch.token
        if not token:
            return found


def _from_mlflow(raw: Any, aliases: Mapping[str, str]) -> ModelVersion:
    return ModelVersion(
        name=raw.name,
        version=int(raw.version),
        uri=f"models:/{raw.name}/{raw.version}",
        source=raw.source,
        run_id=raw.run_id or None,
        aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(raw.version))),
        tags=dict(raw.tags),
        created_at_ms=int(raw.creation_timestamp),
    )
