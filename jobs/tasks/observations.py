"""What a policy learns of observations, vectors or images: their shape, their scale, how they become rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.policy_log import LogFindings

DARK = 32
"""Images of whole numbers, none of them above this, are no pixels but codes, or black and white: all would be black."""
FAR = 10.0
"""An image of numbers that lie within ±1 in training is in another unit beyond this, such as 0 to 255 for 0 to 1."""


@dataclass(frozen=True)
class Observations:
    """The form of all observations of a log."""

    shape: tuple[int, ...] = ()
    """(D,), (H, W) or (H, W, C)."""
    pixels: bool = False
    """Whether they are images of whole numbers from 0 to 255."""
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    """Of each number of a vector; of images, one for all."""

    @classmethod
    def learned(cls, findings: LogFindings) -> Observations:
        """Learn from a log: vectors get mean 0 and deviation 1, images the range from -1 to 1."""
        shape, low, high = findings.shape, findings.range.low, findings.range.high
        if len(shape) > 1:
            pixels = findings.range.whole and low >= 0 and DARK < high <= 255
            low, high = (0.0, 255.0) if pixels else (low, high)
            return cls(shape, pixels, ((low + high) / 2,), (2 / (high - low) if high > low else 0.0,))
        values = findings.sample[f"observation {shape[0]}"]
        spread = np.where(values.max(0) > values.min(0), values.std(0), 0)
        scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
        return cls(shape, False, tuple(values.mean(0).tolist()), tuple(scale.tolist()))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Observations:
        """Return what `as_json` made JSON of."""
        return cls(tuple(given["shape"]), given["pixels"], tuple(given["centre"]), tuple(given["scale"]))

    def as_json(self) -> dict[str, Any]:
        """Return what `of` reads back."""
        return asdict(self)

    def said(self, names: Sequence[str]) -> list[str]:
        """Return sentences for the log; `names` are those of the numbers of a vector."""
        if self.is_image:
            range_ = "of whole numbers to 255" if self.pixels else "of numbers, scaled to ±1"
            said = [f"observations are images {self.image} (height, width, channels) {range_}"]
            if self.image[0] <= 4 < self.image[2]:
                said.append(f"they are {self.image[0]} high: if that is their channels, these are to come last")
            return said
        same = [name for name, scale in zip(names, self.scale, strict=True) if not scale]
        said = [f"observations are {self.shape[0]} numbers"]
        return said + ([f"the same in all steps, and not read: {', '.join(same)}"] if same else [])

    @property
    def is_image(self) -> bool:
        """Whether they are images."""
        return len(self.shape) > 1

    @property
    def image(self) -> list[int]:
        """Height, width and channels of an image."""
        return [*self.shape, 1][:3]

    @property
    def size(self) -> int:
        """How many numbers one holds."""
        return int(np.prod(self.shape))

    def checked(self, state: np.ndarray) -> np.ndarray:
        """Return an observation, float64, if it is like those that were learned from.

        Raises:
            TaskError: it has another shape, or is no image of the same range.
        """
        if state.shape != self.shape:
            raise TaskError(f"an observation of shape {list(state.shape)}; most in training have {list(self.shape)}")
        if self.pixels and not ((state >= 0) & (state <= 255) & (state % 1 == 0)).all():
            raise TaskError("an image with values that are no whole numbers from 0 to 255, as all in training are")
        if self.is_image and not self.pixels:
            self._check_range(state)
        return state

    def _check_range(self, state: np.ndarray) -> None:
        """Raise TaskError for an image (H, W) or (H, W, C) in another unit: far outside of ±1 once it is scaled."""
        far = np.abs((state - self.centre[0]) * self.scale[0])
        if far.max() > FAR and self.scale[0]:
            half = 1 / self.scale[0]
            raise TaskError(
                f"an image that holds {state.flat[far.argmax()]:g}, and those in training lie between "
                f"{self.centre[0] - half:g} and {self.centre[0] + half:g}: give it in their unit"
            )

    def rows(self, states: np.ndarray) -> np.ndarray:
        """Return observations (N, …) as rows hold them, (N, D): uint8 where they are pixels, else float32, scaled."""
        flat = states.reshape(len(states), -1)
        if self.pixels:
            return flat.astype(np.uint8)
        return ((flat - np.array(self.centre)) * np.array(self.scale)).astype(np.float32)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Return what a network reads of rows (B, D): float32."""
        if not self.pixels:
            return rows.astype(np.float32)
        return (rows.astype(np.float32) - self.centre[0]) * self.scale[0]
