"""What the tasks that look at images share: reading, size and channels, normalisation, what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from cluster.strict import Text
from jobs.tasks import Task, TaskError, TaskOptions
from jobs.tasks.beside import table_of
from jobs.tasks.image_files import Picture
from jobs.tasks.images import COUNTED, LARGEST, PixelSums, bits_of, deepened, read_picture, resize
from jobs.tasks.labels import column_of

if TYPE_CHECKING:
    import torch

PREPROCESSING_FILE = "preprocessor_config.json"
Loaded = TypeVar("Loaded", bound="ImageTask")


class ImageOptions(TaskOptions):
    """How images become pixels."""

    image_column: Text = "image"
    """The column that holds the image: a folder of folders of images has it. The name of a file starts at the folder of
    the table that it stands in."""
    image_size: int | None = Field(None, gt=0, le=65_536)
    """Pixels per side; images of another size are resized. Left out: the size of the first image."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour. Left out: as the first image has."""


@dataclass(frozen=True)
class PixelFindings:
    """What the pixels of images say, out of one chunk or many."""

    size: tuple[int, int]
    channels: int
    """Size and channels of the first image."""
    sums: Mapping[int, PixelSums] = field(default_factory=dict)
    """By number of channels: until the first image of all is known, each is counted as grey and as colour."""
    bits: int = 8
    """8, or 16 where an image has them."""

    @classmethod
    def of(cls, images: Sequence[np.ndarray], options: ImageOptions) -> PixelFindings:
        """Sum pixels, each uint8 or uint16 (H, W, C), exactly, at the size in which they are seen."""
        side, wanted = options.image_size, options.channels
        sums: dict[int, PixelSums] = {channels: PixelSums() for channels in ((wanted,) if wanted else (1, 3))}
        for image in images:
            size = (side, side) if side else (image.shape[0], image.shape[1])
            sums = {channels: sums[channels] + PixelSums.of(resize(image, size, channels)) for channels in sums}
        first = images[0].shape
        return cls((first[0], first[1]), first[2], sums, max(map(bits_of, images)))

    def merged(self, later: PixelFindings) -> PixelFindings:
        """Return the findings of both chunks."""
        sums = {channels: self.sums[channels] + later.sums[channels] for channels in self.sums}
        return PixelFindings(self.size, self.channels, sums, max(self.bits, later.bits))


class ImageTask(Task):
    """A task whose examples hold an image each. Deriving classes say what is to be learned of it."""

    unit: ClassVar[str] = "images"
    Options: ClassVar[type[TaskOptions]] = ImageOptions
    learned_files: ClassVar[tuple[str, ...]] = (PREPROCESSING_FILE,)
    counted: ClassVar[Mapping[str, str]] = COUNTED

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.size: tuple[int, int] = (0, 0)
        self.channels = 0
        self.bits = 8
        self.mean: list[float] = []
        self.std: list[float] = []

    # -- data -------------------------------------------------------------------------------------------------------

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the image, whatever its label or its path."""
        there = [path for path in self.files(example) if path.is_file()]
        image = there[0].read_bytes() if there else self._image(example)
        return (isinstance(image, Mapping) and image.get("bytes")) or image

    def files(self, example: Mapping[str, Any]) -> Sequence[Path]:
        """Return the image's path, where the example names it instead of holding it."""
        image = self._image(example)
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        return [Path(image)] if isinstance(image, str | Path) else []

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the image as pixels."""
        return read_picture(self._image(example)).pixels

    def inherit(self, parent: Path | str) -> bool:
        """Keep what the parent learned; options that ask for another size or other channels are refused."""
        super().inherit(parent)
        side, channels = self.options.image_size, self.options.channels
        if side and (side, side) != self.size:
            raise TaskError(f"task.image_size is {side}, but the model it starts from sees {self.size}: leave it out")
        if channels and channels != self.channels:
            raise TaskError(f"task.channels is {channels}, but the model it starts from has {self.channels}")
        return True

    def save(self, directory: Path) -> None:
        """Write preprocessor_config.json: size, channels, mean, deviation, and what the deriving class adds."""
        (directory / PREPROCESSING_FILE).write_text(json.dumps(self._settings(), indent=2), encoding="utf-8")

    @classmethod
    def load(cls: type[Loaded], directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Loaded:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            task._take(json.loads((Path(directory) / PREPROCESSING_FILE).read_text(encoding="utf-8")))
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise TaskError(
                f"{directory} holds no model of Tandem's {cls.name}: {PREPROCESSING_FILE}: {error}"
            ) from error
        return task

    # -- use --------------------------------------------------------------------------------------------------------

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the image tensor, in whose place files may be sent."""
        return [self._input("image")]

    # -- for deriving classes ---------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return what is kept beside the weights, as JSON."""
        return {
            "size": {"height": self.size[0], "width": self.size[1]},
            "num_channels": self.channels,
            "image_mean": self.mean,
            "image_std": self.std,
            "rescale_factor": 1 / LARGEST[self.bits],
        }

    def _take(self, settings: Mapping[str, Any]) -> None:
        """Take over what `_settings` returned. Raises KeyError for what is missing."""
        self.size = (settings["size"]["height"], settings["size"]["width"])
        self.channels = settings["num_channels"]
        self.mean, self.std = settings["image_mean"], settings["image_std"]
        self.bits = 16 if settings.get("rescale_factor") == 1 / LARGEST[16] else 8

    def _input(self, name: str) -> dict[str, Any]:
        tensor = {"name": name, "datatype": f"UINT{self.bits}", "shape": [-1, *self.size, self.channels]}
        return {**tensor, "parameters": {"content_types": ["np", "base64"]}}

    def _image(self, example: Mapping[str, Any]) -> Any:
        """Return what the column holds; the name of a file from the folder of the table that it stands in on."""
        value = column_of(example, self.options.image_column, "image_column")
        if not isinstance(value, str) or not value or Path(value).is_absolute():
            return value
        table = table_of(example)
        there = table is not None and (table.parent / value).is_file()
        return str(table.parent / value) if table is not None and there else value

    def _learn_pixels(self, found: PixelFindings) -> list[str]:
        """Learn the size and the mean and deviation of the pixels per channel; return what is to be said of them."""
        side = self.options.image_size
        self.size = (side, side) if side else found.size
        self.channels = self.options.channels or (1 if found.channels == 1 else 3)
        self.bits = found.bits
        self.mean, self.std = found.sums[self.channels].mean_and_deviation()
        said = [f"images become {self._form()}"]
        return [*said, *(["images of 16 bits: all pixels are kept as 16 bits, 0 to 65535"] * (self.bits == 16))]

    def _form(self) -> str:
        chosen = "as the first one is" if None in (self.options.image_size, self.options.channels) else "as asked for"
        return f"{self.size[0]} x {self.size[1]} pixels, {'grey' if self.channels == 1 else 'in colour'}: {chosen}"

    def _pixels(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Return uint8 or uint16 (B, H, W, C) of the fitted size."""
        resized = (resize(picture.pixels, self.size, self.channels) for picture in pictures)
        return np.stack([deepened(pixels, self.bits) for pixels in resized])

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn pixels (B, H, W, C) into fp32 (B, C, H, W) of mean 0 and deviation 1 over the training images."""
        import torch

        scaled = torch.from_numpy(pixels.astype(np.float32) / LARGEST[bits_of(pixels)])
        return ((scaled - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2).contiguous()


def on_device(pixels: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Bring pixels (B, C, H, W) to a model's device and, where its weights are floating-point, to their dtype."""
    import torch

    parameter = next(model.parameters())
    return pixels.to(parameter.device, parameter.dtype if parameter.dtype.is_floating_point else torch.float32)
