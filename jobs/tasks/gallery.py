"""Who is enrolled with a model of image embeddings: `gallery.json` beside its weights (`python -m jobs.enrol`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.tasks import TaskError

FILE = "gallery.json"
MANIFEST = "tandem.json"
"""The model's contract (tracking/manifest.py), whose figures of the last evaluation hold the best threshold."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Gallery:
    """A vector for each identity."""

    identities: Sequence[str]
    vectors: np.ndarray
    """(identities, E) fp32, of length 1."""
    threshold: float | None = None
    """From which similarity on somebody is known, where that was chosen with the gallery."""

    @classmethod
    def of(cls, identities: Sequence[str], vectors: np.ndarray, threshold: float | None = None) -> Gallery:
        """Enrol the mean vector of each identity, of vectors (N, E) and the identities of the images they are of."""
        known = list(dict.fromkeys(identities))
        named = np.array(identities)
        means = np.stack([vectors[named == identity].mean(0) for identity in known])
        lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return cls(known, (means / lengths).astype(np.float32), threshold)

    @classmethod
    def read(cls, directory: Path) -> Gallery | None:
        """Read the gallery of a model directory; None where it has none. Raises TaskError for one that is broken."""
        path = directory / FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            enrolled, threshold = found["identities"], found["threshold"]
            return cls(list(enrolled), np.array(list(enrolled.values()), dtype=np.float32), threshold)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise TaskError(f"{path} is no gallery: {error}; make it with python -m jobs.enrol") from error

    def write(self, directory: Path) -> None:
        """Write gallery.json."""
        enrolled = dict(zip(self.identities, self.vectors.tolist(), strict=True))
        content = {"identities": enrolled, "threshold": self.threshold}
        (directory / FILE).write_text(json.dumps(content), encoding="utf-8")

    def identified(self, vectors: np.ndarray, threshold: float) -> list[dict[str, Any]]:
        """Return for each of vectors (B, E): the vector, the identity it is most like, and how much that is.

        One that is less like everybody than the threshold is of nobody known; nobody is enrolled: the score is -1.
        """
        if not self.identities:
            return [{"embedding": vector, "identity": UNKNOWN, "score": -1.0} for vector in vectors]
        alike = vectors @ self.vectors.T
        answers = []
        for vector, row in zip(vectors, alike, strict=True):
            best = int(row.argmax())
            identity = self.identities[best] if row[best] >= threshold else UNKNOWN
            answers.append({"embedding": vector, "identity": identity, "score": float(row[best])})
        return answers


def threshold_of(directory: Path, name: str, default: float) -> float:
    """Return the threshold, of that name, that was best on the held-out images, as the model's contract has it.

    Where nothing was held out, or the directory is none that a job exported, the default.
    """
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["evaluation"][name]
    except (OSError, ValueError, LookupError, TypeError):
        return default
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else default


def described(threshold: float, identity_threshold: float) -> list[dict[str, Any]]:
    """Describe what `ImageEmbedding.predict` answers, as in the Open Inference Protocol.

    Args:
        threshold: from which similarity on two images are of one identity.
        identity_threshold: from which on an image is of the identity that it is most like.
    """
    compared = {"with": "other"}
    return [
        {"name": "embedding", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "identity", "datatype": "BYTES", "shape": [-1], "parameters": {"threshold": identity_threshold}},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
        {"name": "similarity", "datatype": "FP32", "shape": [-1], "parameters": compared},
        {"name": "same", "datatype": "BOOL", "shape": [-1], "parameters": {**compared, "threshold": threshold}},
    ]
