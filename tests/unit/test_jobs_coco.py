"""COCO's JSON as raw examples: whole, and each thing that can be wrong with it, by file and entry."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.data import corpora_shapes, sources
from jobs.data.examples import BadRow
from jobs.tasks import TaskError, get

COCO: dict[str, Any] = {
    "info": {"year": 2024},
    "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0.5, 0, 19.5, 10], "area": 195},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
}


def read(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda coco: None, indent: int | None = None) -> list:
    """Write COCO with a change, its images in a folder beside it, and read it."""
    coco = copy.deepcopy(COCO)
    change(coco)
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(folder / "images" / name)
    (folder / "data.json").write_text(json.dumps(coco, indent=indent))
    return list(sources.open_source("data.json", folder).read())


@pytest.mark.parametrize("indent", [None, 1])
def test_an_image_is_an_example_with_its_objects(indent: int | None, tmp_path: Path) -> None:
    first, second = read(tmp_path, indent=indent)
    assert first["image"] == str((tmp_path / "images" / "a.png").resolve())
    assert [(each["bbox"], each["category"]) for each in first["objects"]] == [
        ([1, 2, 3, 4], "cat"),
        ([0.5, 0, 19.5, 10], "dog"),
    ]
    assert first.where == f"{tmp_path}/data.json[images][0]"
    assert second["objects"] == []
    task = get("object-detection")()
    task.check(first)
    assert task.unused(first) == ["objects.segmentation"]
    assert [str(path) for path in task.files(first)] == [first["image"]]


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(coco: Any) -> None:
        for key in path[:-1]:
            coco = coco[key]
        coco[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        (set_to("annotations", 1, "category_id", value=9), "[annotations][1]", "category_id is 9"),
        (set_to("annotations", 1, "image_id", value=9), "[annotations][1]", "no image has that id"),
        (set_to("annotations", 1, "image_id", value=None), "", "an object with an image_id"),
        (set_to("images", 1, "id", value=7), "[images][1]", "another image has the id 7"),
        (set_to("images", 1, "id", value=None), "[images][1]", "an id"),
        (set_to("images", 0, "file_name", value="c.png"), "[images][0]", "there is no file 'c.png'"),
        (set_to("categories", 1, "id", value=2), "", "[categories][1]: another category has the id 2"),
        (set_to("categories", 1, "name", value="cat"), "", "the name 'cat' too"),
        (set_to("categories", value=[]), "", "a list `categories`"),
    ],
)
def test_what_cannot_be_read_is_a_bad_row(change: Callable[..., None], where: str, said: str, tmp_path: Path) -> None:
    bad = [row for row in read(tmp_path, change) if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert bad[0].where == f"{tmp_path}/data.json{where}"
    assert said in bad[0].reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_to("annotations", 0, "bbox", value=[1, 2, 0, 4]), "[annotations][0]: the box [1, 2, 0, 4] has no area"),
        (set_to("annotations", 0, "bbox", value=[1, 2, 3]), "not four numbers"),
        (set_to("annotations", 0, "bbox", value=[1, 2, 3, float("nan")]), "not four numbers"),
        (set_to("annotations", 0, "bbox", value=[1, 2, 30, 4]), "lies outside the image of 20 x 10"),
        (set_to("annotations", 0, "bbox", value=[-9, 2, 3, 4]), "lies outside"),
        (set_to("annotations", 0, "iscrowd", value="no"), "neither 0 nor 1"),
        (set_to("images", 0, "width", value=10), "10 x 10, and it is 20 x 10"),
    ],
)
def test_boxes_that_cannot_be_are_named(change: Callable[..., None], said: str, tmp_path: Path) -> None:
    task = get("object-detection")()
    whole = read(tmp_path)
    task.fit(task.observe(whole))
    refused = []
    for example in read(tmp_path, change):
        try:
            task.check(example)
            task.encode([example])
        except TaskError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert said in refused[0]


def test_a_box_that_rounding_moved_out_is_clipped(tmp_path: Path) -> None:
    task = get("object-detection")()
    examples = read(tmp_path, set_to("annotations", 1, "bbox", value=[-0.5, 0, 20.9, 10.2]))
    task.fit(task.observe(examples))
    assert task.encode(examples[:1])["boxes"][0, 1].tolist() == [0, 0, 1, 1]


def test_the_generated_shapes_are_the_same_as_files_and_as_a_corpus(tmp_path: Path) -> None:
    corpora_shapes.main([str(tmp_path / "shapes"), "--count", "5"])
    written = list(sources.open_source("shapes/annotations.json", tmp_path).read())
    task = get("object-detection")()
    assert len(written) == 5
    for example, built_in in zip(written, sources.open_source("generated-shapes", tmp_path).read(), strict=False):
        task.check(example)
        assert task.answer(example) == task.answer(built_in)
        assert np.array_equal(np.asarray(Image.open(example["image"])), built_in["image"])
