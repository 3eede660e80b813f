"""Image files of every mode to pixels: ranges kept, nothing opened that a client names, bombs not unpacked."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.data.examples import Example
from jobs.tasks import TaskError, get
from jobs.tasks.image_classification import ImageClassification
from jobs.tasks.image_files import MAX_PIXELS, decode
from jobs.tasks.images import PixelSums, deepened, read_image, read_picture, resize, sent_picture
from tests.support.sinks import touched

DEEP = np.array([[0, 9000], [47000, 65535]], dtype=np.uint16)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def values(content: bytes) -> Any:
    return decode(content).pixels.tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_keeps_its_range(kind: str) -> None:
    pixels = decode(file(Image.fromarray(DEEP), kind)).pixels
    assert pixels.dtype == np.uint16
    assert pixels[:, :, 0].tolist() == DEEP.tolist()


def test_a_big_endian_tiff_of_16_bits_reads_the_same() -> None:
    entries = [(256, 4, 2), (257, 4, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 4, 2), (279, 4, 8)]  # fmt: skip
    tags = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in entries
    )
    head = b"MM\0*" + struct.pack(">I", 16) + DEEP.astype(">u2").tobytes()
    pixels = decode(head + struct.pack(">H", len(entries)) + tags + b"\0\0\0\0").pixels
    assert pixels[:, :, 0].tolist() == DEEP.tolist()


def test_a_classifier_of_16_bit_images_tells_brightness_apart() -> None:
    def image(low: int) -> bytes:
        return file(Image.fromarray(np.random.default_rng(low).integers(low, low + 3000, (8, 8), dtype=np.uint16)))

    task = get("image-classification")()
    examples = [{"image": image(low), "label": low} for low in (9000, 45000)]
    task.fit(task.observe(examples))
    assert 0.3 < task.mean[0] < 0.5
    assert task.inputs()[0]["datatype"] == "UINT16"
    rows = task.encode(examples)
    assert rows["pixels"].dtype == np.uint16
    dim, bright = task.collate(rows)["pixel_values"].mean((1, 2, 3)).tolist()
    assert dim == pytest.approx(-bright, abs=0.1)
    assert bright > 0.9


def test_one_deep_image_makes_all_deep_whatever_the_chunks(tmp_path: Path) -> None:
    examples = [
        {"image": file(Image.new("L", (2, 2), 9)), "label": 0},
        {"image": file(Image.fromarray(DEEP)), "label": 1},
    ]
    whole, parts = get("image-classification")(), get("image-classification")()
    whole.fit(whole.observe(examples))
    parts.fit(parts.observe(examples[:1]).merged(parts.observe(examples[1:])))
    assert (whole.bits, whole.mean, whole.std) == (parts.bits, parts.mean, parts.std)
    assert whole.encode(examples)["pixels"][0].max() == 9 * 257
    whole.save(tmp_path)
    assert get("image-classification").load(tmp_path).bits == 16


def test_deep_images_for_a_model_of_8_bits_are_rounded_and_counted() -> None:
    task = get("image-classification")()
    task.fit(task.observe([{"image": file(Image.new("L", (2, 2), level)), "label": level} for level in (1, 2)]))
    rows = task.encode([{"image": file(Image.fromarray(DEEP)), "label": 1}])
    assert rows["pixels"].ravel().tolist() == [0, 35, 183, 255]
    assert rows["narrowed"].tolist() == [1]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), [[[255]]]),
        (Image.new("L", (1, 1), 7), [[[7]]]),
        (Image.new("LA", (1, 1), (7, 255)), [[[7]]]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), [[[1, 2, 3]]]),
        (Image.new("RGB", (1, 1), (1, 2, 3)).quantize(2), [[[1, 2, 3]]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 255)), [[[1, 2, 3]]]),
    ],
)
def test_modes(image: Image.Image, expected: Any) -> None:
    found = decode(file(image))
    assert found.pixels.tolist() == expected
    assert not found.on_white


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("LA", (1, 1), (0, 0)), [[[255]]]),
        (Image.new("LA", (1, 1), (0, 128)), [[[127]]]),
        (Image.new("RGBA", (1, 1), (200, 0, 0, 0)), [[[255, 255, 255]]]),
    ],
)
def test_transparent_pixels_lie_on_white(image: Image.Image, expected: Any) -> None:
    found = decode(file(image))
    assert found.pixels.tolist() == expected
    assert found.on_white


def test_transparent_colours_of_palettes_and_greys() -> None:
    assert values(file(Image.new("P", (1, 1), 0), transparency=0)) == [[[255, 255, 255]]]
    assert values(file(Image.new("L", (1, 1), 9), transparency=9)) == [[[255]]]
    clear = decode(file(Image.fromarray(DEEP), transparency=9000))
    assert clear.pixels[0, 1, 0] == 65535
    assert clear.on_white


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).pixels
    assert pixels.shape == (8, 8, 3)
    assert pixels[0, 0, 0] > 240 > 15 > pixels[0, 0, 1]


def test_exif_orientation_is_honoured() -> None:
    image = Image.fromarray(np.array([[10, 200]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    assert values(file(image, exif=exif)) == [[[10]], [[200]]]
    task = get("image-classification")()
    examples = [{"image": file(image, exif=exif), "label": 0}, {"image": file(image), "label": 1}]
    task.fit(task.observe(examples))
    assert task.encode(examples)["turned"].tolist() == [1, 0]
    assert "upright" in task.counted["turned"]


def test_copies_under_other_names_are_copies() -> None:
    content = file(Image.new("L", (2, 2), 3))
    task = get("image-classification")()
    first, second = (task.content({"image": {"bytes": content, "path": name}}) for name in ("a.png", "b.png"))
    assert first == second == content


def test_the_first_frame_is_used_and_said() -> None:
    frames = [Image.new("L", (2, 2), level) for level in (10, 200)]
    found = decode(file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert found.pixels.max() == 10
    assert found.first_of_several
    task = get("image-classification")()
    examples = [{"image": file(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "label": n} for n in (0, 1)]
    task.fit(task.observe(examples))
    assert task.encode(examples)["several"].tolist() == [1, 1]
    assert task.counted["several"]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(TaskError, match="no known range"):
        decode(file(Image.new(mode, (2, 2), 1), "TIFF"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"AAAA",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        file(Image.new("L", (64, 64), 3))[:-20],
        file(Image.new("RGB", (64, 64), 3), "JPEG")[:300],
        file(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))[:2000] + b"\0" * 3000,
        b"GIF89a" + b"\xff" * 40,
        b"II*\0" + b"\xff" * 40,
    ],
)
def test_what_is_no_whole_image_is_refused_without_an_address(content: bytes) -> None:
    with pytest.raises(TaskError) as caught:
        decode(content)
    assert "0x" not in str(caught.value).replace("\\x", "")
    assert "object at" not in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 10_000, 60_000])
def test_bombs_are_not_unpacked(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(TaskError, match="pixels"):
        decode(bomb(side, side))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((2, 2), 0.5), "no known range"),
        (np.full((2, 2), 12.0, dtype=np.float32), "no known range"),
        (np.full((2, 2), np.nan), "no known range"),
        (np.ones((2, 2), dtype=bool), "no known range"),
        (np.full((2, 2), -5), "holds -5"),
        (np.full((2, 2), 256), "holds 256"),
        (np.zeros((2, 2, 2, 2), dtype=np.uint8), "shape"),
        (np.zeros((0, 2), dtype=np.uint8), "shape"),
        (np.array([["a"]], dtype=object), "shape"),
    ],
)
def test_arrays_that_do_not_say_what_is_white(array: np.ndarray, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        sent_picture(array)


def test_arrays_of_whole_numbers() -> None:
    assert sent_picture(np.array([[0, 255]])).pixels.dtype == np.uint8
    assert read_image([[0, 255]]).shape == (1, 2, 1)
    assert sent_picture(DEEP).pixels.dtype == np.uint16


def test_8_bits_are_exact_in_16() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert (deepened(deepened(grey, 16), 8) == grey).all()
    assert PixelSums.of(grey) == PixelSums.of(deepened(grey, 16))


def test_deep_images_are_resized_and_recoloured_as_shallow_ones() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for channels in (1, 3):
        deep = resize(deepened(colour, 16), (4, 4), channels)
        assert deep.dtype == np.uint16
        assert np.abs(deepened(deep, 8).astype(int) - resize(colour, (4, 4), channels)).max() <= 1


def test_training_names_the_file_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    with pytest.raises(TaskError, match=r"broken\.png: No such file"):
        read_picture(path)
    path.write_bytes(b"AAAA")
    with pytest.raises(TaskError, match=r"broken\.png: this is no image"):
        read_picture({"bytes": None, "path": str(path)})
    path.write_bytes(file(Image.new("L", (1, 1), 7)))
    assert read_image(str(path)).tolist() == [[[7]]]
    with pytest.raises(TaskError, match=r"not None$"):
        read_picture({"bytes": None, "path": None})
    with pytest.raises(TaskError, match="no known range"):
        read_picture(Image.new("F", (1, 1)))
    assert read_image(Image.new("RGB", (1, 1), (1, 2, 3)).quantize(2)).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    "form", [str, os.fsencode, Path, "file://{}".format, "http://127.0.0.1/{}".format, lambda p: {"path": p}]
)
def test_no_path_is_opened_that_a_client_sends(form: Any, tmp_path: Path) -> None:
    task = get("image-classification")()
    pixels = np.zeros((8, 8), dtype=np.uint8)
    task.fit(task.observe([{"image": pixels, "label": n} for n in (0, 1)]))
    model = task.build("cnn", {"width": 8, "hidden_size": 8}).eval()
    task.predict(model, [pixels])  # what is imported late is imported now
    with pytest.raises(TaskError):
        task.predict(model, [b"AAAA"])
    sink = tmp_path / "sink.png"
    os.mkfifo(sink)  # opening it would block
    with touched("sink") as opened, pytest.raises(TaskError):
        task.predict(model, [form(str(sink))])
    assert opened == []
    (tmp_path / "other.png").write_bytes(b"AAAA")
    with touched("other") as opened, pytest.raises(TaskError):
        read_picture(tmp_path / "other.png")
    assert opened  # training does open what its own rows name, and the watch sees it


def png(mode: int, channels: int, shade: int) -> bytes:
    """Return a PNG of 2 x 2 pixels with 16 bits in each channel; Pillow writes none in colour."""
    row = b"\0" + struct.pack(">H", shade) * 2 * channels
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, mode, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * 2)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "content",
    [
        png(2, 3, 300),
        png(4, 2, 300),
        png(6, 4, 300),
        b"P6 2 2 65535\n" + b"\1\2" * 12,
        b"P3 1 1 65535\n1 2 3\n",
    ],
    ids=["PNG in colour", "PNG in grey and alpha", "PNG in colour and alpha", "PPM", "plain PPM"],
)
def test_colour_of_16_bits_is_refused_rather_than_halved(content: bytes) -> None:
    with pytest.raises(TaskError, match="with 16 bits per channel is not read, since 8 of them would be lost: save it"):
        decode(content)


def test_colour_of_8_bits_and_less_is_read() -> None:
    assert values(b"P6 1 1 255\n\1\2\3") == [[[1, 2, 3]]]
    assert values(b"P6 1 1 100\n\0\x32\x64") == [[[0, 128, 255]]]
    assert decode(png(0, 1, 300)).pixels.dtype == np.uint16


def test_what_is_done_to_images_is_counted() -> None:
    images = [
        Image.new("L", (8, 8)),
        Image.new("L", (4, 4)),
        Image.new("RGB", (8, 4), "red"),
        Image.new("L", (8, 8), 9),
    ]
    examples = [{"image": file(image), "label": n % 2} for n, image in enumerate(images)]
    task = get("image-classification")()
    assert task.fit(task.observe(examples)) == [
        "2 labels: 0, 1",
        "images become 8 x 8 pixels, grey: as the first one is",
    ]
    counted = {name: int(task.encode(examples)[name].sum()) for name in ("resized", "stretched", "greyed", "narrowed")}
    assert counted == {"resized": 2, "stretched": 1, "greyed": 1, "narrowed": 0}


def tiff(bits: int, photometric: int, content: bytes) -> bytes:
    """Return a TIFF of 2 x 2 pixels, one sample each."""
    short = {256: 2, 257: 2, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 2}
    long = {273: 8, 279: len(content)}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short.items()]
    entries += [struct.pack("<HHII", tag, 4, 1, value) for tag, value in long.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda e: struct.unpack("<H", e[:2])))
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory + bytes(4)


def test_white_is_what_a_tiff_says_it_is() -> None:
    deep = np.array([0, 1, 1000, 65535], "<u2").tobytes()
    assert decode(tiff(16, 1, deep)).pixels.ravel().tolist() == [0, 1, 1000, 65535]
    assert decode(tiff(16, 0, deep)).pixels.ravel().tolist() == [65535, 65534, 64535, 0]
    assert decode(tiff(8, 0, bytes([0, 1, 100, 255]))).pixels.ravel().tolist() == [255, 254, 155, 0]
    with pytest.raises(TaskError, match="a TIFF with 12 bits per pixel is not read"):
        decode(tiff(12, 1, bytes(6)))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(TaskError, match=f"{path}: is no regular file"):
            read_image(path)


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("cnn", {"width": 4}, "must be divisible by num_groups"),
        ("vit", {"hidden_size": 7}, "vit cannot be built"),
        ("llama", {}, "'llama' is no image-classifying architecture"),
        ("cnn", {"widht": 4}, "did you mean 'width'"),
    ],
)
def test_what_makes_no_classifier_is_refused_before_there_are_images(
    architecture: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        ImageClassification(ImageClassification.Options()).check_model(architecture, config)


def test_classifiers_that_can_be_built_are_taken() -> None:
    for architecture in ("cnn", "resnet"):
        ImageClassification(ImageClassification.Options()).check_model(architecture, {})


def test_names_of_files_start_at_the_folder_of_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(file(Image.new("L", (1, 1), 200)))
    (tmp_path / "set" / "in" / "a.png").write_bytes(file(Image.new("L", (1, 1), 7)))
    (tmp_path / "set" / "b.jsonl").write_text("")
    task = get("image-classification")()
    monkeypatch.chdir(tmp_path)
    example = Example({"image": "in/a.png", "label": 1}, f"{tmp_path}/set/b.jsonl:1")
    assert task.instance(example).tolist() == [[[7]]]  # and not what the process that reads happens to stand beside
    assert task.files(example) == [tmp_path / "set" / "in" / "a.png"]
    assert task.instance({"image": str(tmp_path / "in" / "a.png")}).tolist() == [[[200]]]
