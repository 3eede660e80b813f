"""What the tasks share whose examples are an image and a label: what is read, what is unused, what a chunk says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.tasks.image_task import ImageTask, PixelFindings
from jobs.tasks.images import read_picture
from jobs.tasks.labels import kind_of, label_of


@dataclass(frozen=True)
class ImageFindings:
    """What images and labels say, out of one chunk or many."""

    pixels: PixelFindings
    labels: frozenset[str]
    kinds: frozenset[str] = frozenset()
    """What the labels are, in words: text, numbers."""

    def merged(self, later: ImageFindings) -> ImageFindings:
        """Return the findings of both chunks."""
        return ImageFindings(self.pixels.merged(later.pixels), self.labels | later.labels, self.kinds | later.kinds)


class LabelledImages(ImageTask):
    """A task of images with labels, which its option `label_column` names."""

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without an image or a label."""
        self._image(example)
        self._label(example)

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return the label."""
        return self._label(example)

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither the image nor the label."""
        read = {self.options.image_column, self.options.label_column}
        return [key for key, value in example.items() if key not in read and value is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> ImageFindings:
        """Note the labels, the first image's size, and exact sums of all pixels, at the size in which they are seen."""
        pixels = PixelFindings.of([read_picture(self._image(each)).pixels for each in examples], self.options)
        kinds = frozenset(kind_of(example[self.options.label_column]) for example in examples)
        return ImageFindings(pixels, frozenset(map(self._label, examples)), kinds)

    def _label(self, example: Mapping[str, Any]) -> str:
        return label_of(example, self.options.label_column)
