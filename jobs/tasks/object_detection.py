"""Task `object-detection`: which objects are in an image, and where.

Rows: pixels (N, H, W, C) uint8 or uint16; boxes (N, M, 4) fp32, corners x1, y1, x2, y2 as shares of the image's sides;
label (N, M) int32, -1 where there is no object; crowd (N, M) uint8; size (N, 2) int32, the image's own height and
width; targets (N,) int32, all ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions, detection_scores
from jobs.tasks.boxes import READ, Object, entries_of, in_pixels, inside, mirrored, objects_of
from jobs.tasks.detectors import Detectors, look
from jobs.tasks.finite import finite
from jobs.tasks.image_task import ImageOptions, ImageTask, PixelFindings
from jobs.tasks.images import COUNTED, counts, read_picture, sent_picture
from jobs.tasks.labelled_images import ImageFindings
from jobs.tasks.labels import check_columns, chosen, column_of, kind_of, natural, said_of, unknown_of

if TYPE_CHECKING:
    import torch


SCORE_THRESHOLD, MAX_DETECTIONS = 0.3, 100


class ObjectDetectionOptions(ImageOptions):
    """How images and their objects become rows, and what of what is found is answered."""

    objects_column: Text = "objects"
    """The column that holds the objects of an image: a list of mappings with bbox, [x, y, width, height] in pixels, and
    category. A COCO file has it."""
    max_objects: int = Field(100, gt=0, le=10_000)
    """An image with more objects than this is a bad row."""
    max_detections: int | None = Field(None, gt=0, le=1000)
    """So many guesses for an image are measured, and answered at most. Left out: 100, as COCO has it, or what the model
    that the job starts from has."""
    score_threshold: float | None = Field(None, ge=0, lt=1)
    """Guesses of a lower score are not answered; all are measured. Left out: 0.3, or what the model that the job starts
    from has."""
    flip: bool = False
    """Every second image is mirrored, left to right, in training."""

    @model_validator(mode="after")
    def _columns_differ(self) -> ObjectDetectionOptions:
        return check_columns(self, "image_column", "objects_column")


class ObjectDetection(Detectors, ImageTask):
    """The objects of an image: a category, a score and a box in pixels for each, of categories that training has seen.

    All images are brought to one size; what is only a few pixels large then is not found.
    """

    name: ClassVar[str] = "object-detection"
    version: ClassVar[int] = 2
    Options: ClassVar[type[TaskOptions]] = ObjectDetectionOptions
    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min", "mAP": "max", "mAP50": "max"}
    gathered: ClassVar[tuple[str, ...]] = ("found", "truths", "size", "thumbnail")
    counted: ClassVar[Mapping[str, str]] = {
        **COUNTED,
        "empty": "images hold no object",
        "repeated": "images hold an object twice, with one box and one category: each counts, and one cannot be found",
        "crowded": "images hold crowds: nothing is learned of what is in them",
    }

    options: ObjectDetectionOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.categories: list[str] = []
        self.score_threshold: float = chosen(self.options.score_threshold, SCORE_THRESHOLD)
        self.max_detections: int = chosen(self.options.max_detections, MAX_DETECTIONS)

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without an image or with an object that cannot be."""
        self._image(example)
        self._objects(example)

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return the objects, as JSON, in whatever order they stand."""
        return json.dumps(sorted([*found.box, found.category, found.crowd] for found in self._objects(example)))

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are not read, and what of the objects is not."""
        column = self.options.objects_column
        read = {self.options.image_column, column, "width", "height"}
        other = [key for key, value in example.items() if key not in read and value is not None]
        keys = {key for entry in self._entries(example) for key in entry} - READ
        return [*other, *(f"{column}.{key}" for key in sorted(keys))]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> ImageFindings:
        """Note the categories, the first image's size, and exact sums of all pixels."""
        pixels = PixelFindings.of([read_picture(self._image(each)).pixels for each in examples], self.options)
        entries = [entry for each in examples for entry in self._entries(each)]
        kinds = frozenset(kind_of(entry["category"]) for entry in entries)
        objects = [found for each in examples for found in self._objects(each)]
        return ImageFindings(pixels, frozenset(found.category for found in objects if not found.crowd), kinds)

    def fit(self, findings: ImageFindings) -> list[str]:
        """Number the categories; learn the size and the mean and deviation of the pixels per channel.

        Raises:
            TaskError: no training image holds an object.
        """
        self.categories = sorted(findings.labels, key=natural)
        if not self.categories:
            raise TaskError("none of the training images holds an object: there is nothing to be found")
        named = [said.replace("labels", "categories", 1) for said in said_of(self.categories, findings.kinds)]
        return [*named, *self._learn_pixels(findings.pixels)]

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Resize to the fitted size, pixels (N, H, W, C) uint8 or uint16; bring boxes to shares of the sides.

        Raises:
            TaskError: a box lies outside its image, a category is unknown, or there are more than max_objects.
        """
        pictures = [read_picture(self._image(example)) for example in examples]
        objects = [self._objects(example) for example in examples]
        labelled = [found.category for each in objects for found in each if not found.crowd]
        if (wrong := unknown_of(labelled, self.categories)) is not None:
            raise TaskError(wrong.replace("labels", "categories"))
        sizes = [(picture.pixels.shape[0], picture.pixels.shape[1]) for picture in pictures]
        rows = [self._row(*each) for each in zip(examples, objects, sizes, strict=True)]
        return {
            "pixels": self._pixels(pictures),
            **{name: np.stack([row[name] for row in rows]) for name in ("boxes", "label", "crowd")},
            "size": np.array(sizes, dtype=np.int32),
            "targets": np.ones(len(rows), dtype=np.int32),
            "empty": np.array([not each for each in objects], dtype=np.int32),
            "repeated": np.array([len({*each}) < len(each) for each in objects], dtype=np.int32),
            "crowded": np.array([any(found.crowd for found in each) for each in objects], dtype=np.int32),
            **counts(pictures, self.size, self.channels, self.bits),
        }

    def collate(self, rows: Columns) -> Batch:
        """Return pixel_values (B, C, H, W) fp32, normalised, and boxes, labels, crowd and size as rows have them.

        Args:
            rows: of B images, as `encode` makes them.
        """
        import torch

        return {
            "pixel_values": self._normalise(rows["pixels"]),
            "boxes": torch.from_numpy(rows["boxes"].astype(np.float32)),
            "labels": torch.from_numpy(rows["label"].astype(np.int64)),
            "crowd": torch.from_numpy(rows["crowd"].astype(bool)),
            "size": torch.from_numpy(rows["size"].astype(np.int64)),
        }

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return the number of channels and of categories."""
        return {"num_channels": self.channels, "categories": len(self.categories)}

    def placeholders(self) -> dict[str, Any]:
        """Return the same for images that are not known yet."""
        return {"num_channels": self.options.channels or 3, "categories": 1}

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss over the images, a scalar fp32; and their number, a scalar int64.

        Args:
            batch: as `collate` makes it; images are mirrored at random where the model is in training.
        """
        import torch

        pixels, boxes = batch["pixel_values"], batch["boxes"]
        if model.training and self.options.flip:
            pixels, boxes = mirrored(pixels, boxes)
        seen = look(model, pixels)
        if model.training:
            seen.check(batch["labels"], batch["crowd"])
        each = seen.loss(boxes, batch["labels"], batch["crowd"])
        return each.sum(), torch.full((), len(each), device=each.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the sums loss and targets (), and of each image what `detection_scores` reads, row by row.

        These are found (B, K, 6), truths (B, M, 6), size (B, 2), and the image itself, small: thumbnail (B, h, w, C)
        uint8.
        """
        import torch

        seen = look(model, batch["pixel_values"])
        labels, crowd, size = batch["labels"], batch["crowd"], batch["size"]
        each = seen.loss(batch["boxes"], labels, crowd)
        boxes, scores, guesses = seen.found(self.max_detections)
        of_truths = torch.stack([labels, crowd.long()], -1).float()
        return {
            "loss": each.sum(),
            "targets": torch.full((), len(each), device=each.device),
            "found": torch.cat([in_pixels(boxes, size), torch.stack([scores, guesses.float()], -1)], -1),
            "truths": torch.cat([in_pixels(batch["boxes"], size), of_truths], -1),
            "size": size,
            "thumbnail": detection_scores.thumbnails(batch["pixel_values"]),
        }

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return loss (per image) and COCO's mAP and mAP50, which are left out where there is nothing to be found."""
        return {
            "loss": sums["loss"] / max(sums["targets"], 1),
            **detection_scores.precision(sums["found"], sums["truths"]),
        }

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw what was found in the first images."""
        drawn = detection_scores.picture(
            sums["thumbnail"], sums["size"], sums["found"], sums["truths"], self.categories
        )
        return {"detections.png": drawn}

    # -- use --------------------------------------------------------------------------------------------------------

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Find the objects in images: arrays (H, W) or (H, W, C) of whole numbers, or the bytes of image files.

        Returns:
            For each, count, and detections: a list as JSON, the best first, of label, score and box, [x, y, width,
            height] in pixels of the image as it was sent.

        Raises:
            TaskError: anything else; a str is never opened, since it may come from a client.
        """
        import torch

        pictures = [sent_picture(instance) for instance in instances]
        size = torch.tensor([picture.pixels.shape[:2] for picture in pictures])
        with torch.inference_mode():
            seen = look(model, self._normalise(self._pixels(pictures)))
            boxes, scores, labels = seen.found(self.max_detections)
        rows = zip(in_pixels(finite(boxes).cpu(), size).tolist(), finite(scores).tolist(), labels.tolist(), strict=True)
        return [self._answer(*row) for row in rows]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the detections, a JSON list for each image, and their number."""
        if self.answers_otherwise(ObjectDetection):
            return []
        said = {"content_type": "json", "labels": self.categories, "threshold": self.score_threshold}
        return [
            {"name": "detections", "datatype": "BYTES", "shape": [-1], "parameters": said},
            {"name": "count", "datatype": "INT64", "shape": [-1]},
        ]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _answer(self, boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Any]:
        kept = [
            {"label": self.categories[label], "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for box, score, label in zip(boxes, scores, labels, strict=True)
            if score > 0 and score >= self.score_threshold
        ]
        return {"detections": json.dumps(kept), "count": len(kept)}

    def _objects(self, example: Mapping[str, Any]) -> list[Object]:
        column = self.options.objects_column
        return objects_of(column_of(example, column, "objects_column"), column)

    def _entries(self, example: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return entries_of(example[self.options.objects_column], self.options.objects_column)

    def _row(self, example: Mapping[str, Any], objects: list[Object], size: tuple[int, int]) -> Columns:
        """Return an image's boxes (M, 4), label (M,) and crowd (M,)."""
        height, width = size
        said = (example.get("height") or height, example.get("width") or width)
        if said != size:
            raise TaskError(
                f"the data says that the image is {said[1]} x {said[0]}, and it is {width} x {height}: the boxes "
                "are of another image, or of one that is not upright"
            )
        most = self.options.max_objects
        if len(objects) > most:
            raise TaskError(f"the image holds {len(objects)} objects, and task.max_objects is {most}")
        row = {
            "boxes": np.zeros((most, 4), dtype=np.float32),
            "label": np.full(most, -1, dtype=np.int32),
            "crowd": np.zeros(most, dtype=np.uint8),
        }
        at = {category: number for number, category in enumerate(self.categories)}
        entries = self._entries(example)
        for number, (found, entry) in enumerate(zip(objects, entries, strict=True)):
            where = str(entry.get("where", f"{self.options.objects_column}[{number}]"))
            row["boxes"][number] = np.array(inside(found, width, height, where)) / (width, height, width, height)
            # Only a crowd may be of a category that is not known: its number is that of none that could be guessed.
            row["label"][number] = at.get(found.category, len(self.categories))
            row["crowd"][number] = found.crowd
        return row

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "categories": self.categories,
            "score_threshold": self.score_threshold,
            "max_detections": self.max_detections,
        }

    def _take(self, settings: Mapping[str, Any]) -> None:
        super()._take(settings)
        self.categories = settings["categories"]
        self.score_threshold = chosen(self.options.score_threshold, settings["score_threshold"])
        self.max_detections = chosen(self.options.max_detections, settings.get("max_detections", MAX_DETECTIONS))
