"""Task `image-embedding`: a vector for each image, near to those of the same identity: faces, products, signatures.

Rows: pixels (N, H, W, C) uint8 or uint16, label (N,) int32, the number of the identity or -1 for one that training has
not seen, identity (N,) int64, a hash of its name, targets (N,) int32, all ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions, verification
from jobs.tasks.augmentation import AugmentationOptions, augmented
from jobs.tasks.finite import finite
from jobs.tasks.gallery import UNKNOWN, Gallery, described, threshold_of
from jobs.tasks.image_task import ImageOptions, on_device
from jobs.tasks.images import COUNTED, counts, read_picture, sent_picture
from jobs.tasks.labelled_images import ImageFindings, LabelledImages
from jobs.tasks.labels import check_columns, chosen, natural, said_of
from jobs.tasks.own_networks import OwnNetworks

if TYPE_CHECKING:
    import torch

SCALE_IS_ARCFACES = "scale is what loss arcface multiplies cosines with: with triplet it has no effect"
SCALE = 16.0
MARGINS = {"arcface": 0.5, "triplet": 0.3}


class ImageEmbeddingOptions(ImageOptions, AugmentationOptions):
    """How images become pixels, how they are changed at random in training, and by which loss they are told apart."""

    label_column: Text = "label"
    """The column that holds the identity."""
    loss: Literal["arcface", "triplet"] | None = None
    """arcface: the angle to a centre that each identity of the training data has. triplet: distances to the farthest
    image of the same identity and the nearest of another, within the micro-batch of each worker. Left out: arcface, or
    the loss of the model that the job starts from, with its margin and scale."""
    margin: float | None = Field(None, ge=0, lt=1.5)
    """Of arcface, an angle in radians (left out: 0.5); of triplet, a distance between vectors of length 1 (0.3)."""
    scale: float | None = Field(None, gt=0)
    """What arcface multiplies cosines with; 16 where it is left out."""

    @model_validator(mode="after")
    def _columns_differ(self) -> ImageEmbeddingOptions:
        if self.loss == "triplet" and self.scale is not None:
            raise ValueError(SCALE_IS_ARCFACES)
        return check_columns(self, "image_column", "label_column")


class ImageEmbedding(OwnNetworks, LabelledImages):
    """A vector of length 1 for each image; whether two images show one identity; whose of the enrolled it is.

    Two images are taken for one identity from a similarity on that was best on the held-out images; it is only as good
    for others as these are like them. Without a gallery (python -m jobs.enrol), the identities of the training data
    are those that are known; others are "unknown" where they are less similar than that.
    """

    name: ClassVar[str] = "image-embedding"
    Options: ClassVar[type[TaskOptions]] = ImageEmbeddingOptions
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "auc": "max",
        "verification_accuracy": "max",
        "recall_at_1": "max",
    }
    gathered: ClassVar[tuple[str, ...]] = ("embedding", "identity", "to_centres")
    loss_terms: ClassVar[str] = "known"
    counted: ClassVar[Mapping[str, str]] = {
        **COUNTED,
        "unseen": "images are of identities that training has not seen: measured in pairs, without arcface's loss",
    }
    networks: ClassVar[Mapping[str, str]] = {
        "embedding-cnn": "jobs.tasks.embedding_networks:EmbeddingCnn",
        "embedding-vit": "jobs.tasks.embedding_networks:EmbeddingVit",
    }

    options: ImageEmbeddingOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.identities: list[str] = []
        self.objective = self._asked({"loss": "arcface"})
        self.gallery: Gallery | None = None
        self.threshold = self.identity_threshold = 0.5

    # -- data -------------------------------------------------------------------------------------------------------

    def fit(self, findings: ImageFindings) -> list[str]:
        """Number the identities; learn the size and the mean and deviation of the pixels per channel.

        Raises:
            TaskError: there are fewer than two identities.
        """
        self.identities = sorted(findings.labels, key=natural)
        if len(self.identities) < 2:
            raise TaskError(f"the training images are of {self.identities}: to tell identities apart takes two")
        if UNKNOWN in self.identities:
            raise TaskError(f"an identity cannot be called {UNKNOWN!r}: that is what is answered of strangers")
        labels = [said.replace("labels", "identities", 1) for said in said_of(self.identities, findings.kinds)]
        return [*labels, *self._learn_pixels(findings.pixels), *self._said_of_triplets()]

    def inherited(self) -> list[str]:
        """Say that a gallery stays behind: its vectors are of the parent's weights."""
        if self.gallery is None:
            return self._said_of_triplets()
        count = len(self.gallery.identities)
        return [f"the parent's gallery of {count} identities is left out: enrol them again", *self._said_of_triplets()]

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Resize to the fitted size, pixels (N, H, W, C) uint8 or uint16; number the identities."""
        index = {identity: number for number, identity in enumerate(self.identities)}
        identities = [self._label(example) for example in examples]
        label = np.array([index.get(identity, -1) for identity in identities], dtype=np.int32)
        pictures = [read_picture(self._image(example)) for example in examples]
        return {
            "pixels": self._pixels(pictures),
            "label": label,
            "identity": np.array([_hash(identity) for identity in identities], dtype=np.int64),
            "targets": np.ones(len(label), dtype=np.int32),
            "unseen": (label < 0).astype(np.int32),
            **counts(pictures, self.size, self.channels, self.bits),
        }

    def collate(self, rows: Columns) -> Batch:
        """Return pixel_values (B, C, H, W) fp32, normalised, labels and identity (B,) int64.

        Args:
            rows: pixels (B, H, W, C) uint8 or uint16, label (B,) int32, identity (B,) int64.
        """
        import torch

        labels, identity = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("label", "identity"))
        return {"pixel_values": self._normalise(rows["pixels"]), "labels": labels, "identity": identity}

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return the number of channels and of identities, and the images' size."""
        return self._decided(self.channels, len(self.identities), self.size)

    def placeholders(self) -> dict[str, Any]:
        """Return the same for images that are not known yet."""
        side = self.options.image_size or 512
        return self._decided(self.options.channels or 1, 2, (side, side))

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss over the images, a scalar fp32; and their number, a scalar int64.

        Args:
            batch: as `collate` makes it; the images are changed at random where the model is in training.

        Raises:
            TaskError: an image to be trained on has an identity without a centre, which arcface cannot learn.
        """
        import torch

        from jobs.tasks import metric_learning

        pixels, labels = batch["pixel_values"], batch["labels"]
        vectors, centres = self._vectors(model, augmented(pixels, self.options) if model.training else pixels)
        count = torch.full((), len(labels), device=vectors.device)
        if self.objective["loss"] == "triplet":
            each = metric_learning.triplets(vectors, batch["identity"], self._margin)
            return each.sum() + 0 * centres.sum(), count  # every weight takes part in the backward pass
        if model.training and bool((labels < 0).any()):
            raise TaskError(
                f"a training image has an identity that is none of the parent's {len(self.identities)}: arcface has a "
                "centre for each identity it began with; train from scratch, or set task.loss: triplet"
            )
        return self._arcface(vectors, centres, labels).sum(), count

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return embedding (B, E) fp32, identity (B,) int64 and to_centres (B, 2) fp32, row by row; and sums, scalars.

        to_centres is how alike an image is to its own centre, -2 where it has none, and to the nearest other one. Sums
        are loss and known, arcface's loss and how many images have one (0 where the loss is of triplets); targets
        and margin, the number of images and the sum of their margins.
        """
        import torch

        from jobs.tasks import metric_learning

        labels = batch["labels"]
        vectors, centres = self._vectors(model, batch["pixel_values"])
        if self.objective["loss"] == "triplet":
            labels = torch.full_like(labels, -1)
        return {
            "loss": self._arcface(vectors, centres, labels).sum(),
            "known": (labels >= 0).sum(),
            "targets": torch.full((), len(labels), device=vectors.device),
            "margin": torch.tensor(len(labels) * self._margin, device=vectors.device),
            "embedding": vectors,
            "identity": batch["identity"],
            "to_centres": metric_learning.to_centres(vectors, centres, labels),
        }

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the loss, and of the pairs of all rows auc, verification_accuracy, recall_at_1 and the threshold.

        The loss is arcface's over images of known identities; where none is known, and with triplets, that of triplets
        over all rows. What the rows have no pairs for is left out.
        """
        return verification.summary(sums)

    def verdict(self, metrics: Mapping[str, float]) -> list[str]:
        """Say which of the two thresholds is not measured, so that what is answered by it is a guess."""
        arcface = self.objective["loss"] == "arcface"
        answers = {"threshold": "same", **({"identity_threshold": "identity"} if arcface else {})}
        missing = [name for name in answers if name not in metrics]
        if not missing:
            return []
        named = " and ".join(f"{name} (of the answer `{answers[name]}`)" for name in missing)
        return [
            f"{named} could not be measured: held-out images of one identity and of two are needed "
            "(data.eval_fraction, data.eval); a model that is exported with this evaluation answers by a similarity of "
            f"{self.threshold:g}, "
            "for which nothing speaks"
        ]

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw the ROC and how alike pairs are."""
        return verification.pictures(verification.Pairs.of(sums["embedding"], sums["identity"]))

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the image as pixels, alone."""
        return {"image": super().instance(example)}

    def vectors(self, model: torch.nn.Module, images: Sequence[Any]) -> np.ndarray:
        """Return the vectors (N, E) fp32 of images as a client sends them. Raises TaskError for what is no image."""
        import torch

        pixels = self._pixels([sent_picture(image) for image in images])
        with torch.inference_mode():
            found: np.ndarray = finite(self._vectors(model, self._normalise(pixels))[0]).cpu().numpy()
        return found

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer with an image's vector and the identity it is most like; with `other`, whether both show the same.

        Raises:
            TaskError: what should be an image is neither an array (H, W) or (H, W, C) nor the bytes of a file.
        """
        vectors = self.vectors(model, [instance["image"] for instance in instances])
        asked = [number for number, instance in enumerate(instances) if "other" in instance]
        others = self.vectors(model, [instances[number]["other"] for number in asked]) if asked else ()
        limit = self.threshold if self.gallery else self.identity_threshold
        answers = (self.gallery or self._trained(model)).identified(vectors, limit)
        for number, other in zip(asked, others, strict=True):
            similarity = float(vectors[number] @ other)
            answers[number] |= {"similarity": similarity, "same": similarity >= self.threshold}
        return answers

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the image, and the other one that it may be compared with."""
        other = self._input("other")
        return [self._input("image"), {**other, "parameters": {**other["parameters"], "optional": True}}]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the vector, the identity and its similarity; similarity and same come where `other` was sent."""
        return (
            []
            if self.answers_otherwise(ImageEmbedding)
            else described(self.threshold, self.threshold if self.gallery else self.identity_threshold)
        )

    def rows_meet(self) -> str:
        """Return that triplets are made within a micro-batch, where they are."""
        return "triplets are sought within a micro-batch" if self.objective["loss"] == "triplet" else ""

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _margin(self) -> float:
        margin = self.objective["margin"]
        return MARGINS[self.objective["loss"]] if margin is None else float(margin)

    def _said_of_triplets(self) -> list[str]:
        if self.objective["loss"] != "triplet":
            return []
        return [
            "triplets are sought within each worker's micro-batch: the loss depends on its size and on the number of "
            "workers, and an image that has no other one of its identity there has none"
        ]

    @staticmethod
    def _decided(channels: int, identities: int, size: tuple[int, int]) -> dict[str, Any]:
        known = {"num_channels": channels, "identities": identities}
        return {**known, "image_height": size[0], "image_width": size[1]}

    def _vectors(self, model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vectors (B, E) and centres (identities, E), fp32, of length 1."""
        vectors, centres = model(pixel_values=on_device(pixels, model))
        return vectors, centres

    def _arcface(self, vectors: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from jobs.tasks import metric_learning

        return metric_learning.arcface(vectors, centres, labels, self._margin, self.objective["scale"])

    def _trained(self, model: torch.nn.Module) -> Gallery:
        """Return who is known where nobody is enrolled: the identities of the training data, by their centres."""
        if self.objective["loss"] == "triplet":  # its centres have learned nothing
            return Gallery([], np.zeros((0, 1), dtype=np.float32))
        centres: torch.Tensor = model.centres()  # type: ignore[operator]
        return Gallery(self.identities, centres.detach().cpu().numpy())

    def _asked(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the loss with its margin and scale: as the options say, else as before where the loss is the same."""
        given = self.options
        loss = chosen(given.loss, before["loss"])
        kept = before if loss == before["loss"] else {}
        margin, scale = chosen(given.margin, kept.get("margin")), chosen(given.scale, kept.get("scale", SCALE))
        return {"loss": loss, "margin": margin, "scale": scale}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "identities": self.identities, "objective": self.objective}

    def _take(self, settings: Mapping[str, Any]) -> None:
        super()._take(settings)
        self.identities = settings["identities"]
        self.objective = self._asked(settings["objective"])
        if self.objective["loss"] == "triplet" and self.options.scale is not None:
            raise TaskError(f"task.{SCALE_IS_ARCFACES}, which the model that the job starts from has")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> ImageEmbedding:
        """Read what `save` wrote, who is enrolled, and from which similarity on two images are one identity's."""
        task = super().load(directory, options)
        task.gallery = Gallery.read(Path(directory))
        task.threshold = threshold_of(directory, "threshold", task.threshold)
        task.identity_threshold = threshold_of(directory, "identity_threshold", task.identity_threshold)
        if task.gallery is not None and task.gallery.threshold is not None:
            task.threshold = task.gallery.threshold
        return task


def _hash(identity: str) -> int:
    """Return 64 bits that tell identities apart, also those that training has not seen."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little", signed=True)
