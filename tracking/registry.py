"""Model versions by reference: a name and an alias lead to a local directory, and nothing is uploaded.

MLflow's server refuses a path or a `file:` URI as a version's source unless it lies in the run's own artifact folder,
which is on the server. It keeps sources of schemes it does not know as they are, so versions carry `dir:///abs/path`;
or, for a model in a store, its URI (tracking/model_store.py), and in a tag the digest of what is there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from cluster import store_uri, stored_weights, stores
from cluster.names import check_alias, check_name, suggest
from tracking import model_folder, model_store, version_tags
from tracking.client import ask, connect, create_once
from tracking.errors import Refused, TrackingError
from tracking.manifest import FILE_NAME, read

_SCHEME = "dir"
_REFUSED = ("hdfs", "viewfs")
"""Schemes of stores that MLflow's server refuses; a version's source has `tandem+` before them."""
_FOREIGN = "tandem+"
_KEY_TAG = "tandem.registration"
_FOLDER_TAG = "tandem.folder"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    uri: str
    """For example `models:/stdlib-lm/3`."""
    source: str
    """Where its files are: `dir:///abs/path`, the URI of a folder in a store, or what another tool registered."""
    run_id: str | None = None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    created_at_ms: int = 0

    @property
    def stored(self) -> tuple[str, str] | None:
        """The URI of its folder in a store and the digest of that; None for any other."""
        uri, digest = self.source.removeprefix(_FOREIGN), self.tags.get(_FOLDER_TAG)
        return (uri, digest) if digest and store_uri.is_store(uri) else None

    @property
    def directory(self) -> Path:
        """The model's directory; raises TrackingError for a version in a store, and one that another tool put there."""
        if self.stored is not None:
            raise TrackingError(f"{self.uri} lies in a store, at {stores.shown(self.source)}: `resolve` fetches it")
        parts = urlsplit(self.source)
        if parts.scheme not in (_SCHEME, "file", ""):
            raise TrackingError(
                f"{self.uri} lies at {stores.shown(self.source)}, as another tool says: put its files there with "
                "`tandem tracking upload`, or into a directory, and register that with Tandem"
            )
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
    directory: Path | str,
    *,
    run_id: str | None,
    alias: str | None = None,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
) -> ModelVersion:
    """Make a model the next version of model `name`; the same files and run again give the same version.

    Task, size, evaluation and quantisation are copied from its `tandem.json` into the version's tags, and its card
    (README.md) into the version's description.

    Args:
        directory: the model's folder, or the URI where `model_store.put` has put it: its small files are fetched.
    """
    check_name("model name", name)
    source, folder, digest = _place(directory)
    client = connect(tracking_uri)
    key = _registration_key(f"{source}#{digest}" if digest else str(folder), run_id)
    all_tags = {
        **version_tags.of_folder(folder),
        **(tags or {}),
        _KEY_TAG: key,
        **({_FOLDER_TAG: digest} if digest else {}),
    }
    _ensure_model(client, name)
    found = create_once(
        client,
        find=lambda: _find(client, name, all_tags[_KEY_TAG]),
        create=lambda: client.create_model_version(
            name,
            source,
            run_id=run_id,
            tags=all_tags,
            description=version_tags.description_of(folder),
            await_creation_for=0,
        ),
    )
    if alias is None:
        return _version(client, name, int(found.version))
    return promote(name, int(found.version), alias, tracking_uri)


def resolve(uri: str, tracking_uri: str | None = None) -> Path:
    """Return the directory behind `models:/name/3`, `models:/name@alias`, `models:/name` (newest) or a plain path.

    A model in a store, a version's or a plain URI, is fetched once a node, but for its weights.
    """
    if not uri.startswith("models:/"):
        return model_store.fetched(uri) if store_uri.is_store(uri) else _existing(Path(uri))
    version = find_version(uri, tracking_uri)
    if version.stored is not None:
        return model_store.fetched(*version.stored)
    if not version.directory.is_dir():
        raise TrackingError(
            f"{uri} is version {version.version}, in {version.directory}, which this machine does not have: "
            "mount that storage here or register the model from a directory that is shared"
        )
    return version.directory


def located(source: str, base: Path) -> str:
    """Return what `resolve` takes of what a user or a manifest names: only paths start at `base`. Pure."""
    elsewhere = source.startswith("models:/") or store_uri.is_store(source)
    return source if elsewhere else str(base / Path(source).expanduser())


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

    Raises TrackingError, and moves nothing, when the version's files are on this machine or in a store, and not what
    they were; or, where it holds adapters alone, the model that they were trained on.
    """
    check_alias(alias)
    client = connect(tracking_uri)
    found = _version(client, name, version)
    if found.stored is not None:
        _verify(model_store.verify(*found.stored))
    elif found.source.startswith(f"{_SCHEME}:") and (found.directory / FILE_NAME).exists():
        _verify(found.directory)
        stored_weights.verify(found.directory)
    ask(client, lambda: client.set_registered_model_alias(name, alias, str(version)))
    return _version(client, name, version)


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise TrackingError(f"no model directory at {directory.absolute()}")
    return directory.resolve()


def _place(model: Path | str) -> tuple[str, Path, str | None]:
    """Return a version's source, the model's folder on this machine, and the digest of one in a store."""
    reference = model if isinstance(model, str) else model_store.portable(model)
    if not store_uri.is_store(reference):
        directory = _existing(Path(reference))
        return f"{_SCHEME}://{quote(directory.as_posix())}", directory, None
    folder = model_store.here(reference)
    uri, _, digest = model_store.portable(folder).partition("#")
    return f"{_FOREIGN if uri.partition(':')[0] in _REFUSED else ''}{uri}", folder, digest


def _registration_key(place: str, run_id: str | None) -> str:
    return hashlib.sha256(f"{place}\n{run_id}".encode()).hexdigest()[:32]


def _verify(directory: Path) -> None:
    """Read a model's files on this machine, and the base's where it is adapters alone."""
    if (directory / FILE_NAME).exists():
        read(directory, verify=True)
        model_folder.check_base(directory)


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
