"""What a version in the registry tells of its model: tags from the manifest, and the card."""

import json
from pathlib import Path

from cluster import stored_weights
from tracking.manifest import FILE_NAME, ModelManifest, read

_MOST_CHARS = 4_800
"""MLflow's table holds 5,000."""
_CUT = "\n\n… (the rest is in README.md beside the weights)"


def of_folder(directory: Path) -> dict[str, str]:
    """Return what a model's `tandem.json` says of it; nothing where there is none."""
    if not (directory / FILE_NAME).exists():
        return {}
    manifest, stored = read(directory), stored_weights.read(directory)
    elsewhere = stored.files.items() if stored is not None else ()
    return _tags_of(manifest, sum(file.bytes for name, file in elsewhere if name not in manifest.files))


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
