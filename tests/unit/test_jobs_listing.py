"""Which files are data: hidden ones, those about the data, links and unknown kinds are left out, and said."""

import gzip
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs import progress
from jobs.data import sources

LINE = '{"text": "a line of data"}\n'


def put(folder: Path, *names: str, content: str = LINE) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), shade, np.uint8)).save(path)


def found(where: str, base: Path) -> tuple[int, str]:
    """Return how many examples there are, and what is said."""
    source = sources.open_source(where, base)
    return len(list(source.examples())), "\n".join(source.notes)


@pytest.mark.parametrize("where", ["data", "data/", "data/*", "data/**", "data/**/*.jsonl", "."])
def test_what_is_no_data_is_not_read(tmp_path, where):
    folder = tmp_path / "data"
    put(
        folder, "a.jsonl", "sub/b.JSONL", ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/c.txt", "._a.jsonl", "a.jsonl~"
    )
    if not where.endswith("jsonl"):
        put(folder, "README.md", "LICENSE", "sub/dataset_card.md", content="about")
        put(folder, "weights.npy", "x.zip")
    (folder / "loop").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(folder)
    wanted = 1 if where.endswith("jsonl") else 2  # a pattern's letters are meant as they are
    assert found(where, tmp_path)[0] == wanted


def test_what_is_left_out_of_a_folder_is_said_with_the_reason(tmp_path):
    folder = tmp_path / "data"
    put(folder, "a.jsonl", ".hidden.jsonl", "README.md", "weights.npy", "readme_data.jsonl", "sub/License.txt")
    (folder / "gone.jsonl").symlink_to("nowhere")
    count, said = found("data", tmp_path)
    assert count == 2, "readme_data.jsonl is data"
    assert "1 entry left out (hidden, or not data by its name): .hidden.jsonl" in said
    assert "2 entries left out (about the data, not data): README.md, sub/License.txt" in said
    assert "(of an unknown kind): weights.npy" in said
    assert "(a link to nothing): gone.jsonl" in said


def test_what_is_named_itself_is_read_whatever_its_name(tmp_path):
    put(tmp_path, "README.md", ".hidden.jsonl")
    assert found("README.md", tmp_path)[0] == found("README*", tmp_path)[0] == found(".hidden.jsonl", tmp_path)[0] == 1
    with pytest.raises(UserError, match=r"\*\.md.*about the data, not data\): README\.md"):
        found("*.md", tmp_path)


@pytest.mark.parametrize("name", ["a [v2].jsonl", "Daten (1) ü.jsonl", "w*t?.jsonl", "[x].jsonl", "~.jsonl"])
def test_a_path_that_exists_is_no_glob(tmp_path, name):
    base = tmp_path / "a [folder] *"
    put(base, name)
    assert found(name, base)[0] == found("*.jsonl", base)[0] == found("**/*.jsonl", base)[0] == 1
    assert found(base.name, tmp_path)[0] == 1


def test_a_file_that_two_matches_lead_to_is_read_once(tmp_path):
    put(tmp_path, "data/a.jsonl", "data/sub/b.jsonl")
    (tmp_path / "data" / "newest.jsonl").symlink_to("a.jsonl")
    for where in ("data/*", "data", "data/**"):
        count, said = found(where, tmp_path)
        assert count == 2
        assert "(the same file once more, through a link): " in said
        assert "newest.jsonl" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.symlink_to("nowhere"), "is a link to nothing"),
        (os.mkfifo, "is no regular file: it is a pipe"),
        (lambda p: os.mkfifo(p.with_suffix("")) or p.symlink_to("x"), "is no regular file: it is a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "is no regular file: it is a device"),
        (lambda p: os.mknod(p, stat.S_IFSOCK | 0o600), "is no regular file: it is a socket"),
        (lambda p: p.with_name("x.jsonl.parquet.gz").write_bytes(b""), "nothing matches"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make, said):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d" / "x.jsonl")
    with pytest.raises(UserError, match=said):
        found("d/x.jsonl", tmp_path)
    if "regular" in said:
        put(tmp_path, "d/a.jsonl")
        for where in ("d", "d/*", "**/*.jsonl", "d/*.jsonl"):
            with pytest.raises(UserError, match=rf"d/x(\.jsonl)? {said}"):
                found(where, tmp_path)


def test_nothing_is_no_name_of_data(tmp_path):
    for nothing in ("", []):
        with pytest.raises(UserError, match="names no data"):
            sources.open_source(nothing, tmp_path)


def test_compressed_files_count_as_their_kind_and_unknown_ones_are_named(tmp_path):
    put(tmp_path, "d/part-0.jsonl")
    (tmp_path / "d" / "part-1.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    (tmp_path / "d" / "part-2.parquet.gz").write_bytes(b"x")
    (tmp_path / "d" / "all.tar.gz").write_bytes(b"x")
    count, said = found("d", tmp_path)
    assert count == 2
    assert "1 entry left out (of an unknown kind): part-2.parquet.gz" in said
    assert "1 entry left out (an archive beside other data, of which it may be a copy: name it): all.tar.gz" in said


def test_images_that_have_no_label_or_no_known_kind_are_named(tmp_path):
    folder = tmp_path / "set"
    for name in ("cat/1.png", "cat/2.PNG", "dog/1.png", "top.png", "cat/deep/x.png", ".cache/q.png"):
        image(folder / name)
    put(folder, "cat/y.heic", "labels.csv", ".DS_Store")
    count, said = found("set", tmp_path)
    assert count == 3
    assert "an image without the folder of its label): top.png" in said
    assert "an image deeper than the folder of its label): cat/deep/x.png" in said
    assert "of no kind of image that is read" in said
    assert "cat/y.heic, labels.csv" in said


def test_a_folder_of_texts_with_a_few_images_is_texts(tmp_path):
    put(tmp_path, *(f"docs/{n}.md" for n in range(3)))
    image(tmp_path / "docs" / "img" / "a.png")
    count, said = found("docs", tmp_path)
    assert count == 3
    assert "img/a.png" in said


def test_images_without_labels_are_refused_with_the_layout(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png"):
        image(tmp_path / "set" / name)
    with pytest.raises(UserError, match="a folder for each label"):
        found("set", tmp_path)
    assert found("set/train", tmp_path)[0] == 2


def test_a_folder_with_a_test_set_in_it_says_that_it_is_read(tmp_path):
    put(tmp_path, "d/train.jsonl", "d/test.jsonl", "d/more.jsonl")
    assert "test.jsonl, train.jsonl are all read" in found("d", tmp_path)[1]
    (tmp_path / "d" / "test.jsonl").unlink()
    assert "are all read" not in found("d", tmp_path)[1]


def test_a_name_that_is_no_utf8_can_be_said(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for name in (b"bad\xff.jsonl", b"what\xfe.npy"):
        with open(os.path.join(os.fsencode(tmp_path / "d"), name), "wb") as file:
            file.write(b"[]\n")
    source = sources.open_source("d", tmp_path)
    progress.say(source.notes[0])
    with pytest.raises(UserError, match=r"a list of objects is a \.json") as caught:
        list(source.examples())
    progress.say(str(caught.value))
    assert "what\\udcfe.npy" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".pgm", ".ppm", ".jfif"])
def test_suffixes_of_the_formats_that_are_read_are_images(tmp_path, suffix):
    for label in "ab":
        image(tmp_path / "i" / label / "1.png")
        kind = {".jfif": "JPEG", ".pgm": "PPM", ".ppm": "PPM"}.get(suffix, "TIFF")
        Image.new("L" if suffix == ".pgm" else "RGB", (4, 4)).save(tmp_path / "i" / label / f"2{suffix}", kind)
    assert found("i", tmp_path) == (4, "")


def test_folders_without_an_image_make_no_label_and_are_named(tmp_path):
    image(tmp_path / "i" / "a" / "1.png")
    image(tmp_path / "i" / "b" / "1.png")
    put(tmp_path / "i", "c/notes.txt")
    (tmp_path / "i" / "d").mkdir()
    assert "i: 2 entries left out (a folder without an image, which makes no label): c, d" in found("i", tmp_path)[1]
