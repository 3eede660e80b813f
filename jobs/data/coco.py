"""COCO's JSON of images and annotations: one example an image, with the objects that are annotated in it.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}, …],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "iscrowd": 0}, …],
     "categories": [{"id": 3, "name": "cat"}, …]}

An annotation that cannot be used makes a bad row of its image: without it, the image would teach that nothing is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data.examples import BadRow, Example, Rows, unread

SECTIONS = ("images", "annotations", "categories")
_NAMES = {"category_id", "image_id", "id"}


def is_coco(value: Mapping[str, Any]) -> bool:
    """Tell whether an object is a data set in COCO's form, whole or not."""
    return all(isinstance(value.get(section), list) for section in ("images", "annotations"))


def examples(path: Path, value: Mapping[str, Any]) -> Rows:
    """Yield for each image `image`, its path, and `objects`: its annotations, with the category's name.

    Images lie where `file_name` says, seen from the JSON's folder, from `images` in it, or from the folder above.
    """
    try:
        categories = _categories(path, value)
        of_image = _by_image(path, value["annotations"])
    except UserError as error:
        yield unread(str(path), str(error))
        return
    seen: Counter[Any] = Counter()
    for number, image in enumerate(value["images"]):
        where = f"{path}[images][{number}]"
        identity = image.get("id") if isinstance(image, dict) else None
        if not _is_id(identity) or not isinstance(image.get("file_name"), str):
            yield BadRow(where, "an image has an id, a number or a text, and a file_name")
            continue
        seen[identity] += 1
        if seen[identity] > 1:
            yield BadRow(where, f"another image has the id {identity!r} too")
            continue
        yield _image(path, where, image, of_image.pop(identity, []), categories)
    for identity, orphans in of_image.items():
        if not seen[identity]:
            yield BadRow(orphans[0][0], f"image_id is {identity!r}, and no image has that id")


def _image(
    path: Path, where: str, image: dict[str, Any], annotations: list[tuple[str, dict[str, Any]]], names: dict[Any, str]
) -> Example | BadRow:
    found = _file(path.parent, image["file_name"])
    if found is None:
        places = f"{path.parent}, {path.parent / 'images'} and {path.parent.parent}"
        return BadRow(where, f"there is no file {image['file_name']!r} in {places}")
    objects = []
    for at, annotation in annotations:
        category = annotation.get("category_id")
        if not _is_id(category) or category not in names:
            return BadRow(at, f"category_id is {category!r}; the categories have the ids {list(names)[:10]}")
        kept = {key: value for key, value in annotation.items() if key not in _NAMES}
        objects.append({**kept, "category": names[category], "where": at.removeprefix(str(path))})
    fields: dict[str, Any] = {"image": str(found), "objects": objects}
    return Example({**fields, **{key: image[key] for key in ("width", "height") if key in image}}, where)


def _file(folder: Path, name: str) -> Path | None:
    places = (folder / name, folder / "images" / name, folder.parent / name)
    return next((place.resolve() for place in places if place.is_file()), None)


def _categories(path: Path, value: Mapping[str, Any]) -> dict[Any, str]:
    """Return the categories' names by their ids.

    Raises:
        UserError: there are none, or two of one id or of one name.
    """
    entries = value.get("categories")
    if not isinstance(entries, list) or not entries:
        raise UserError("a COCO file has a list `categories`, each with an id and a name")
    names: dict[Any, str] = {}
    for number, entry in enumerate(entries):
        at = f"[categories][{number}]"
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise UserError(f"{at}: a category has an id and a name")
        if entry["id"] in names or entry["name"] in names.values():
            raise UserError(f"{at}: another category has the id {entry['id']!r} or the name {entry['name']!r} too")
        names[entry["id"]] = entry["name"]
    return names


def _by_image(path: Path, annotations: list[Any]) -> dict[Any, list[tuple[str, dict[str, Any]]]]:
    """Return the annotations of each image, with where they stand."""
    of_image: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
    for number, annotation in enumerate(annotations):
        at = f"{path}[annotations][{number}]"
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            raise UserError(f"[annotations][{number}]: an annotation is an object with an image_id")
        of_image.setdefault(annotation["image_id"], []).append((at, annotation))
    return of_image


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
